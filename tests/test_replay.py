"""Pictures made again from their files: the same pixels, or a refusal that names what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import miniflux
from miniflux import lora
from miniflux.apps.cli import main
from miniflux.errors import InputError, LoraError, ReplayError, SettingsError
from miniflux.pipeline import Pipeline
from miniflux.replay import Replay, replay
from miniflux.result import save_picture
from miniflux.sampling import SOLVERS, cache, guide
from miniflux.sampling.schedules import SPACINGS
from miniflux.service import Axis, Grid
from miniflux.settings import LoraUse, Request, read_picture
from miniflux.weights.finding import BUNDLED

REALISM = BUNDLED / "loras" / "realism.safetensors"
Pipes = dict[tuple[str, str | None], Pipeline]


@pytest.fixture(scope="module")
def pipes() -> Pipes:
    """Pipelines by model and dtype, loaded once for all tests."""
    return {(name, None): miniflux.load(name) for name in ("nano-dev", "nano-schnell")}


def again(path: Path, pipes: Pipes, **options: Any) -> Replay:
    return replay(path, pipes=pipes, **options)


def drawn(pipes: Pipes, request: Request) -> miniflux.Result:
    pipe = pipes[request.model, request.dtype]
    for i, use in enumerate(request.loras):
        lora.attach(pipe, use.file, use.strength, f"LoRA {i}")
    try:
        return pipe.generate(**request.arguments())
    finally:
        for name in list(lora.attached(pipe)):
            lora.detach(pipe, name)


guides = st.sampled_from(
    [
        guide("cfg", scale=2.5),
        guide("cfg", scale=3.0, window=(0.0, 0.5), rescale=0.7),
        guide("cfg", scale=lambda sigma: 1 + sigma),
        guide("cfg-zero", scale=2.0),
        guide("apg", scale=3.0, eta=0.5, momentum=-0.5, threshold=5.0),
        guide("perp-neg", scale=2.0, negative_scale=0.5),
        guide("skip-layer", scale=1.5, skip_window=(0.0, 1.0)),
        guide("nag", scale=4.0, alpha=0.5),
    ]
)
words = st.text(max_size=40).filter(lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Small pictures of any settings."""
    model = draw(st.sampled_from(["nano-dev", "nano-schnell"]))
    chosen = draw(st.none() | guides)
    on_levels = [name for name, method in SOLVERS.items() if method.calls == 1 or name == "heun"]
    function = chosen is not None and callable(chosen.scale)
    own = draw(st.sampled_from([None, None, (1.0, 0.7, 0.2, 0.0), (0.9, 0.4, 0.0)]))
    scale = st.floats(-2, 2) | st.just((("double_blocks", 0.5), ("double_blocks.1", 1.5)))
    # Skip-layer guidance needs a step inside its window, restarts two levels to go between.
    steps = draw(st.integers(2, 4))
    return Request(
        prompt=draw(words),
        negative=draw(words) if chosen is not None and draw(st.booleans()) else None,
        model=model,
        loras=tuple(LoraUse(str(REALISM), draw(scale)) for _ in range(draw(st.integers(0, 2))))
        if model == "nano-dev"
        else (),
        seed=draw(st.integers(0, 2**64 - 1)),
        steps=steps if own is None else None,
        width=draw(st.sampled_from([16, 32, 48])),
        height=draw(st.sampled_from([16, 32])),
        guidance=draw(st.none() | st.floats(0, 9)) if model == "nano-dev" else None,
        guide=chosen,
        solver=draw(st.sampled_from(on_levels if function else [*SOLVERS, "ddim:0.5", "euler-ancestral:0.25"])),
        schedule=draw(st.sampled_from(sorted(SPACINGS))) if own is None else own,
        shift=draw(st.none() | st.floats(0.5, 5)) if own is None else None,
        variation=draw(st.none() | st.tuples(st.integers(0, 2**64 - 1), st.floats(0, 1))),
        cache=draw(
            st.sampled_from(
                [None, None, None, cache("taylor", warmup=1, interval=2), cache("first-block", threshold=0.5)]
            )
        ),
        t5_length=draw(st.sampled_from([None, 16])),
        padding=draw(st.sampled_from(["released", "masked", "trimmed"])) if chosen is None else "released",
        stop=draw(st.sampled_from([None, None, 1])),
    )


