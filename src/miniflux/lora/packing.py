"""Merged weights in the place of packed ones.

What is packed lies on a coarse grid, and most changes are smaller than half of its steps: packed again, the weight
falls back to where it was. Of a LoRA with |dW| / |W| = 0.01 int8 keeps 0.9, scaled float8 0.4, and formats of four bits
0.02. So a merged weight stays wide, unless the user asks for its old format.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from miniflux.checkpoints.formats.base import WEIGHT, Kind, Stored, pieces
from miniflux.checkpoints.formats.encodings import kinds_of
from miniflux.checkpoints.formats.ggml import Ggml
from miniflux.checkpoints.formats.scaled import PLAIN
from miniflux.checkpoints.loading import is_finite
from miniflux.checkpoints.quantized import Stack
from miniflux.errors import LoraError

log = logging.getLogger(__name__)
FAITHFUL = 0.9  # share of a change below which a user is told


@dataclass(frozen=True)
class Rounding:
    """What packing again did to a merged weight.

    Attributes:
        layer: its name.
        format: what it is packed in.
        error: ||new - (W + dW)|| / ||W + dW||.
        arrived: the share of dW that is in the new weight: <new - W, dW> / ||dW||^2; 1 if nothing is lost.
    """

    layer: str
    format: str
    error: float
    arrived: float


def _wide(numbers: Tensor, dtype: torch.dtype) -> Stack:
    """Rows as plain floats among packed ones."""
    shape = tuple(numbers.shape)
    return Stored(PLAIN, shape, {WEIGHT: (dtype, shape)}), {WEIGHT: numbers.to(dtype, copy=True)}


def why_not(stored: Stored, columns: int) -> str:
    """Why rows that were stored so cannot be packed in this way again; empty if they can."""
    form, shape = stored.format, _shape(stored, columns)
    fits = form is PLAIN or form.holds(shape)
    return "" if fits else f"{form.label} is not written for {shape[0]}x{shape[1]} numbers"


def again(name: str, stored: Stored, numbers: Tensor, dtype: torch.dtype | None) -> Stack:
    """Merged rows (float32) in the place of packed ones: wide in a dtype, or, for None, in the format that they were
    in; scales of scales (bitsandbytes' nested statistics) then become plain ones.

    Raises:
        LoraError: see `check_range`.
    """
    form = stored.format
    check_range(name, numbers)
    if dtype is not None or form is PLAIN:
        made, parts = _wide(numbers, stored.parts[WEIGHT][0] if form is PLAIN else dtype or torch.float32)
    else:
        parts = form.pack(numbers.reshape(_shape(stored, numbers.shape[1])))
        made = form.read(
            {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}, parts.__getitem__
        )
        made = replace(made, shape=tuple(numbers.shape))
    check_range(name, *parts.values())
    if not made.format.sound(made, parts):
        raise LoraError(f"{name}: with the LoRA in it, it has numbers beyond the range of {form.label}")
    return made, parts


def kinds_again(stored: Stored, shape: tuple[int, ...]) -> dict[str, Kind]:
    """What packing rows of this shape again gives: dtype and shape of each part."""
    return kinds_of(stored.format, _shape(stored, shape[1]))


def check_range(name: str, *tensors: Tensor) -> None:
    """Refuse what merging has driven beyond the range of its dtype.

    Raises:
        LoraError: a number is infinite or NaN.
    """
    for tensor in tensors:
        if not is_finite(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise LoraError(f"{name}: with the LoRA in it, it has numbers beyond the range of {kind}")


def _shape(stored: Stored, columns: int) -> tuple[int, int]:
    """What the format sees of a weight: GGUF files may hold one in rows of another length."""
    if isinstance(stored.format, Ggml) and columns == stored.shape[1]:
        rows = stored.parts[WEIGHT][1][0]
        return rows, stored.shape[0] * columns // rows
    return stored.shape[0], columns


def rounding(layer: str, before: Tensor, wanted: Tensor, stack: Stack) -> Rounding:
    """Compare rows as they were and as they were to become (float32) with what they have become."""
    stored, parts = stack
    new = stored.unpack(parts, torch.empty_like(wanted))
    error = whole = along = size = 0.0
    for piece in pieces(*wanted.shape):
        change, moved = wanted[piece] - before[piece], new[piece] - before[piece]
        error += float((moved - change).square().sum(dtype=torch.float64))
        whole += float(wanted[piece].square().sum(dtype=torch.float64))
        along += float((moved * change).sum(dtype=torch.float64))
        size += float(change.square().sum(dtype=torch.float64))
    return Rounding(layer, stored.format.label, math.sqrt(error / whole) if whole else 0.0, along / size if size else 1)


def report(roundings: Sequence[Rounding]) -> None:
    """Say what packing again has cost: always to the log, and as a warning where part of a change is lost."""
    if not roundings:
        return
    worst = max(roundings, key=lambda rounding: rounding.error)
    log.info(
        "%d merged weights were packed again; the largest relative error is %.2g, that of %s (%s)",
        *(len(roundings), worst.error, worst.layer, worst.format),
    )
    lossy = [rounding for rounding in roundings if rounding.arrived < FAITHFUL]
    if lossy:
        least = min(lossy, key=lambda rounding: rounding.arrived)
        warnings.warn(
            f"{len(lossy)} of {len(roundings)} packed weights lose part of their change to rounding: of that of "
            f"{least.layer} ({least.format}) {max(0.0, least.arrived):.0%} is left; "
            "attach the LoRA instead, or merge it without packing again",
            stacklevel=3,
        )
