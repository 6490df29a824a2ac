"""What a device does beside its computing: copies of weights that come next, and the decoding of a picture.

A GPU works through queues (CUDA's streams) that know nothing of each other but what they are told to wait for: a mark
in another queue. Here is all that the library tells them. A CPU has done everything when a call returns, and its lane
waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Mark = Any
"""A place in a queue, which comes when all before it is done; None for one that has come."""

Start = Callable[[Callable[[], T]], Callable[[], T]]
"""Begins work, and gives a function that waits for its result and raises what it raised."""


def stages_of(device: torch.device) -> int:
    """Pieces of memory from which copies to a device are made, in turns: none where what is read is where it computes;
    of a CUDA device two, one to read into while the other is copied."""
    return {"cpu": 0, "cuda": 2}.get(device.type, 1)


class Lane:
    """A queue beside the caller's. This one is of devices that have no second one: all is done when a call returns.

    Attributes:
        beside: whether something is done at the same time as what the caller tells the device.
        stages: pieces of memory that copies are made from, in turns.
    """

    beside = False

    def __init__(self, device: torch.device) -> None:
        self.device, self.stages = device, stages_of(device)

    def stage(self, size: int) -> Tensor:
        """So many bytes of the machine's memory, that `copy` copies from."""
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        """Copy after what is marked; neither may be changed before the mark that is returned."""
        target.copy_(source)
        return None

    def here(self) -> Mark:
        """Marks all that the caller has told the device so far."""
        return None

    def join(self, memory: Tensor, *marks: Mark) -> None:
        """Let what the caller tells the device from now on wait for marks; the caller does not. `memory`, which that
        works with, is not given to others before it is done."""

    def finish(self, mark: Mark) -> None:
        """Wait for a mark."""

    @contextmanager
    def working(self, after: Mark) -> Generator[None]:
        """What this thread tells the device in here goes through this lane, after what is marked, and is done at the
        end, however it ends: what it reads may be gone then."""
        yield


class CudaLane(Lane):
    """A stream of its own."""

    beside = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)

    def stage(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)  # from other memory, copies are not asynchronous

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def here(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def join(self, memory: Tensor, *marks: Mark) -> None:
        now = torch.cuda.current_stream(self.device)
        for mark in marks:
            if mark is not None:
                now.wait_event(mark)
        memory.record_stream(now)

    def finish(self, mark: Mark) -> None:
        if mark is not None:
            mark.synchronize()

    @contextmanager
    def working(self, after: Mark) -> Generator[None]:
        self.stream.wait_event(after)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            self.stream.synchronize()


def lane_of(device: torch.device) -> Lane:
    """A new lane."""
    return CudaLane(device) if device.type == "cuda" else Lane(device)


def directly(work: Callable[[], T]) -> Callable[[], T]:
    """A `Start` that does it now."""
    done = work()
    return lambda: done


class Aside:
    """A `Start` for a thread and a lane of their own: one piece of work after the other, each behind what the caller
    has told the device when it began.

    Args:
        around: what to do each in.
    """

    def __init__(self, lane: Lane, around: Callable[[], AbstractContextManager[object]] = nullcontext[None]) -> None:
        self._lane, self._around = lane, around
        self._thread = ThreadPoolExecutor(1, "miniflux-aside")

    def __call__(self, work: Callable[[], T]) -> Callable[[], T]:
        before = self._lane.here()

        def run() -> T:
            with torch.inference_mode(), self._around(), self._lane.working(before):
                return work()

        return self._thread.submit(run).result

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *_: object) -> None:
        """Whoever leaves early waits for what is at work; the rest is not begun."""
        self._thread.shutdown(wait=True, cancel_futures=True)
