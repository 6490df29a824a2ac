"""What is published: everything is in it, what it says of itself is true, and its messages name nothing it lacks."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
HOME = "https://git.example/somebody/miniflux"


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout, so nobody knows what belongs to it")
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in found.stdout.split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What setuptools writes about a distribution, in a folder of its own."""
    folder = tmp_path_factory.mktemp("info")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "miniflux.egg-info"


def test_the_source_distribution_is_the_repository(info: Path, tracked: set[str]) -> None:
    """Every file: fixtures, conftest.py, Makefile, constraints.txt, documents and their pictures."""
    packed = set((info / "SOURCES.txt").read_text("utf-8").splitlines())
    assert sorted(tracked - packed) == []
    assert {"tests/conftest.py", "Makefile", "constraints.txt", ".ci/run", "setup.py"} <= packed
    assert not [name for name in packed if name.endswith((".pyc", ".part"))]


def test_the_wheel_has_every_file_of_the_package(tracked: set[str], tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path), "egg_info", "--egg-base"]
    subprocess.run([*command, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    built = {path.relative_to(tmp_path / "lib").as_posix() for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    wanted = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    assert sorted(wanted - built) == []


def test_metadata(info: Path) -> None:
    metadata = Metadata.from_email((info / "PKG-INFO").read_text("utf-8"), validate=True)
    assert metadata.name == "miniflux" and metadata.author == "The miniflux authors"
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert metadata.project_urls is not None and all(
        url.startswith("https://") for url in metadata.project_urls.values()
    )
    assert metadata.summary is not None and len(metadata.summary) < 200
    assert metadata.keywords and all("," not in word for word in metadata.keywords)


@pytest.mark.parametrize("address", ["", HOME])
def test_links_of_the_readme_work_on_an_index(address: str) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    relative = re.findall(r"\]\((?!https?://|#)([^)]+)\)", readme)
    shown = SETUP["description"](readme, address)
    assert relative and not re.search(r"\]\((?!https?://|#)", shown)
    for target in relative:
        assert target in shown
        assert not address or re.search(rf"\({HOME}/(raw|blob)/v[\d.a-z]+/{re.escape(target)}\)", shown)
    assert not address or f"![Pictures drawn by the bundled model]({HOME}/raw/" in shown


def test_addresses_follow_from_one() -> None:
    assert "Source" not in SETUP["urls"]("")
    urls = SETUP["urls"](HOME)
    assert urls["Source"] == HOME and urls["Issues"] == f"{HOME}/issues"
    for name in ("Documentation", "Changelog"):
        path = re.sub(rf"{HOME}/(tree|blob)/v[^/]+/", "", urls[name])
        assert (ROOT / path).exists()


def messages(path: Path) -> list[str]:
    """The texts of a module that are no docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bare: set[Any] = {
        line.value
        for node in ast.walk(tree)
        if isinstance(node, holders)
        for line in node.body
        if isinstance(line, ast.Expr)
    }
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [str(text.value) for text in texts if text not in bare]


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: path.stem)
def test_no_message_names_a_file_that_a_wheel_lacks(path: Path) -> None:
    for text in messages(path):
        assert not re.search(r"\b[\w/.-]+\.(md|rst)\b|\b(docs|tests|benchmarks)/|\bMakefile\b", text), text
