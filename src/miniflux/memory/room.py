"""How many runs at once: as many as there is memory for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch

from miniflux.memory.modes import SPARED, free_ram, free_vram

log = logging.getLogger(__name__)


class Room:
    """Lets runs begin one after another, in the order in which they ask: one may always, another only while there is
    memory for it beside those at work. They may not have taken all of theirs yet, so that it is all set aside."""

    def __init__(self) -> None:
        self._line: list[object] = []
        self._taken: list[tuple[int, int]] = []
        self._change = threading.Condition()

    @contextmanager
    def taken(self, needs: tuple[int, int], device: torch.device, waiting: Callable[[], None]) -> Generator[None]:
        """Wait for memory, and have it while the context lasts.

        Args:
            needs: bytes of RAM and of the device's memory, see `Ledger.working`.
            waiting: called several times a second while it waits; what it raises ends that.
        """
        ticket, told = object(), False
        with self._change:
            self._line.append(ticket)
            try:
                while self._line[0] is not ticket or not self._fits(needs, device):
                    if not told:
                        told = True
                        log.info("a run that needs %.1f GB waits: %d are at work", sum(needs) / 1e9, len(self._taken))
                    waiting()
                    self._change.wait(0.1)
                self._taken.append(needs)
            finally:
                self._line.remove(ticket)
                self._change.notify_all()
        try:
            yield
        finally:
            with self._change:
                self._taken.remove(needs)
                self._change.notify_all()

    def _fits(self, needs: tuple[int, int], device: torch.device) -> bool:
        if not self._taken:
            return True
        aside = [sum(sizes) for sizes in zip(*self._taken, needs, strict=True)]
        free = (free_ram(), free_vram(device))
        return all(known is None or size <= SPARED * known for size, known in zip(aside, free, strict=True))
