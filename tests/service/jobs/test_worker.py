"""A worker and the store, with a stand-in for the models: every way in which a job may end."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from miniflux.errors import InputError, LoraError, OutOfMemoryError, OutputError
from miniflux.result import Result
from miniflux.service import Catalogue
from miniflux.service.jobs import worker as workers
from miniflux.service.jobs.blobs import Blobs
from miniflux.service.jobs.database import GONE
from miniflux.service.jobs.records import Job, Wanted
from miniflux.service.jobs.store import Store
from miniflux.service.jobs.workbench import Workbench
from miniflux.service.jobs.worker import Drawing, Worker, encoded
from miniflux.service.models import Models
from miniflux.settings import Request

STEPS = 4


def colour(seed: int) -> tuple[int, int, int]:
    return seed % 256, seed // 7 % 256, 40


class StandIn:
    """Draws a plain picture of a colour that follows from the seed."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.at_once = 1
        self.catalogue = Catalogue()
        self.before: Callable[[Request, int], None] = lambda request, step: None

    def loaded(self) -> dict[str, int]:
        return {"nano": 1}

    def most_at_once(self, request: Request) -> int:
        return self.at_once

    def draw_together(self, requests: Sequence[Request], step: Callable[[int, int, Any], None]) -> list[Result]:
        self.batches.append([request.prompt for request in requests])
        for done in range(1, STEPS + 1):
            for i, request in enumerate(requests):
                self.before(request, done)
                shows = {n: (done, partial(Image.new, "RGB", (8, 8), colour(n))) for n in range(request.images)}
                step(i, done * request.images, shows)
        return [self.result(request) for request in requests]

    def result(self, request: Request) -> Result:
        seeds = [request.seed + i for i in range(request.images)]
        images = [Image.new("RGB", (16, 16), colour(seed)) for seed in seeds]
        return Result(images, torch.empty(0), [{"seed": seed} for seed in seeds])


@pytest.fixture
def models() -> StandIn:
    return StandIn()


@pytest.fixture
def worker(models: StandIn, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(workers, "OFTEN", 0.0)
    monkeypatch.setattr(workers, "REPORT", 0.0)
    return Worker("w", Workbench(url), Blobs(tmp_path / "blobs"), cast(Models, models))


def ask(store: Store, prompt: str = "x", images: int = 1, **more: Any) -> str:
    request = Request(prompt=prompt, images=images, seed=7)
    return store.submit(Wanted(request=request, kin="k", steps=STEPS * images, **more)).id


def work(worker: Worker, jobs: int = 1) -> None:
    for _ in range(jobs):
        assert worker.next()
    if worker._kept is not None:
        worker._kept.result()


def of(store: Store, id: str) -> Job:
    job = store.job(id)
    assert job is not None
    return job


def test_pictures(store: Store, worker: Worker) -> None:
    id = ask(store, images=2)
    work(worker)
    assert of(store, id).state == "done" and not worker.next()
    for i, picture in enumerate(store.pictures(id)):
        data = worker.blobs.path(picture.blob).read_bytes()
        image = Image.open(io.BytesIO(data))
        assert image.getpixel((3, 3)) == colour(7 + i) and len(data) == picture.bytes and picture.seed == 7 + i
        assert image.size == (picture.width, picture.height) and not image.info  # nothing of this machine is in it


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_formats(kind: str, magic: bytes) -> None:
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    data, ending = encoded(image, {"format": kind, "quality": 90})
    assert data.startswith(magic) and ending in ("png", "jpg", "webp")
    if kind != "png":
        assert len(encoded(image, {"format": kind, "quality": 10})[0]) < len(data)
    assert encoded(image, {"format": kind})[0] == encoded(image, {"format": kind})[0]


def test_a_batch(store: Store, worker: Worker, models: StandIn) -> None:
    models.at_once = 3
    ids = [ask(store, str(i)) for i in range(4)]
    work(worker, 2)
    assert models.batches == [["0", "1", "2"], ["3"]]
    assert {of(store, id).state for id in ids} == {"done"}
    assert store.numbers()["batch 3"] == 1 and store.numbers()["batch 1"] == 1


def test_cancelled_within_a_step(store: Store, worker: Worker, models: StandIn) -> None:
    id, seen = ask(store), list[int]()

    def before(_: Request, step: int) -> None:
        seen.append(step)
        if step == 2:
            store.cancel(id)

    models.before = before
    work(worker)
    assert seen == [1, 2] and of(store, id).state == "cancelled" and store.pictures(id) == []


def test_one_of_a_batch_is_cancelled(store: Store, worker: Worker, models: StandIn) -> None:
    models.at_once = 2
    stays, goes = ask(store, "stays"), ask(store, "goes")
    models.before = lambda request, step: store.cancel(goes) if step == 2 else None
    work(worker)
    assert of(store, stays).state == "done" and of(store, goes).state == "cancelled" and store.pictures(goes) == []


def test_too_long(store: Store, worker: Worker, models: StandIn) -> None:
    id = ask(store, seconds=0.05)
    models.before = lambda request, step: time.sleep(0.06)
    work(worker)
    job = of(store, id)
    assert (job.state, job.error_kind, job.error) == ("failed", "time", "it took longer than 0.05 s")
    assert not job.charged


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (InputError("width must be 16\nand more"), "input", "width must be 16"),
        (OutOfMemoryError("too large"), "memory", "too large"),
        (LoraError("LoRA '/srv/loras/x.safetensors': damaged"), "input", "LoRA 'x.safetensors': damaged"),
        (RuntimeError("/secret/path"), "fault", "an error of the server"),
    ],
)
def test_what_cannot_be_drawn(
    store: Store, worker: Worker, models: StandIn, error: Exception, kind: str, told: str
) -> None:
    models.at_once = 2
    bad, good = ask(store, "bad"), ask(store, "good")

    def before(request: Request, step: int) -> None:
        if request.prompt == "bad":
            raise error

    models.before = before
    work(worker)
    job = of(store, bad)
    assert (job.state, job.error_kind, job.error) == ("failed", kind, told)
    assert of(store, good).state == "done" and models.batches == [["bad", "good"], ["bad"], ["good"]]


