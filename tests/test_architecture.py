"""The plan of the house: who may import whom, and what must not happen where."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import miniflux

SOURCE = Path(miniflux.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Rooms and what of the project each may import; every room may import itself and `errors`. Arrows point one way: from
# the apps down. A module beside the rooms is a room of its own.
BELOW = {"checks", "disk", "strictjson", "pictures", "version"}  # know nothing but errors
CORE = {"models", "sampling", "text", "variants", "families", "checks"}
FILES_AND_MEMORY = {"checkpoints", "weights", "lora", "memory"}
LIBRARY = BELOW | CORE | FILES_AND_MEMORY | {
    "conditions",
    *("arguments", "plan", "settings", "result", "cache", "loaded", "inspection", "conversion", "assembly", "drawing"),
    "batching",
    *("pipeline", "steering", "upsampling", "root"),
}  # fmt: skip
MAY_IMPORT = {
    **{name: set[str]() for name in ("errors", *BELOW)},
    # The core
    "models": set(),
    "sampling": {"models", "checks"},
    "text": {"models", "checks", "strictjson"},
    "variants": {"models", "text"},
    "families": {"sampling"},
    "conditions": CORE | {"families", "pictures"},
    # Files and memory
    "checkpoints": {"models", "variants", "disk", "strictjson"},
    "weights": {"checkpoints", "models", "variants", "disk"},
    "lora": {"checkpoints", "weights", "models", "variants", "text", "checks", "disk", "strictjson"},
    "memory": {"checkpoints", "models", "sampling"},
    "inspection": {"checkpoints", "lora", "models", "variants", "weights"},
    "conversion": {"checkpoints", "weights", "lora", "models", "sampling", "text", "variants", "strictjson"},
    "steering": {"checkpoints", "weights", "conditions", "inspection", "models", "variants"},
    "assembly": {*CORE, "conditions", "checkpoints", "weights", "memory", "inspection", "conversion"},
    "upsampling": {"checkpoints", "memory", "models", "text", "variants", "checks", "strictjson"},
    # A call, and what is said and kept of it
    "arguments": CORE | {"conditions", "lora", "pictures"},
    "plan": CORE | {"arguments", "conditions", "memory", "pictures"},
    "settings": CORE | {"arguments", "conditions", "plan", "pictures"},
    "result": {"settings", "weights", "sampling", "checks", "disk"},
    "cache": {"plan", "checkpoints", "weights", "sampling", "checks"},
    "loaded": {"checkpoints", "weights", "lora", "models", "text", "variants"},
    "drawing": CORE | {"plan", "conditions", "cache", "result", "memory", "pictures"},
    "batching": {"plan", "cache", "memory"},
    "pipeline": LIBRARY - {"pipeline", "settings", "inspection", "conversion", "root"},
    "testing": LIBRARY,
    "root": LIBRARY | {"testing"},  # miniflux/__init__.py
    # The desk
    "study": LIBRARY | {"nano"},  # for captions
    "training": LIBRARY,
    "nano": LIBRARY | {"training"},
    "replay": LIBRARY,
    "service": LIBRARY | {"replay"},
    "apps.console": set(),  # what all commands say, and how
    "apps.web": set(),  # what the page and the server share
    "apps.ui": LIBRARY | {"replay", "service", "study", "apps.web"},
    "apps.serve": LIBRARY | {"service", "apps.web", "apps.console", "apps.ui"},  # --ui serves the page as well
    "apps": LIBRARY | {"study", "training", "nano", "replay", "service", "apps.ui", "apps.serve", "apps.console"},
    "__main__": {"apps"},
}

REAL_SIZES = {3072, 12288, 15360, 21504, 9216}
# Installed only with an extra, or slow to import: what a user has not asked for must not be loaded.
HEAVY = {
    *("accelerate", "alembic", "bitsandbytes", "cv2", "datasets", "diffusers", "fastapi", "gguf", "gradio", "httpx"),
    *("huggingface_hub", "matplotlib", "openai", "pandas", "peft", "prometheus_client", "psycopg", "pydantic"),
    *("schemathesis", "scipy", "sqlalchemy", "streamlit", "torchvision", "transformers", "uvicorn", "wandb"),
}


def module_name(path: Path) -> str:
    """`.../miniflux/models/flux1.py` -> `models.flux1`; packages by their folder, the package itself as `root`."""
    parts = [*path.relative_to(SOURCE).parts[:-1], path.stem]
    return ".".join(part for part in parts if part != "__init__") or "root"


def room(name: str) -> str:
    """A folder or a module of the package; each program of more than one file is a room of its own."""
    program = ".".join(name.split(".")[:2])
    return program if program in MAY_IMPORT else name.split(".")[0]


MODULES = {module_name(path): ast.parse(path.read_text("utf-8")) for path in FILES}


def imports(name: str) -> Iterator[str]:
    """Modules of the project that a module imports, anywhere in its text."""
    is_package = (SOURCE / name.replace(".", "/")).is_dir() or name == "root"
    here = [] if name == "root" else name.split(".")
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = here[: len(here) - node.level + is_package]
                base = ".".join(["miniflux", *up, *([base] if base else [])])
            found = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in found:
            first, *rest = target.split(".")
            if first != "miniflux":
                continue
            while rest and ".".join(rest) not in MODULES:  # the last part is a name inside a module
                rest.pop()
            yield ".".join(rest) or "root"


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name: str) -> None:
    """A room knows only the rooms below it; a new room needs a line in MAY_IMPORT."""
    assert room(name) in MAY_IMPORT, f"{name}: add its room to MAY_IMPORT"
    allowed = MAY_IMPORT[room(name)] | {room(name), "errors"}
    assert not {target for target in imports(name) if room(target) not in allowed}


def test_rooms_are_in_no_circle() -> None:
    """What rooms may import is one way, too; but for the package itself, which hands on what others hold."""
    TopologicalSorter({name: below - {"root"} for name, below in MAY_IMPORT.items() if name != "root"}).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_no_import_inside_a_function_between_rooms(name: str) -> None:
    """It would hide an arrow. The apps alone import late, so that --help and errors come at once."""
    if name.split(".")[0] in {"apps", "__main__"}:
        return
    functions = [n for n in ast.walk(MODULES[name]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = [n for function in functions for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = [n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name for n in inside]
    assert not [module for module in modules if module.startswith("miniflux")]


def test_nobody_asks_which_family_it_is() -> None:
    """A family is asked for what it is like; `family ==` outside of `families` would be a branch that grows."""
    for name, tree in MODULES.items():
        compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
        sides = [ast.unparse(side) for node in compared for side in (node.left, *node.comparators)]
        asked = [side for side in sides if side.endswith(("family", "family.name"))]
        assert room(name) == "families" or name == "apps.web.listening" or not asked, name  # which asks sockets


def test_no_room_holds_more_than_a_fifth() -> None:
    lines: dict[str, int] = {}
    for path in FILES:
        home = room(module_name(path))
        lines[home] = lines.get(home, 0) + len(path.read_text("utf-8").splitlines())
    assert max(lines.values()) <= sum(lines.values()) / 5


def test_arrows_are_found() -> None:
    """The test above sees the imports that are known to be there."""
    assert "models.layers" in set(imports("models.flux1"))
    assert "models.flux1" in set(imports("sampling.denoising"))
    assert "sampling.schedules" in set(imports("sampling"))


def test_no_circles() -> None:
    """Every module can be read, and imported, after those it needs."""
    graph = {name: set(imports(name)) - {name, "root"} for name in MODULES if name != "root"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in {"models", "sampling"}])
def test_networks_need_torch_and_einops_only(name: str) -> None:
    """The models and the sampler stay readable to who knows torch."""
    allowed = {"miniflux", "torch", "einops"} | sys.stdlib_module_names
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    assert found <= allowed


@pytest.mark.parametrize("name", MODULES)
def test_no_real_sizes(name: str) -> None:
    """Every code path runs at hidden 64; the sizes of the releases live in variants/sizes.py alone."""
    if name != "variants.sizes":
        constants = [n for n in ast.walk(MODULES[name]) if isinstance(n, ast.Constant) and type(n.value) is int]
        assert not [f"line {n.lineno}: {n.value}" for n in constants if n.value in REAL_SIZES]


@pytest.mark.parametrize("name", MODULES)
def test_a_library_never_prints_and_never_exits(name: str) -> None:
    """Logging says what happened, exceptions say what went wrong; only the apps talk to people."""
    if name.split(".")[0] not in {"apps", "__main__"}:
        forbidden = {"print", "exit", "quit", "sys.exit", "os._exit", "SystemExit"}
        calls = [n for n in ast.walk(MODULES[name]) if isinstance(n, ast.Call)]
        assert not [f"line {n.lineno}: {ast.unparse(n.func)}" for n in calls if ast.unparse(n.func) in forbidden]


def test_import_is_light(tmp_path: Path) -> None:
    """`import miniflux` makes no files, changes no environment and loads no optional package."""
    code = """
import json, os, sys
before = dict(os.environ)
import miniflux
import torch
print(json.dumps({
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "environment": before == dict(os.environ),
    "cuda": torch.cuda.is_initialized(),
    "threads": torch.get_num_threads(),
}))
"""
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(SOURCE.parent)}
    environment = os.environ | home | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert not HEAVY & set(found["modules"])
    assert found["environment"]
    assert not found["cuda"]
    assert found["threads"] == 1
    assert not run.stderr
    assert not list(tmp_path.iterdir())
