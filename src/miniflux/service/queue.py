"""First in, first out: who draws next, how far it is, how long it will take, and how to stop it.

    queue = Queue(models.draw, models.cost, deliver=history.deliver)
    job = queue.submit(session, request)
    job.status()      # place in line, steps done, seconds left
    job.results()     # waits; raises what went wrong
    job.cancel()

A job is one or several requests (a batch, a grid) that keep one place in line. Threads of the queue, one by default, do
the work; everything here may be called from any thread.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from statistics import median, median_low
from typing import Literal

from PIL import Image

from miniflux.checks import whole
from miniflux.errors import CancelledError, InputError, QueueFullError
from miniflux.result import Result
from miniflux.settings import Request

log = logging.getLogger(__name__)

JobState = Literal["waiting", "running", "done", "failed", "cancelled"]
Preview = Callable[[], "Image.Image | None"]

Step = Callable[[int, "Preview | None"], None]
"""Told after every step: (steps done of this request, what makes the preview). Raises to stop the run."""

Draw = Callable[[Request, Step], Result]
"""Does the work: a request into pictures."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a request will cost.

    Attributes:
        kind: what the duration of a step depends on, beside the size: the model, how its predictions are made.
        size: in any unit that grows with that duration, such as the tokens that go through the network in a step.
        steps: of all pictures of the request.
    """

    kind: Hashable
    size: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """A job at one moment.

    Attributes:
        state: waiting, running, done, failed or cancelled.
        place: 0 while running, 1 for the next in line ...; None when it is over.
        steps_done, steps: over all pictures of the job.
        seconds_left: until it is over, waiting included; None while no step of its kind was measured.
        error: one line, if it failed or was cancelled.
    """

    state: JobState
    place: int | None
    steps_done: int
    steps: int
    seconds_left: float | None
    error: str | None


@dataclass(eq=False)
class Job:
    """One place in the queue. Made by `Queue.submit`."""

    queue: Queue
    session: str
    requests: tuple[Request, ...]
    costs: tuple[Cost, ...]
    title: str = ""
    deliver: Deliver | None = None
    draw: Draw | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    state: JobState = "waiting"
    error: BaseException | None = None
    made: list[Result] = field(default_factory=list[Result])
    step: int = 0  # done of the running request
    show: Preview | None = None
    stopping: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        return self.ended.is_set()

    @property
    def finished(self) -> list[Result]:
        """Results of the requests that are done, in order; also of a job that runs or was cancelled."""
        return list(self.made)

    def status(self) -> Status:
        """Where it stands."""
        return self.queue.status_of(self)

    def preview(self) -> Image.Image | None:
        """The picture that the run points to now, roughly; None if there is none. Made when asked for."""
        make = self.show
        return None if make is None else make()

    def cancel(self) -> None:
        """Stop within one step; nothing happens if it is over."""
        self.queue.cancel(self)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is over, at most so many seconds; whether it is."""
        return self.ended.wait(timeout)

    def results(self, timeout: float | None = None) -> list[Result]:
        """Wait, and return one result per request.

        Raises:
            CancelledError: it was cancelled, or the queue was closed.
            TimeoutError: it is not over after so many seconds.
            MinifluxError, Exception: what went wrong.
        """
        if not self.ended.wait(timeout):
            raise TimeoutError(f"not finished after {timeout} s")
        if self.error is not None:
            raise self.error
        return list(self.made)


Deliver = Callable[[Job, int, Result], None]
"""Told once of every result, before the job is over: (job, which of its requests, result)."""


