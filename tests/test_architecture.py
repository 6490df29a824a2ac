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

# Rooms and what of the project each may import; every room may import itself. Arrows point one way: from the apps down.
NETWORKS = {"errors", "models", "sampling"}
PARTS = NETWORKS | {"version", "variants", "checkpoints", "text", "conditions", "lora", "memory"}
LIBRARY = PARTS | {"arguments", "plan", "loaded", "settings", "cache", "pipeline", "pictures", "result", "root"}
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "models": NETWORKS,
    "sampling": NETWORKS,
    "variants": NETWORKS,
    "checkpoints": PARTS,
    "text": PARTS,
    "conditions": PARTS,
    "lora": PARTS,
    "memory": PARTS,
    "loaded": PARTS,
    "pictures": {"errors"},
    "arguments": PARTS | {"pictures"},
    "plan": PARTS | {"pictures", "arguments"},
    "settings": PARTS | {"arguments", "plan", "pictures"},
    "result": PARTS | {"plan", "settings"},
    "cache": PARTS | {"plan", "settings", "result"},
    "pipeline": PARTS | {"arguments", "plan", "loaded", "settings", "pictures", "result", "cache"},
    "testing": LIBRARY,
    "root": LIBRARY | {"testing"},  # miniflux/__init__.py
    "study": LIBRARY | {"nano"},  # for captions
    "training": LIBRARY,
    "nano": LIBRARY | {"training"},
    "replay": LIBRARY,
    "service": LIBRARY | {"replay"},
    "apps": LIBRARY | {"study", "training", "nano", "replay", "service"},
    "__main__": {"apps"},
}

REAL_SIZES = {3072, 12288, 15360, 21504, 9216}
# Installed only with an extra, or slow to import: what a user has not asked for must not be loaded.
HEAVY = {
    *("accelerate", "bitsandbytes", "cv2", "datasets", "diffusers", "fastapi", "gguf", "gradio"),
    *("huggingface_hub", "matplotlib", "pandas", "peft", "scipy", "streamlit", "torchvision", "transformers"),
    *("uvicorn", "wandb"),
}


def module_name(path: Path) -> str:
    """`.../miniflux/models/flux1.py` -> `models.flux1`; packages by their folder, the package itself as `root`."""
    parts = [*path.relative_to(SOURCE).parts[:-1], path.stem]
    return ".".join(part for part in parts if part != "__init__") or "root"


def room(name: str) -> str:
    return name.split(".")[0]


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
    allowed = MAY_IMPORT[room(name)] | {room(name)}
    assert not {target for target in imports(name) if room(target) not in allowed}


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
    """Every code path runs at hidden 64; the sizes of the releases live in variants.py alone."""
    if name != "variants":
        constants = [n for n in ast.walk(MODULES[name]) if isinstance(n, ast.Constant) and type(n.value) is int]
        assert not [f"line {n.lineno}: {n.value}" for n in constants if n.value in REAL_SIZES]


@pytest.mark.parametrize("name", MODULES)
def test_a_library_never_prints_and_never_exits(name: str) -> None:
    """Logging says what happened, exceptions say what went wrong; only the apps talk to people."""
    if room(name) not in {"apps", "__main__"}:
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
