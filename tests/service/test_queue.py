"""The queue: nothing lost, nothing doubled, order kept, stopped within a step, refused politely."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from miniflux.errors import CancelledError, InputError, MinifluxError, QueueFullError
from miniflux.result import Result
from miniflux.service import Cost, Job, Queue
from miniflux.service.queue import Draw, Step, Timings
from miniflux.settings import Request
from tests.service.conftest import cost, picture


def ask(seed: int = 0, **options: object) -> Request:
    return Request(prompt="a star", seed=seed, **options)  # type: ignore[arg-type]


class Gate:
    """Work that stands still before every step until it is let go."""

    def __init__(self) -> None:
        self.go, self.at = threading.Semaphore(0), threading.Semaphore(0)
        self.begun: list[int] = []

    def __call__(self, request: Request, step: Step) -> Result:
        self.begun.append(request.seed)
        for done in range(1, (request.steps or 4) + 1):
            self.at.release()
            assert self.go.acquire(timeout=10)
            step(done, lambda: Image.new("RGB", (8, 8), (request.seed, 0, 0)))
        return picture(request)

    def steps(self, count: int) -> None:
        """Let it make so many steps, and wait until it stands before the next."""
        for _ in range(count):
            self.go.release()
            assert self.at.acquire(timeout=10)

    def wait(self) -> None:
        assert self.at.acquire(timeout=10)

    def open(self) -> None:
        for _ in range(10_000):
            self.go.release()


def test_64_requests_of_8_sessions(draw: Draw) -> None:
    """From 8 threads at once: none lost, none doubled, each session's in its order, the whole line in one order."""
    delivered: list[tuple[str, int]] = []
    order: list[int] = []

    def work(request: Request, step: Step) -> Result:
        order.append(request.seed)
        return draw(request, step)

    def deliver(job: Job, which: int, result: Result) -> None:
        delivered.append((job.session, result.settings[which]["seed"]))

    with Queue(work, cost, deliver=deliver) as queue:

        def session(name: int) -> list[Job]:
            return [queue.submit(f"session-{name}", ask(100 * name + i)) for i in range(8)]

        with ThreadPoolExecutor(8) as pool:
            jobs = [job for run in [pool.submit(session, name) for name in range(8)] for job in run.result()]
        results = [job.results(timeout=30) for job in jobs]
    assert [one.settings[0]["seed"] for (one,) in results] == [job.requests[0].seed for job in jobs]
    assert len(delivered) == len(set(delivered)) == 64 and {seed for _, seed in delivered} == set(order)
    for name in range(8):
        expected = [100 * name + i for i in range(8)]
        assert [seed for who, seed in delivered if who == f"session-{name}"] == expected
    assert [seed for _, seed in delivered] == order and queue.jobs() == []


def test_first_in_first_out_with_places() -> None:
    gate = Gate()
    with Queue(gate, cost) as queue:
        jobs = [queue.submit(f"session-{i % 2}", ask(i)) for i in range(4)]
        gate.wait()
        assert [job.status().place for job in jobs] == [0, 1, 2, 3]
        assert [job.status().state for job in jobs] == ["running", "waiting", "waiting", "waiting"]
        assert queue.jobs() == jobs and queue.jobs("session-1") == jobs[1::2]
        gate.steps(3)
        status = jobs[0].status()
        assert (status.steps_done, status.steps) == (3, 4)
        preview = jobs[0].preview()
        assert preview is not None and preview.getpixel((0, 0)) == (0, 0, 0) and jobs[1].preview() is None
        jobs[2].cancel()
        assert [job.status().place for job in jobs] == [0, 1, None, 2]
        gate.open()
        for job in (jobs[0], jobs[1], jobs[3]):
            job.results(timeout=10)
    assert gate.begun == [0, 1, 3]
    assert jobs[0].status().place is None and jobs[0].status().state == "done" and jobs[0].preview() is None