def check_random_pictures(pipes: Pipes, folder: Path, request: Request) -> None:
    try:
        result = drawn(pipes, request)
    except InputError:  # settings that go together badly are refused before anything is drawn
        return
    path = result.save(folder / "x.png")
    made = again(path, pipes)
    assert made.same and made.psnr == float("inf") and made.largest == 0 and not made.differences
    assert made.image.tobytes() == result.images[0].tobytes()
    assert read_picture(path).requests == read_picture(made.result.save(folder / "y.png")).requests


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests())
def test_random_settings_give_the_same_pixels(pipes: Pipes, tmp_path: Path, request: Request) -> None:
    """Any model, guide, solver, schedule, LoRAs ...: through a PNG and back, bitwise."""
    check_random_pictures(pipes, tmp_path, request)


@pytest.mark.slow
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests())
def test_many_random_settings_give_the_same_pixels(pipes: Pipes, tmp_path: Path, request: Request) -> None:
    check_random_pictures(pipes, tmp_path, request)


@pytest.mark.parametrize("name", ["x.jpg", "x.webp"])
def test_lossy_files_are_compared_with_what_the_encoder_makes(pipes: Pipes, tmp_path: Path, name: str) -> None:
    path = drawn(pipes, Request(prompt="a star", width=64, height=32, steps=2)).save(tmp_path / name)
    assert again(path, pipes).same


def test_grids_and_labelled_sheets(pipes: Pipes, tmp_path: Path) -> None:
    """Several pictures of a call, and an X/Y grid with its labels, as whole sheets."""
    request = Request(prompt="a star", width=32, height=32, steps=2, loras=(LoraUse("realism", 1.0),))
    path = drawn(pipes, Request(prompt="a star", width=32, height=32, steps=2, images=3)).save(tmp_path / "a.png")
    made = again(path, pipes)
    assert made.same and made.image.size == (64, 64) and len(made.result.images) == 3
    grid = Grid(request, Axis.parse("lora", "0, 0.5, 1"), Axis.parse("solver", "euler, heun"))
    sheet = grid.save(tmp_path / "b.png", [drawn(pipes, one) for one in grid.requests()])
    made = again(sheet, pipes)
    with Image.open(sheet) as image:
        assert made.same and made.image.tobytes() == image.convert("RGB").tobytes()
    assert len(made.result.images) == 6 and made.result.settings[0]["sheet"]["rows"] == ["solver euler", "solver heun"]


