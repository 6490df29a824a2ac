"""How the benchmarks measure, and what they tell: calls that are compared take turns in one process, because the
machine may be shared; every figure is a median, with its spread."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from miniflux.memory.ledger import peak_size


@dataclass(frozen=True)
class Taken:
    """Seconds: the median, and the distance between the quartiles over it."""

    median: float
    spread: float


def times(*calls: Callable[[], object], rounds: int = 15) -> list[Taken]:
    """Of each call over `rounds` rounds, in which all of them run once; on a GPU until that is done."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    each: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, each, strict=True):
            wait()
            start = time.perf_counter()
            call()
            wait()
            taken.append(time.perf_counter() - start)
    return [taken_of(taken) for taken in each]


def taken_of(seconds: list[float]) -> Taken:
    """What several rounds took."""
    if len(seconds) < 2:
        return Taken(seconds[0], 0.0)
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return Taken(median, (third - first) / median)


def median_times(*calls: Callable[[], object], rounds: int = 15) -> list[float]:
    """Median seconds of each call: `times` for those who ask for no more."""
    return [taken.median for taken in times(*calls, rounds=rounds)]


@dataclass(frozen=True)
class Figure:
    """One line of a benchmark: seconds of ours, of a peer and of the limit; None where there is none."""

    what: str
    ours: Taken
    peer: Taken | None = None
    limit: Taken | None = None
    peak: int | None = None  # bytes that the process has had at most
    note: str = ""

    def __str__(self) -> str:
        def against(other: Taken | None) -> str:
            return "" if other is None else f"{self.ours.median / other.median:.3f}"

        def told(taken: Taken | None) -> str:
            return "" if taken is None else f"{1000 * taken.median:.1f} ms +-{50 * taken.spread:.0f} %"

        peak = "" if self.peak is None else f"{self.peak / 2**20:.0f} MiB"
        columns = [told(self.ours), told(self.peer), against(self.peer), told(self.limit), against(self.limit), peak]
        return " | ".join([self.what, *columns, self.note])


HEADER = "what | miniflux | peer | ratio | limit | over the limit | peak | notes"


@dataclass
class Report:
    """The figures of one question: printed as they come, and kept as JSON where `--json` says.

    Attributes:
        question: what is asked.
        peer, limit: what it is compared with.
    """

    question: str
    peer: str = ""
    limit: str = ""
    figures: list[Figure] = field(default_factory=list)

    def add(
        self, what: str, ours: Taken, peer: Taken | None = None, limit: Taken | None = None, note: str = ""
    ) -> None:
        if not self.figures:
            print(f"{self.question}\npeer: {self.peer or 'none'}; limit: {self.limit or 'none'}\n{HEADER}")
        self.figures.append(Figure(what, ours, peer, limit, peak_size(), note))
        print(self.figures[-1], flush=True)

    def write(self, path: Path | None) -> None:
        if path is not None:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")


def options(about: str | None, rounds: int) -> argparse.ArgumentParser:
    """What every benchmark with figures can be asked."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser
