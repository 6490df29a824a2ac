"""The pipeline with the bundled model: what a caller may rely on."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import miniflux
from miniflux.errors import InputError, MinifluxError, OutputError
from miniflux.pipeline import Pipeline, Result, to_image
from miniflux.sampling import flux1_schedule

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.load("nano")


@pytest.fixture(scope="module")
def schnell() -> Pipeline:
    return miniflux.load("nano-schnell")


def drawn(pipe: Pipeline, **settings: object) -> Result:
    return pipe.generate(PROMPT, **{"steps": 2, "width": 64, "height": 64, **settings})  # type: ignore[arg-type]


def test_settings_say_all_that_made_the_picture(pipe: Pipeline) -> None:
    """Feeding the settings back must give the same latents, bitwise."""
    first = drawn(pipe, seed=3, guidance=2.0)
    said = first.settings[0]
    names = ("seed", "steps", "guidance", "width", "height", "t5_length", "padding")
    again = miniflux.load(said["model"]).generate(said["prompt"], **{name: said[name] for name in names})
    assert torch.equal(first.latents, again.latents)
    assert said["sigmas"] == flux1_schedule(2, 16) and said["guidance"] == 2.0
    json.dumps(said)


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_pipeline_is_not_copied(copying: Callable[[Any], Any], pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="neither copied nor pickled.*load another one"):
        copying(pipe)


def test_defaults_come_from_the_variant(pipe: Pipeline, schnell: Pipeline) -> None:
    said = pipe.generate(PROMPT, steps=1).settings[0]
    assert (said["width"], said["height"], said["guidance"]) == (128, 128, pipe.variant.guidance)
    said = schnell.generate(PROMPT, width=64, height=64).settings[0]
    assert (said["steps"], said["guidance"], said["sigmas"]) == (4, None, [1.0, 0.75, 0.5, 0.25, 0.0])


def test_image_i_equals_its_seed_alone(pipe: Pipeline) -> None:
    """Neighbours in a call must not change a picture."""
    several = drawn(pipe, seed=5, images=3)
    for i in range(3):
        assert torch.equal(several.latents[i : i + 1], drawn(pipe, seed=5 + i).latents)
    assert [said["seed"] for said in several.settings] == [5, 6, 7]


def test_a_list_of_prompts_is_a_batch(pipe: Pipeline) -> None:
    other = "a green star on a white background"
    both = pipe.generate([PROMPT, other], seed=2, steps=1, width=64, height=64)
    alone = pipe.generate(other, seed=3, steps=1, width=64, height=64)
    assert len(both.images) == 2 and torch.equal(both.latents[1:], alone.latents)


def test_seed_prompt_guidance_and_steps_matter(pipe: Pipeline) -> None:
    base = drawn(pipe).latents
    assert torch.equal(base, drawn(pipe).latents)
    for change in ({"seed": 1}, {"guidance": 1.0}, {"steps": 3}, {"padding": "masked"}, {"t5_length": 20}):
        assert not torch.equal(base, drawn(pipe, **change).latents), change
    assert not torch.equal(base, pipe.generate("a green star", steps=2, width=64, height=64).latents)


def test_seed_and_steps_cost_no_encoding(pipe: Pipeline) -> None:
    drawn(pipe)
    before = pipe.text.encoded
    drawn(pipe, seed=9, steps=3, guidance=1.5, images=2)
    assert pipe.text.encoded == before


def test_trimmed_equals_masked(pipe: Pipeline) -> None:
    """Nobody attends to masked padding, so cutting it away changes nothing but rounding."""
    masked, trimmed = (drawn(pipe, padding=kind).latents for kind in ("masked", "trimmed"))
    torch.testing.assert_close(masked, trimmed, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (192, 64), (64, 192), (16, 48), (160, 96)])
def test_sizes(pipe: Pipeline, width: int, height: int) -> None:
    result = drawn(pipe, width=width, height=height)
    assert result.images[0].size == (width, height)
    assert result.latents.shape == (1, 16, height // 8, width // 8)


def test_sizes_are_rounded_up_and_said(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = drawn(pipe, width=50, height=64)
    assert result.images[0].size == (64, 64) and result.settings[0]["width"] == 64
    assert "width 50 is not a multiple of 16: drawing 64" in caplog.text


def test_threads_do_not_disturb_each_other(pipe: Pipeline) -> None:
    """Results of simultaneous calls are bitwise those of calls one after the other."""
    serial = {seed: drawn(pipe, seed=seed).latents for seed in range(4)}
    found: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda s=seed: found.update({s: drawn(pipe, seed=s).latents})) for seed in serial
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(serial[seed], found[seed]) for seed in serial)


def test_progress_counts_every_step_and_may_stop_the_run(pipe: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    drawn(pipe, steps=2, images=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def stop(done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawn(pipe, progress=stop)
    assert torch.equal(drawn(pipe).latents, drawn(pipe).latents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width .* got 0"),
        ({"height": 7}, "height .* got 7"),
        ({"width": 100_000}, "width .* got 100000"),
        ({"width": 64.0}, "width .* got 64.0"),
        ({"steps": 0}, "steps .* got 0"),
        ({"steps": 100_000}, "steps .* got 100000"),
        ({"steps": True}, "steps .* got True"),
        ({"guidance": -0.5}, "guidance .* got -0.5"),
        ({"guidance": float("nan")}, "guidance .* got nan"),
        ({"guidance": float("inf")}, "guidance .* got inf"),
        ({"guidance": "3"}, "guidance .* got '3'"),
        ({"seed": -1}, "seed .* got -1"),
        ({"seed": 2**64}, "seed .* got 18446744073709551616"),
        ({"seed": 2**64 - 1, "images": 2}, "seed .* got 18446744073709551615"),
        ({"images": 0}, "images .* got 0"),
        ({"padding": "odd"}, "padding .* got 'odd'"),
        ({"t5_length": 0}, "t5_length .* got 0"),
    ],
)
def test_bad_input_names_the_value(pipe: Pipeline, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        drawn(pipe, **arguments)


def test_no_prompt_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="empty list"):
        pipe.generate([])


def test_guidance_is_refused_where_it_has_no_effect(schnell: Pipeline) -> None:
    with pytest.raises(InputError, match="nano-schnell has no guidance input.* got 2.0"):
        drawn(schnell, guidance=2.0)


def test_overflow_is_an_error_and_not_a_black_picture() -> None:
    pipe = miniflux.load("nano")
    bias = torch.full_like(pipe.autoencoder.decoder.conv_out.bias, float("inf"))
    pipe.autoencoder.decoder.conv_out.bias = torch.nn.Parameter(bias, requires_grad=False)
    with pytest.raises(MinifluxError, match="overflowed in float32"):
        drawn(pipe)


def test_half_precision_draws_the_same_picture(pipe: Pipeline) -> None:
    """bfloat16 keeps three digits; the picture stays the same to the eye."""
    exact = pipe.generate(PROMPT, steps=6).images[0]
    half = miniflux.load("nano", dtype="bfloat16").generate(PROMPT, steps=6).images[0]
    difference = np.asarray(exact, float) - np.asarray(half, float)
    assert np.sqrt(np.mean(difference**2)) < 20


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp", "a.PNG"])
def test_saved_pictures_carry_their_settings(pipe: Pipeline, tmp_path: Path, name: str) -> None:
    result = drawn(pipe)
    path = result.save(tmp_path / name)
    with Image.open(path) as image:
        text = image.text["miniflux"] if name.lower().endswith("png") else image.getexif()[0x010E]  # type: ignore[attr-defined]
        pixels = np.asarray(image.convert("RGB"))
    assert json.loads(text) == result.settings[0]
    if name.lower().endswith("png"):
        assert np.array_equal(pixels, np.asarray(result.images[0]))
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_several_pictures_make_a_grid(pipe: Pipeline, tmp_path: Path) -> None:
    result = drawn(pipe, images=3, steps=1)
    path = result.save(tmp_path / "grid.png")
    with Image.open(path) as sheet:
        assert sheet.size == (128, 128) and len(json.loads(sheet.text["miniflux"])) == 3  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(sheet)[:64, 64:], np.asarray(result.images[1]))


def test_bad_places_to_save_are_refused_and_leave_nothing(pipe: Pipeline, tmp_path: Path) -> None:
    result = drawn(pipe, steps=1)
    (tmp_path / "folder.png").mkdir()
    for place in ("x.bmp", "nowhere/x.png", "folder.png", "noending"):
        with pytest.raises(OutputError, match=place.split("/")[0]):
            result.save(tmp_path / place)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(pipe: Pipeline, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        drawn(pipe, steps=1).save(tmp_path / "x.png")


def test_a_failed_save_keeps_the_old_file(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "x.png"
    place.write_bytes(b"old")

    result, whole = drawn(pipe, steps=1), Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        whole(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match="No space left"):
            result.save(place)
    assert place.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["x.png"]


def test_pixels_are_rounded_to_levels() -> None:
    """-1, 0 and 1 are the levels 0, 128 and 255; what is beyond is clamped."""
    pixels = torch.tensor([-1.0, 0.0, 1.0, -3.0, 3.0, 1 / 255]).expand(3, 1, 6)
    assert np.asarray(to_image(pixels))[0, :, 0].tolist() == [0, 128, 255, 0, 255, 128]


def test_loading_leaves_the_compiler_of_torch_alone() -> None:
    """Drawing first weights on the meta device would import it, for longer than all the rest of a start takes."""
    code = """
import sys
import miniflux
pipe = miniflux.load("nano")
miniflux.lora.attach(pipe, "realism")
miniflux.lora.inspect("realism")
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
