"""Workers and servers killed at random moments: nothing lost, nothing doubled, the same bytes, quotas right.

MINIFLUX_KILLS says how often; 30 takes minutes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from miniflux.service import Models
from miniflux.service.jobs import keys
from miniflux.service.jobs.database import Database, sqlite_url
from miniflux.service.jobs.migrations import migrate
from miniflux.service.jobs.worker import encoded
from miniflux.settings import Request
from tests.apps.serve.running import Running

KILLS = int(os.environ.get("MINIFLUX_KILLS", "2"))
JOBS = 6 * KILLS


def drawn(seed: int) -> bytes:
    """The file that a request makes, drawn here and now, alone."""
    request = Request(prompt="a red circle on a blue background", model="nano-schnell", seed=seed, width=64, height=64)
    (image,) = Models().draw(request, lambda done, preview: None).images
    return encoded(image, {"format": "png"})[0]


def test_killed_at_random_moments(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    database = Database(sqlite_url(data / "jobs.sqlite"))
    migrate(database)
    key = keys.add(database, "me", per_day=JOBS)
    (known,) = keys.listed(database)
    database.close()
    rng, server = random.Random(5), Running(data, "--workers", "1")
    headers = {"x-key": key}
    body = {"prompt": "a red circle on a blue background", "width": 64, "height": 64, "output_format": "png"}
    with server, httpx.Client(base_url=server.url, headers=headers, timeout=60, trust_env=False) as client:
        ids: list[str] = []
        for kill in range(KILLS):
            for i in range(JOBS // KILLS):
                answer = client.post("/v1/nano-schnell", json={**body, "seed": kill * 100 + i})
                assert answer.status_code == 200, answer.text
                ids.append(answer.json()["id"])
            time.sleep(rng.uniform(0, 0.5))
            if kill % 2:
                server.kill()
                server.start()
            else:
                for pid in server.workers:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        store, until = server.store(), time.monotonic() + 60 + 30 * KILLS
        while any(not job.over for job in store.jobs(ids).values()):
            assert time.monotonic() < until, store.numbers()
            time.sleep(0.1)
        jobs = store.jobs(ids)
        assert len(jobs) == len(ids) == JOBS and {job.state for job in jobs.values()} == {"done"}
        expected = {seed: drawn(seed) for seed in (0, JOBS // KILLS - 1)}
        for i, id in enumerate(ids):
            (picture,) = store.pictures(id)
            seed = i // (JOBS // KILLS) * 100 + i % (JOBS // KILLS)
            assert picture.seed == seed
            answer = client.get("/v1/get_result", params={"id": id}).json()
            got = client.get(answer["result"]["sample"]).content
            assert len(got) == picture.bytes and got[:4] == b"\x89PNG"
            if seed in expected:
                assert got == expected[seed]
        assert store.used(known.id)[0] == JOBS  # paid once each
        assert client.post("/v1/nano-schnell", json={**body, "seed": 1}).status_code in (200, 429)
        assert not [path for path in (data / "pictures").iterdir() if path.suffix == ".part"]
    assert server.process is not None and server.process.returncode in (143, -15, 130)


def test_without_keys_it_does_not_start(tmp_path: Path) -> None:
    server = Running(tmp_path / "data")
    with pytest.raises(AssertionError, match="keys add NAME.*--insecure-no-keys"):
        server.start()
    assert server.process is not None and server.process.returncode == 2


@pytest.mark.slow
def test_the_log_is_lines_of_json(tmp_path: Path) -> None:
    """That of the server and that of its worker, with what Python warns of; but for the first line and the last."""
    server = Running(tmp_path / "data", "--insecure-no-keys")
    long = "a red circle on a blue background, " * 100
    with server, httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        asked = {"model": "nano-schnell", "prompt": long, "size": "64x64"}
        assert client.post("/v1/images/generations", json=asked, headers={"x-request-id": "mine"}).status_code == 200
        assert client.get("/v1/jobs/none").status_code == 404
    first, *others, last = (tmp_path / "server.log").read_text().splitlines()
    assert first.startswith("miniflux: serving at http://127.0.0.1:") and last == "miniflux: stopped"
    told = [json.loads(line) for line in others]
    assert all({"time", "level", "logger"} < one.keys() and ("message" in one) != ("request" in one) for one in told)
    (mine,) = [one for one in told if one.get("request") == "mine"]
    assert (mine["route"], mine["status"], mine["level"]) == ("/v1/images/generations", 200, "info")
    assert [one for one in told if "its end was cut off" in one.get("message", "") and one["level"] == "warning"]
