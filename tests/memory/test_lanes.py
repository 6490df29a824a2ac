"""Copies and decoding beside the computing, with stand-ins for a device that is as late as it may be: nothing is
computed before its weights are there, and nothing is written over that is still needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import miniflux
from miniflux.memory import lanes, streaming
from miniflux.memory.lanes import Aside, CudaLane, Lane, directly
from tests.memory.conftest import Make
from tests.memory.test_modes import drawn, loaded

CPU = torch.device("cpu")


class Late(Lane):
    """Copies nothing before somebody waits for it, and looks whether it is told to wait for enough. Marks are numbers
    of copies, and of what was computed.

    Attributes:
        queue: what is to be copied yet.
        copied: the last copy into each area, by its address.
        computed: the mark behind what was last computed in each area; None while it is computed.
        sources: the last copy from each piece of memory.
        waited: the mark that the thread which reads has waited for. What the device waits for does not count.
        most: copies that nobody had waited for at once.
    """

    made: list[Late] = []  # noqa: RUF012

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stages, self.marks = 2, 0
        self.queue: list[tuple[int, Tensor, Tensor]] = []
        self.copied: dict[int, int] = {}
        self.computed: dict[int, int | None] = {}
        self.sources: dict[int, int] = {}
        self.most, self.waited = 0, 0
        self.lock = threading.RLock()
        self.made.append(self)

    def copy(self, source: Tensor, target: Tensor, after: Any) -> int:
        with self.lock:
            before = self.computed.get(target.data_ptr(), 0)
            assert before is not None, "a block is copied to where another one computes"
            assert after is not None and after >= before, "the copy does not wait for what is computed there"
            assert self.sources.get(source.data_ptr(), 0) <= self.waited, "memory was read into while it is copied"
            self.marks += 1
            self.sources[source.data_ptr()] = self.marks
            self.queue.append((self.marks, source, target))
            self.copied[target.data_ptr()] = self.marks
            self.most = max(self.most, len(self.queue))
            return self.marks

    def here(self) -> int:
        with self.lock:
            self.marks += 1
            self.computed = {area: self.marks if mark is None else mark for area, mark in self.computed.items()}
            return self.marks

    def join(self, memory: Tensor, *marks: Any) -> None:
        with self.lock:
            assert self.copied[memory.data_ptr()] in marks, "computed before the copy is done"
            self.computed[memory.data_ptr()] = None
            for mark in marks:
                self.catch_up(mark)

    def finish(self, mark: Any) -> None:
        with self.lock:
            self.waited = max(self.waited, mark or 0)
            self.catch_up(mark)

    def catch_up(self, mark: int | None) -> None:
        while self.queue and mark is not None and self.queue[0][0] <= mark:
            _, source, target = self.queue.pop(0)
            target.copy_(source)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Late]:
    Late.made = []
    monkeypatch.setattr(streaming, "lane_of", Late)
    return Late.made


@pytest.mark.parametrize("settings", [{}, {"guide": "cfg"}, {"images": 2, "solver": "heun"}], ids=str)
@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_blocks_are_there_when_they_run(make: Make, late: list[Late], memory: str, settings: dict[str, Any]) -> None:
    pipe = loaded(make(), memory)
    assert torch.equal(drawn(pipe, **settings), drawn(loaded(make(), "resident"), **settings))
    assert all(not lane.queue for lane in late)  # before its memory is let go, every copy is done
    assert max(lane.most for lane in late) > 0


def test_the_caller_does_not_wait_for_copies(make: Make, late: list[Late]) -> None:
    """When a block has run, the next one is read already, and nobody but the device has waited for its copy."""
    pipe = loaded(make(), "stream", modulation_ahead=False)
    assert pipe.memory is not None and pipe.memory.transformer is not None
    chain, seen = pipe.memory.transformer.chains[0], list[int]()

    def look(*_: Any) -> None:
        for area in chain._areas:  # pyright: ignore[reportPrivateUsage]
            if area.reading is not None:
                area.reading.result()
        seen.append(len(chain._lane.queue))  # type: ignore[attr-defined]

    handles = [unit.module.register_forward_pre_hook(look) for unit in chain.units]
    drawn(pipe, steps=1)
    for handle in handles:
        handle.remove()
    assert seen == [0] + [1] * (len(chain.units) - 1)


def test_an_interruption_leaves_no_copy_behind(make: Make, late: list[Late]) -> None:
    pipe, resident = loaded(make(), "stream"), loaded(make(), "resident")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = pipe.transformer.get_submodule("single_blocks.0.linear2").register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        drawn(pipe)
    handle.remove()
    assert all(not lane.queue for lane in late)
    assert torch.equal(drawn(pipe), drawn(resident))


class Stream:
    """Stands in for a CUDA stream, and writes down what it is told."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_event(self, event: Event) -> None:
        self.told.append(f"{self.name} waits for {event.name}")

    def record_event(self) -> Event:
        self.told.append(f"{self.name} marks")
        return Event(f"mark {len(self.told)}", self.told)

    def synchronize(self) -> None:
        self.told.append(f"caller waits for {self.name}")