def test_a_picture_made_from_another_needs_that_one(pipes: Pipes, tmp_path: Path) -> None:
    source = Image.effect_noise((32, 32), 90).convert("RGB")
    result = pipes["nano-dev", None].generate("a star", image=source, strength=0.6, steps=4)
    path = result.save(tmp_path / "x.png")
    assert again(path, pipes, image=source).same
    with pytest.raises(ReplayError, match="give that one as well"):
        again(path, pipes)
    with pytest.raises(ReplayError, match="its pixels differ"):
        again(path, pipes, image=Image.new("RGB", (32, 32)))
    plain = pipes["nano-dev", None].generate("a star", steps=1, width=32, height=32).save(tmp_path / "y.png")
    with pytest.raises(InputError, match="was not made from any"):
        again(plain, pipes, image=source)


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The picture with other settings in it."""
    with Image.open(path) as image:
        about = json.loads(image.text["miniflux"])  # type: ignore[attr-defined]
        change(about)
        save_picture(image.convert("RGB"), path, [about])
    return path


@pytest.fixture
def picture(pipes: Pipes, tmp_path: Path) -> Path:
    """A picture with a LoRA from a file of its own."""
    file = tmp_path / "style.safetensors"
    shutil.copy(REALISM, file)
    return drawn(pipes, Request(prompt="a star", width=32, height=32, steps=2, loras=(LoraUse(str(file), 0.7),))).save(
        tmp_path / "x.png"
    )


def test_another_lora_file_is_refused_by_name(pipes: Pipes, picture: Path) -> None:
    """And drawn with --force, which shows the difference."""
    file = picture.parent / "style.safetensors"
    assert again(picture, pipes).same
    tensors = {key: 2 * tensor for key, tensor in miniflux.checkpoints.files.open_tensors(REALISM).items()}
    file.unlink()
    miniflux.checkpoints.writing.write_tensors(file, tensors, {})
    with pytest.raises(ReplayError, match="style.safetensors is not the one that the picture was made with"):
        again(picture, pipes)
    made = again(picture, pipes, force=True)
    assert not made.same and made.psnr < 60 and 0 < made.largest <= 255
    assert any("style.safetensors is not the one" in line for line in made.differences)
    with Image.open(picture) as image:
        kept, new = np.asarray(image.convert("RGB"), np.float64), np.asarray(made.image, np.float64)
    assert made.largest == np.abs(kept - new).max()
    assert made.psnr == pytest.approx(10 * np.log10(255**2 / np.mean((kept - new) ** 2)))
    assert not lora.attached(pipes["nano-dev", None])


def test_a_lora_that_moved_is_found_or_missed_by_name(pipes: Pipes, picture: Path, tmp_path: Path) -> None:
    """Beside the picture, or not at all; bundled ones everywhere."""
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    copy = Path(shutil.copy(picture, moved / "x.png"))
    (picture.parent / "style.safetensors").rename(moved / "style.safetensors")
    assert again(copy, pipes).same
    with pytest.raises(ReplayError, match="style.safetensors is missing"):
        again(picture, pipes)
    bundled = drawn(pipes, Request(prompt="a star", width=32, height=32, steps=2, loras=(LoraUse("realism", 0.7),)))
    path = bundled.save(tmp_path / "y.png")

    def elsewhere(about: dict[str, Any]) -> None:
        about["loras"][0]["source"] = "C:\\loras\\realism.safetensors"

    assert again(edited(path, elsewhere), pipes).same


def test_a_lora_that_is_named_for_the_one_in_the_file(pipes: Pipes, picture: Path, tmp_path: Path) -> None:
    """By its hash, whatever it is called; by its place, another one, which is said; not if the picture has none."""
    renamed = (tmp_path / "style.safetensors").rename(tmp_path / "renamed.safetensors")
    with pytest.raises(ReplayError, match=r"style.safetensors is missing \(--model, --weights, --lora and"):
        again(picture, pipes)
    assert again(picture, pipes, loras=[renamed]).same
    other = tmp_path / "other.safetensors"
    tensors = {key: 2 * tensor for key, tensor in miniflux.checkpoints.files.open_tensors(REALISM).items()}
    miniflux.checkpoints.writing.write_tensors(other, tensors, {})
    with pytest.raises(ReplayError, match="other.safetensors is not the one that the picture was made with"):
        again(picture, pipes, loras=[other])
    assert not again(picture, pipes, loras=[other], force=True).same
    with pytest.raises(InputError, match="other.safetensors is none of those that the picture was made with"):
        again(picture, pipes, loras=[renamed, other])
    plain = drawn(pipes, Request(prompt="a star", width=32, height=32, steps=2)).save(tmp_path / "plain.png")
    with pytest.raises(InputError, match=r"renamed.safetensors is none of those .* \(none\)"):
        again(plain, pipes, loras=[renamed])
    with pytest.raises(LoraError, match="nothing.safetensors: no such file"):
        again(picture, pipes, loras=["nothing.safetensors"])


def test_a_model_that_moved_is_found_beside_the_picture(tmp_path: Path) -> None:
    """A fine-tune by its path: where it was, beside the picture, by `model`, or missed by name; never another one."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    tensors = dict(miniflux.checkpoints.files.open_tensors(BUNDLED / "flux1-nano-dev.safetensors").items())
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"] + 0.25
    tuned = old / "tuned.safetensors"
    miniflux.checkpoints.writing.write_tensors(tuned, tensors, {})
    others = {
        "autoencoder": BUNDLED / "ae.safetensors",
        "clip": BUNDLED / "text_encoder",
        "t5": BUNDLED / "text_encoder_2",
        "clip_tokenizer": BUNDLED / "tokenizer",
        "t5_tokenizer": BUNDLED / "tokenizer_2",
    }
    for place in others.values():
        (old / place.name).symlink_to(place)
    pipe = miniflux.load(tuned)
    picture = pipe.generate("a star", width=32, height=32, steps=2).save(new / "x.png")
    assert replay(picture).same
    for file in list(old.iterdir()):
        file.rename(new / file.name)
    assert replay(picture).same  # beside it, with its other parts
    elsewhere = tmp_path / "elsewhere"
    new.rename(elsewhere)
    new.mkdir()
    picture = Path(shutil.copy(elsewhere / "x.png", new / "x.png"))
    with pytest.raises(ReplayError, match=r"tuned.safetensors is neither there nor beside the picture \(--model"):
        replay(picture)
    assert replay(picture, model=elsewhere / "tuned.safetensors").same
    assert replay(picture, weights=elsewhere).same
    with pytest.raises(ReplayError, match=r"flux1-nano-dev.safetensors is not the tuned.safetensors"):
        replay(picture, model="nano-dev")
    old.mkdir(exist_ok=True)
    # Another one where it was: the one beside the picture is taken.
    for file in elsewhere.iterdir():
        (old / file.name).symlink_to(BUNDLED / "flux1-nano-dev.safetensors" if file.suffix else file)
    (old / "ae.safetensors").unlink()
    (old / "ae.safetensors").symlink_to(BUNDLED / "ae.safetensors")
    assert replay(elsewhere / "x.png").same


