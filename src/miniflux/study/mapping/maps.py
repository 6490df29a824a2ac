"""What all maps have in common: numbers for every place of a picture, by name, step and block.

A place is an image token: 16 x 16 pixels in every model of the family. Letters in shapes: N names, S steps, K blocks,
H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miniflux.checks import check_number, shown, whole
from miniflux.disk import write_beside
from miniflux.errors import InputError, OutputError
from miniflux.models.transformer import TransformerConfig
from miniflux.result import Result
from miniflux.sampling import Told
from miniflux.sampling.observing import Call

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Grid:
    """Image tokens of one picture, in a sequence of [picture, references]: from `start`, row by row."""

    start: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Layout:
    """What a sequence of [text, picture, references] is made of.

    Attributes:
        text: tokens of the text.
        grids: the picture, then the references, in order.
    """

    text: int
    grids: tuple[Grid, ...]

    @classmethod
    def of(cls, told: Told) -> Layout:
        """Of what a network is told, by the positions of its tokens: the picture's own, and those of each reference,
        are told apart by the axes that are neither row nor column."""
        ids = told.img_ids[0].cpu()
        apart = torch.cat((ids[:, :1], ids[:, 3:]), dim=1)
        _, lengths = torch.unique_consecutive(apart, dim=0, return_counts=True)
        grids: list[Grid] = []
        start = 0
        for length in cast("list[int]", lengths.tolist()):
            rows = len(ids[start : start + length, 1].unique())
            grids.append(Grid(start, rows, length // rows))
            start += length
        return cls(told.words.txt.shape[1], tuple(grids))

    def grid(self, on: int) -> Grid:
        """The picture (0) or a reference, from 1.

        Raises:
            InputError: there is none of this number.
        """
        if on >= len(self.grids):
            there = len(self.grids) - 1
            raise InputError(
                f"there is no reference {on} among the tokens: there are {there} (one that is looked at once, as by "
                "FLUX.2 klein KV, is none of them: Reference(picture, once=False))"
            )
        return self.grids[on]

    def tokens(self, on: int) -> Tensor:
        """The places of a grid's tokens in the whole sequence (L,)."""
        grid = self.grid(on)
        return torch.arange(grid.size) + self.text + grid.start


@dataclass(frozen=True, repr=False, eq=False)
class Maps:
    """Maps of one picture.

    Attributes:
        kind: what the numbers are.
        names: what there is a map of.
        steps: of which steps, counted from 0; blocks: of which blocks.
        heads: which heads are kept apart; none where they are all in one.
        values: (N, S, K, H or 1, rows, columns), float32; nan where a step cache left a block out.
        result: what `generate` made.
        canvas: width and height in pixels of all that the maps cover: more than the picture where that was cut back to
            a reference.
        on: what they lie on: 0 the picture, 1 the first reference ...
    """

    kind: str
    names: tuple[str, ...]
    steps: tuple[int, ...]
    blocks: tuple[str, ...]
    heads: tuple[int, ...]
    values: Array = field(repr=False)
    result: Result
    canvas: tuple[int, int]
    on: int = 0

    def __repr__(self) -> str:
        rows, columns = self.values.shape[-2:]
        size = f"{rows} x {columns}, {len(self.steps)} steps, {len(self.blocks)} blocks"
        return f"<Maps: {self.kind} of {', '.join(self.names)}, {size}>"

    @property
    def image(self) -> Image.Image:
        """The picture that was drawn."""
        return self.result.images[0]

    def __getitem__(self, name: str) -> Array:
        """The map of a name, (rows, columns): the mean over all steps, blocks and heads."""
        return self.of(name)

    def of(
        self,
        name: str,
        *,
        steps: Sequence[int] | None = None,
        blocks: Sequence[str] | None = None,
        head: int | None = None,
    ) -> Array:
        """The map of a name, (rows, columns): the mean over some steps, blocks and heads; None for all there are.

        Raises:
            InputError: one of them is not there, or a step cache left out all that was asked for.
        """
        one = self._chosen(name, steps, blocks, head)
        return _mean(one, (0, 1, 2), f"{name!r} of these steps and blocks")

    def by_step(self, name: str, blocks: Sequence[str] | None = None, head: int | None = None) -> Array:
        """A map for every step (S, rows, columns); nan where a step cache left out all blocks."""
        return _mean(self._chosen(name, None, blocks, head), (1, 2))

    def by_block(self, name: str, steps: Sequence[int] | None = None, head: int | None = None) -> Array:
        """A map for every block (K, rows, columns)."""
        return _mean(self._chosen(name, steps, None, head), (0, 2))

    def share(
        self,
        name: str,
        temperature: float = 1.0,
        *,
        steps: Sequence[int] | None = None,
        blocks: Sequence[str] | None = None,
    ) -> Array:
        """Softmax over all names, of their mean maps over a temperature: how much of each place is this one's, 0 to 1
        (rows, columns).

        Raises:
            InputError: there is only one name, the temperature is not above 0, or as of `of`.
        """
        if len(self.names) == 1:
            raise InputError(f"a share is one among several, and there is only {self.names[0]!r}: ask for more names")
        if check_number("temperature", temperature, 0) == 0:
            raise InputError("temperature must be above 0, got 0")
        logits = np.stack([self.of(each, steps=steps, blocks=blocks) for each in self.names]) / temperature
        powers = np.exp(logits - logits.max(axis=0))
        return (powers / powers.sum(axis=0))[self.names.index(name)]

    def contrast(self, name: str, *, steps: Sequence[int] | None = None, blocks: Sequence[str] | None = None) -> Array:
        """The map of a name less the mean of all others' (rows, columns): what is in all of them is in none.

        Raises:
            InputError: there is only one name, or as of `of`.
        """
        if len(self.names) == 1:
            raise InputError(f"a contrast is one to others, and there is only {self.names[0]!r}: ask for more names")
        own = self.of(name, steps=steps, blocks=blocks)
        others = [self.of(each, steps=steps, blocks=blocks) for each in self.names if each != name]
        return own - np.mean(others, axis=0)

    def save(self, path: str | Path) -> Path:
        """Write all numbers as .npz: `values` as above, and `names`, `steps`, `blocks`, `heads`, `kind`.

        Raises:
            OutputError: another ending, or the place cannot be written to.
        """
        path = Path(path)
        if path.suffix.lower() != ".npz":
            raise OutputError(f"{path}: maps are written as .npz, got the ending {path.suffix!r}")

        def write(beside: Path) -> None:
            with beside.open("wb") as file:
                about = {
                    name: np.asarray(getattr(self, name)) for name in ("names", "steps", "blocks", "heads", "kind")
                }
                np.savez_compressed(file, values=self.values, **about)  # pyright: ignore[reportArgumentType]

        write_beside(path, write)
        return path

    def _chosen(self, name: str, steps: Sequence[int] | None, blocks: Sequence[str] | None, head: int | None) -> Array:
        """(S', K', H', rows, columns) of a name."""
        values = self.values[_place("name", self.names, name)]
        if steps is not None:
            values = values[[_place("step", self.steps, step) for step in steps]]
        if blocks is not None:
            values = values[:, [_place("block", self.blocks, block) for block in blocks]]
        if head is not None:
            if not self.heads:
                raise InputError(f"head {shown(head)}: heads were not kept apart; ask for some when drawing: heads=[0]")
            values = values[:, :, [_place("head", self.heads, head)]]
        return values


