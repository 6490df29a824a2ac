"""For tests of what must not hang: ends a call that does not come back. It measures nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 120  # seconds; what is called in here takes less than one


@contextmanager
def no_hang() -> Iterator[None]:
    """Raises AssertionError after two minutes, where the system has alarms."""
    if not hasattr(signal, "SIGALRM"):  # Windows
        yield
        return

    def end(*_: object) -> None:
        raise AssertionError(f"hangs: no end after {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