def test_weights_of_a_known_model_beside_the_picture(tmp_path: Path) -> None:
    """Drawn with another autoencoder from `--weights`; made again with the one that lies beside it."""
    tensors = dict(miniflux.checkpoints.files.open_tensors(BUNDLED / "ae.safetensors").items())
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] + 0.25
    miniflux.checkpoints.writing.write_tensors(tmp_path / "ae.safetensors", tensors, {})
    result = miniflux.load("nano", weights=tmp_path).generate("a star", width=32, height=32, steps=2)
    assert replay(result.save(tmp_path / "x.png")).same
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(ReplayError, match="autoencoder: .*ae.safetensors is not the ae.safetensors"):
        replay(shutil.copy(tmp_path / "x.png", elsewhere / "x.png"))
    assert replay(elsewhere / "x.png", weights=tmp_path).same


def test_other_weights_are_refused_by_name(pipes: Pipes, picture: Path) -> None:
    def other(about: dict[str, Any]) -> None:
        for file in about["files"]:
            if file["part"] == "autoencoder":
                file["sha256"] = "0" * 64

    with pytest.raises(ReplayError, match=r"autoencoder: .*ae.safetensors is not the ae.safetensors"):
        again(edited(picture, other), pipes)
    made = again(picture, pipes, force=True)
    assert made.same and any("autoencoder" in line for line in made.differences)


def test_a_model_changed_in_memory_is_refused_by_name(pipes: Pipes, tmp_path: Path, picture: Path) -> None:
    """A picture that it drew says so; and it makes no picture again while it is changed."""
    handle = pipes["nano-dev", None].transformer.final_layer.register_forward_hook(lambda m, x, y: y * 0.5)
    path = drawn(pipes, Request(prompt="a star", model="nano-dev", steps=2, width=32, height=32)).save(
        tmp_path / "hooked.png"
    )
    with pytest.raises(ReplayError, match="changed in memory: transformer: final_layer: a forward hook"):
        again(picture, pipes)
    handle.remove()
    (record,) = read_picture(path).records
    assert record.doubts == ("the model had been changed in memory: transformer: final_layer: a forward hook",)
    assert all(file.sha256 is None for file in record.files if file.part == "transformer")
    with pytest.raises(ReplayError, match="or what was loaded from it, when the picture was made"):
        again(path, pipes)
    made = again(path, pipes, force=True)
    assert not made.same and any("changed in memory" in line for line in made.differences)


