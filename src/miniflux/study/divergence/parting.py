"""How far two networks are apart, part by part, and how much of that rounding explains.

Errors grow on their way through a network, so the block at which a difference has become large is not the one that made
it. Three runs tell them apart. A runs and is noted. B runs by itself: how far its streams are from A's is the error
that has *grown*. And B runs once more, while every block is given what A's was given, and what it makes is taken away
and replaced by what A's made: what is wrong then is the block's *own*. What such a block is handed is looked at before
it is exchanged: it comes from right results, so what is wrong there is between the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miniflux.errors import InputError
from miniflux.study.divergence.sides import Unit, watched
from miniflux.study.divergence.tensors import Named

# What rounding explains of a block's own error, in roundings of a number: so many of what the block adds to a stream,
# and so many of the stream. Of two implementations in one precision a tenth to a half of it is seen, of one in two
# precisions a tenth to a fifth, at widths of 32 to 64 (docs/study/diff.md).
CHANGE, STREAM = 16.0, 2.0


@dataclass(frozen=True)
class Error:
    """How far a tensor of B is from A's.

    Attributes:
        largest: of the differences.
        relative: L2 norm of the difference over that of A's.
        excess: L2 norm of the difference over what rounding explains: more than 1 is a fault.
    """

    largest: float
    relative: float
    excess: float


@dataclass(frozen=True)
class Row:
    """One part of the networks: a block, an embedder, a modulation, the last layer.

    Attributes:
        name: as ours has it.
        block: whether it is a block.
        given: what B's other parts hand to it once all before have made what A's made, by argument.
        own: what it makes of what A's was given, by stream.
        grown: what it makes in a run of B alone, by stream.
    """

    name: str
    block: bool
    given: Mapping[str, Error]
    own: Mapping[str, Error]
    grown: Mapping[str, Error]


@dataclass(frozen=True)
class Diff:
    """Two networks compared. `str()` is a table and a verdict.

    Attributes:
        a, b: what they are.
        rows: in the order in which A's parts ended.
        output: of the whole, in a run of B alone.
        rounding: the relative rounding of a number in the coarser of both precisions.
        tolerance: how many times more than rounding explains is still taken for that.
        inside: rows of the modules in the part at which they part, if they were asked for.
    """

    a: str
    b: str
    rows: tuple[Row, ...]
    output: Error
    rounding: float
    tolerance: float
    inside: tuple[Row, ...] = ()

    @property
    def agree(self) -> bool:
        """Whether no part's own error is more than rounding explains."""
        return self.first is None

    @property
    def parts_at(self) -> str | None:
        """The name of the first part of the networks at which they part, or to which B hands something else than A;
        None if they agree."""
        return None if self.first is None else self.first.name

    @property
    def first(self) -> Row | None:
        return first(self.rows, self.tolerance)

    @property
    def verdict(self) -> str:
        """Where they part, or to what they agree, in a sentence."""
        row = self.first
        if row is None:
            most = max((worst(row.own) for row in self.rows), key=_order)
            return (
                f"they agree: no part's own error is over {most.relative:.1e}, {most.excess:.2g} of what rounding "
                f"explains; the output differs by {self.output.relative:.1e}"
            )
        more = first(self.inside, self.tolerance)
        return f"they part {_how(row, self.tolerance)}" + (f"; in there {_how(more, self.tolerance)}" if more else "")

    def __str__(self) -> str:
        about = f"tolerated: {self.tolerance:g} times what rounding explains, {self.rounding:.1e} of a number"
        out = f"{'output':36} {'':>10} {'':>10} {'':>10} {self.output.relative:9.1e} {self.output.largest:10.1e}"
        tables = [*_table(self.rows, self.tolerance), out]
        inside = ["", *_table(self.inside, self.tolerance)] if self.inside else []
        return "\n".join([f"A: {self.a}", f"B: {self.b}", about, "", *tables, *inside, "", self.verdict])


def first(rows: Sequence[Row], tolerance: float) -> Row | None:
    """The first row with more than rounding explains, in what it is given or in what it makes."""
    return next((row for row in rows if beyond(row.given, tolerance) or beyond(row.own, tolerance)), None)


def beyond(errors: Mapping[str, Error], tolerance: float) -> dict[str, Error]:
    """Of which tensors the error is more than rounding explains; what is not a number is."""
    return {name: one for name, one in errors.items() if not one.excess <= tolerance}


def worst(errors: Mapping[str, Error]) -> Error:
    """The one that exceeds most what rounding explains."""
    return max(errors.values(), key=_order)


def _order(error: Error) -> float:
    return math.inf if math.isnan(error.excess) else error.excess


def _how(row: Row, tolerance: float) -> str:
    """In which way a row is off."""
    off = beyond(row.given, tolerance)
    where = f"before {row.name}: B hands it other" if off else f"at {row.name}: of what A's was given it makes other"
    off = off or beyond(row.own, tolerance)
    most = worst(off)
    about = f"error {most.relative:.1e}, {most.excess:.3g} times what rounding explains"
    return f"{where} {', '.join(off)} ({about})"