class Queue:
    """The line, and the threads that serve it.

    Args:
        draw: does the work.
        cost: says what a request will cost, before it is begun.
        workers: jobs at once, at most; `Models.draw` lets a run begin only when there is memory for it.
        waiting: jobs that may wait.
        deliver: told of every result, exactly once.
        answer: what can be answered at once, without waiting in line (a cache); returns None for the rest.
    """

    def __init__(
        self,
        draw: Draw,
        cost: Callable[[Request], Cost],
        *,
        workers: int = 1,
        waiting: int = 128,
        deliver: Deliver | None = None,
        answer: Callable[[Request], Result | None] | None = None,
    ) -> None:
        self.draw, self.cost, self.deliver, self.answer = draw, cost, deliver, answer
        self.waiting = whole("waiting", waiting, 1)
        self.timings = Timings()
        self._line: deque[Job] = deque()
        self._running: list[Job] = []
        self._change = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"miniflux-worker-{i}", daemon=True)
            for i in range(whole("workers", workers, 1, 64))
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        session: str,
        *requests: Request,
        title: str = "",
        deliver: Deliver | None = None,
        draw: Draw | None = None,
    ) -> Job:
        """Put a job at the end of the line.

        Args:
            deliver: told of its results, instead of the queue's own.
            draw: does its work, instead of the queue's own; nothing of it is then answered at once.

        Raises:
            QueueFullError: too many wait.
            InputError, WeightsNotFoundError: no request, or a model that is not there.
            CancelledError: the queue was closed.
        """
        if not requests:
            raise InputError("a job needs at least one request, got none")
        costs = tuple(self.cost(request) for request in requests)
        job = Job(self, session, requests, costs, title, deliver or self.deliver, draw)
        if self._answered(job):
            return job
        with self._change:
            if self._closed:
                raise CancelledError("the queue is closed")
            if len(self._line) >= self.waiting:
                raise QueueFullError(self._full())
            self._line.append(job)
            self._change.notify()
        return job

    def _answered(self, job: Job) -> bool:
        """Whether the whole job could be answered at once, and was."""
        if self.answer is None or job.draw is not None or self._closed:
            return False
        results: list[Result] = []
        for request in job.requests:
            result = self.answer(request)
            if result is None:
                return False
            results.append(result)
        for i, result in enumerate(results):
            if job.deliver is not None:
                job.deliver(job, i, result)
            job.made.append(result)
        with self._change:
            self._finish(job, None)
        return True

    def _full(self) -> str:
        left = self._seconds_until(len(self._line))
        when = "later" if left is None else f"in about {max(1, round(left))} s"
        return f"the queue is full: {len(self._line)} jobs wait, and no more are taken; try again {when}"

    def jobs(self, session: str | None = None) -> list[Job]:
        """Jobs that run, then those that wait, in order; of one session if given."""
        with self._change:
            return [job for job in [*self._running, *self._line] if session in (None, job.session)]

    def cancel(self, job: Job) -> None:
        """Stop a job; see `Job.cancel`."""
        with self._change:
            job.stopping = True
            if job in self._line:
                self._line.remove(job)
                self._finish(job, CancelledError("cancelled"))

    def close(self, timeout: float | None = 30.0) -> None:
        """Cancel everything and end the threads; waits for them so many seconds each."""
        with self._change:
            self._closed = True
            for job in [*self._running, *self._line]:
                self.cancel(job)
            self._change.notify_all()
        for thread in self._threads:
            thread.join(timeout)

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What is known of a job

    def status_of(self, job: Job) -> Status:
        """See `Job.status`."""
        with self._change:
            total = sum(cost.steps for cost in job.costs)
            done = sum(cost.steps for cost in job.costs[: len(job.made)]) + job.step
            place = left = None
            if job.state == "running":
                place, left = 0, self._seconds_for(job)
            elif job.state == "waiting":
                ahead = self._line.index(job)
                own, before = self._seconds_for(job), self._seconds_until(ahead)
                place, left = ahead + 1, None if own is None or before is None else before + own
            error = None if job.error is None else str(job.error).partition("\n")[0] or type(job.error).__name__
            return Status(state=job.state, place=place, steps_done=done, steps=total, seconds_left=left, error=error)

    def _seconds_for(self, job: Job) -> float | None:
        """What is left of one job, without waiting."""
        left = 0.0
        for i, cost in enumerate(job.costs[len(job.made) :]):
            seconds = self.timings.seconds(cost, cost.steps - (job.step if i == 0 else 0))
            if seconds is None:
                return None
            left += seconds
        return left

    def _seconds_until(self, ahead: int) -> float | None:
        """How long until the job with so many before it in line begins."""
        free = [0.0] * (len(self._threads) - len(self._running))
        for job in self._running:
            left = self._seconds_for(job)
            if left is None:
                return None
            free.append(left)
        for job in list(self._line)[:ahead]:
            left = self._seconds_for(job)
            if left is None:
                return None
            free.sort()
            free[0] += left
        return min(free)

    # The work

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._line and not self._closed:
                    self._change.wait()
                if self._closed:
                    return
                job = self._line.popleft()
                job.state = "running"
                self._running.append(job)
            error: BaseException | None = None
            try:
                self._run(job)
            except BaseException as reason:  # whatever it is, the thread goes on serving
                error = reason
                if not isinstance(reason, ValueError):
                    log.exception("a job failed")
            with self._change:
                self._running.remove(job)
                self._finish(job, error)

    def _run(self, job: Job) -> None:
        for i, (request, cost) in enumerate(zip(job.requests, job.costs, strict=True)):
            timer = self.timings.start(cost)

            def step(done: int, preview: Preview | None, timer: Timer = timer) -> None:
                if job.stopping:
                    raise CancelledError("cancelled")
                timer.told(done)
                job.step, job.show = done, preview

            if job.stopping:
                raise CancelledError("cancelled")
            result = (job.draw or self.draw)(request, step)
            if job.deliver is not None:
                job.deliver(job, i, result)
            timer.over()
            with self._change:
                job.made.append(result)
                job.step, job.show = 0, None

    def _finish(self, job: Job, error: BaseException | None) -> None:
        job.error, job.show = error, None
        job.state = "done" if error is None else "cancelled" if isinstance(error, CancelledError) else "failed"
        job.ended.set()


