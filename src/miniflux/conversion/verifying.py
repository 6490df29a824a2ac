"""How far the numbers in a file are from what they were, read back some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from miniflux.checkpoints.files import Entry, TensorSource
from miniflux.checkpoints.formats.base import CHUNK, WEIGHT, Stored
from miniflux.checkpoints.formats.fourbit import ABSMAX, FourBit
from miniflux.checkpoints.formats.nvfp4 import Nvfp4
from miniflux.checkpoints.formats.reading import contents_of, parts_of
from miniflux.conversion.tensors import Target

ROWS = 64  # that are taken at a time come in multiples of this, so that no block of four-bit numbers is cut


def rows(shape: Sequence[int]) -> Iterator[slice]:
    """Slices over the rows of a tensor, of about `CHUNK` numbers each."""
    if not shape:
        yield slice(0, 1)
        return
    step = max(1, CHUNK // (ROWS * max(1, math.prod(shape[1:])))) * ROWS
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def difference(source: TensorSource, key: str, item: Target, numbers: Tensor) -> float | None:
    """||file - numbers|| / ||numbers|| of one tensor; None if the file holds something else under this name.

    Args:
        source: the new file.
        key: the name of the tensor there.
        numbers: what the tensor was made of.
    """
    stored = contents_of(source).of(key)
    packed = not isinstance(item.encoding, torch.dtype)
    if key not in source.entries or (packed and (stored is None or stored.shape != item.shape)):
        return None
    if packed:
        assert stored is not None
        parts = parts_of(source, key.removesuffix("." + WEIGHT), stored)
        pieces = (unpacked(stored, parts, some) for some in rows(item.shape))
    else:
        entry = source.entries[key]
        if (entry.dtype, entry.shape) != (item.encoding, item.shape):
            return None
        pieces = (_run(source, key, entry, some) for some in rows(item.shape))
    error = size = 0.0
    for some, piece in zip(rows(item.shape), pieces, strict=True):
        before = (numbers[some] if numbers.ndim else numbers.reshape(-1)).float()
        error += float((piece.float() - before).square_().sum(dtype=torch.float64))
        size += float(before.square().sum(dtype=torch.float64))
    return math.sqrt(error / size) if size else math.sqrt(error)


def _run(source: TensorSource, key: str, entry: Entry, some: slice) -> Tensor:
    """Some rows of a tensor that is not packed."""
    row = math.prod(entry.shape[1:])
    out = torch.empty((some.stop - some.start, *entry.shape[1:]), dtype=entry.dtype)
    source.read(key, out, some.start * row)
    return out


def unpacked(stored: Stored, parts: Mapping[str, Tensor], some: slice) -> Tensor:
    """Some rows of a packed weight, float32; their number and the first are multiples of `ROWS`, but for the last."""
    height, width = stored.shape
    if isinstance(stored.format, Nvfp4) and stored.format.comfy:  # whose scales lie in tiles
        return stored.unpack(parts, torch.empty(stored.shape))[some]
    if isinstance(stored.format, FourBit):
        block, start, stop = stored.facts["block"], some.start * width, some.stop * width
        cut = {WEIGHT: parts[WEIGHT].reshape(-1)[start // 2 : (stop + 1) // 2]}
        cut[ABSMAX] = parts[ABSMAX].reshape(-1)[start // block : -(-stop // block)]
    else:
        cut = {name: part[some] for name, part in parts.items() if part.ndim and len(part) == height}
    shape = (some.stop - some.start, width)
    return replace(stored, shape=shape).unpack({**parts, **cut}, torch.empty(shape))
