"""Who draws the pictures of `miniflux batch`: this process, several that it starts, or actors of Ray.

A picture is written beside and renamed by whoever drew it: what is kept is in the folder, and nowhere else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniflux.checks import whole
from miniflux.errors import CancelledError, MinifluxError, OutOfMemoryError
from miniflux.memory.compute import device_of_process
from miniflux.service.cluster import share, started

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    from miniflux.service.together import Previews
    from miniflux.settings import Request

LOOKS = 0.5  # seconds between two looks whether Ray is there
PIECE = 64  # pictures that a process is given at once, at most: so many are lost if it ends


@dataclass(frozen=True)
class Unit:
    """A picture to be drawn, and the file that it becomes."""

    request: Request
    path: Path


@dataclass(frozen=True, kw_only=True)
class How:
    """What all pictures share; the first two as of `service.Models`."""

    weights: str | None = None
    device: str | None = None
    metadata: bool = True


Told = Sequence[str]
"""Of each picture why it could not be drawn; empty if it was."""


class Hand:
    """Draws in this process.

    Args:
        stop: asked at every step.
    """

    def __init__(self, how: How, stop: Event | None = None) -> None:
        from miniflux.service import Models

        self.how, self.stop = how, stop
        self.models = Models(weights=how.weights, device=how.device)

    def draw(self, units: Sequence[Unit]) -> Iterator[tuple[Sequence[Unit], Told]]:
        """Draw pictures, neighbours of one kin together: as many at once as is fast and fits.

        Raises:
            OutputError: a picture cannot be written.
            CancelledError: `stop` was set.
        """
        for piece in pieces(units):
            left = piece
            while left:
                try:
                    most = max(1, self.models.most_at_once(left[0].request))
                except MinifluxError:  # drawing it says the same
                    most = 1
                yield left[:most], self._together(left[:most])
                left = left[most:]

    def _together(self, units: Sequence[Unit]) -> Told:
        from miniflux.memory.shortage import is_shortage

        try:
            results = self.models.draw_together([unit.request for unit in units], self._step)
        except CancelledError:
            raise
        except Exception as error:
            if not isinstance(error, MinifluxError) and not is_shortage(error):
                raise
            which = getattr(error, "which", None)
            if len(units) > 1 and which is None:  # whichever it was: the others can be drawn
                return [told for unit in units for told in self._together([unit])]
            which, why = which or 0, str(error).partition("\n")[0] or type(error).__name__
            before, after = units[:which], units[which + 1 :]
            told = self._together([*before, *after]) if len(units) > 1 else []
            return [*told[:which], why, *told[which:]]
        for unit, result in zip(units, results, strict=True):
            result.save(unit.path, metadata=self.how.metadata)
        return [""] * len(units)

    def _step(self, which: int, done: int, previews: Previews) -> None:
        if self.stop is not None and self.stop.is_set():
            raise CancelledError("stopped")


class Hands:
    """Draws in processes of its own, which end with this one however it ends.

    Args:
        count: how many; with several GPUs, and no device named, each has the next one.
    """

    def __init__(self, how: How, count: int) -> None:
        whole("workers", count, 1, 64)
        spawned = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        places = spawned.SimpleQueue()
        for i in range(count):
            places.put(device_of_process(i, how.device))
        self.stop = spawned.Event()
        threads = max(1, (os.cpu_count() or 1) // count)
        self._pool = ProcessPoolExecutor(count, spawned, _begin, (how, places, self.stop, threads))

    def draw(self, units: Sequence[Unit]) -> Iterator[tuple[Sequence[Unit], Told]]:
        """As of `Hand`, in whichever order they are done.

        Raises:
            OutOfMemoryError: a process ended in the middle.
        """
        waiting: dict[Future[Told], Sequence[Unit]] = {}
        for piece in pieces(units):
            waiting[self._pool.submit(_drawn, piece)] = piece
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise OutOfMemoryError(
                "a process that draws was ended, perhaps for want of memory: what is drawn is kept; run it again, with "
                "fewer --workers"
            ) from error

    def close(self) -> None:
        """End the processes, within a step of what they draw."""
        self.stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


class RayHands:
    """Draws in actors that Ray places, one for each GPU; what one had that ended is drawn by another.

    Args:
        count: how many at once.
        address: as of `cluster.started`. Folders and files are to be where all machines of the cluster see them.
    """

    def __init__(self, how: How, count: int, address: str) -> None:
        self.cluster = started(address)
        self.ray = self.cluster.ray
        lasting = {"max_restarts": -1, "max_task_retries": 3, **share(self.ray, count)}
        how = replace(how, weights=None if how.weights is None else os.path.abspath(how.weights))
        actor = self.ray.remote(_Far).options(**lasting)
        self.actors: list[Any] = [actor.remote(how) for _ in range(count)]

    def draw(self, units: Sequence[Unit]) -> Iterator[tuple[Sequence[Unit], Told]]:
        """As of `Hand`, in whichever order they are done.

        Raises:
            OutOfMemoryError: an actor ended again and again with the same pictures.
            MinifluxError: Ray itself ended.
        """
        left, free = list(pieces(units)), list(self.actors)
        waiting: dict[Any, tuple[Any, Sequence[Unit]]] = {}
        while left or waiting:
            while left and free:
                actor, piece = free.pop(), left.pop(0)
                far = [Unit(unit.request, unit.path.absolute()) for unit in piece]
                waiting[actor.drawn.remote(far)] = actor, piece
            while not (ended := self.ray.wait(list(waiting), num_returns=1, timeout=LOOKS)[0]):
                if why := self.cluster.ended():
                    raise MinifluxError(f"{why}: what is drawn is kept; run it again")
            (done,) = ended
            actor, piece = waiting.pop(done)
            free.append(actor)
            try:
                told: Told = self.ray.get(done)
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self.ray.exceptions.RayError as error:
                raise OutOfMemoryError("an actor ended again and again: what is drawn is kept") from error
            yield piece, told

    def close(self) -> None:
        self.cluster.close()


class _Far:
    """A hand, as an actor."""

    def __init__(self, how: How) -> None:
        self.hand = Hand(how)

    def drawn(self, units: Sequence[Unit]) -> Told:
        return [why for _, told in self.hand.draw(units) for why in told]


def pieces(units: Sequence[Unit]) -> Iterator[Sequence[Unit]]:
    """Neighbours of one kin, at most `PIECE` of them."""
    from miniflux.service import kin

    begin, kins = 0, [kin(unit.request) for unit in units]
    for i in range(1, len(units) + 1):
        if i == len(units) or kins[i] != kins[begin] or i - begin == PIECE:
            yield units[begin:i]
            begin = i


_hand: Hand | None = None  # of a process that `Hands` has started


def _begin(how: How, places: Any, stop: Event, threads: int) -> None:
    """What a process does first."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us, and sets `stop`
    parent = multiprocessing.parent_process()
    assert parent is not None

    def orphaned() -> None:
        parent.join()
        os._exit(1)  # whatever we draw: nobody writes down that it is there

    threading.Thread(target=orphaned, daemon=True).start()
    torch.set_num_threads(threads)
    global _hand
    _hand = Hand(replace(how, device=places.get()), stop)


def _drawn(units: Sequence[Unit]) -> Told:
    assert _hand is not None
    return [why for _, told in _hand.draw(units) for why in told]
