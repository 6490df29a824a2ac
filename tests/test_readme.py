"""What README and the pages of docs tell people to type works."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from miniflux.apps.cli import main
from miniflux.weights.finding import BUNDLED

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """All of them, also those that stand in lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All examples of a page, one after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_example_goes_by_another_name(page: Path) -> None:
    """What is Python is run: `python` here, and `py`, which needs a server, by `tests/apps/serve/test_examples.py`."""
    known = ("python", "py") if page == ROOT / "docs" / "serve.md" else ("python",)
    marks = re.findall(r"^ *```+ *([^\n`]*)", page.read_text("utf-8"), re.MULTILINE)
    assert not [mark for mark in marks if re.match(r"py|ipy", mark, re.IGNORECASE) and mark not in known]


COMMANDS = [
    line.split("  #")[0]
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.startswith("miniflux ") and not line.startswith("miniflux COMMAND")
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands with the bundled model draw; those that need official weights say so with exit code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINIFLUX_WEIGHTS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "out-of-the-attic.safetensors").symlink_to(BUNDLED / "ae.safetensors")
    Image.new("RGB", (128, 128), "blue").save(tmp_path / "a.png")
    arguments = shlex.split(command)[1:]
    assert main(arguments) == (2 if any(re.match("flux[123]-", word) for word in arguments) else 0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
