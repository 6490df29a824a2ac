"""Too little memory: a picture that does not fit is refused before it is begun, and running out is told in one line."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace

import torch

from miniflux.errors import OutOfMemoryError
from miniflux.memory.ledger import Run
from miniflux.memory.modes import SPARED, free_ram, free_vram

# How libraries say it that raise no exception of their own for it.
TEXTS = (
    "can't allocate memory",  # torch, on a CPU
    "not enough memory",  # torch, on Windows
    "out of memory",  # CUDA, and Apple's MPS
    "CUBLAS_STATUS_ALLOC_FAILED",
    "cudaErrorMemoryAllocation",
    "Invalid buffer size",  # MPS, of a single tensor that is too large
    "bad_alloc",  # C++
    "could not create a memory",  # oneDNN
    "could not create a primitive\n",  # oneDNN; "a primitive descriptor" is what it has no way to compute
    "Cannot allocate memory",  # mmap
    "unable to mmap",
)

SHARE = 0.75  # of what ran out of memory, that is recommended then

Free = tuple[int | None, int | None]
"""Bytes free of RAM and of the device's memory; None where that is not known, or is the same."""

Needs = Callable[[Run], tuple[int, int]]
"""Bytes of RAM and of the device's memory that a run takes beside what is there already, see `Ledger.working`."""


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that there was too little memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in f"{error}\n" for text in TEXTS)


@contextmanager
def told(what: str, advice: Callable[[], str]) -> Generator[None]:
    """Around work that may run out of memory.

    Args:
        what: is done in there.
        advice: what would help, asked only then.

    Raises:
        OutOfMemoryError: it did.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        raise OutOfMemoryError(f"{what} ran out of memory: {advice()}") from error


class Fits:
    """Whether runs of one pipeline fit into what is free at this moment.

    Args:
        unit: what the sides of a picture are multiples of.
        others: names of memory modes in which a run would fit into so much free memory.
    """

    def __init__(self, needs: Needs, device: torch.device, unit: int, others: Callable[[Run, Free], list[str]]) -> None:
        self.needs, self.unit, self.others = needs, unit, others
        self.free: Free = (free_ram(), free_vram(device))

    def __call__(self, run: Run) -> bool:
        return self._within(run, (SPARED, SPARED))

    def _within(self, run: Run, shares: tuple[float, float]) -> bool:
        """Whether it takes no more than these shares of the RAM and VRAM that are free."""
        sizes = zip(self.needs(run), shares, self.free, strict=True)
        return all(free is None or size <= share * free for size, share, free in sizes)

    def check(self, run: Run) -> None:
        """
        Raises:
            OutOfMemoryError: it does not fit; the message names a size that would.
        """
        if self(run):
            return
        size = largest(run, self.unit, self)
        fitting = f"{size[0]}x{size[1]} would fit" if size else f"not even {self.unit}x{self.unit} would"
        modes = [f"so would memory={mode!r}" for mode in self.others(run, self.free)[:1]]
        what = f"a picture of {run.width}x{run.height} does not fit into memory"
        raise OutOfMemoryError(f"{what}: {self.facts(run)}; {', '.join([fitting, *modes])}")

    def facts(self, run: Run) -> str:
        """What a run needs, and what was free."""
        kinds = zip(self.needs(run), self.free, ("RAM", "VRAM"), strict=True)
        return ", ".join(
            f"it needs {need / 1e9:.1f} GB {kind} beside what is loaded"
            + ("" if free is None else f" ({free / 1e9:.1f} were free)")
            for need, free, kind in kinds
            if need
        )

    def advice(self, run: Run) -> str:
        """What to try where a run that should have fitted did not: what takes three quarters of it."""
        most = [SHARE * need for need in self.needs(run)]
        size = largest(
            run, self.unit, lambda smaller: all(a <= b for a, b in zip(self.needs(smaller), most, strict=True))
        )
        way = f"{size[0]}x{size[1]}" if size else "another memory mode"
        return f"{self.facts(run)}; try {way}, or end other programs"


def largest(run: Run, unit: int, fits: Callable[[Run], bool]) -> tuple[int, int] | None:
    """Width and height of the largest picture of the same shape that fits, up to that of the run; None if none does."""
    longer = max(run.width, run.height)

    def sides(count: int) -> tuple[int, int]:
        """So many units along the longer side."""
        width, height = (unit * max(1, round(side * count / longer)) for side in (run.width, run.height))
        return width, height

    low, high = 0, -(-longer // unit)
    while low < high:
        middle = (low + high + 1) // 2
        width, height = sides(middle)
        if fits(replace(run, width=width, height=height)):
            low = middle
        else:
            high = middle - 1
    return sides(low) if low else None