def test_cancelling_stops_within_a_step_and_leaves_everything_usable() -> None:
    gate = Gate()
    delivered: list[int] = []
    with Queue(gate, cost, deliver=lambda job, which, result: delivered.append(job.requests[which].seed)) as queue:
        job, after = queue.submit("s", ask(1, steps=50)), queue.submit("s", ask(2))
        gate.wait()
        gate.steps(3)
        job.cancel()
        job.cancel()
        gate.go.release()  # the step it was in
        with pytest.raises(CancelledError):
            job.results(timeout=10)
        assert job.status().state == "cancelled" and job.status().error == "cancelled" and job.status().steps_done == 3
        gate.open()
        assert len(after.results(timeout=10)) == 1
        after.cancel()
        assert after.status().state == "done"
    assert delivered == [2]


def test_what_was_finished_of_a_cancelled_batch_is_kept() -> None:
    gate = Gate()
    with Queue(gate, cost) as queue:
        job = queue.submit("s", ask(1), ask(2), ask(3), title="batch")
        gate.wait()
        gate.steps(5)  # all of the first, one of the second
        assert job.status().steps_done == 5 and job.status().steps == 12
        job.cancel()
        gate.open()
        assert job.wait(10) and [result.settings[0]["seed"] for result in job.finished] == [1]


def test_a_failure_is_told_and_the_next_is_served(draw: Draw, caplog: pytest.LogCaptureFixture) -> None:
    """One of ours as it is, one of others with a trace in the log; delivering can fail as well."""

    def work(request: Request, step: Step) -> Result:
        if request.seed == 1:
            raise MinifluxError("the numbers overflowed\nand more")
        if request.seed == 2:
            raise RuntimeError("a fault")
        return draw(request, step)

    def deliver(job: Job, which: int, result: Result) -> None:
        if job.requests[which].seed == 3:
            raise OSError("disk full")

    with Queue(work, cost, deliver=deliver) as queue:
        jobs = [queue.submit("s", ask(seed)) for seed in range(5)]
        for job, error in zip(jobs, (None, MinifluxError, RuntimeError, OSError, None), strict=True):
            if error is None:
                assert len(job.results(timeout=10)) == 1
            else:
                with pytest.raises(error):
                    job.results(timeout=10)
        assert [job.status().state for job in jobs] == ["done", "failed", "failed", "failed", "done"]
        assert jobs[1].status().error == "the numbers overflowed"
    assert "a fault" in caplog.text and "overflowed" not in caplog.text


def test_a_full_queue_refuses_politely() -> None:
    gate = Gate()
    with Queue(gate, cost, waiting=3) as queue:
        running = queue.submit("s", ask(0))
        gate.wait()
        jobs = [queue.submit("s", ask(i)) for i in range(1, 4)]
        with pytest.raises(
            QueueFullError, match="the queue is full: 3 jobs wait, and no more are taken; try again later"
        ):
            queue.submit("s", ask(4))
        jobs[0].cancel()
        queue.submit("s", ask(5))
        gate.steps(2)
        with pytest.raises(QueueFullError, match=r"try again in about \d+ s"):
            queue.submit("s", ask(6))
        gate.open()
        running.results(timeout=10)


def test_closing_cancels_everything(draw: Draw) -> None:
    before = set(threading.enumerate())
    gate = Gate()
    queue = Queue(gate, cost)
    jobs = [queue.submit("s", ask(i, steps=1000)) for i in range(3)]
    gate.wait()
    queue.close(timeout=0.01)
    gate.open()
    queue.close(timeout=10)
    for job in jobs:
        with pytest.raises(CancelledError):
            job.results(timeout=10)
    with pytest.raises(CancelledError, match="closed"):
        queue.submit("s", ask(9))
    assert not any(thread.name.startswith("miniflux-worker") for thread in set(threading.enumerate()) - before)


def test_workers_serve_at_once_and_keep_the_order_of_beginning() -> None:
    gate = Gate()
    with Queue(gate, cost, workers=3) as queue:
        jobs = [queue.submit("s", ask(i)) for i in range(5)]
        for _ in range(3):
            gate.wait()
        assert [job.status().place for job in jobs] == [0, 0, 0, 1, 2]
        gate.open()
        for job in jobs:
            job.results(timeout=10)
    assert sorted(gate.begun[:3]) == [0, 1, 2] and sorted(gate.begun[3:]) == [3, 4]


