"""Packed weights from one layout into another as they are: rows are taken apart, put together or in another order, but
no number changes.

Parts that hold something of every row (codes, scales of rows or blocks) are cut and stacked like the rows. Parts of the
whole weight (its one scale, a table: `Format.shared`) must be equal in what is to be stacked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from miniflux.checkpoints.files import TensorSource
from miniflux.checkpoints.formats import Format
from miniflux.checkpoints.formats.base import WEIGHT, Stored
from miniflux.checkpoints.formats.encodings import kinds_of
from miniflux.checkpoints.formats.reading import contents_of, parts_of
from miniflux.checkpoints.formats.scaled import PLAIN
from miniflux.checkpoints.layouts import MOVED, Counterpart, to_ours, to_theirs


@dataclass(frozen=True)
class Stretch:
    """Some rows of a packed weight.

    Attributes:
        layer: whose weight it is, in the file.
        stored: how.
        start, stop: the rows.
    """

    layer: str
    stored: Stored
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def runs_of(source: TensorSource, origin: Counterpart) -> list[Stretch] | None:
    """The rows of one of the network's weights, in its order; None if none of them is packed by more than a cast."""
    contents, runs = contents_of(source), list[Stretch]()
    for key in origin.keys:
        stored, entry = contents.of(key), source.entries[key]
        if stored is None or stored.is_cast:
            stored = Stored(PLAIN, entry.shape, {WEIGHT: (entry.dtype, entry.shape)})
        runs.append(Stretch(key.removesuffix("." + WEIGHT), stored, 0, stored.shape[0] if stored.shape else 0))
    if all(run.stored.format is PLAIN for run in runs):
        return None
    count = sum(run.rows for run in runs)
    return _ordered(runs, to_ours([torch.arange(count)], origin, (count,))) if origin.how in MOVED else runs


def shared_out(runs: Sequence[Stretch], origin: Counterpart, heights: Sequence[int]) -> list[list[Stretch]]:
    """These rows as the tensors of another layout, which have so many rows each."""
    made: list[list[Stretch]] = []
    for stop, height in zip(accumulate(heights), heights, strict=True):
        made.append(_between(runs, stop - height, stop))
    if origin.how not in MOVED:
        return made
    orders = [to_theirs(torch.arange(height), origin, 0)[0] for height in heights]
    return [_ordered(some, order) for some, order in zip(made, orders, strict=True)]


def _between(runs: Sequence[Stretch], start: int, stop: int) -> list[Stretch]:
    found: list[Stretch] = []
    first = 0
    for run in runs:
        low, high = max(start - first, 0), min(stop - first, run.rows)
        if low < high:
            found.append(Stretch(run.layer, run.stored, run.start + low, run.start + high))
        first += run.rows
    return found


def _ordered(runs: Sequence[Stretch], order: Tensor) -> list[Stretch]:
    """The same rows in another order, as few stretches as there can be."""
    rows = [(run, row) for run in runs for row in range(run.start, run.stop)]
    made: list[Stretch] = []
    for run, row in (rows[place] for place in order.tolist()):
        if made and made[-1].stop == row and made[-1].layer == run.layer:
            made[-1] = replace(made[-1], stop=row + 1)
        else:
            made.append(Stretch(run.layer, run.stored, row, row + 1))
    return made


def obstacle(source: TensorSource, runs: Sequence[Stretch]) -> str:
    """Why these rows cannot be one packed weight; empty if they can."""
    form, width = runs[0].stored.format, runs[0].stored.shape[1]
    if any(run.stored.format is not form for run in runs):
        return "its rows are stored in several formats"
    total, layers = sum(run.rows for run in runs), {run.layer: run for run in runs}
    heights = {n for run in runs for n in (total, run.stored.shape[0], run.start, run.rows) if n}
    if not all(form.holds((height, width)) for height in heights):
        return "a block would be cut in two"
    for name in _moving(form, (total, width)):
        size = {height: math.prod(kinds_of(form, (height, width))[name][1]) for height in heights}
        if any(math.prod(run.stored.parts[name][1]) != size[run.stored.shape[0]] for run in runs):
            return f"its {name} has another size than the one that is written"
        if name not in form.shared and len({size[height] / height for height in heights}) > 1:
            return f"its {name} would be cut within a block"
        if name in form.shared and not all(
            torch.equal(_part(source, runs[0], name), _part(source, run, name)) for run in layers.values()
        ):
            return f"the weights that it is to be made of differ in their {name}"
    return ""


def moved(source: TensorSource, runs: Sequence[Stretch]) -> dict[str, Tensor]:
    """The parts of the weight that these rows make, if there is no obstacle."""
    form, shape = runs[0].stored.format, (sum(run.rows for run in runs), runs[0].stored.shape[1])
    made = form.constants(shape)
    layers = {run.layer: run for run in runs}  # whose parts are read once, though their rows lie apart
    for name in _moving(form, shape):
        dtype, size = kinds_of(form, shape)[name]
        if name in form.shared:
            part = _part(source, runs[0], name)
        else:
            wholes = {layer: _part(source, run, name) for layer, run in layers.items()}
            part = torch.cat([_cut(wholes[run.layer], run) for run in runs])
        made[name] = part.to(dtype).view(size)
    return made


def _cut(part: Tensor, run: Stretch) -> Tensor:
    height = run.stored.shape[0]
    return part[run.start * len(part) // height : run.stop * len(part) // height]


def _part(source: TensorSource, run: Stretch, name: str) -> Tensor:
    """A part of the whole weight, flat, as `pack` makes it."""
    return run.stored.format.plain(run.stored, parts_of(source, run.layer, run.stored))[name].reshape(-1)


def _moving(form: Format, shape: tuple[int, int]) -> list[str]:
    """The parts that are not the same for all weights of this shape."""
    return [name for name in kinds_of(form, shape) if name not in form.constants(shape)]