def test_versions_and_precision_are_told(pipes: Pipes, picture: Path) -> None:
    """They are no reason to refuse: the pixels tell."""

    def older(about: dict[str, Any]) -> None:
        about |= {"version": "0.0.1", "torch": "1.0", "threads": 64, "device": "quantum"}

    made = again(edited(picture, older), pipes)
    told = "\n".join(made.differences)
    assert made.same
    for part in ("miniflux 0.0.1", "torch 1.0", "threads 64", "device quantum"):
        assert part in told


def test_files_without_hashes_are_told(pipes: Pipes, picture: Path) -> None:
    made = again(edited(picture, lambda about: about.pop("files")), pipes)
    assert made.same and "does not name the weights" in made.differences[0]


def test_pixels_and_size_that_differ(pipes: Pipes, picture: Path) -> None:
    with Image.open(picture) as image:
        about = json.loads(image.text["miniflux"])  # type: ignore[attr-defined]
        changed = image.convert("RGB")
    changed.putpixel((3, 4), (255, 0, 255))
    save_picture(changed, picture, [about])
    made = again(picture, pipes)
    assert not made.same and made.largest > 0 and not made.differences
    save_picture(changed.resize((16, 16)), picture, [about])
    with pytest.raises(ReplayError, match="the file has 16x16 pixels, its settings make 32x32"):
        again(picture, pipes)
    assert not again(picture, pipes, force=True).same


def test_what_replaced_latents_is_told(pipes: Pipes, tmp_path: Path) -> None:
    result = pipes["nano-dev", None].generate("a star", steps=2, width=32, height=32, callback=lambda i, m: 0.5 * m.x)
    made = again(result.save(tmp_path / "x.png"), pipes)
    assert not made.same and "a callback replaced its latents on the way" in made.differences


def test_pictures_without_settings_of_ours(pipes: Pipes, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    with pytest.raises(SettingsError, match="nothing that was written by miniflux"):
        again(tmp_path / "x.png", pipes)
    with pytest.raises(SettingsError, match="cannot be read"):
        again(tmp_path / "none.png", pipes)


def test_command_line(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit codes 0 and 2; one line on stderr; nothing is written where it is refused."""
    out = tmp_path / "again.png"
    assert main(["replay", str(picture), "-o", str(out)]) == 0
    assert "the same pixels" in capsys.readouterr().out
    assert read_picture(out).origin == "miniflux"
    assert main(["replay", str(picture), "-o", str(out)]) == 0
    assert f"{tmp_path / 'again-1.png'}: written" in capsys.readouterr().out
    style = (tmp_path / "style.safetensors").rename(tmp_path / "s.safetensors")
    assert main(["replay", str(picture), "--lora", str(style), "--model", "nano"]) == 0
    assert "the same pixels" in capsys.readouterr().out
    style.rename(tmp_path / "style.safetensors")
    (tmp_path / "style.safetensors").unlink()
    assert main(["replay", str(picture), "-o", str(tmp_path / "no.png")]) == 2
    error = capsys.readouterr().err
    assert "style.safetensors is missing" in error and error.count("\n") == 1 and not (tmp_path / "no.png").exists()
    assert main(["replay", str(picture), "--force", "-o", str(out), "--no-metadata"]) == 0
    said = capsys.readouterr().out
    assert "PSNR" in said and "style.safetensors is missing" in said
    assert read_picture(out).origin == "none"
    assert main(["replay", str(picture), "--force", "-o", str(picture)]) == 2
    assert "is what is read from" in capsys.readouterr().err
    assert main(["replay", str(out)]) == 2
    assert "nothing that was written by miniflux" in capsys.readouterr().err


def test_generate_leaves_settings_out_if_asked(tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    assert main(["generate", "a star", "-o", str(out), "--steps", "1", "--size", "32", "--no-metadata"]) == 0
    assert read_picture(out).origin == "none"
