"""How the benchmarks measure: calls that are compared take turns in one process, because the machine may be shared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def median_times(*calls: Callable[[], object], rounds: int = 15) -> list[float]:
    """Median seconds of each call over `rounds` rounds, in which all of them run once."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]
