"""A process that draws what waits in the store: `python -m miniflux.service.jobs.worker`, started by `supervisor`.

What to do comes as one line of JSON on its standard input, which then stays open as long as somebody wants the worker:
when it closes, for whatever reason, the worker gives back what it has begun and ends.
"""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL import Image

from miniflux.checks import without_folders
from miniflux.errors import CancelledError, MinifluxError, OutOfMemoryError, OutputError
from miniflux.memory.ledger import resident_size
from miniflux.result import QUALITY, Result
from miniflux.service import logs
from miniflux.service.jobs.blobs import Blobs
from miniflux.service.jobs.database import GONE
from miniflux.service.jobs.inputs import Inputs
from miniflux.service.jobs.records import Job, Picture, Shown
from miniflux.service.jobs.workbench import Workbench
from miniflux.service.models import Models
from miniflux.service.queue import Preview
from miniflux.service.together import Previews

log = logging.getLogger("miniflux.service.jobs.worker")  # also where it is the process

IDLE = 0.02  # seconds between two looks at an empty line
OFTEN = 0.005  # seconds between two questions whether to stop
REPORT = 0.1  # seconds between two reports of progress
SIGNS = 2.0  # seconds between two signs of life
ENDINGS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


@dataclass(frozen=True, kw_only=True)
class Duty:
    """What a worker is started with.

    Attributes:
        worker: its id.
        database: the URL of the store.
        blobs, inputs: folders of finished pictures and of those that were given.
        weights, device, dtype, models, max_bytes: as of `service.Models`, whose `folder` is `models`.
    """

    worker: str
    database: str
    blobs: str
    inputs: str
    weights: str | None = None
    device: str | None = None
    dtype: str | None = None
    models: str | None = None
    max_bytes: int | None = None

    def text(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self))


@dataclass(eq=False)
class Drawing:
    """A job at work.

    Attributes:
        done: steps of all its pictures.
        dropped: why its pictures are not wanted any more: cancelled, or time.
    """

    job: Job
    done: int = 0
    previews: int = 0
    dropped: str = ""

    @property
    def steps(self) -> int:
        """Of one picture."""
        return self.job.steps // self.job.pictures

    @property
    def marks(self) -> set[int]:
        """The steps of a picture after which a preview is kept, evenly between its begin and its end."""
        return {round(i * self.steps / (self.previews + 1)) for i in range(1, self.previews + 1)} - {0, self.steps}


