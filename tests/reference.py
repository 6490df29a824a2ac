"""Opens the reference data: what the code of others computes, names and numbers. `tests/data/README.md` says whose.

Everything that the tests need lies in `tests/data`. A folder of the same form, named by MINIFLUX_REFERENCE or at
`../shared/reference` beside the checkout, adds what is too large for the repository; a test that asks for such a thing
is skipped where there is none.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from miniflux.models.linear import _by_intel  # pyright: ignore[reportPrivateUsage]

DATA = Path(__file__).parent / "data"
BESIDE = DATA.parents[1] / "../shared/reference"


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


def find(name: str) -> Path:
    """A file or folder of the reference, packed or not: here, else in the folder that adds to it; else a skip."""
    folders = [DATA, Path(os.environ.get("MINIFLUX_REFERENCE") or BESIDE).resolve()]
    for path in (folder / form for folder in folders for form in (name, f"{name}.gz")):
        if path.exists():
            return path
    if folders[1].is_dir():
        raise FileNotFoundError(f"no {name} in {folders[0]}, nor in {folders[1]}")
    pytest.skip(f"no {name} in tests/data: set MINIFLUX_REFERENCE to a folder that has it")


def read(path: Path) -> bytes:
    """What a file holds, unpacked."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def opened(name: str) -> Any:
    """A JSON file, parsed anew: the caller may change it."""
    return json.loads(read(find(name)))


def names(kind: str) -> set[str]:
    """What lies in `tests/data` of "golden", "manifests" or "lora_dialects"; notes, which begin with `_`, aside."""
    files = (path.name.removesuffix(".gz") for path in (DATA / kind).glob("[!_]*.*") if path.suffix != ".md")
    return {name.rpartition(".")[0] for name in files}


def golden(name: str) -> Golden:
    """Inputs, outputs and weights of one case."""
    with safe_open(find(f"golden/{name}.safetensors"), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["about"])
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    return Golden(about, weights, {k: t for k, t in tensors.items() if not k.startswith("weights.")})


def manifest(name: str) -> dict[str, list[int]]:
    """Keys and shapes of a published checkpoint."""
    return {key: tensor["shape"] for key, tensor in opened(f"manifests/{name}.json")["tensors"].items()}


def dialect(name: str) -> dict[str, Any]:
    """One way of naming the tensors of a LoRA file."""
    return opened(f"lora_dialects/{name}.json")


def configs() -> dict[str, Any]:
    """The hyper-parameters of the published models, each with its source."""
    return opened("configs.json")


def scenes() -> dict[str, Any]:
    """What the bundled models learn to draw, and how pictures are judged."""
    return opened("nano_scenes.json")


def prompts() -> list[dict[str, Any]]:
    """Prompts with their exact ids; the head of the file explains each field."""
    return opened("token_ids.json")["prompts"]


def unpack_tokenizer(name: str, target: Path) -> None:
    """A published tokenizer, "clip_l", "t5_v1_1_xxl" or "qwen3", as the folder that others can open."""
    source = find(f"tokenizers/{name}")
    target.mkdir()
    for path in source.iterdir():
        (target / path.name.removesuffix(".gz")).write_bytes(read(path))


# What depends on the processor

INTEL = _by_intel()
"""Whether float32 is multiplied, and exponentials are computed, by MKL's code for processors of Intel: a row is then
rounded by how many others there are and where its weight lies, and frequencies of time have other last bits than where
the reference was recorded. At a time of 1000 one such bit moves an angle by 6e-5."""


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two results are bit for bit the same; where rows are not rounded alike, within 1e-4 of the largest."""
    return torch.equal(a, b) or (INTEL and float((a - b).abs().max()) <= 1e-4 * max(1.0, float(b.abs().max())))


def of_exponentials(call: Callable[[], Tensor]) -> float:
    """How far a result moves if the frequencies of time move by their last bit; 0 where they are as recorded."""
    if not INTEL:
        return 0.0
    plain = call()
    moved: list[float] = []
    for towards in (torch.inf, -torch.inf):
        with _nudged(towards):
            moved.append(float((call() - plain).abs().max()))
    return max(moved)


@contextmanager
def _nudged(towards: float) -> Generator[None]:
    exp = torch.exp
    torch.exp = lambda x: torch.nextafter(exp(x), torch.tensor(towards))  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.exp = exp
