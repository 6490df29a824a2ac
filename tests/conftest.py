"""What every test may use: the reference data, and settings that keep the suite fast, repeatable and offline."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers and diffusers are imported

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from torch import Tensor

torch.set_num_threads(1)  # the tensors are tiny: more threads only cost
settings.register_profile("miniflux", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("miniflux")

REPOSITORY = Path(__file__).resolve().parents[1]


def reference_folder() -> Path:
    """Where the reference data should be: MINIFLUX_REFERENCE, else `../shared/reference` beside the checkout."""
    return Path(os.environ.get("MINIFLUX_REFERENCE") or REPOSITORY / "../shared/reference").resolve()


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference data; the test is skipped on machines without it."""
    folder = reference_folder()
    if not (folder / "golden").is_dir():
        pytest.skip(f"no reference data in {folder}: set MINIFLUX_REFERENCE to its folder")
    return folder


@dataclass(frozen=True)
class Golden:
    """One file of inputs and outputs of the original release's code."""

    about: dict[str, Any]
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


@pytest.fixture(scope="session")
def golden(reference: Path) -> Callable[[str], Golden]:
    """Read `golden/NAME.safetensors`."""

    def read(name: str) -> Golden:
        with safe_open(reference / "golden" / f"{name}.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()["about"])
        weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
        return Golden(about, weights, {k: t for k, t in tensors.items() if not k.startswith("weights.")})

    return read


@pytest.fixture(scope="session")
def published(reference: Path) -> dict[str, Any]:
    """The hyper-parameters of the published models (`configs.json`)."""
    return json.loads((reference / "configs.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def manifest(reference: Path) -> Callable[[str], dict[str, list[int]]]:
    """Keys and shapes of a published checkpoint (`manifests/NAME.json`)."""

    def read(name: str) -> dict[str, list[int]]:
        tensors = json.loads((reference / "manifests" / f"{name}.json").read_text("utf-8"))["tensors"]
        return {key: tensor["shape"] for key, tensor in tensors.items()}

    return read
