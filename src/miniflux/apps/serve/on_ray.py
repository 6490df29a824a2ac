"""`miniflux serve --ray`: the same app and the same workers, placed by Ray, on one machine or on many.

The app is a deployment of Ray Serve, behind its proxy. Workers are actors, one for each GPU (without GPUs, one for each
share of the CPUs), that claim jobs of the same store: whatever Ray, its proxy or an actor does, jobs are where they
always are. More actors are started while jobs wait, and idle ones end. The line stays first in, first out: a worker
loads the model of the job that is next, and keeps as many as `--memory-gb` says; none is passed by for being loaded
elsewhere.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from fastapi import FastAPI

from miniflux.apps.serve.place import Place
from miniflux.apps.serve.starting import app_of, duty_of
from miniflux.service.cluster import share, started
from miniflux.service.jobs.store import Store
from miniflux.service.jobs.supervisor import Process, Supervisor
from miniflux.service.jobs.worker import Duty, worker_of

EACH = 4  # jobs that wait for each worker before there is one more
IDLE = 60.0  # seconds without a job that waits, after which there is one less


class Drawer:
    """A worker, as an actor."""

    def __init__(self, duty: Duty) -> None:
        _log()
        self.worker = worker_of(duty)

    def draw(self) -> None:
        """Until `stop` is called."""
        threading.Thread(target=self.worker.live, daemon=True).start()
        self.worker.serve()
        self.worker.bench.put_back(self.worker.id)

    def stop(self) -> None:
        self.worker.stop.set()


class Actor:
    """An actor, as `Supervisor` knows a process."""

    def __init__(self, ray: Any, duty: Duty, resources: dict[str, float]) -> None:
        self.ray, self.returncode, self.pid = ray, 0, 0
        made = ray.remote(Drawer).options(max_concurrency=2, **resources)
        self.actor = made.remote(duty)
        self.drawing = self.actor.draw.remote()
        self.stdin: IO[bytes] | None = _Stop(self.actor)  # pyright: ignore[reportAttributeAccessIssue]

    def poll(self) -> int | None:
        """None while it draws, or waits for a place to; 1 if it ended otherwise than asked to."""
        return self._ended(0)

    def _ended(self, seconds: float) -> int | None:
        done, _ = self.ray.wait([self.drawing], timeout=seconds)
        if not done:
            return None
        try:
            self.ray.get(done[0])
        except self.ray.exceptions.RayError:
            self.returncode = 1
        self.ray.kill(self.actor)  # which frees its GPU
        return self.returncode

    def kill(self) -> None:
        self.ray.kill(self.actor)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(1e9 if timeout is None else timeout)
        if code is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        return code


class _Stop:
    """What tells an actor to end when it is closed."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def close(self) -> None:
        self.actor.stop.remote()


class Crew(Supervisor):
    """As many actors as the line wants, from one to `count`."""

    def __init__(self, ray: Any, duty: Duty, count: int, hang: float) -> None:
        super().__init__(duty, count, hang, threads=1)
        self.ray, self.store, self.busy = ray, Store(duty.database), time.monotonic()
        self.resources = share(ray, count)
        for place in self.places[1:]:
            place.wanted = False

    def begin(self, duty: Duty) -> Process:
        """An actor, which begins when the cluster has room for it."""
        return Actor(self.ray, duty, self.resources)

    def round(self) -> None:
        """Look after those that there are, and how many the line wants."""
        super().round()
        now, there = time.monotonic(), sum(place.wanted for place in self.places)
        waiting = self.store.numbers().get("state waiting", 0)
        self.busy = now if waiting else self.busy
        if waiting > EACH * there:
            for place in self.places[: math.ceil(waiting / EACH)]:
                place.wanted = True
        elif there > 1 and now - self.busy > IDLE:
            self.busy, last = now, self.places[there - 1]
            last.wanted = False
            if last.process is not None and last.process.stdin is not None:
                last.process.stdin.close()  # what it has begun goes back into the line


def _log() -> None:
    """In a process of Ray, say what `miniflux serve` says without it; Ray brings it to where it was started."""
    logging.basicConfig(level=logging.WARNING, format="miniflux: %(message)s")
    for name in ("miniflux.serve", "miniflux.service.jobs"):
        logging.getLogger(name).setLevel(logging.INFO)


def run(options: argparse.Namespace, where: Place) -> None:
    """Serve until it is stopped; errors as of `command.run`."""
    for name in ("weights", "folder", "loras", "networks"):  # processes of Ray are elsewhere
        if getattr(options, name) is not None:
            setattr(options, name, os.path.abspath(getattr(options, name)))
    where = Place(Path(where.folder).resolve(), where.database)
    app_of(options, where)  # refuses here what the deployment would fail with
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # 5 are too few where models are being loaded
    ray = started(options.ray)
    from ray import serve  # pyright: ignore[reportMissingImports]

    quiet = {"log_level": "WARNING", "enable_access_log": False}  # a line for each request is ours already
    told = {name: value for name, value in vars(options).items() if name != "run"}

    def app() -> FastAPI:  # made where it answers: a database, threads and the like do not travel
        _log()
        return app_of(argparse.Namespace(**told), where)

    deployment: Any = serve.deployment(
        serve.ingress(app)(type("Miniflux", (), {})),
        name="miniflux",
        ray_actor_options={"num_cpus": 0},  # it draws nothing
        max_ongoing_requests=1000,
        logging_config=quiet,
    )
    try:
        serve.start(http_options={"host": options.host, "port": options.port}, logging_config=quiet)
        serve.run(deployment.bind(), name="miniflux", route_prefix="/")
        with Crew(ray, duty_of(options, where), options.workers, options.hang):
            print(f"miniflux: serving at http://{options.host}:{options.port} on Ray (Ctrl+C ends it)", flush=True)
            threading.Event().wait()
    finally:
        with suppress(Exception):  # it may be Ray that has ended
            serve.shutdown()
        ray.shutdown()
