"""Starts workers as processes, starts them anew when they end, ends those that hang, and gives back what they had."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import IO, Protocol

from miniflux.checks import whole
from miniflux.memory.compute import device_of_process
from miniflux.service.jobs.database import GONE
from miniflux.service.jobs.workbench import Workbench
from miniflux.service.jobs.worker import Duty

log = logging.getLogger(__name__)

LOOKS = 0.1  # seconds between two looks at the processes
ROUNDS = 1.0  # seconds between two looks at what the store knows of them
LOST = 30.0  # seconds of silence after which a worker, perhaps of another machine, is taken for dead
SOON = 5.0  # a worker that ended within so many seconds is started again after a pause
LONGEST_PAUSE = 30.0
ENDS = 10.0  # seconds that workers have to end


class Process(Protocol):
    """What has the place of a worker, as `subprocess.Popen` has it. When `stdin` is closed the worker is to end."""

    stdin: IO[bytes] | None
    returncode: int

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


@dataclass(eq=False)
class Place:
    """One place for a worker, with the process that has it now; nobody takes it while it is not wanted."""

    duty: Duty
    wanted: bool = True
    hung: bool = False
    process: Process | None = None
    started: float = 0.0
    pause: float = 0.0
    since: float = field(default_factory=time.monotonic)  # the place is empty

    def end(self) -> None:
        """End what hangs."""
        self.hung = True
        if self.process is not None:
            self.process.kill()


class Supervisor:
    """So many workers, as long as the context lasts.

    Args:
        duty: of each of them; their ids are made here.
        count: how many.
        hang: seconds without a step, while one has a job, after which it is ended. Loading a model is a step, too.
        threads: of torch, for each worker; None for an even share of the cores.
    """

    def __init__(self, duty: Duty, count: int, hang: float = 900.0, threads: int | None = None) -> None:
        self.bench, self.hang = Workbench(duty.database), hang
        self.threads = threads or max(1, (os.cpu_count() or 1) // whole("workers", count, 1, 64))
        self.places = [Place(duty) for _ in range(count)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="miniflux-supervisor", daemon=True)

    def __enter__(self) -> Supervisor:
        self._give_back_of_the_dead()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        running = [place.process for place in self.places if place.process is not None]
        for process in running:
            _close(process.stdin)
        until = time.monotonic() + ENDS
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()
            process.wait()
        for place in self.places:
            self._quietly(lambda id=place.duty.worker: self.bench.put_back(id))
        self.bench.close()

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [place.process.pid for place in self.places if place.process is not None]

    def _watch(self) -> None:
        rounds = 0.0
        while not self._stop.wait(LOOKS):
            now = time.monotonic()
            for place in self.places:
                if place.process is not None and place.process.poll() is not None:
                    self._ended(place, now)
                if place.process is None and place.wanted and now - place.since >= place.pause:
                    self._start(place)
            if now - rounds >= ROUNDS:
                rounds = now
                self._quietly(self.round)

    def _start(self, place: Place) -> None:
        place.duty = replace(place.duty, worker=secrets.token_hex(16))
        place.process, place.started = self.begin(place.duty), time.monotonic()

    def begin(self, duty: Duty) -> Process:
        """A worker, begun; with several GPUs each has the next one."""
        place = [place.duty for place in self.places].index(duty)
        duty = replace(duty, device=device_of_process(place, duty.device))
        # Its own session: Ctrl-C at a terminal ends the server, which then ends the workers.
        process = subprocess.Popen(
            [sys.executable, "-m", "miniflux.service.jobs.worker"],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
        )
        assert process.stdin is not None
        with suppress(OSError):  # it has ended already, which is seen at the next look
            process.stdin.write(f"{duty.text()}\n".encode())
            process.stdin.flush()
        return process

    def _ended(self, place: Place, now: float) -> None:
        """A worker is no more: what it had goes back into the line, another takes its place."""
        assert place.process is not None
        outside = place.process.returncode in (0, -signal.SIGKILL, -signal.SIGTERM) and not place.hung
        if not self._quietly(lambda: self.bench.put_back(place.duty.worker, crashed=not outside)):
            return  # at the next look
        place.hung = False
        if place.wanted:
            log.warning("a worker ended (%s); another is started", place.process.returncode)
        _close(place.process.stdin)
        soon = now - place.started < SOON
        place.pause = min(LONGEST_PAUSE, max(1.0, 2 * place.pause)) if soon else 0.0
        place.process, place.since = None, now

    def round(self) -> None:
        """End those that hang; give back what those had that fell silent."""
        own = {place.duty.worker: place for place in self.places if place.process is not None}
        for worker in self.bench.workers():
            place, silent = own.get(worker["id"]), worker["about"].get("silent")
            if place is not None and silent is not None and silent > self.hang:
                log.warning("a worker has made no step for %.0f s, and is ended", silent)
                place.end()
        for id in self.bench.lost(LOST):
            place = own.get(id)
            if place is not None:  # it is there, and says nothing at all
                place.end()
            else:
                log.warning("worker %s is lost", id)
                self.bench.put_back(id)

    def _give_back_of_the_dead(self) -> None:
        """What workers of this machine had that ended with an earlier server."""
        for worker in self.bench.workers():
            if worker["host"] == socket.gethostname() and not _alive(worker["pid"]):
                self.bench.put_back(worker["id"])

    def _quietly(self, act: Callable[[], object]) -> bool:
        """Do it; whether the database took it."""
        try:
            act()
        except GONE as error:
            log.warning("the database does not answer: %s", str(error).partition("\n")[0])
            return False
        return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is, and somebody else's
        return True
    return True


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        with suppress(OSError):
            pipe.close()
