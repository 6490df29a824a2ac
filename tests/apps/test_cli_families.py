"""FLUX.2 and FLUX.3 on the command line: longer prompts, references looked at once, guidance of base models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miniflux.apps.cli import main
from tests.small_models import model
from tests.steered import photo

QUICK = ("--steps", "2", "--size", "64")
NAMES = ("flux2-dev", "flux2-klein-4b", "flux2-klein-base-4b", "flux3-klein", "flux3-klein-base")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each kind in it."""
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        model(folder / name, name)
    return folder


def said(path: str | Path) -> dict[str, Any]:
    return json.loads(Image.open(path).info["miniflux"])


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.filterwarnings("ignore:the answer was cut off")
def test_prompts_are_rewritten(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was written is said, drawn and kept, with what it was written out of; the file is called by the short one.
    Replay draws the same picture without the language model, and says the same of it."""
    writer, out = shelf / "flux2-dev" / "text_encoder", tmp_path / "{prompt}-{index}.png"
    options = ("--upsample", str(writer), "--upsample-tokens", "12", "--upsample-temperature", "1", "--seed", "7")
    command = ("generate", "a cat", "a dog", "-o", str(out), "--model", str(shelf / "flux2-klein-4b"), *QUICK)
    assert main([*command, *options]) == 0
    told, files = capsys.readouterr().out, sorted(tmp_path.glob("*.png"))
    assert [file.name for file in files] == ["a-cat-1.png", "a-dog-2.png"]
    for file, prompt in zip(files, ("a cat", "a dog"), strict=True):
        about = said(file)
        assert about["prompt"] != prompt and f"{prompt!r} is drawn as " in told
        expected = {"prompt": prompt, "model": "text_encoder", "temperature": 1.0, "seed": 7, "max_new_tokens": 12}
        assert {name: value for name, value in about["upsampled"].items() if name != "system"} == expected
    plain = tmp_path / "plain.png"
    assert main(["generate", said(files[0])["prompt"], *command[3:4], str(plain), *command[5:], "--seed", "7"]) == 0
    assert np.array_equal(pixels(plain), pixels(files[0])) and "upsampled" not in said(plain)
    writer.rename(moved := shelf / "flux2-dev" / "gone")
    try:
        again = tmp_path / "again.png"
        assert main(["replay", str(files[1]), "-o", str(again)]) == 0 and "the same pixels" in capsys.readouterr().out
        assert said(again)["upsampled"] == said(files[1])["upsampled"]
    finally:
        moved.rename(writer)
    assert main(["inspect", str(files[0])]) == 0
    assert '"prompt": "a cat", "model": "text_encoder"' in capsys.readouterr().out


def test_what_cannot_write_is_refused_before_the_model_is_loaded(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reads = model(tmp_path / "reads", "flux2-klein-4b", writes=False) / "text_encoder"
    empty = tmp_path / "empty"
    empty.mkdir()
    writer = str(shelf / "flux2-klein-4b" / "text_encoder")
    for options, message in (
        (("--upsample", str(tmp_path / "nothing")), "nothing: no such folder; expected one of a language model"),
        (("--upsample", str(empty)), "empty: no language model to write with; missing: config.json; weights"),
        (("--upsample", str(reads)), "text_encoder/model.safetensors: 12 missing, such as model.layers.27."),
        (("--upsample-system", "Say."), "--upsample-system has no effect without --upsample FOLDER"),
        (("--upsample-temperature", "0"), "--upsample-temperature has no effect without --upsample FOLDER"),
        (("--upsample-tokens", "9"), "--upsample-tokens has no effect without --upsample FOLDER"),
        (("--upsample", writer, "--upsample-tokens", "0"), "--upsample-tokens must be a whole number of at least 1"),
        (("--upsample", writer, "--upsample-temperature", "-1"), "--upsample-temperature must be a finite number"),
        (("--upsample", writer, "--upsample-system", "@no.txt"), "system no.txt cannot be read"),
        (("--upsample", writer, "--upsample-system", " "), "system is empty"),
    ):
        out = tmp_path / "out.png"
        assert main(["generate", "a cat", "-o", str(out), "--model", "flux2-dev", *options]) == 2
        error = capsys.readouterr().err
        assert message in error and not out.exists(), error


@pytest.mark.parametrize("name", ["flux2-klein-base-4b", "flux3-klein-base"])
def test_a_negative_prompt_of_base_models(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """They are drawn with CFG: what is to be left out needs no scale beside theirs. A window and another method take
    that scale, too."""
    command = ("generate", "a cat", "--model", str(shelf / name), *QUICK, "-o")
    plain, left_out, stated = (str(tmp_path / f"{i}.png") for i in range(3))
    assert main([*command, plain]) == main([*command, left_out, "--negative", "a dog"]) == 0
    assert main([*command, stated, "--negative", "a dog", "--cfg", "4"]) == 0
    assert np.array_equal(pixels(left_out), pixels(stated)) and not np.array_equal(pixels(left_out), pixels(plain))
    assert said(left_out)["negative"] == "a dog" and said(left_out)["guide"]["scale"] == 4.0
    capsys.readouterr()
    assert main(["replay", left_out]) == 0 and "the same pixels" in capsys.readouterr().out
    shaped = str(tmp_path / "shaped.png")
    assert main([*command, shaped, "--window", "0:0.5", "--guidance-method", "apg"]) == 0
    assert said(shaped)["guide"] | {"scale": 4.0, "window": [0.0, 0.5], "method": "apg"} == said(shaped)["guide"]
    assert main([*command, str(tmp_path / "no.png"), "--guidance", "3", "--cfg", "2"]) == 2
    assert "guidance 3.0 is the scale of the usual guide" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["flux2-klein-4b", "flux2-dev", "flux3-klein"])
def test_a_negative_prompt_of_others_is_refused(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """By name before anything is loaded, by path when it is known what is there; with a scale they take it."""
    out = str(tmp_path / "a.png")
    for given in (name, str(shelf / name)):
        assert main(["generate", "a cat", "--model", given, *QUICK, "-o", out, "--negative", "a dog"]) == 2
        assert "--negative has no effect without --cfg X" in capsys.readouterr().err and not Path(out).exists()
    options = ("--negative", "a dog", "--cfg", "2")
    assert main(["generate", "a cat", "--model", str(shelf / name), *QUICK, "-o", out, *options]) == 0


def test_references_looked_at_once(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for, and asked not to be; the picture says so, and is made again. Who cannot is refused by name."""
    seen = ("--reference", photo(tmp_path / "a.png"), "--reference", photo(tmp_path / "b.png", 30))
    command = ("generate", "a cat", "--model", str(shelf / "flux2-klein-4b"), "--steps", "2", *seen, "-o")
    once, every, usual = (str(tmp_path / f"{i}.png") for i in range(3))
    assert main([*command, once, "--once"]) == main([*command, every, "--no-once"]) == main([*command, usual]) == 0
    assert [use["once"] for use in said(once)["conditions"]] == [True, True]
    assert "once" not in said(usual)["conditions"][0]
    assert np.array_equal(pixels(every), pixels(usual)) and not np.array_equal(pixels(once), pixels(usual))
    capsys.readouterr()
    given = ("--picture", seen[1], "--picture", seen[3])
    assert main(["replay", once, *given]) == 0 and "the same pixels" in capsys.readouterr().out
    for name in ("flux2-dev", "flux3-klein", "flux1-dev"):
        assert main([*command[:3], name, *seen, "-o", str(tmp_path / "x.png"), "--once"]) == 2
        assert f"{name} looks at references at every step" in capsys.readouterr().err
    assert main([*command[:2], "-o", str(tmp_path / "x.png"), "--no-once"]) == 2
    assert "--no-once is for references, and no --reference is given" in capsys.readouterr().err
