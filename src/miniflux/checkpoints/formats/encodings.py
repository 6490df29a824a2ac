"""Ways to store a tensor, packed or as plain numbers: by name, and what they make of it."""

from __future__ import annotations

import re
from functools import cache

import torch

from miniflux.checkpoints.formats import FORMATS, Format
from miniflux.checkpoints.formats.base import WEIGHT, Kind
from miniflux.checkpoints.formats.ggml import BLOCKS, Ggml
from miniflux.errors import InputError

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALIASES = {
    "fp8": "fp8_scaled",
    "fp32": "float32",
    "f32": "float32",
    "fp16": "float16",
    "f16": "float16",
    "bf16": "bfloat16",
}
Encoding = Format | torch.dtype
"""How a tensor is stored: packed, or as numbers of a dtype."""
FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


def writable() -> list[str]:
    """Names of all formats that `convert` writes."""
    return [*FLOATS, *FORMATS]


def find_format(name: str) -> Encoding:
    """A format by its name: upper or lower case, `fp8 scaled` or `fp8_scaled`, `fp8` and `bf16` for short; or as people
    and files call it, `bitsandbytes nf4`, `GGUF MOSTLY_Q4_K_S`.

    Raises:
        InputError: there is none of this name that can be written; the message lists those there are.
    """
    plain = _plain(name)
    plain = ALIASES.get(plain, plain)
    found = next((known for known in writable() if known.lower() == plain), None) or accepted(name)
    if found is None:
        raise InputError(f"unknown format {name!r}; written are {', '.join([*writable(), *ALIASES])}")
    return FLOATS.get(found) or FORMATS[found]


def accepted(called: str) -> str | None:
    """The name under which `find_format` knows what a file is called after; None if it is not written."""
    plain = _plain(called)
    names = {_plain(form.label): form.name for form in FORMATS.values()}
    names |= {name.lower(): name for name in writable()}
    names |= {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2", **ALIASES}
    inner = re.sub(r"^gguf_(mostly_|all_)?|(?<=_k)_[sml]$", "", plain)  # llama.cpp: Q4_K in its mixtures small to large
    return names.get(plain) or names.get(inner)


def _plain(name: str) -> str:
    return "_".join(name.lower().replace("-", " ").replace("_", " ").split())


def file_type(most: Encoding) -> str:
    """What a GGUF file calls itself whose weights are mostly stored so."""
    if isinstance(most, Ggml):
        return f"MOSTLY_{most.name}" + ("_S" if most.name in ("Q3_K", "Q4_K", "Q5_K") else "")
    return FILE_TYPES.get(most, "ALL_F32") if isinstance(most, torch.dtype) else "ALL_F32"


@cache
def kinds_of(form: Format, shape: tuple[int, ...]) -> dict[str, Kind]:
    """dtype and shape of the parts of a packed weight as `pack` makes them, whatever its numbers."""
    if isinstance(form, Ggml):
        block = BLOCKS[form.name]
        return {WEIGHT: (torch.uint8, (shape[0], shape[1] // block.numbers * block.bytes))}
    parts = form.pack(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    return {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
