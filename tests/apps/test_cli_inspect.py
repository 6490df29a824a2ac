"""`miniflux inspect` of pictures and of several things at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from miniflux.weights.finding import BUNDLED
from tests.apps.test_cli import QUICK, run

AE = str(BUNDLED / "ae.safetensors")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "x.png"
    options = ["--seed", "4", "--cfg", "2", "--negative", "a star", "--lora", "realism:0.5"]
    assert run("generate", "a red\x1b[31m circle", "-o", str(out), *QUICK, *options) == 0
    return out


def foreign(path: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (96, 64), "blue").save(path, pnginfo=info)
    return path


def test_our_picture_tells_its_settings_and_files(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", str(picture)) == 0
    said = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in said.splitlines()[1:])
    assert lines["picture"] == "64x48" and lines["seed"] == "4" and lines["model"] == "nano-dev"
    assert lines["negative"] == "a star" and '"scale": 0.5' in lines["loras"] and '"method": "cfg"' in lines["guide"]
    assert lines["prompt"] == r"a red\x1b[31m circle" and "\x1b" not in said  # nothing that a terminal would obey
    assert "file        lora realism: realism.safetensors" in said and "sha256" in said


def test_pictures_of_other_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is understood, and what is not."""
    text = "a castle\nNegative prompt: fog\nSteps: 12, Sampler: Euler, CFG scale: 1, Seed: 9, Size: 96x64, Ensd: 31337"
    assert run("inspect", str(foreign(tmp_path / "a.png", parameters=text))) == 0
    said = capsys.readouterr().out
    assert "made by     A1111" in said and "prompt      a castle" in said and "steps       12" in said
    assert "not understood: " in said and "Ensd" in said
    graph = {
        "3": {"class_type": "KSampler", "inputs": {"seed": 5, "steps": 7, "cfg": 1.0, "sampler_name": "euler",
              "scheduler": "simple", "denoise": 1.0, "positive": ["6", 0], "negative": ["6", 0]}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a tower"}},
    }  # fmt: skip
    assert run("inspect", str(foreign(tmp_path / "c.png", prompt=json.dumps(graph)))) == 0
    said = capsys.readouterr().out
    assert "made by     ComfyUI" in said and "a tower" in said and "steps       7" in said
    assert run("inspect", str(foreign(tmp_path / "n.png", Comment="hello"))) == 0
    said = capsys.readouterr().out
    assert "nobody who says how" in said and "not understood: the text 'Comment'" in said


def test_several_paths_of_which_one_fails(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are told, the exit code is 2, what failed is one line; as JSON it is one list."""
    paths = [AE, str(tmp_path / "nothing.safetensors"), str(picture)]
    assert run("inspect", *paths) == 2
    said = capsys.readouterr()
    assert "Autoencoder" in said.out and "a red" in said.out
    assert said.err.count("\n") == 1 and "nothing.safetensors" in said.err
    assert run("inspect", "--json", *paths) == 2
    told = json.loads(capsys.readouterr().out)
    assert [one.get("network") for one in told] == ["Autoencoder", None, "picture"]
    assert "no such file" in told[1]["error"] and told[2]["settings"][0]["seed"] == 4
    assert run("inspect", "--json", *paths[::2]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_a_picture_whose_pixels_are_damaged_tells_its_settings(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(picture.read_bytes())
    place = data.index(b"IDAT")
    data[place + 10 : place + 40] = bytes(30)
    broken = tmp_path / "broken.png"
    broken.write_bytes(data)
    assert run("inspect", str(broken)) == 0
    said = capsys.readouterr().out
    assert "its pixels cannot be read: " in said and "seed        4" in said


def test_what_is_no_picture_and_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in (("a.txt", b"hello"), ("cut.png", b"\x89PNG\r\n\x1a\n\0\0"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
        assert run("inspect", str(tmp_path / name)) == 2
        said = capsys.readouterr().err
        assert name in said and said.count("\n") == 1
