"""The sampling options of `miniflux generate`, and `miniflux study`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from miniflux.apps.cli import main

FAST = ["--steps", "3", "--size", "64x64"]


def said(path: Path) -> dict:
    """The settings inside a picture."""
    return json.loads(Image.open(path).info["miniflux"])


def test_options_reach_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option is in the settings, as it was given."""
    out = tmp_path / "a.png"
    options = [
        "--solver",
        "unipc-3",
        "--schedule",
        "beta",
        "--shift",
        "2",
        "--cfg",
        "2.5",
        "--negative",
        "a green star",
    ]
    options += ["--guidance-method", "apg", "--window", "0:0.7", "--cache", "taylor", "--variation", "7:0.25"]
    assert main(["generate", "a red circle", "-o", str(out), *FAST, *options]) == 0
    about = said(out)
    assert (about["solver"], about["schedule"], about["shift"]) == ("unipc-3", "beta", 2.0)
    assert (about["negative"], about["variation"]) == ("a green star", [7, 0.25])
    assert (about["guide"]["method"], about["guide"]["scale"], about["guide"]["window"]) == ("apg", 2.5, [0.0, 0.7])
    assert about["cache"]["name"] == "taylor"
    counted = f"cache taylor: {about['cache']['skipped']} of {about['cache']['skipped'] + about['cache']['evaluated']}"
    assert counted in capsys.readouterr().out


def test_levels_of_your_own(tmp_path: Path) -> None:
    """A list takes the place of a name, and says how many steps there are."""
    out = tmp_path / "a.png"
    assert main(["generate", "a red circle", "-o", str(out), "--size", "64x64", "--schedule", "1,0.6,0.2,0"]) == 0
    assert said(out)["sigmas"] == [1, 0.6, 0.2, 0] and said(out)["steps"] == 3


def test_an_image_to_change_and_previews(tmp_path: Path) -> None:
    """Half the steps from a picture of its own size; a preview beside the output for every second one but the last."""
    source, out = tmp_path / "source.png", tmp_path / "out.png"
    Image.new("RGB", (96, 64), "blue").save(source)
    options = ["--image", str(source), "--strength", "0.5", "--steps", "8", "--preview-every", "2"]
    assert main(["generate", "a red circle on a blue background", "-o", str(out), *options]) == 0
    assert said(out)["steps"] == 4 and Image.open(out).size == (96, 64)
    assert sorted(path.name for path in tmp_path.glob("out-*")) == ["out-step002.png"]
    assert Image.open(tmp_path / "out-step002.png").size == (96, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--solver", "leapfrog"], "unknown solver 'leapfrog'; known: euler"),
        (["--schedule", "fast"], "unknown schedule 'fast'; known: auto, uniform"),
        (["--schedule", "1,0.5,0.7,0"], "noise level 2 is 0.7"),
        (["--schedule", "1,nan,0"], "noise level 1 is nan"),
        (["--shift", "-1"], "shift must be a positive number, got -1.0"),
        (["--negative", "a star"], "--negative has no effect without --cfg"),
        (["--window", "0:0.5"], "--window has no effect without --cfg"),
        (["--cfg", "2", "--window", "0.5:0.2"], "window must be (start, stop)"),
        (["--cfg", "2", "--guidance-method", "magic"], "unknown guidance method 'magic'; known: cfg"),
        (["--cfg", "nan"], "scale must be a finite number of at least 0, got nan"),
        (["--cache", "magic"], "unknown cache 'magic'; known: first-block"),
        (["--strength", "0.5"], "no image is given"),
        (["--image", "nothing.png"], "nothing.png: cannot be read: No such file"),
        (["--variation", "7:2"], "amount of variation must be a number from 0 to 1, got 2.0"),
        (["--preview-every", "0"], "--preview-every must be at least 1, got 0"),
    ],
)
def test_what_is_refused(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the value, exit code 2, nothing written."""
    out = tmp_path / "a.png"
    assert main(["generate", "a red circle", "-o", str(out), "--size", "64x64", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A schedule as a table, several as a figure."""
    assert main(["study", "schedule", "karras", "--steps", "4", "--shift", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("karras, 4 steps") and "   1  1.00000" in printed
    assert main(["study", "schedule", "--steps", "4", "--plot", str(tmp_path / "s.png")]) == 0
    assert (tmp_path / "s.png").exists()
    assert main(["study", "schedule", "none"]) == 2
