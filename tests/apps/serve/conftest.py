"""A server in this process, and a stand-in for a worker: it paints plain pictures, as slowly as a test wants."""

from __future__ import annotations

import base64
import colorsys
import io
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from miniflux.apps.serve.app import create_app
from miniflux.apps.serve.site import Options
from miniflux.apps.web.door import Door
from miniflux.apps.web.serving import Connection, Server
from miniflux.service.jobs import keys
from miniflux.service.jobs.blobs import Blobs
from miniflux.service.jobs.database import sqlite_url
from miniflux.service.jobs.inputs import Inputs
from miniflux.service.jobs.migrations import migrate
from miniflux.service.jobs.records import Job, Picture, Shown
from miniflux.service.jobs.store import Store
from miniflux.service.jobs.workbench import Workbench
from miniflux.service.jobs.worker import encoded


def plain(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture of one colour, which is that of its seed."""
    red, green, blue = (round(255 * x) for x in colorsys.hsv_to_rgb(seed % 97 / 97, 0.8, 0.9))
    return Image.new("RGB", size, (red, green, blue))


def png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def text_of(picture: Image.Image) -> str:
    """As base64."""
    return base64.b64encode(png(picture)).decode()


def opened(data: bytes | str) -> Image.Image:
    """A picture from bytes or base64."""
    image = Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))
    image.load()
    return image


class Painter(threading.Thread):
    """Takes jobs one by one and finishes them.

    Attributes:
        at_work: whether it takes any.
        seconds: of a step.
        quick: whether it does without steps.
        refuses: (kind, message) with which it fails all jobs.
        began: ids, in order.
    """

    def __init__(self, bench: Workbench, blobs: Blobs) -> None:
        super().__init__(daemon=True)
        self.bench, self.blobs = bench, blobs
        self.at_work, self.ending = threading.Event(), threading.Event()
        self.at_work.set()
        self.seconds = 0.0
        self.quick = False
        self.refuses: tuple[str, str] | None = None
        self.began: list[str] = []

    def run(self) -> None:
        self.bench.see("painter", "here", 1, {"resident": 1, "models": []})
        while not self.ending.is_set():
            job = self.bench.claim("painter") if self.at_work.is_set() else None
            if job is None:
                time.sleep(0.005)
            else:
                self.began.append(job.id)
                self.draw(job)

    def draw(self, job: Job) -> None:
        size = (job.output["size"][0], job.output["size"][1])
        steps = job.steps // job.pictures
        for step in range(1, 1 + (0 if self.quick else job.steps)):
            time.sleep(self.seconds)
            told = self.bench.told([job.id])[job.id]
            if told.stopping or self.ending.is_set():
                self.bench.fail(job.id, "painter", "cancelled", "cancelled")
                return
            shown: list[tuple[str, Shown]] = []
            number, within = divmod(step - 1, steps)
            if within + 1 < steps and within < told.previews:
                blob = self.blobs.add(*encoded(plain(size, 50 + step), job.output))
                shown.append((job.id, Shown(number=number, step=within + 1, blob=blob)))
            self.bench.advance("painter", {job.id: step}, shown)
        if self.refuses is not None:
            self.bench.fail(job.id, "painter", *self.refuses)
            return
        pictures: list[Picture] = []
        for i in range(job.pictures):
            data, ending = encoded(plain(size, job.request.seed + i), job.output)
            blob, about = self.blobs.add(data, ending), {"width": size[0], "height": size[1], "bytes": len(data)}
            pictures.append(Picture(number=i, blob=blob, seed=job.request.seed + i, **about))
        self.bench.finish("painter", {job.id: pictures}, 0.01)


class Served:
    """An app on a folder of its own, with a painter, a key, and a client of the same process."""

    def __init__(self, place: Path, /, **options: Any) -> None:
        self.url = sqlite_url(place / "jobs.sqlite")
        self.store, self.blobs, self.inputs = Store(self.url), Blobs(place / "pictures"), Inputs(place / "given")
        migrate(self.store)
        self.key = keys.add(self.store, "somebody")
        options = {"models": None, "door": Door(frozenset({"localhost", "testserver"})), **options}
        self.options = Options(**options)
        self.app: FastAPI = create_app(self.store, self.blobs, self.inputs, self.options)
        self.bench = Workbench(self.url)
        self.painter = Painter(self.bench, self.blobs)
        self.painter.start()
        self.client: TestClient
        self.headers = {"x-key": self.key}

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, json=body, headers=self.headers)

    def get(self, path: str, **params: Any) -> Any:
        return self.client.get(path, params=params, headers=self.headers)

    def result(self, answer: Any) -> dict[str, Any]:
        """What becomes of a job that was asked for in BFL's shape."""
        assert answer.status_code == 200, answer.text
        until = time.monotonic() + 60
        while True:
            told: dict[str, Any] = self.get("/v1/get_result", id=answer.json()["id"]).json()
            if told["status"] != "Pending":
                return told
            assert time.monotonic() < until, told
            time.sleep(0.02)

    def job(self, answer: Any) -> Job:
        """The job of an answer in BFL's shape."""
        assert answer.status_code == 200, answer.text
        job = self.store.job(answer.json()["id"])
        assert job is not None
        return job

    def close(self) -> None:
        self.painter.ending.set()
        self.painter.join()
        self.bench.close()
        self.store.close()


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Makes servers; each option is one of `Options`."""
    made: list[tuple[Served, Any]] = []

    def make(**options: Any) -> Served:
        served = Served(Path(tempfile.mkdtemp(dir=tmp_path)), **options)
        entered = TestClient(served.app, raise_server_exceptions=False)
        served.client = entered.__enter__()
        made.append((served, entered))
        return served

    yield make
    for served, entered in made:
        entered.__exit__(None, None, None)
        served.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for tests that leave it as they found it."""
    served = Served(tmp_path_factory.mktemp("shared"))
    with TestClient(served.app, raise_server_exceptions=False) as client:
        served.client = client
        yield served
    served.close()


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The same app behind a real socket, as the command serves it; its address."""
    config = uvicorn.Config(app, http=Connection, log_config=None, ws="none", lifespan="on")
    server = Server(config, app.state.site.watch.close)
    with socket.create_server(("127.0.0.1", 0)) as place:
        thread = threading.Thread(target=server.run, args=([place],), daemon=True)
        thread.start()
        until = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, str]]:
    """A server behind a socket, and its address."""
    served = Served(tmp_path_factory.mktemp("live"))
    with listening(served.app) as url:
        yield served, url
    served.close()