def _place(what: str, there: Sequence[Any], wanted: Any) -> int:
    if wanted not in there:
        raise InputError(f"no {what} {shown(wanted)} among these maps; there are {', '.join(map(str, there))}")
    return there.index(wanted)


def _mean(values: Array, axes: tuple[int, ...], what: str | None = None) -> Array:
    """The mean of all that is not nan; nan where nothing is.

    Args:
        what: refuse that, and say of what.
    """
    there = ~np.isnan(values)
    count = there.sum(axis=axes)
    if what is not None and not count.all():
        raise InputError(f"a step cache left out all of {what}")
    total = np.where(there, values, 0).sum(axis=axes, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def blocks_for(config: TransformerConfig, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Names of blocks in which text and picture meet, in the order in which they run.

    Args:
        asked: names of blocks, or of kinds of blocks ("double_blocks", "single_blocks"); None for all of them.

    Raises:
        InputError: there is no such block, or it is one in which text and picture do not meet (the first of FLUX.3).
    """
    meeting = [name for name in config.blocks if config.joined or name.startswith("single_blocks.")]
    if asked is None:
        return tuple(meeting)
    if isinstance(asked, str) or not asked:
        raise InputError(f"blocks must be a list of at least one name, got {shown(asked)}")
    found: set[str] = set()
    for name in asked:
        these = [block for block in meeting if block == name or block.rpartition(".")[0] == name]
        if not these and (name in config.blocks or any(block.rpartition(".")[0] == name for block in config.blocks)):
            raise InputError(
                f"{name}: in these blocks text, picture and references attend each within itself, so that there is no "
                f"map from one to another; they meet in {meeting[0]} ... {meeting[-1]}"
            )
        if not these:
            raise InputError(f"there is no block {shown(name)}; there are {', '.join(meeting)}")
        found.update(these)
    return tuple(name for name in meeting if name in found)


class Gathering:
    """Maps as they come in while a picture is drawn, all (N, H, rows, columns), of the steps and blocks asked for."""

    def __init__(self, blocks: tuple[str, ...], steps: Sequence[int] | None) -> None:
        if steps is not None:
            if isinstance(steps, str) or not len(steps):
                raise InputError(f"steps must be a list of at least one number, got {shown(steps)}")
            steps = [whole("a step", step, 0) for step in steps]
        self.blocks, self.wanted = blocks, steps
        self.ran: list[int] = []  # of the steps, those that were made and asked for
        self._sums: dict[tuple[int, str], tuple[Tensor, int]] = {}

    def wants(self, call: Call) -> bool:
        """Whether there are to be maps of this call of the network.

        Raises:
            InputError: a step was asked for that there is not.
        """
        if self.wanted is not None and max(self.wanted) >= call.steps:
            raise InputError(f"step {max(self.wanted)} was asked for, and there are {call.steps}, counted from 0")
        wanted = "positive" in call.told.texts and (self.wanted is None or call.step in self.wanted)
        if wanted and call.step not in self.ran:
            self.ran.append(call.step)
        return wanted

    def add(self, step: int, block: str, values: Tensor) -> None:
        """The maps of a block in one call; of several calls of a step the mean counts."""
        total, count = self._sums.get((step, block), (torch.zeros(values.shape), 0))
        self._sums[step, block] = total + values.float().cpu(), count + 1

    def values(self) -> Array:
        """(N, S, K, H, rows, columns).

        Raises:
            InputError: no block ran of those, in none of those steps.
        """
        if not self._sums:
            raise InputError(
                f"there is no map of {', '.join(self.blocks)} in steps {self.wanted or 'made'}: the steps were not "
                "made, or a step cache left all of these blocks out"
            )
        shape = next(iter(self._sums.values()))[0].shape
        values = torch.full((len(self.ran), len(self.blocks), *shape), torch.nan)
        for (step, block), (total, count) in self._sums.items():
            values[self.ran.index(step), self.blocks.index(block)] = total / count
        return values.movedim(2, 0).contiguous().numpy()
