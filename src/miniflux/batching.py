"""Which pictures of a call are drawn together, in one batch.

A network does the same work for a batch as for its pictures one after the other; what a batch spares is the time
between the operations. So it pays for small networks and canvases, and not for large ones. A picture of a batch is the
one that is drawn alone: bit for bit where libraries round the product of a row as they do without its neighbours, as
they do on CPUs for numbers of rows that share a large divisor; else up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from miniflux.cache import Drawn
from miniflux.errors import InputError, OutOfMemoryError
from miniflux.memory.ledger import Run
from miniflux.memory.shortage import Fits
from miniflux.plan import Plan

PAYS = 2**20
"""Numbers in the residual stream of a batch up to which it was measured to be faster (`benchmarks/batches.py`)."""

Later = Callable[[], Drawn]
"""Waits for a picture, and raises what went wrong with it."""

ROWS = 16
"""Rows, by which others must divide to be drawn together without being asked to."""


def check_batch(plan: Plan) -> None:
    """
    Raises:
        InputError: a batch was asked for and cannot be.
    """
    if isinstance(plan.batch, int) and plan.batch > 1 and plan.cache is not None:
        raise InputError(
            f"batch={plan.batch}: a step cache decides for all pictures of a batch at once, so that each would depend "
            "on the others; with a cache batch must be 1"
        )


def at_once(plan: Plan, looked_at: bool, hidden_size: int, run: Run) -> int:
    """How many pictures are drawn together at most, as far as speed goes.

    Args:
        looked_at: whether a function of the caller's follows each picture step by step, or takes part in the network.
            Unless a batch is asked for, be it "auto", it sees one picture at a time.
        run: of one picture.
    """
    if isinstance(plan.batch, int):
        return plan.batch
    image_tokens = plan.rows * plan.columns
    if (looked_at and plan.batch is None) or plan.cache is not None or image_tokens % ROWS or run.more_tokens % ROWS:
        return 1
    tokens = image_tokens + run.text_tokens + run.more_tokens
    return max(1, PAYS // (tokens * hidden_size * run.batch))


def fitting(count: int, asked: int | None, run: Run, fits: Fits) -> int:
    """As many of them as fit into memory; at least one, which is checked elsewhere.

    Raises:
        OutOfMemoryError: so many were asked for.
    """
    most = next((n for n in range(count, 1, -1) if fits(replace(run, batch=n * run.batch))), 1)
    if asked is not None and most < count:
        facts = fits.facts(replace(run, batch=count * run.batch))
        raise OutOfMemoryError(f"{count} pictures at once do not fit into memory: {facts}; batch={most} would")
    return most


@dataclass
class Batches:
    """The pictures of a call, each drawn when it is asked for, together with those that will be asked for next.

    Attributes:
        total: pictures of the call.
        draw: draws as many of the pictures of these numbers as it can at once, the first of them at least; each is
            there when it is asked for.
        needed: whether a picture has to be drawn at all.
        ahead: whether the batch after one is begun before the pictures of that one are waited for.
        newest: the last batch.
    """

    total: int
    draw: Callable[[Sequence[int]], Sequence[Later]]
    needed: Callable[[int], bool] = lambda i: True
    ahead: bool = False
    drawn: dict[int, Later] = field(default_factory=dict[int, Later])
    newest: list[int] = field(default_factory=list[int])

    def picture(self, i: int) -> Drawn:
        if i not in self.drawn:
            self._begin(i)
        following = self.newest[-1] + 1
        new = following < self.total and following not in self.drawn and self.needed(following)
        if self.ahead and i in self.newest and new:
            try:
                self._begin(following)
            except Exception as error:  # told where that picture is asked for: this one is drawn, and kept
                self.ahead, self.drawn[following] = False, partial(_raised, error)
        return self.drawn.pop(i)()

    def _begin(self, i: int) -> None:
        wanted = [i, *(j for j in range(i + 1, self.total) if j not in self.drawn and self.needed(j))]
        begun = self.draw(wanted)
        self.newest = wanted[: len(begun)]
        self.drawn.update(zip(self.newest, begun, strict=True))


def _raised(error: Exception) -> Drawn:
    raise error
