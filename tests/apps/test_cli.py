"""The command line, typed as a user would: exit codes, one line per error, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from miniflux.apps.cli import main
from miniflux.weights.finding import BUNDLED

QUICK = ["--steps", "1", "--size", "64x48"]


def run(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


def test_generate_writes_the_picture_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    assert run("generate", "a red circle", "-o", str(out), *QUICK, "--seed", "4") == 0
    with Image.open(out) as image:
        assert image.size == (64, 48)
        assert json.loads(image.text["miniflux"])["seed"] == 4  # type: ignore[attr-defined]
    assert str(out) in capsys.readouterr().out


def test_several_pictures_are_files_and_a_grid_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, sheet = tmp_path / "out.png", tmp_path / "sheet.png"
    options = ["-o", str(out), *QUICK, "--images", "2", "--seed", "5"]
    assert run("generate", "a red circle", "a star", *options, "--grid", str(sheet)) == 0
    files = [tmp_path / f"out-{i}.png" for i in (1, 2, 3, 4)]
    assert sorted(tmp_path.iterdir()) == [*files, sheet]
    said = [json.loads(Image.open(file).text["miniflux"]) for file in files]  # type: ignore[attr-defined]
    expected = [("a red circle", 5), ("a red circle", 6), ("a star", 7), ("a star", 8)]
    assert [(about["prompt"], about["seed"]) for about in said] == expected
    with Image.open(sheet) as image:
        assert image.size == (128, 96)
        assert image.crop((64, 48, 128, 96)).tobytes() == Image.open(files[3]).tobytes()
    assert capsys.readouterr().out.splitlines()[0] == f"{files[0]}: 64x48, nano-dev, seed 5, 'a red circle'"
    # Each is what a call for it alone draws.
    assert run("generate", "a star", "-o", str(out), *QUICK, "--seed", "8") == 0
    assert Image.open(out).tobytes() == Image.open(files[3]).tobytes()


def test_every_option_reaches_the_picture(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    options = "--model nano-dev --steps 2 --guidance 1.5 --size 64 --dtype bfloat16 --device cpu --t5-length 20"
    assert run("generate", "a star", "-o", str(out), *options.split(), "--padding", "masked") == 0
    with Image.open(out) as image:
        said = json.loads(image.text["miniflux"])  # type: ignore[attr-defined]
    expected = {"model": "nano-dev", "steps": 2, "guidance": 1.5, "width": 64, "height": 64, "dtype": "bfloat16",
                "device": "cpu", "t5_length": 20, "padding": "masked"}  # fmt: skip
    assert {key: said[key] for key in expected} == expected


def test_weights_may_stay_in_the_file(tmp_path: Path) -> None:
    """The same picture, and the settings say where the weights were."""
    pictures: list[Image.Image] = []
    for memory in ("resident", "stream"):
        path = tmp_path / f"{memory}.png"
        assert run("generate", "a star", *QUICK, "--memory", memory, "-o", str(path)) == 0
        pictures.append(Image.open(path))
        assert json.loads(pictures[-1].text["miniflux"])["memory"] == memory  # type: ignore[attr-defined]
    assert pictures[0].tobytes() == pictures[1].tobytes()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--size 0", "got 0"),
        ("--size 7x64", "got 7"),
        ("--size 64x100000", "got 100000"),
        ("--size big", "'big'"),
        ("--size 64x", "'64x'"),
        ("--steps 0", "got 0"),
        ("--steps two", "'two'"),
        ("--guidance -1", "-1.0"),
        ("--guidance nan", "nan"),
        ("--guidance inf", "inf"),
        ("--seed -1", "-1"),
        ("--images 0", "got 0"),
        ("--model nothing-like-it", "nothing-like-it"),
        ("--model nano-schnell --guidance 3", "3.0"),
        ("--device quantum", "quantum"),
        ("--dtype int3", "int3"),
        ("--memory swap", "auto, resident, text-freed, offload, stream, got 'swap'"),
        ("--padding odd", "odd"),
        ("--t5-length 0", "got 0"),
        ("--weights /no/such/folder", "/no/such/folder"),
        ("-o /no/such/folder/x.png", "/no/such/folder"),
        ("-o x.bmp", ".bmp"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("generate", "a star", *QUICK, *options.split()) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and named in said.err and "Traceback" not in said.err and not said.out
    assert not list(tmp_path.iterdir())


def test_missing_weights_say_where_and_how(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(tmp_path / "mine"))
    assert run("generate", "a star", "-o", str(tmp_path / "x.png"), "--model", "flux1-schnell") == 2
    said = capsys.readouterr().err
    for part in ("flux1-schnell.safetensors", "ae.safetensors", "text_encoder_2", "tokenizer", str(tmp_path / "mine")):
        assert part in said
    assert "FLUX.1-schnell" in said and "Apache-2.0" in said


def broken(kind: str, folder: Path) -> None:
    """Put a bad transformer file into a weights folder."""
    good = BUNDLED / "flux1-nano-dev.safetensors"
    bad = folder / good.name
    if kind == "empty":
        bad.write_bytes(b"")
    elif kind == "truncated":
        bad.write_bytes(good.read_bytes()[:-1000])
    elif kind == "text":
        bad.write_text("<html>not found</html>")
    elif kind == "another variant":
        bad.write_bytes((BUNDLED / "flux1-nano-schnell.safetensors").read_bytes())
    elif kind == "another network":
        bad.write_bytes((BUNDLED / "ae.safetensors").read_bytes())
    else:
        tensors = load_file(good)
        if kind == "nan":
            tensors["img_in.bias"][3] = float("nan")
        elif kind == "misshapen":
            tensors["final_layer.linear.bias"] = torch.zeros(7, dtype=torch.bfloat16)
        elif kind == "key missing":
            del tensors["double_blocks.1.txt_mlp.2.bias"]
        elif kind == "key too many":
            tensors["extra.weight"] = torch.zeros(1)
        save_file(tensors, bad)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("empty", "0 bytes"),
        ("truncated", "cut off"),
        ("text", "not a safetensors file"),
        ("another variant", "nano-schnell"),
        ("another network", "Autoencoder"),
        ("nan", "img_in.bias"),
        ("misshapen", "final_layer.linear.bias"),
        ("key missing", "double_blocks.1.txt_mlp.2.bias"),
        ("key too many", "extra.weight"),
    ],
)
def test_bad_files_are_one_line_and_exit_code_2(
    kind: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(kind, tmp_path)
    out = tmp_path / "x.png"
    assert run("generate", "a star", "-o", str(out), *QUICK, "--weights", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and named in said and "flux1-nano-dev.safetensors" in said
    assert not out.exists()


def test_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("inspect", str(BUNDLED / "flux1-nano-dev.safetensors")) == 0
    said = capsys.readouterr().out
    assert "Flux1" in said and "nano-dev" in said and "original" in said and "bfloat16" in said
    assert run("inspect", str(BUNDLED), "--json") == 0
    assert {part["network"] for part in json.loads(capsys.readouterr().out)} == {
        *("Flux1", "Autoencoder", "ClipTextEncoder", "T5Encoder", "TinyDecoder", "LoRA", "ControlNet"),
        *("Flux2", "Flux2Autoencoder", "Flux3", "CausalLm"),
    }  # fmt: skip
    assert run("inspect", str(tmp_path / "nothing")) == 2


def test_a_fault_of_ours_is_exit_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken inside")

    monkeypatch.setattr("miniflux.inspection.inspect", fail)
    assert run("inspect", "x") == 1
    said = capsys.readouterr().err
    assert "broken inside" in said and "Traceback" not in said


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("miniflux.inspection.inspect", stop)
    assert run("inspect", "x") == 130
    assert capsys.readouterr().err == "miniflux: stopped\n"


def test_help_and_version_cost_no_torch() -> None:
    """Help must come at once; `python -m miniflux` is the same command."""
    code = "import sys; from miniflux.apps.cli import parser; parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    said = subprocess.run([sys.executable, "-m", "miniflux", "--version"], check=True, capture_output=True, text=True)
    assert said.stdout.startswith("miniflux ")


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert "usage:" in capsys.readouterr().out


def test_too_long_a_text_is_refused_before_it_is_encoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: object) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr("miniflux.text.Text.encode", encode)
    assert run("generate", "a star", "-o", str(tmp_path / "x.png"), "--t5-length", "99999") == 2
    assert "t5_length must be a whole number from 1 to 16384, got 99999" in capsys.readouterr().err
