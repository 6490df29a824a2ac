"""`miniflux convert` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from miniflux.apps.cli import main
from miniflux.weights.finding import BUNDLED

NANO = str(BUNDLED / "flux1-nano-schnell.safetensors")


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ten worst layers, or all of them with -v; a folder in another layout; pictures on request."""
    out = tmp_path / "nano.safetensors"
    assert main(["convert", NANO, str(out), "--format", "int8", "--picture"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{out}: ") and "29 x int8" in said[0] and said[0].endswith("read back")
    assert said[1] == "relative error by layer, the worst 10:" and len(said) == 2 + 10 + 2
    errors = [float(line.split()[0]) for line in said[2:12]]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 1e-4 and errors[0] < 0.05
    assert said[-1].startswith("picture: PSNR ") and float(said[-1].split()[2]) > 25
    assert main(["convert", NANO, str(tmp_path / "folder"), "--layout", "diffusers", "--format", "nf4", "-v"]) == 0
    assert "relative error by layer:" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


def test_what_cannot_be_converted_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([NANO, NANO], "is what is read from"),
        ([NANO, str(tmp_path / "a.safetensors"), "--format", "banana"], "unknown format 'banana'; written are float32"),
        ([NANO, str(tmp_path / "a.safetensors"), "--layout", "banana"], "no layout 'banana'; known: original"),
        (["nothing.safetensors", str(tmp_path / "a.safetensors")], "no such file"),
    ):
        assert main(["convert", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_result_needs_a_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders that have none, in which nothing is numbered."""
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(BUNDLED / "ae.safetensors"), name]) == 2
    assert "give the result a name of its own" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
