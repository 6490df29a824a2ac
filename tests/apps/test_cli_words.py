"""How the words of a command line are read, and what is checked before anything is computed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miniflux.weights.finding import BUNDLED
from tests.apps.test_cli import QUICK, run

AE, SCHNELL = str(BUNDLED / "ae.safetensors"), str(BUNDLED / "flux1-nano-schnell.safetensors")
REALISM = str(BUNDLED / "loras" / "realism.safetensors")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--gui 3", "unrecognized arguments: --gui 3"),  # no abbreviations: --guidance or --guidance-method
        ("--see 3", "did you mean --seed?"),
        ("--sttrength=1", "did you mean --strength?"),
        ("--guidance -1e3", "got -1000.0"),
        ("--cfg -inf", "got -inf"),
        ("--variation -7:0.1", "got -7"),
        ("--cfg 2 --window -1:2", "(-1.0, 2.0)"),
        ("--schedule -1,0", "-1"),
        ("--negative -fog", "is given as --negative=-..."),
        ("--lora", "expected one argument"),
        ("--lora realism --lora realism", "'realism' is attached already"),
        ("--lora realism --lora " + REALISM, "'realism' is attached already"),
        (f"--lora {AE}", "ae.safetensors"),
        ("-o x.png more", "words stand together"),
        ("--grid x.bmp", "'.bmp'"),
        ("--grid no/x.png", "does not exist"),
        ("--grid g-{seed}.png", "one sheet holds all pictures"),
        ("--grid g-{sed}.png", "one sheet holds all pictures"),
        ("--grid g-}.png", "a brace itself is written twice"),
        ("--weights=", "argument --weights: the name is empty"),
        ("--grid=", "is empty"),
        ("--output=", "is empty"),
        ("--image=", "the name of a picture is empty"),
        ("--t5-length 0", "got 0"),
    ],
)
def test_what_is_wrong_is_one_line_before_weights_are_read(
    options: str,
    named: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("miniflux.pipeline.load", load)
    assert run("generate", "a star", *options.split()) == 2
    said = capsys.readouterr()
    assert named in said.err and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.iterdir())


def test_options_given_twice_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last counts, as of other commands: so aliases work."""
    out = str(tmp_path / "x.png")
    assert run("generate", "a star", "-o", out, *QUICK, "--seed", "1", "--seed=2", "--seed", "2") == 0
    said = capsys.readouterr()
    assert "seed 2" in said.out and said.err.count("--seed is given twice: 2 counts, 1 does not\n") == 1


def test_words_behind_two_dashes_are_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", *QUICK, "-o", str(tmp_path / "x.png"), "--", "--seed") == 0
    assert run("inspect", "--", AE) == 0
    assert "Autoencoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("study solvers --plot no/x.png", "does not exist"),
        ("study solvers --plot x.gif", "'.gif'"),
        ("study solvers --plot .", "the ending ''"),
        ("study solvers --calls 0", "calls must be a whole number from 1"),
        ("study solvers --prompts 0", "prompts must be a whole number from 1"),
        ("study schedule --plot no/x.png", "does not exist"),
        ("study schedule --size 0", "width must be"),
        (f"convert {AE} no/x.safetensors", "does not exist"),
        (f"convert {AE} {AE} --force", "is what is read from"),
        (f"convert {SCHNELL} x.safetensors --picture --weights no", "no"),
        (f"lora merge {SCHNELL} --lora {REALISM} -o no/x.safetensors", "does not exist"),
        (f"lora merge {SCHNELL} --lora {REALISM} -o {SCHNELL} --force", "is what is read from"),
        (f"lora convert {REALISM} --to kohya -o x.txt", "'.txt'"),
        (f"lora convert {REALISM} --to kohya -o {REALISM} --force", "is what is read from"),
        (f"lora extract {SCHNELL} {SCHNELL} -o no/x.safetensors", "does not exist"),
    ],
)
def test_places_are_checked_first(
    command: str,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("miniflux.study.solvers.measure", "miniflux.lora.merge_files", "miniflux.lora.extract"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("computed"))
    monkeypatch.chdir(tmp_path)
    assert run(*command.split()) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_study_without_matplotlib_says_so_before_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("miniflux.study.plotting.find_spec", lambda _: None)
    assert run("study", "solvers", "--plot", str(tmp_path / "x.png")) == 2
    assert "pip install 'miniflux[study]'" in capsys.readouterr().err


def test_a_bad_place_for_a_figure_costs_no_torch() -> None:
    """So it is said at once, whatever the machine: the command alone, without the time for torch."""
    code = (
        "import sys; from miniflux.apps.cli import main; "
        "code = main(['study', 'solvers', '--plot', '/no/x.png']); "
        "sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    begun = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ}).returncode == 2
    assert time.monotonic() - begun < 20  # 0.3 s on an idle machine


@pytest.mark.parametrize(
    "command",
    [
        f"convert {AE} x.safetensors",
        f"convert {AE} x",
        f"lora convert {REALISM} --to kohya --model nano-dev -o x.safetensors",
        "study schedule --plot x.png",
    ],
)
def test_nothing_is_written_over(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second result is numbered; `--force` writes over files, and no folder is removed."""
    monkeypatch.chdir(tmp_path)
    target = Path(next(word for word in command.split() if word.split(".")[0] == "x"))
    assert run(*command.split()) == run(*command.split()) == 0
    second = target.with_name(f"x-1{target.suffix}")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / target, tmp_path / second])
    if target.suffix:
        target.write_bytes(b"mine")
        assert run(*command.split()) == 0 and target.read_bytes() == b"mine"
        assert run(*command.split(), "--force") == 0 and target.read_bytes() != b"mine"
    else:
        assert run(*command.split(), "--force") == 2


def test_an_interrupted_conversion_goes_on_under_its_numbered_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from miniflux.conversion import converting

    monkeypatch.chdir(tmp_path)
    Path("x.safetensors").write_bytes(b"mine")
    add, done = converting._Count.add, []

    def stop(self: converting._Count, count: int) -> None:
        done.append(count)
        if len(done) == 100:
            raise KeyboardInterrupt
        add(self, count)

    monkeypatch.setattr(converting._Count, "add", stop)
    assert run("convert", AE, "x.safetensors") == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-1.safetensors.part", "x.safetensors"]
    assert run("convert", AE, "x.safetensors") == 0
    assert "tensors were there from an interrupted run" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-1.safetensors", "x.safetensors"]


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", ""],
        ["convert", "", "a.safetensors"],
        ["convert", AE, ""],
        ["lora", "inspect", ""],
        ["lora", "convert", "realism", "--to", "kohya", "-o", ""],
        ["lora", "merge", "", "--lora", "realism", "-o", "a.safetensors"],
        ["lora", "extract", AE, AE, "-o", ""],
        ["replay", ""],
        ["replay", "a.png", "--weights", ""],
        ["study", "schedule", "--plot", ""],
    ],
)
def test_an_empty_name_is_not_the_folder_we_are_in(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert "the name is empty" in said and said.count("\n") == 1