class Event:
    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def synchronize(self) -> None:
        self.told.append(f"caller waits for {self.name}")


class Memory:
    """Stands in for a tensor on a GPU."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def copy_(self, source: object, non_blocking: bool) -> None:
        assert non_blocking
        self.told.append(f"copied in {Now.name}")

    def record_stream(self, stream: Stream) -> None:
        self.told.append(f"kept for {stream.name}")


class Now:
    name = "main"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams of CUDA are told."""
    written: list[str] = []

    @contextmanager
    def within(stream: Stream) -> Generator[None]:
        Now.name = stream.name
        try:
            yield
        finally:
            Now.name = "main"

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", written))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(Now.name, written))
    monkeypatch.setattr(torch.cuda, "stream", within)
    return written


def test_what_cuda_is_told(told: list[str]) -> None:
    """The order of streams, events and copies; that CUDA keeps it is not shown here."""
    lane, memory = CudaLane(torch.device("cuda")), Memory(told)
    assert lane.stages == 2 and lane.beside
    copied = lane.copy(memory, memory, lane.here())  # type: ignore[arg-type]
    lane.join(memory, copied, None)  # type: ignore[arg-type]
    lane.finish(copied)
    lane.finish(None)
    assert told == [
        "main marks",
        "side waits for mark 1",
        "copied in side",
        "side marks",
        "main waits for mark 4",
        "kept for main",
        "caller waits for mark 4",
    ]
    told.clear()

    def fail() -> None:
        with lane.working(lane.here()):
            assert Now.name == "side"
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert told == ["main marks", "side waits for mark 1", "caller waits for side"]


def test_work_aside_is_done_in_order_in_one_thread_behind_what_was_told() -> None:
    marks: list[Any] = []

    class Marked(Lane):
        def here(self) -> int:
            return len(marks)

        @contextmanager
        def working(self, after: Any) -> Generator[None]:
            assert torch.is_inference_mode_enabled()
            marks.append(after)
            yield

    def work(i: int) -> Callable[[], tuple[int, int]]:
        return lambda: (i, threading.get_ident())

    with Aside(Marked(CPU)) as start:
        first = start(work(0))
        assert first()[0] == 0
        others = [wait() for wait in [start(work(1)), start(work(2))]]
    assert [i for i, _ in others] == [1, 2]
    assert {ident for _, ident in others} == {first()[1]} != {threading.get_ident()}
    assert marks[0] == 0 and len(marks) == 3


def test_errors_aside_are_raised_where_the_result_is_asked_for() -> None:
    @contextmanager
    def around() -> Generator[None]:
        try:
            yield
        except ZeroDivisionError as error:
            raise ValueError("told otherwise") from error

    with Aside(Lane(CPU), around) as start:
        wait = start(lambda: 1 // 0)
        assert start(lambda: 2)() == 2
        with pytest.raises(ValueError, match="told otherwise"):
            wait()
    with pytest.raises(ZeroDivisionError):
        directly(lambda: 1 // 0)


def test_whoever_leaves_early_waits_for_what_is_at_work() -> None:
    begun, go, done = threading.Event(), threading.Event(), list[int]()

    def slow() -> None:
        begun.set()
        assert go.wait(60)
        done.append(1)

    def leave() -> None:
        with Aside(Lane(CPU)) as start:
            start(slow)
            start(lambda: done.append(2))
            assert begun.wait(60)
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert done == [1]


def test_memory_that_copies_are_made_from_is_foreseen(make: Make) -> None:
    """None on a CPU; for CUDA as much as the areas on the device."""
    memory = miniflux.load(make(), memory="stream", device="cpu").memory
    assert memory is not None and memory.transformer is not None
    sizes = memory.parts["transformer"].plan.areas
    assert [lanes.stages_of(torch.device(kind)) * sum(sizes) // 2 for kind in ("cpu", "mps", "cuda")] == [
        0,
        sum(sizes) // 2,
        sum(sizes),
    ]
