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

import httpx
from fastapi import FastAPI

from miniflux.apps.serve.place import Place
from miniflux.apps.serve.starting import app_of, duty_of
from miniflux.apps.web.listening import Listening, listen
from miniflux.errors import InputError, MinifluxError
from miniflux.service import logs
from miniflux.service.cluster import share, started
from miniflux.service.jobs.store import Store
from miniflux.service.jobs.supervisor import Process, Supervisor
from miniflux.service.jobs.worker import Duty, worker_of

NAME = "miniflux"  # of the app, in a cluster
ANSWERS = 180.0  # seconds that Ray Serve has for its first answer
LOOKS = 0.5
EACH = 4  # jobs that wait for each worker before there is one more
IDLE = 60.0  # seconds without a job that waits, after which there is one less, of those that draw nothing


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

    def __enter__(self) -> Crew:
        super().__enter__()
        return self

    def ended(self) -> str:
        """Why nobody looks after the workers; empty while they are looked after."""
        return "" if self._thread.is_alive() else "the cluster does not answer"

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
            draws = {worker["id"] for worker in self.bench.workers() if worker["about"].get("silent") is not None}
            for place in reversed(self.places):
                if place.wanted and place.process is not None and place.duty.worker not in draws:
                    self.busy, place.wanted = now, False
                    if place.process.stdin is not None:
                        place.process.stdin.close()  # what it has begun meanwhile goes back into the line
                    break


def _log() -> None:
    """In a process of Ray, say what `miniflux serve` says without it; Ray brings it to where it was started."""
    logs.begin()
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("miniflux.serve", "miniflux.service.jobs"):
        logging.getLogger(name).setLevel(logging.INFO)


def run(options: argparse.Namespace, where: Place) -> None:
    """Serve until it is stopped; errors as of `command.run`.

    Raises:
        InputError: no cluster is there, or it has a server.
        MinifluxError: Ray does not start, or ended.
    """
    for name in ("weights", "folder", "loras", "networks"):  # processes of Ray are elsewhere
        if getattr(options, name) is not None:
            setattr(options, name, os.path.abspath(getattr(options, name)))
    where = Place(Path(where.folder).resolve(), where.database)
    app_of(options, where)  # refuses here what the deployment would fail with
    listening = listen(options.host, options.port)  # likewise; Ray would share the port with whoever has it
    listening.close()
    cluster = started(options.ray)
    ray, mark = cluster.ray, None
    try:
        mark = _mark(ray)
        _deploy(options, where, listening)
        with Crew(ray, duty_of(options, where), options.workers, options.hang) as crew:
            urls = " and ".join(f"http://{name}:{listening.port}" for name in listening.hosts)
            print(f"miniflux: serving at {urls} on Ray, described at /docs (Ctrl+C ends it)", flush=True)
            while not (why := cluster.ended() or crew.ended()):
                time.sleep(LOOKS)
        raise MinifluxError(f"{why}: start the server again, which goes on with the jobs that there are")
    finally:
        if mark is not None and not cluster.folder:  # one that goes on without us
            with suppress(Exception):
                _undeploy()
        cluster.close()


class Mark:
    """An actor by which a cluster has one server; it ends with the server, however that ends."""


def _mark(ray: Any) -> Any:
    """
    Raises:
        InputError: there is a server, whose app ours would replace.
    """
    try:
        return ray.remote(Mark).options(name=NAME, namespace=NAME, num_cpus=0).remote()
    except ValueError as error:
        raise InputError("--ray: a server runs on this cluster already; it can have more --workers") from error


def _deploy(options: argparse.Namespace, where: Place, listening: Listening) -> None:
    """Have Ray Serve answer with our app.

    Raises:
        MinifluxError: it does not.
    """
    from ray import exceptions, serve  # pyright: ignore[reportMissingImports]

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    names = sorted(listening.names)
    quiet = {"log_level": "ERROR", "enable_access_log": False}  # a line for each request is ours already
    told = {name: value for name, value in vars(options).items() if name != "run"}

    def app() -> FastAPI:  # made where it answers: a database, threads and the like do not travel
        _log()
        return app_of(argparse.Namespace(**told), where, names)

    deployment: Any = serve.deployment(
        serve.ingress(app)(type("Miniflux", (), {})),
        name=NAME,
        ray_actor_options={"num_cpus": 0},  # it draws nothing
        max_ongoing_requests=1000,
        health_check_period_s=1,  # 10 else, in which one that ended is not missed
        graceful_shutdown_timeout_s=5,
        logging_config=quiet,
    )
    try:
        with suppress(TimeoutError):  # after a minute, which is not too long: it is seen below
            serve.start(http_options={"host": listening.host, "port": listening.port}, logging_config=quiet)
        with suppress(TimeoutError):
            serve.run(deployment.bind(), name=NAME, route_prefix="/")
    except (RuntimeError, exceptions.RayError) as error:
        raise MinifluxError(f"Ray Serve does not take the app: {str(error).strip().rpartition(chr(10))[2]}") from error
    url, until = f"http://{listening.hosts[0]}:{listening.port}/healthz", time.monotonic() + ANSWERS
    while time.monotonic() < until:
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=10, trust_env=False).status_code == 200:
                return
        time.sleep(LOOKS)
    raise MinifluxError(
        f"Ray Serve does not answer at {url}: on a cluster where it runs already, give its --host and --port"
    )


def _undeploy() -> None:
    """Leave a cluster that others may use, too."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    serve.delete(NAME)
    if not serve.status().applications:
        serve.shutdown()
