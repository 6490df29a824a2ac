"""The site of the documents: whole without being built, and built strictly where MkDocs is installed."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

import miniflux

ROOT = Path(__file__).resolve().parents[1]
HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
MKDOCS = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
PAGES: dict[str, str] = HOOKS["pages"]()


def leaves(nav: Any) -> list[str]:
    """The pages of a navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in leaves(entry)]


def test_every_page_is_in_the_navigation_once() -> None:
    found = leaves(HOOKS["filled"](MKDOCS["nav"]))
    assert sorted(found) == sorted([*PAGES, *HOOKS["reference"]()])
    written = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert written <= set(PAGES.values())


def test_every_module_has_a_page_in_the_reference() -> None:
    """All of the package but its programs."""
    files = (path.relative_to(ROOT / "src").with_suffix("") for path in (ROOT / "src").rglob("*.py"))
    names = {".".join(part for part in path.parts if part != "__init__") for path in files}
    programs = {name for name in names if re.match(r"miniflux\.(apps|nano\.recipe|__main__)(\.|$)", name)}
    assert set(HOOKS["reference"]()) == {f"reference/{name}.md" for name in names - programs}
    assert len(names - programs) > 200 and "reference/miniflux.models.flux1.md" in HOOKS["reference"]()


def test_every_public_name_leads_to_where_it_is_defined() -> None:
    """Names that a package hands on are found in the module that the reference sends readers to."""
    for name in miniflux.__all__:
        if name != "__version__":
            assert any(full.rpartition(".")[2] == name for full in HOOKS["handed_on"]("miniflux")), name
    found = {module: HOOKS["handed_on"](module) for module in HOOKS["modules"]()}
    assert "miniflux.result.Result" in found["miniflux"] and "miniflux.models" in found["miniflux"]
    assert "miniflux.sampling.denoising.denoise" in found["miniflux.sampling"]
    for full in {full for names in found.values() for full in names}:
        module, _, name = full.rpartition(".")
        assert full in HOOKS["modules"]() or hasattr(importlib.import_module(module), name), full


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_pages_and_headings(page: str) -> None:
    for link in HOOKS["LINK"].finditer(HOOKS["text_of"](page)):
        target, anchor = link["target"], link["anchor"]
        if re.match(r"\w+:", target):
            continue
        path = HOOKS["target_of"](page, target)
        assert (ROOT / path).exists(), target
        assert HOOKS["place_of"](path) is not None, f"{target}: the site has no folders"
        if anchor and path.endswith(".md"):
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
            assert anchor[1:] in {slug(heading) for heading in headings}, f"{target}{anchor}"


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_links_are_those_of_the_site() -> None:
    """A page elsewhere, a picture, a heading, a file that is no page; what leads out of the repository stays."""
    written = (
        "[a](../weights/README.md) ![b](images/nano.png) [c](lora.md#merging) [d](../compose.yaml) [e](https://e.org/x)"
    )
    assert HOOKS["for_site"]("serve.md", written) == (
        "[a](weights.md) ![b](images/nano.png) [c](lora.md#merging) [d](files/compose.yaml) [e](https://e.org/x)"
    )
    assert (
        HOOKS["for_site"]("index.md", "[a](docs/models.md) [b](weights/README.md)") == "[a](models.md) [b](weights.md)"
    )
    listed = "- a list\n\n  ```python\n  a = 1\n\n  b = 2\n  ```\n"
    assert HOOKS["for_site"]("lora.md", listed) == "- a list\n\n    ```python\n    a = 1\n  \n    b = 2\n    ```\n\n"


def test_arguments_that_share_a_line_are_told_one_by_one() -> None:
    each_alone = runpy.run_path(str(ROOT / "docs" / "docstrings.py"))["each_alone"]
    text = (
        "One, two: no arguments.\n\nArgs:\n    a, b: two,\n        of a kind.\n    c: d, e: f\n\nReturns:\n    x, y: z"
    )
    expected = text.replace(
        "    a, b: two,\n        of a kind.", "    a: two,\n        of a kind.\n    b: two,\n        of a kind."
    )
    assert each_alone(text) == expected


def test_notebooks_become_pages() -> None:
    """Words, code, what it printed and showed; nothing is executed."""
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"output_type": "stream", "text": ["1\n"]},
                {"output_type": "display_data", "data": {"image/png": "aGVyZQ==", "text/plain": ["<Image>"]}},
                {"output_type": "execute_result", "data": {"text/plain": ["2"]}},
            ],
        },
    ]
    text, pictures = HOOKS["from_notebook"](json.dumps({"cells": cells}), "anatomy")
    assert text.split("\n\n") == [
        "# Title\nwords",
        "```python\nprint(1)\n```",
        "```text\n1\n```",
        "![What the cell shows](anatomy-1.png)",
        "```text\n2\n```\n",
    ]
    assert pictures == {"anatomy-1.png": b"here"}


def test_sections_without_pages_are_left_out() -> None:
    nav = [{"A": "index.md"}, {"None": "nowhere/"}, {"B": ["text.md", "nowhere/"]}]
    assert HOOKS["filled"](nav) == [{"A": "index.md"}, {"B": ["text.md"]}]


def test_nothing_is_asked_from_elsewhere() -> None:
    assert MKDOCS["theme"]["font"] is False
    assert MKDOCS["extra_css"] == ["site.css"] and not MKDOCS.get("extra_javascript")
    assert MKDOCS["extra"]["polyfills"] == ["iframe-worker.js"]


class Loaded(HTMLParser):
    """Addresses that a browser loads by itself, and those that readers can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.loads, self.links, self.ids = list[str](), list[str](), set[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {value for name, value in attrs if name in ("id", "name") and value}
        if tag == "a":
            self.links.append(given.get("href") or "")
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given.get("href") or "")
        elif tag in ("script", "img", "iframe", "source", "video"):
            self.loads.append(given.get("src") or "")


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="MkDocs is not installed (make docs)")
def test_it_builds_strictly_and_needs_no_network(tmp_path: Path) -> None:
    """Every page that is loaded loads its own files alone, and every link inside leads to a file and a place in it."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    found: dict[Path, Loaded] = {}
    for path in tmp_path.rglob("*.html"):
        found[path] = Loaded()
        found[path].feed(path.read_text("utf-8"))
    assert len(found) > len(PAGES)
    for path, page in found.items():
        outside = [url for url in page.loads if re.match(r"(\w+:)?//", url)]
        assert not outside, f"{path.name}: {outside}"
        for link in page.links:
            target, _, anchor = unquote(link).partition("#")
            if re.match(r"\w+:", target) or path.name == "404.html":
                continue
            there = (path.parent / target.partition("?")[0]).resolve() if target else path
            assert there.exists(), f"{path.name}: {link}"
            if anchor and there in found:
                assert anchor in found[there].ids, f"{path.name}: {link}"
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(\w+:)?//", style.read_text("utf-8")), style.name
    assert "denoise" in (tmp_path / "search" / "search_index.json").read_text("utf-8")