def _table(rows: Sequence[Row], tolerance: float) -> list[str]:
    lines = [f"{'':36} {'stream':>10} {'own error':>10} {'x rounding':>10} {'grown':>9} {'max |B-A|':>10}"]
    marked = first(rows, tolerance)
    for row in rows:
        for i, (name, own) in enumerate(row.own.items()):
            grown, mark = row.grown.get(name), "  <" if row is marked and i == 0 else ""
            alone = f"{'':9} {'':10}" if grown is None else f"{grown.relative:9.1e} {grown.largest:10.1e}"
            called = row.name if i == 0 else ""
            lines.append(f"{called:36} {name:>10} {own.relative:10.1e} {own.excess:10.2g} {alone}{mark}".rstrip())
    return lines


@dataclass(frozen=True)
class Trace:
    """A run of A: what each call of a unit was given and what it made, in the order in which they ended."""

    given: Mapping[str, Named]
    made: Mapping[str, Named]
    output: Tensor


def _called(unit: Unit, number: int) -> str:
    """The name of one of the calls of a unit: a block has one."""
    return unit.name if not number else f"{unit.name}, call {number + 1}"


def traced(units: Mapping[str, Unit], text: int, run: Callable[[], Tensor], keep: Callable[[Tensor], Tensor]) -> Trace:
    """Run A. `keep` makes of a tensor what is kept of it: itself, or a copy where others write over it."""
    given, made = dict[str, Named](), dict[str, Named]()

    def note(into: dict[str, Named]) -> Callable[[Unit, int, Named], None]:
        def told(unit: Unit, number: int, named: Named) -> None:
            into[_called(unit, number)] = {name: keep(one) for name, one in named.items()}

        return told

    with watched(units, text, note(given), note(made)):
        output = run()
    for name, named in made.items():
        if not all(bool(torch.isfinite(one).all()) for one in named.values()):
            raise InputError(f"A's {name} makes numbers that are not finite: compare in another precision")
    return Trace(given, made, output)


def compared(
    trace: Trace, units: Mapping[str, Unit], text: int, run: Callable[[], Tensor], rounding: float
) -> tuple[list[Row], Error]:
    """B, by itself and with A's tensors, against a run of A: a row for each call of a unit; and of the output, how far
    it is from A's in a run of B alone.

    Raises:
        InputError: a tensor of B has another shape than A's.
    """
    given, own, grown = (dict[str, dict[str, Error]]() for _ in range(3))

    def alone(unit: Unit, number: int, named: Named) -> None:
        name = _called(unit, number)
        grown[name] = _errors(trace.made.get(name, {}), named, {}, rounding)

    def exchanged(unit: Unit, number: int, named: Named) -> Named | None:
        name = _called(unit, number)
        given[name] = _errors(trace.given.get(name, {}), named, {}, rounding)
        return {one: like(trace.given[name][one], named[one]) for one in given[name]}

    def replaced(unit: Unit, number: int, named: Named) -> Named | None:
        name = _called(unit, number)
        own[name] = _errors(trace.made.get(name, {}), named, trace.given.get(name, {}), rounding)
        return {one: like(trace.made[name][one], named[one]) for one in own[name]}

    with watched(units, text, lambda *_: None, alone):
        output = run()
    with watched(units, text, exchanged, replaced):
        run()
    rows = [
        Row(name, units[name.partition(",")[0]].block, given[name], own[name], grown[name])
        for name in trace.made
        if own.get(name)
    ]
    return rows, error_of(trace.output, output, None, rounding)


def like(a: Tensor, b: Tensor) -> Tensor:
    """A's tensor where B's is, in its precision; a copy, because it may be written over."""
    return a.to(b.device, b.dtype, copy=True)


def _errors(a: Named, b: Named, before: Named, rounding: float) -> dict[str, Error]:
    """Of each tensor that both have; `before`: what the same streams were before."""
    return {name: error_of(a[name], b[name], before.get(name), rounding) for name in a if name in b}


def error_of(a: Tensor, b: Tensor, before: Tensor | None, rounding: float) -> Error:
    """How far b is from a.

    What rounding explains: so many roundings of what was added to the stream, and a few of the stream itself, to which
    it was added. A stream is often far larger than what one block adds, and would hide it.

    Args:
        before: the stream that a is, before the change; None where it is none.
        rounding: relative, of a number.
    """
    if a.shape != b.shape:
        return Error(math.inf, math.inf, math.inf)
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    a, b = a.to(dtype=wide), b.to(a.device, wide)
    off, size = b - a, float(a.norm())
    distance = float(off.norm())
    change = size if before is None or before.shape != a.shape else float((a - before.to(wide)).norm())
    explained = rounding * (CHANGE * change + STREAM * size)
    if distance == 0:
        return Error(0.0, 0.0, 0.0)
    largest = float(off.abs().max())
    return Error(largest, distance / size if size else math.inf, distance / explained if explained else math.inf)
