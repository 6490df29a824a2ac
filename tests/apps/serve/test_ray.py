"""The server on a Ray of its own: two workers draw, one is killed under load, and nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.apps.serve.running import Running

pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.slow

JOBS, WAIT = 24, 300.0


def until(what: str, true: object, seconds: float = WAIT) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, what
        time.sleep(0.1)


def test_a_worker_is_killed_under_load(tmp_path: Path) -> None:
    server = Running(tmp_path / "data", "--ray", "--workers", "2", "--insecure-no-keys").start(wait=WAIT)
    process = server.process
    assert process is not None
    try:
        store = server.store()
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            assert len(store.workers()) == 1  # nothing waits: one is enough
            ids: list[str] = []
            for seed in range(JOBS):
                width = 64 + 16 * (seed % 3)  # not all in one batch
                body = {"prompt": "a red circle", "seed": seed, "steps": 40, "width": width, "height": 64}
                answer = client.post("/v1/nano", json=body)
                assert answer.status_code == 200, answer.text
                ids.append(answer.json()["id"])
            until("the line wants a second worker", lambda: len(store.workers()) == 2)

            def at_work() -> list[str]:
                return [job.worker for job in store.jobs(ids).values() if job.state == "running" and job.worker]

            until("both draw", lambda: len(set(at_work())) == 2)
            victim = at_work()[0]
            (pid,) = [one["pid"] for one in store.workers() if one["id"] == victim]
            os.kill(pid, signal.SIGKILL)
            until("all are over", lambda: all(job.over for job in store.jobs(ids).values()))
            jobs = store.jobs(ids)
            assert [jobs[id].state for id in ids] == ["done"] * JOBS
            numbers = store.numbers()
            assert numbers["done"] == JOBS and numbers["again"] >= 1  # each once, and some were begun twice
            assert victim not in {one["id"] for one in store.workers()}
            for seed, id in enumerate(ids):
                (picture,) = store.pictures(id)
                assert picture.seed == seed and (server.data / "pictures" / picture.blob).exists()
            told = client.get("/v1/get_result", params={"id": ids[0]}).json()
            assert told["status"] == "Ready" and client.get(told["result"]["sample"]).status_code == 200
            spoken = {"model": "nano", "prompt": "a star", "size": "64x64", "num_inference_steps": 2}
            stream = client.post("/v1/images/generations", json={**spoken, "stream": True, "partial_images": 1})
            assert stream.text.count("event: image_generation.partial_image") == 1
            assert stream.text.count("event: image_generation.completed") == 1
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    assert not server.store().workers() and not server.store().numbers().get("state running")