class Timings:
    """How long work took: seconds per step, and what a request takes beside its steps, as the median of the last ones.

    For a size that was not measured, the nearest one of the same kind is taken, in proportion.
    """

    def __init__(self) -> None:
        self._steps: dict[Hashable, dict[float, deque[float]]] = {}
        self._rest: dict[Hashable, deque[float]] = {}

    def start(self, cost: Cost) -> Timer:
        """To be told of the steps of one request."""
        return Timer(self, cost, time.monotonic())

    def add_step(self, cost: Cost, seconds: float) -> None:
        """One step took so long."""
        self._steps.setdefault(cost.kind, {}).setdefault(cost.size, deque(maxlen=32)).append(seconds)

    def add_rest(self, cost: Cost, seconds: float) -> None:
        """A request took so long beside its steps."""
        self._rest.setdefault(cost.kind, deque(maxlen=8)).append(max(0.0, seconds))

    def per_step(self, cost: Cost) -> float | None:
        """Seconds per step; None if none of the kind was measured."""
        known = self._steps.get(cost.kind)
        if not known:
            return None
        size = min(list(known), key=lambda size: abs(size - cost.size))
        return median(list(known[size])) * cost.size / size

    def seconds(self, cost: Cost, steps: int) -> float | None:
        """How long the request takes while so many steps are left; None if none of its kind was measured."""
        step, rest = self.per_step(cost), list(self._rest.get(cost.kind, ()))
        return None if step is None else steps * step + (median_low(rest) if rest else 0.0)


@dataclass
class Timer:
    """Measures one request: the time between two steps, and the rest."""

    timings: Timings
    cost: Cost
    began: float
    step: tuple[int, float] | None = None
    counted: int = 0
    spent: float = 0.0

    def told(self, done: int) -> None:
        """So many steps are done."""
        now = time.monotonic()
        if self.step is not None and done == self.step[0] + 1:
            self.timings.add_step(self.cost, now - self.step[1])
            self.counted, self.spent = self.counted + 1, self.spent + now - self.step[1]
        if self.step is None or done != self.step[0]:
            self.step = (done, now)

    def over(self) -> None:
        """The request is done. Its first step, which was not measured, counts as the others."""
        if self.counted:
            mean = self.spent / self.counted
            self.timings.add_rest(self.cost, time.monotonic() - self.began - (self.counted + 1) * mean)
