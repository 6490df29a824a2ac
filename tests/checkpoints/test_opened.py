"""A file is looked at once: for a load, an inspection, a conversion."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import miniflux
from miniflux.checkpoints import convert, files, inspect, opened
from miniflux.errors import CheckpointError
from miniflux.models.flux1 import Flux1
from miniflux.weights.finding import BUNDLED

DEV = BUNDLED / "flux1-nano-dev.safetensors"
PARTS = ("ae.safetensors", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often files were opened, divided into networks, and their layouts told."""
    seen: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        inner = getattr(module, name)

        def count(*given: Any) -> Any:
            seen[name] += 1
            return inner(*given)

        monkeypatch.setattr(module, name, count)

    for module, name in ((files, "open_file"), (opened, "divide"), (opened, "detect")):
        counted(module, name)
    return seen


def test_a_load_looks_once_at_each_file(looks: Counter[str]) -> None:
    """Transformer, autoencoder, CLIP, T5 and the tiny decoder."""
    miniflux.load("nano-dev")
    assert looks == {"open_file": 5, "divide": 5, "detect": 5}


@pytest.mark.parametrize("memory", ["stream", "offload"])
def test_a_load_of_a_file_of_ones_own(memory: str, looks: Counter[str]) -> None:
    """What it is, is told from the file that is then loaded."""
    miniflux.load(DEV, memory=memory)
    assert looks["open_file"] == looks["divide"] == 5 and looks["detect"] == 5


def test_an_inspection_looks_once(looks: Counter[str]) -> None:
    inspect(DEV)
    assert looks == {"open_file": 1, "divide": 1, "detect": 1}


def test_a_conversion_looks_once_at_what_it_reads_and_at_what_it_wrote(tmp_path: Path, looks: Counter[str]) -> None:
    convert(DEV, tmp_path / "a.safetensors", layout="diffusers")
    assert looks == {"open_file": 2, "divide": 2, "detect": 2}


def test_a_conversion_of_a_folder(tmp_path: Path, looks: Counter[str]) -> None:
    for name in (DEV.name, *PARTS):
        (tmp_path / name).symlink_to(BUNDLED / name)
    convert(tmp_path, tmp_path.parent / f"{tmp_path.name} diffusers", layout="diffusers")
    assert looks == {"open_file": 8, "divide": 8, "detect": 8}


def test_what_cannot_be_opened_is_said_each_time(tmp_path: Path) -> None:
    shelf, path = opened.Opened(), tmp_path / "a.safetensors"
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            shelf.part(path, Flux1)
