"""Consoles that lack characters, readers that go away, closed streams: no picture is lost, no exit code is 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PROMPT = "a café 🐱 with žluť \u202e and 円"
DRAW = [sys.executable, "-m", "miniflux", "generate", "--steps", "1", "--size", "64x48"]


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


@pytest.mark.parametrize(
    "console",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp437:strict", "COLUMNS": "1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX"},
    ],
    ids=str,
)
def test_consoles_that_lack_characters(console: dict[str, str], tmp_path: Path) -> None:
    """Pictures named from prompts, several prompts (which are printed), one that fails."""
    words = [PROMPT, "a red star", "-o", "{prompt}.png"]
    run = subprocess.run([*DRAW, *words], cwd=tmp_path, env=environment(**console), capture_output=True, check=False)
    assert run.returncode == 0 and b"Traceback" not in run.stderr, run.stderr
    assert len(list(tmp_path.glob("*.png"))) == 2 and run.stdout.count(b"\n") == 2
    run = subprocess.run([*DRAW, PROMPT, "--model", PROMPT], cwd=tmp_path, env=environment(**console),
                         capture_output=True, check=False)  # fmt: skip
    assert run.returncode == 2 and run.stderr.count(b"\n") == 1, run.stderr
    run = subprocess.run([*DRAW, "--help"], env=environment(**console), capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


def test_names_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    """They are drawn to, and printed as they are, so that scripts find the file."""
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    run = subprocess.run([*DRAW, "a star", "-o", name], env=environment(), capture_output=True, check=False)
    assert run.returncode == 0 and run.stdout.startswith(name), run.stderr
    assert os.path.getsize(name) > 0
    run = subprocess.run([*DRAW, "a star", "--image", name + b"x"], env=environment(), capture_output=True, check=False)
    assert run.returncode == 2 and run.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "redirection", [">&-", "2>&-", ">&- 2>&- <&-", "| true", "2>&1 | true", ">/dev/full 2>/dev/full"]
)
def test_streams_that_are_closed_full_or_not_read(redirection: str, tmp_path: Path) -> None:
    """Both pictures are drawn, whole."""
    command = f'set -o pipefail; "$@" {redirection}'
    words = [*DRAW, "a star", "--images", "2", "-o", "x.png"]
    run = subprocess.run(["bash", "-c", command, "bash", *words], cwd=tmp_path, env=environment(), capture_output=True,
                         check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert b"Traceback" not in run.stderr and b"Exception ignored" not in run.stderr
    for i in (1, 2):
        Image.open(tmp_path / f"x-{i}.png").load()


@pytest.mark.parametrize("words", [["--help"], ["study", "schedule", "--steps", "900"], ["variants"]])
@pytest.mark.parametrize("redirection", ["| head -n 1", ">/dev/full", ">&-"])
def test_text_that_nobody_reads(words: list[str], redirection: str) -> None:
    command = f'set -o pipefail; "$@" {redirection}'
    program = ["bash", "-c", command, "bash", sys.executable, "-m", "miniflux", *words]
    run = subprocess.run(program, env=environment(), capture_output=True, check=False)
    assert run.returncode == 0 and b"Traceback" not in run.stderr and b"Exception ignored" not in run.stderr
