"""The server and files of requests on a Ray of their own: workers are killed under load, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
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
        assert process.wait(240) == 143
    assert not server.store().workers() and not server.store().numbers().get("state running")


def test_an_actor_is_killed_in_a_file_of_requests(tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "pictures"
    file.write_text("".join(f'{{"prompt": "star {i}", "seed": {i}, "steps": {8 + i % 3}}}\n' for i in range(36)))
    command = [sys.executable, "-m", "miniflux", "batch", str(file), "--size", "64x64", "--no-metadata", "--out"]
    process = subprocess.Popen([*command, str(out), "--workers", "2", "--ray"])
    until("some are drawn", lambda: len(list(out.glob("*.png"))) > 3)
    actors = [one for one in psutil.Process(process.pid).children(True) if "ray::_Far" in " ".join(one.cmdline())]
    assert len(actors) == 2
    actors[0].kill()
    assert process.wait(WAIT) == 0
    subprocess.run([*command, str(tmp_path / "here")], check=True)
    here, there = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path / "here", out))
    assert here == there and len(here) == 37
