"""What the site has beside the pages of this folder: pages that lie elsewhere, a reference of every module, notebooks.

MkDocs calls `on_config`, `on_files` and `on_page_markdown`. Everything else needs nothing but Python, so that tests can
ask what will be built where MkDocs is not installed.
"""

from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "miniflux"

ELSEWHERE = {
    "index.md": "README.md",
    "weights.md": "weights/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/RESULTS.md",
}
"""Pages of the site, and where they lie in the repository."""
PROGRAMS = ("apps", "nano.recipe", "__main__")  # have pages of their own, and nothing in them is imported by others
LINK = re.compile(r"(?P<before>!?\[[^\]]*\]\()(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
INDENTED_FENCE = re.compile(r"^  (```\w*\n(?:  .*\n|\n)*?  ```)$", re.MULTILINE)


# Pages and the links between them


@cache
def pages() -> dict[str, str]:
    """Every page that somebody wrote, as the site and as the repository name it: notebooks are pages, too."""
    here = sorted((ROOT / "docs").rglob("*.md"))
    found = {path.relative_to(ROOT / "docs").as_posix(): path.relative_to(ROOT).as_posix() for path in here}
    rendered = {f"notebooks/{path.stem}.md": f"docs/notebooks/{path.name}" for path in notebooks()}
    return {**ELSEWHERE, **found, **rendered}


def notebooks() -> list[Path]:
    return sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def text_of(page: str) -> str:
    """The Markdown of a page, links as in the repository."""
    path = ROOT / pages()[page]
    text = path.read_text("utf-8")
    return from_notebook(text, path.stem)[0] if path.suffix == ".ipynb" else text


def target_of(page: str, link: str) -> str:
    """Where a link of a page leads, as a path in the repository; `link` without its anchor."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(pages()[page]), link))


def place_of(path: str) -> str | None:
    """Where the site has a file of the repository; None if it has not."""
    for page, source in pages().items():
        if source == path:
            return page
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" if (ROOT / path).is_file() else None


def links_of(page: str) -> list[str]:
    """The links of a page that lead into the repository."""
    return [link["target"] for link in LINK.finditer(text_of(page)) if not re.match(r"\w+:", link["target"])]


def for_site(page: str, text: str) -> str:
    """A page as the site needs it: links lead to where the site has their target; code in a list is indented as
    Python-Markdown asks, by four, where other programs are content with two."""

    def link(found: re.Match[str]) -> str:
        target = found["target"]
        place = None if re.match(r"\w+:", target) else place_of(target_of(page, target))
        if place is None:
            return found[0]
        path = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"{found['before']}{path}{found['anchor'] or ''})"

    text = INDENTED_FENCE.sub(lambda found: "\n".join(f"  {line}" for line in found[0].split("\n")) + "\n", text)
    return LINK.sub(link, text)


# Notebooks


def from_notebook(text: str, stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, nothing executed: words, code, what was printed; and its pictures by their names."""
    written, pictures = list[str](), dict[str, bytes]()
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            written.append(source)
        elif cell["cell_type"] == "code":
            written.append(f"```python\n{source}\n```")
            for output in cell["outputs"]:
                data = output.get("data", {})
                if "image/png" in data:
                    name = f"{stem}-{len(pictures) + 1}.png"
                    pictures[name] = base64.b64decode("".join(data["image/png"]))
                    written.append(f"![What the cell shows]({name})")
                elif said := "".join(output.get("text", data.get("text/plain", ""))):
                    written.append(f"```text\n{said.rstrip()}\n```")
    return "\n\n".join(written) + "\n", pictures


# The reference


@cache
def modules() -> dict[str, ast.Module]:
    """Every module that others may import, by its name, in order."""
    found: dict[str, ast.Module] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        inside = name.removeprefix("miniflux.")
        if not any(inside == program or inside.startswith(f"{program}.") for program in PROGRAMS):
            found[name] = ast.parse(path.read_text("utf-8"))
    return dict(sorted(found.items()))


def handed_on(module: str) -> list[str]:
    """What a package makes public that is defined in another module, by its full name there."""
    lists = [value for name, value in _assigned(modules()[module]) if name == "__all__"]
    homes = [_home(module, name) for names in lists for name in ast.literal_eval(names)]
    return sorted({home for home in homes if home is not None and not home.startswith("miniflux.version")})


def _home(module: str, name: str) -> str | None:
    """Where a name of a module is defined; None if in itself."""
    tree, seen = modules()[module], module
    while True:
        sources = {
            alias.asname or alias.name: (f"{node.module}", alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and not node.level
            for alias in node.names
        }
        if name not in sources:
            return None if seen == module else f"{seen}.{name}"
        source, name = sources[name]
        if f"{source}.{name}" in modules():
            return f"{source}.{name}"
        if source not in modules():
            return None
        tree, seen = modules()[source], source


def own(module: str) -> list[str]:
    """Public names that a module defines itself, in order."""
    found: list[str] = []
    for node in modules()[module].body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append(node.target.id)
    found += [name for name, _ in _assigned(modules()[module])]
    return [name for name in dict.fromkeys(found) if not name.startswith("_")]


def _assigned(tree: ast.Module) -> list[tuple[str, ast.expr]]:
    """The names that a module binds to values, with these; of several on one line, to the whole."""
    return [(name, node.value) for node in tree.body if isinstance(node, ast.Assign) for name in _names(node)]


def _names(node: ast.Assign) -> list[str]:
    each = [name for target in node.targets for name in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [name.id for name in each if isinstance(name, ast.Name)]


def reference() -> dict[str, str]:
    """The Markdown of every page of the reference."""
    return {f"reference/{name}.md": _module_page(name) for name in modules()}


def _module_page(name: str) -> str:
    lines, names, mine = [f"::: {name}"], handed_on(name), own(name)
    if names:  # or they would be shown as the module's own, a second time
        lines += ["    options:", f"      members: {json.dumps(mine) if mine else 'false'}"]
    for node in _together(name):
        lines += ["", "```python", ast.unparse(node), "```"]
    if names:
        lines += ["", "**Names it hands on**", ""]
    for full in names:
        module, _, last = full.rpartition(".")
        lines.append(f"- [`{last}`][{module if last in _bound_together(module) else full}], of `{module}`")
    return "\n".join(lines) + "\n"


def _together(module: str) -> list[ast.Assign]:
    """Lines that bind several names at once (`A, B = 1, 2`), which mkdocstrings does not show."""
    tree = modules().get(module, ast.Module([], []))
    lines = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)]
    return [node for node in lines if not all(name.startswith("_") for name in _names(node))]


def _bound_together(module: str) -> set[str]:
    return {name for node in _together(module) for name in _names(node)}


# The navigation


def filled(nav: list[Any]) -> list[Any]:
    """A navigation whose folders (`study/`) are replaced by the pages in them; those that hold none are left out."""
    found: list[Any] = []
    for entry in nav:
        ((title, value),) = entry.items() if isinstance(entry, dict) else ((None, entry),)
        if isinstance(value, list):
            value = filled(value)
        elif value == "reference/":
            value = _rooms()
        elif value.endswith("/"):
            inside = [page for page in pages() if page.startswith(value)]
            value = sorted(inside, key=lambda page: (not page.endswith("README.md"), page))
        if value:
            found.append(value if title is None else {title: value})
    return found


def _rooms() -> list[Any]:
    """The pages of the reference, those of a room together."""
    rooms: dict[str, list[Any]] = {}
    for name in modules():
        inside = name.removeprefix("miniflux").removeprefix(".")
        rooms.setdefault(inside.partition(".")[0] or "miniflux", []).append({inside or name: f"reference/{name}.md"})
    alone = [entries[0] for entries in rooms.values() if len(entries) == 1]
    return [*alone, *({room: entries} for room, entries in rooms.items() if len(entries) > 1)]


# What MkDocs calls


def on_config(config: Any) -> Any:
    for made in (pages, modules):  # of an earlier build, while it serves
        made.cache_clear()
    config.nav = filled(config.nav)
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for page in [page for page, source in pages().items() if page != source.removeprefix("docs/")]:
        files.append(File.generated(config, page, content=text_of(page)))
    for page, text in reference().items():
        files.append(File.generated(config, page, content=text))
    for path in notebooks():
        for name, data in from_notebook(path.read_text("utf-8"), path.stem)[1].items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    linked = {target_of(page, link) for page in pages() for link in links_of(page)}
    for path in sorted(linked):
        place = place_of(path)
        if place is not None and place.startswith("files/"):
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    name = page.file.src_uri
    return for_site(name, markdown) if name in pages() else markdown