class Worker:
    """Draws one batch of jobs after the other.

    Args:
        id: unlike that of any other worker.
    """

    def __init__(self, id: str, bench: Workbench, blobs: Blobs, models: Models) -> None:
        self.id, self.bench, self.blobs, self.models = id, bench, blobs, models
        self.stop = threading.Event()
        self.sign: float | None = None  # of the last step, or of the begin of a batch; None while nothing is drawn
        self.telling = ThreadPoolExecutor(1, "miniflux-telling")  # of progress
        self._keeping = ThreadPoolExecutor(1, "miniflux-keeping")  # of what is drawn
        self._kept: Future[None] | None = None

    def serve(self) -> None:
        """Draw until `stop` is set. What is begun then goes back into the line."""
        try:
            while not self.stop.is_set():
                try:
                    if not self.next():
                        self.stop.wait(IDLE)
                except GONE as error:
                    log.warning("the database does not answer: %s", _line(error))
                    self.stop.wait(1.0)
        finally:
            self._keeping.shutdown()
            self.telling.shutdown()

    def next(self) -> bool:
        """Draw the next in line, with those behind it that are alike; whether anybody waited."""
        first = self.bench.claim(self.id)
        if first is None:
            return False
        self.sign = time.monotonic()
        if not self.models.catalogue.lists(first.request.model):  # new in the folder of models
            self.models.catalogue.scan()
        jobs = [first]
        try:
            room = self.models.most_at_once(first.request) - first.pictures
            jobs += self.bench.claim_alike(self.id, first.kin, room)
        except MinifluxError:
            pass  # drawing it says the same
        try:
            self._draw([Drawing(job, previews=job.previews) for job in jobs])
        finally:
            self.sign = None
        return True

    def _draw(self, drawings: Sequence[Drawing]) -> None:
        began, steps = time.monotonic(), Steps(self, drawings)
        try:
            requests = [one.job.request for one in drawings]
            results = self.models.draw_together(requests, steps)
            steps.close()
        except Exception as error:
            if self.stop.is_set():
                self._put_back(drawings)
            elif isinstance(error, CancelledError):
                self._refuse(drawings, error)
            elif len(drawings) > 1:
                self._draw_the_others(drawings, error)
            else:
                self._refuse(drawings, error)
        else:
            if self._kept is not None:
                self._kept.result()
            seconds = time.monotonic() - began
            self._kept = self._keeping.submit(self._keep, list(drawings), results, seconds)

    def _draw_the_others(self, drawings: Sequence[Drawing], error: Exception) -> None:
        """One of a batch cannot be drawn. If it is known which: all others together; else each alone."""
        which = error.which if isinstance(error, MinifluxError) else None
        again = [replace(one, done=0) for one in drawings]
        apart = [[one] for one in again]
        if which is not None:
            apart = [apart.pop(which), [one for (one,) in apart]]
        for some in apart:
            self._draw(some)

    def _put_back(self, drawings: Sequence[Drawing]) -> None:
        self._patiently(lambda: self.bench.put_back(self.id, [one.job.id for one in drawings]))

    def _refuse(self, drawings: Sequence[Drawing], error: Exception) -> None:
        """Say what is wrong: with the job, or with us."""
        for one in drawings:
            kind, why = _reason(one, error)
            if kind == "fault":
                log.exception("a job failed", exc_info=error)
            self._patiently(lambda id=one.job.id, kind=kind, why=why: self.bench.fail(id, self.id, kind, why))

    def _keep(self, drawings: list[Drawing], results: list[Result], seconds: float) -> None:
        """Write the pictures of a batch, and say so; while the next one is drawn."""
        drawn = {
            one.job.id: (one.job, result) for one, result in zip(drawings, results, strict=True) if not one.dropped
        }
        if drawn:
            self._patiently(lambda: self._finish(drawn, seconds))
        for one in drawings:
            if one.dropped:
                self._refuse([one], CancelledError(one.dropped))

    def _finish(self, drawn: Mapping[str, tuple[Job, Result]], seconds: float) -> None:
        pictures = {id: self._written(job, result) for id, (job, result) in drawn.items()}
        for id in pictures.keys() - self.bench.finish(self.id, pictures, seconds):
            log.warning("job %s was drawn here, and is another's now", id)

    def _written(self, job: Job, result: Result) -> list[Picture]:
        pictures: list[Picture] = []
        for i, (image, about) in enumerate(zip(result.images, result.settings, strict=True)):
            data, ending = encoded(image, job.output)
            size = {"bytes": len(data), "width": image.width, "height": image.height}
            pictures.append(Picture(number=i, blob=self.blobs.add(data, ending), seed=about["seed"], **size))
        return pictures

    def _patiently(self, act: Callable[[], object]) -> None:
        """Do it; if the database or the disk does not take it, again and again, until it does or the worker is to end,
        which gives back what is not told. Meanwhile nothing else is drawn, and the worker does not hang."""
        wait = 0.1
        while True:
            try:
                act()
                return
            except (GONE, OutputError, OSError) as error:
                log.warning("not kept yet: %s", _line(error))
            if self.stop.wait(wait):
                return
            wait = min(5.0, 2 * wait)
            if self.sign is not None:
                self.sign = time.monotonic()

    def about(self) -> dict[str, Any]:
        """What it tells of itself."""
        loaded = self.models.loaded()
        return {
            "models": sorted(loaded),
            "bytes": sum(loaded.values()),
            "resident": resident_size(),
            "silent": None if (sign := self.sign) is None else time.monotonic() - sign,
        }

    def live(self) -> None:
        """Give signs of life until `stop` is set."""
        while True:
            try:
                self.bench.see(self.id, socket.gethostname(), os.getpid(), self.about())
            except GONE as error:
                log.warning("no sign of life: %s", _line(error))
            if self.stop.wait(SIGNS):
                return


