"""What every test may use: the reference data, and settings that keep the suite fast, repeatable and offline."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers and diffusers are imported

import pytest
import torch
from hypothesis import settings

from miniflux.checkpoints.files import TensorFile
from tests import reference

torch.set_num_threads(1)  # the tensors are tiny: more threads only cost
settings.register_profile("miniflux", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("miniflux")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], reference.Golden]:
    """Inputs and outputs of the original release's code, by the name of the case."""
    return reference.golden


@pytest.fixture(scope="session")
def manifest() -> Callable[[str], dict[str, list[int]]]:
    """Keys and shapes of a published checkpoint, by its name."""
    return reference.manifest


@pytest.fixture(scope="session")
def published() -> dict[str, Any]:
    """The hyper-parameters of the published models."""
    return reference.configs()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a published tokenizer, by its name; all tests of a process share it, so none may write there."""
    folder = tmp_path_factory.mktemp("tokenizers")

    def unpacked(name: str) -> Path:
        if not (folder / name).exists():
            reference.unpack_tokenizer(name, folder / name)
        return folder / name

    return unpacked


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """The command line sets the level of the root logger, as is its right; the next test finds it as it was."""
    root = logging.getLogger()
    before = root.level
    yield
    root.setLevel(before)


@pytest.fixture
def headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor may be read."""

    def refuse(*_: object) -> Any:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorFile, "view", refuse)
    monkeypatch.setattr(TensorFile, "read", refuse)