def test_previews(store: Store, worker: Worker) -> None:
    id = ask(store, previews=2)
    work(worker)
    assert [(one.number, one.step) for one in store.shown(id)] == [(0, 1), (0, 3)]
    assert all(one.blob in worker.blobs for one in store.shown(id))


@pytest.mark.parametrize(("steps", "count", "marks"), [(4, 0, set()), (4, 1, {2}), (28, 3, {7, 14, 21}), (2, 8, {1})])
def test_when_previews_are_made(store: Store, steps: int, count: int, marks: set[int]) -> None:
    job = of(store, store.submit(Wanted(request=Request(prompt="x"), kin="k", steps=steps)).id)
    assert Drawing(job, previews=count).marks == marks


def test_previews_of_every_picture(store: Store, worker: Worker) -> None:
    """Of those that are drawn at once, too; in the order of steps, each of its own picture."""
    id = ask(store, images=3, previews=2)
    work(worker)
    shown = store.shown(id)
    assert [(one.number, one.step) for one in shown] == [(0, 1), (1, 1), (2, 1), (0, 3), (1, 3), (2, 3)]
    for one in shown:
        assert Image.open(worker.blobs.path(one.blob)).getpixel((3, 3)) == colour(one.number)


def test_progress_is_told(store: Store, worker: Worker, models: StandIn) -> None:
    id, seen = ask(store, images=2), list[int]()

    def before(request: Request, step: int) -> None:
        worker.telling.submit(lambda: None).result()  # behind what was told before
        seen.append(of(store, id).steps_done)

    models.before = before
    work(worker)
    assert seen == [0, 2, 4, 6] and of(store, id).steps_done == 8


def test_pictures_wait_for_room_and_for_the_database(
    store: Store, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    id, errors = ask(store), [OutputError("no room"), OSError(28, "No space left"), GONE("locked")]
    add, finish = worker.blobs.add, worker.bench.finish

    def adding(*arguments: Any) -> str:
        if len(errors) > 1:
            raise errors.pop(0)
        return add(*arguments)

    def finishing(*arguments: Any) -> bool:
        if errors:
            raise errors.pop()
        return finish(*arguments)

    monkeypatch.setattr(worker.blobs, "add", adding)
    monkeypatch.setattr(worker.bench, "finish", finishing)
    work(worker)
    assert of(store, id).state == "done" and len(store.pictures(id)) == 1


def test_what_is_never_kept_is_given_back(
    store: Store, worker: Worker, models: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that stays full: the worker waits, seems alive, and gives back what it has drawn when it ends."""
    id = ask(store)

    def full(*_: object) -> str:
        raise OutputError("no room")

    monkeypatch.setattr(worker.blobs, "add", full)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    until = time.monotonic() + 30
    while not models.batches and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    assert of(store, id).state == "running" and (worker.about()["silent"] or 0) < 5
    worker.stop.set()
    thread.join(10)
    assert worker.bench.put_back("w") == 1 and of(store, id).state == "waiting"


def test_drawing_goes_on_while_the_database_is_away(
    store: Store, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise GONE("away")

    id = ask(store)
    monkeypatch.setattr(worker.bench, "told", away)
    work(worker)
    assert of(store, id).state == "done"


def test_an_end_in_the_middle_gives_back(store: Store, worker: Worker, models: StandIn) -> None:
    models.at_once = 2
    ids = [ask(store, "a"), ask(store, "b")]
    models.before = lambda request, step: worker.stop.set() if step == 2 else None
    worker.serve()
    assert [of(store, id).state for id in ids] == ["waiting", "waiting"] and of(store, ids[0]).tries == 0


def test_serving(store: Store, worker: Worker) -> None:
    thread = threading.Thread(target=worker.serve)
    thread.start()
    ids = [ask(store, str(i)) for i in range(5)]
    until = time.monotonic() + 60
    while any(not of(store, id).over for id in ids) and time.monotonic() < until:
        time.sleep(0.01)
    worker.stop.set()
    thread.join(10)
    assert {of(store, id).state for id in ids} == {"done"}


def test_signs_of_life(store: Store, worker: Worker) -> None:
    worker.stop.set()
    worker.live()
    (seen,) = store.workers()
    assert seen["about"]["models"] == ["nano"] and seen["about"]["resident"] > 10**7 and seen["about"]["silent"] is None


def test_a_model_that_is_new_in_the_folder(
    store: Store, worker: Worker, models: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr(models.catalogue, "scan", lambda: looked.append("again"))
    for model in ("nano", "/models/new.safetensors"):
        store.submit(Wanted(request=Request(prompt="x", model=model), kin=model, steps=STEPS))
        work(worker)
    assert looked == ["again"]
