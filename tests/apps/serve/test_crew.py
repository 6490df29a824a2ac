"""As many actors as the line wants; without Ray, whose actors are in `test_ray.py`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import IO, Any

import pytest

from miniflux.apps.serve import on_ray
from miniflux.apps.serve.on_ray import Crew
from miniflux.service.jobs.database import sqlite_url
from miniflux.service.jobs.migrations import migrate
from miniflux.service.jobs.records import Wanted
from miniflux.service.jobs.store import Store
from miniflux.service.jobs.supervisor import Process
from miniflux.service.jobs.worker import Duty
from miniflux.settings import Request

NODE = {"Alive": True, "Resources": {"CPU": 4.0}}


class Fake:
    """An actor that says whether it draws."""

    returncode, pid = 0, 0

    def __init__(self) -> None:
        self.closed = False
        self.stdin: IO[bytes] | None = self  # type: ignore[assignment]

    def close(self) -> None:
        self.closed = True

    def poll(self) -> int | None:
        return 0 if self.closed else None

    def kill(self) -> None:
        self.closed = True

    def wait(self, timeout: float | None = None) -> int:
        return 0


class Few(Crew):
    """A crew of such actors, looked after when it is told to."""

    def begin(self, duty: Duty) -> Process:
        return Fake()

    def look(self, *drawing: int) -> list[int]:
        """A look, while some places draw; the places that have an actor then."""
        for i, place in enumerate(self.places):
            if place.process is not None:
                about = {"silent": 1.0 if i in drawing else None}
                self.bench.see(place.duty.worker, socket.gethostname(), os.getpid(), about)
        self.round()
        for place in self.places:
            if place.wanted and place.process is None:
                self._start(place)
            elif place.process is not None and place.process.poll() is not None:
                self._ended(place, 0.0)
        return [i for i, place in enumerate(self.places) if place.process is not None]


@pytest.fixture
def crew(tmp_path: Path) -> Few:
    url = sqlite_url(tmp_path / "jobs.sqlite")
    migrate(Store(url))
    ray: Any = types.SimpleNamespace(nodes=lambda: [NODE])
    return Few(ray, Duty(worker="", database=url, blobs=str(tmp_path), inputs=str(tmp_path)), 3, hang=900.0)


def ask(crew: Crew, count: int) -> None:
    for seed in range(count):
        crew.store.submit(Wanted(request=Request(prompt="a star", seed=seed), kin="k", steps=4))


def test_more_while_jobs_wait(crew: Few) -> None:
    assert crew.resources == {"num_cpus": 1.0}  # 4 for 3
    assert crew.look() == [0]
    ask(crew, on_ray.EACH)
    assert crew.look() == [0]
    ask(crew, 1)
    assert crew.look() == [0, 1]
    ask(crew, 10 * on_ray.EACH)
    assert crew.look() == [0, 1, 2]  # and no more


def test_who_draws_is_let_draw(crew: Few, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(crew, 3 * on_ray.EACH)
    assert crew.look() == [0, 1, 2]
    for job in iter(lambda: crew.bench.claim(crew.places[2].duty.worker), None):
        assert job.state == "running"
    assert crew.look() == [0, 1, 2]  # nothing waits, not yet for long
    monkeypatch.setattr(on_ray, "IDLE", 0.0)
    assert crew.look(0, 1, 2) == [0, 1, 2]
    assert crew.look(0, 2) == [0, 2]
    assert crew.look(2) == [2]
    assert crew.look() == [2]  # one stays


def test_a_process_of_ray_logs_lines_of_json() -> None:
    code = "import logging; from miniflux.apps.serve import on_ray; on_ray._log(); "
    code += (
        "logging.getLogger('miniflux.service.jobs.worker').info('two\\nlines'); logging.getLogger('other').info('less')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    (line,) = ended.stderr.splitlines()
    told = json.loads(line)
    assert (told["logger"], told["message"]) == ("miniflux.service.jobs.worker", "two\nlines")