class Steps:
    """Told of every step of a batch: asks whether to stop, reports progress, keeps previews."""

    def __init__(self, worker: Worker, drawings: Sequence[Drawing]) -> None:
        self.worker, self.drawings = worker, drawings
        self.began = self.asked = self.reported = time.monotonic()
        self.shown: list[tuple[str, Shown]] = []
        self.telling: Future[None] | None = None

    def __call__(self, which: int, done: int, previews: Previews) -> None:
        """
        Raises:
            CancelledError: nobody wants any picture of the batch, or the worker is to end.
        """
        worker, one, now = self.worker, self.drawings[which], time.monotonic()
        worker.sign, one.done = now, done
        if now - self.began > one.job.seconds:
            one.dropped = one.dropped or "time"
        for number, (step, preview) in previews.items():
            if step in one.marks:
                self._show(one, number, step, preview)
        if now - self.asked >= OFTEN:
            self.asked = now
            self._talk(now)
        if worker.stop.is_set() or all(one.dropped for one in self.drawings):
            raise CancelledError("cancelled")

    def _show(self, one: Drawing, number: int, step: int, preview: Preview) -> None:
        image = preview()
        if image is not None:
            data, ending = encoded(image, one.job.output)
            try:
                blob = self.worker.blobs.add(data, ending)
            except OutputError as error:
                log.warning("a preview is not kept: %s", _line(error))
                return
            self.shown.append((one.job.id, Shown(number=number, step=step, blob=blob)))

    def _talk(self, now: float) -> None:
        """With the store; while it does not answer, drawing goes on."""
        bench, ids = self.worker.bench, [one.job.id for one in self.drawings]
        try:
            told = bench.told(ids)
            for one in self.drawings:
                news = told.get(one.job.id)
                if news is None or news.stopping:
                    one.dropped = one.dropped or "cancelled"
                else:
                    one.previews = news.previews
        except GONE as error:
            log.warning("whether to stop is not known: %s", _line(error))
        if (self.shown or now - self.reported >= REPORT) and (self.telling is None or self.telling.done()):
            self.reported = now
            done, shown, self.shown = {one.job.id: one.done for one in self.drawings}, self.shown, []
            self.telling = self.worker.telling.submit(self._tell, done, shown)

    def _tell(self, done: Mapping[str, int], shown: Sequence[tuple[str, Shown]]) -> None:
        """Beside the drawing: a write waits for the disk."""
        try:
            self.worker.bench.advance(self.worker.id, done, shown)
        except GONE as error:
            log.warning("progress is not told: %s", _line(error))

    def close(self) -> None:
        """Everything is told before the jobs are over."""
        if self.telling is not None:
            self.telling.result()
        if self.shown:
            self._tell({}, self.shown)


def encoded(image: Image.Image, output: Mapping[str, Any]) -> tuple[bytes, str]:
    """A picture as a file, and the ending of its name. Nothing but the picture is in it: settings would tell paths.

    Args:
        output: `format`, png if there is none, and `quality` of the others, 0 to 100.
    """
    kind, data = output.get("format", "png"), io.BytesIO()
    options = {"compress_level": 1} if kind == "png" else {"quality": output.get("quality", QUALITY)}
    image.save(data, ENDINGS[kind], **options)
    return data.getvalue(), "jpg" if kind == "jpeg" else kind


def _reason(one: Drawing, error: Exception) -> tuple[str, str]:
    """The kind of an error, and a line about it that tells nothing of this machine."""
    if one.dropped == "time":
        return "time", f"it took longer than {one.job.seconds:g} s"
    if isinstance(error, CancelledError):
        return "cancelled", "cancelled"
    if not isinstance(error, MinifluxError):
        return "fault", "an error of the server"
    return "memory" if isinstance(error, OutOfMemoryError) else "input", without_folders(_line(error))


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def worker_of(duty: Duty) -> Worker:
    """The worker that has a duty."""
    models = Models(
        weights=duty.weights,
        device=duty.device,
        dtype=duty.dtype,
        max_bytes=duty.max_bytes,
        folder=duty.models,
        given=Inputs(duty.inputs),
    )
    return Worker(duty.worker, Workbench(duty.database), Blobs(duty.blobs), models)


def main() -> None:
    """Read the duty, draw until standard input closes."""
    logs.begin()
    logging.getLogger().setLevel(logging.INFO)
    worker = worker_of(Duty(**json.loads(sys.stdin.readline())))

    def unwanted() -> None:
        sys.stdin.read()
        worker.stop.set()

    signs = threading.Thread(target=worker.live, name="miniflux-signs", daemon=True)
    signs.start()
    threading.Thread(target=unwanted, name="miniflux-unwanted", daemon=True).start()
    worker.serve()
    worker.bench.put_back(worker.id)


if __name__ == "__main__":
    main()