def test_answers_do_not_wait_in_line() -> None:
    """A job of which everything is known is over at once, delivered once; otherwise all of it waits."""
    gate = Gate()
    delivered: list[int] = []
    known = {7, 8}

    def answer(request: Request) -> Result | None:
        return picture(request) if request.seed in known else None

    with Queue(gate, cost, answer=answer, deliver=lambda job, i, _: delivered.append(job.requests[i].seed)) as queue:
        first = queue.submit("s", ask(0))
        gate.wait()
        job = queue.submit("s", ask(7), ask(8))
        assert job.over and len(job.results()) == 2 and delivered == [7, 8]
        assert job.status().steps_done == job.status().steps == 8
        mixed = queue.submit("s", ask(7), ask(1))
        assert mixed.status().place == 1
        gate.open()
        first.results(timeout=10), mixed.results(timeout=10)
    assert delivered == [7, 8, 0, 7, 1]


def test_a_job_can_deliver_elsewhere(draw: Draw) -> None:
    usual: list[int] = []
    own: list[int] = []
    with Queue(draw, cost, deliver=lambda job, i, _: usual.append(i)) as queue:
        queue.submit("s", ask(0), ask(1), deliver=lambda job, i, _: own.append(i)).results(timeout=10)
        queue.submit("s", ask(0)).results(timeout=10)
    assert own == [0, 1] and usual == [0]


def test_estimates_come_from_measured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds per step as the median; other sizes in proportion, other kinds not at all; what is not a step counts."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    timings = Timings()
    small = Cost(kind="nano", size=64, steps=4)
    assert timings.seconds(small, 4) is None
    timer = timings.start(small)
    for done, seconds in enumerate((5.0, 1.0, 1.0, 9.0, 1.0), 1):  # loading before the first, one that was disturbed
        clock[0] += seconds
        timer.told(done)
        timer.told(done)
    clock[0] += 0.5
    timer.over()
    assert timings.per_step(small) == 1.0
    assert timings.per_step(Cost(kind="nano", size=256, steps=4)) == 4.0
    assert timings.per_step(Cost(kind="flux", size=64, steps=4)) is None
    rest = 17.5 - 5 * 3.0  # all but five steps of the mean length
    assert timings.seconds(small, 4) == pytest.approx(4 + rest)


def test_waiting_times_add_up(draw: Draw) -> None:
    """What is left of the running job, of those before in line, and of one's own."""
    gate = Gate()
    with Queue(gate, cost) as queue:
        for _ in range(3):
            queue.timings.add_step(cost(ask()), 0.5)
        jobs = [queue.submit("s", ask(i)) for i in range(3)]
        gate.wait()
        assert [job.status().seconds_left for job in jobs] == [2.0, 4.0, 6.0]
        unknown = queue.submit("s", ask(9, model="nano-schnell"))
        assert unknown.status().seconds_left is None
        gate.open()
    with Queue(gate, cost, workers=2) as queue:
        gate.go = threading.Semaphore(0)
        queue.timings.add_step(cost(ask()), 0.5)
        jobs = [queue.submit("s", ask(i)) for i in range(4)]
        gate.wait(), gate.wait()
        assert [job.status().seconds_left for job in jobs] == [2.0, 2.0, 4.0, 4.0]
        gate.open()


def test_bad_queues_and_jobs_are_refused(draw: Draw) -> None:
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: Queue(draw, cost, workers=0), "workers must be a whole number from 1 to 64"),
        (lambda: Queue(draw, cost, waiting=0), "waiting must be a whole number of at least 1"),
    ]
    for make, message in refused:
        with pytest.raises(InputError, match=message):
            make()
    with Queue(draw, cost) as queue:
        with pytest.raises(InputError, match="at least one request"):
            queue.submit("s")
        slow = Gate()
        queue.draw = slow
        job = queue.submit("s", ask())
        with pytest.raises(TimeoutError):
            job.results(timeout=0.01)
        slow.open()
