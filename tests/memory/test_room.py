"""Runs at once: bounded by memory, in order."""

from __future__ import annotations

import threading

import pytest
import torch

import miniflux
from miniflux.memory import room
from miniflux.memory.ledger import Ledger, Line, Run
from miniflux.memory.room import Room

CPU = torch.device("cpu")


class Stop(Exception):
    pass


class Runs:
    """Runs in threads, each of which stays until it is let go."""

    def __init__(self) -> None:
        self.room, self.begun, self.waits = Room(), list[str](), threading.Semaphore(0)
        self.threads: dict[str, tuple[threading.Thread, threading.Event, threading.Event]] = {}

    def start(self, name: str, ram: int, vram: int = 0) -> None:
        """Begin one, and come back when it is at work or is known to wait."""
        settled, go, stop = threading.Event(), threading.Event(), threading.Event()

        def waiting() -> None:
            settled.set()
            if stop.is_set():
                raise Stop

        def run() -> None:
            try:
                with self.room.taken((ram, vram), CPU, waiting):
                    self.begun.append(name)
                    settled.set()
                    go.wait(60)
            except Stop:
                pass

        thread = threading.Thread(target=run)
        self.threads[name] = thread, go, stop
        thread.start()
        assert settled.wait(60)

    def end(self, name: str, how: int = 1) -> None:
        """Let one end (1), or stop it while it waits (2)."""
        thread = self.threads[name][0]
        self.threads[name][how].set()
        thread.join(60)
        assert not thread.is_alive()

    def until(self, *names: str) -> None:
        for _ in range(6000):
            if self.begun == list(names):
                return
            threading.Event().wait(0.01)
        raise AssertionError(self.begun)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    known: dict[str, int | None] = {"ram": 1000, "vram": None}
    monkeypatch.setattr(room, "free_ram", lambda: known["ram"])
    monkeypatch.setattr(room, "free_vram", lambda device: known["vram"])
    return known


@pytest.mark.parametrize(
    ("ram", "vram", "at_once"), [(1000, None, 2), (999, None, 1), (None, None, 2), (None, 10, 1), (1000, 100, 2)]
)
def test_second_run_begins_while_there_is_memory_for_both(
    free: dict[str, int | None], ram: int | None, vram: int | None, at_once: int
) -> None:
    """A tenth stays free; what is not known does not count."""
    free |= {"ram": ram, "vram": vram}
    runs = Runs()
    runs.start("a", 500, 5)
    runs.start("b", 400, 5)
    assert len(runs.begun) == at_once
    runs.end("a")
    runs.until("a", "b")
    runs.end("b")


def test_one_run_may_always_begin(free: dict[str, int | None]) -> None:
    runs = Runs()
    runs.start("a", 10**12)
    assert runs.begun == ["a"]
    runs.end("a")


def test_order_is_kept_and_one_that_waits_can_be_stopped(free: dict[str, int | None]) -> None:
    """A small one does not pass a large one that came before it."""
    runs = Runs()
    for name, size in (("a", 500), ("large", 900), ("c", 100)):
        runs.start(name, size)
    assert runs.begun == ["a"]
    runs.end("large", how=2)
    runs.until("a", "c")
    runs.end("a")
    runs.end("c")


def test_what_a_run_takes_beside_what_stays() -> None:
    stays = Line("weights", ram=10**9)
    ledger = Ledger(
        "resident", 0, {"a": (stays, Line("x", ram=5, vram=1)), "b": (stays, Line("y", 2, 7), Line("z", 2))}
    )
    assert ledger.working == (5, 7)


def test_larger_pictures_take_more_room() -> None:
    memory = miniflux.load("nano").memory
    assert memory is not None
    small, large = (
        memory.ledger(Run(width=side, height=side, text_tokens=48, calls=20)).working[0] for side in (128, 512)
    )
    assert 8 * small < large < 20 * small
