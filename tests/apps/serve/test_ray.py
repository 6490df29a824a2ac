"""The server and files of requests on a Ray of their own: what it has is killed under load, and nothing is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from miniflux.service import Models
from miniflux.service.jobs.blobs import Blobs
from miniflux.service.jobs.worker import encoded
from miniflux.settings import Request
from tests.apps.serve.running import Running

pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.slow

JOBS, WAIT = 24, 300.0


def until(what: str, true: object, seconds: float = WAIT) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, what
        time.sleep(0.1)


def drawn(seed: int) -> bytes:
    """The file that a request of `asked` makes, drawn here and now, alone."""
    request = Request(prompt="a red circle", model="nano", seed=seed, steps=40, width=width_of(seed), height=64)
    (image,) = Models().draw(request, lambda done, preview: None).images
    return encoded(image, {"format": "jpeg"})[0]


def width_of(seed: int) -> int:
    return 64 + 16 * (seed % 3)  # not all in one batch


def asked(client: httpx.Client, seed: int) -> str:
    body = {"prompt": "a red circle", "seed": seed, "steps": 40, "width": width_of(seed), "height": 64}
    answer = client.post("/v1/nano", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def processes(server: Running) -> list[psutil.Process]:
    assert server.process is not None
    return psutil.Process(server.process.pid).children(True)


def nothing_is_left(begun: list[psutil.Process], folders: set[Path]) -> None:
    assert begun and not psutil.wait_procs(begun, timeout=10)[1]
    assert set(Path(tempfile.gettempdir()).glob("ray-*")) <= folders


def test_a_worker_is_killed_under_load(tmp_path: Path) -> None:
    folders = set(Path(tempfile.gettempdir()).glob("ray-*"))
    server = Running(tmp_path / "data", "--ray", "--workers", "2", "--insecure-no-keys").start(wait=WAIT)
    process, begun = server.process, processes(server)
    assert process is not None
    try:
        store = server.store()
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            assert len(store.workers()) == 1  # nothing waits: one is enough
            ids = [asked(client, seed) for seed in range(JOBS)]
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
                assert picture.seed == seed and Blobs(server.data / "pictures").path(picture.blob).exists()
            for seed in (0, 1, 2, JOBS - 1):
                (picture,) = store.pictures(ids[seed])
                assert Blobs(server.data / "pictures").path(picture.blob).read_bytes() == drawn(seed)
            told = client.get("/v1/get_result", params={"id": ids[0]}).json()
            assert told["status"] == "Ready" and client.get(told["result"]["sample"]).status_code == 200
            spoken = {"model": "nano", "prompt": "a star", "size": "64x64", "num_inference_steps": 2}
            stream = client.post("/v1/images/generations", json={**spoken, "stream": True, "partial_images": 1})
            assert stream.text.count("event: image_generation.partial_image") == 1
            assert stream.text.count("event: image_generation.completed") == 1
    finally:
        begun += processes(server)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    nothing_is_left(begun, folders)
    assert not server.store().workers() and not server.store().numbers().get("state running")


def test_all_of_ray_is_killed_under_load(tmp_path: Path) -> None:
    folders = set(Path(tempfile.gettempdir()).glob("ray-*"))
    server = Running(tmp_path / "data", "--ray", "--insecure-no-keys").start(wait=WAIT)
    process, store = server.process, server.store()
    assert process is not None
    try:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            ids = [asked(client, seed) for seed in range(6)]

            def answers() -> bool:
                with suppress(httpx.TransportError):
                    return client.get("/readyz").status_code == 200
                return False

            for name in ("ServeReplica", "ProxyActor", "ServeController"):
                (victim,) = [one for one in processes(server) if f"ray::{name}" in " ".join(one.cmdline())]
                victim.kill()
                victim.wait(10)
                until(f"it answers without {name}", answers)
                ids.append(asked(client, len(ids)))
            until("all are over", lambda: all(job.over for job in store.jobs(ids).values()))
        assert [store.jobs([id])[id].state for id in ids] == ["done"] * 9 and store.numbers()["done"] == 9
        begun = processes(server)
        (raylet,) = [one for one in begun if one.name() == "raylet"]
        raylet.kill()  # without which there is no Ray
        assert process.wait(60) == 2
    finally:
        process.kill()
    nothing_is_left(begun, folders)
    log = (tmp_path / "server.log").read_text()
    assert "\nminiflux: the process raylet of Ray has ended" in log and "\nTraceback" not in log  # of ours


def test_a_start_that_cannot_be(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "miniflux", "serve", "--insecure-no-keys", "--data", str(tmp_path)]
    with socket.create_server(("127.0.0.1", 0)) as taken:  # Ray would share it
        port = str(taken.getsockname()[1])
        done = subprocess.run([*command, "--ray", "--port", port], capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 2 and "something else listens there" in done.stderr
    more = "--port", "0", "--ray", "127.0.0.1:9"
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 2 and "miniflux: --ray 127.0.0.1:9: " in done.stderr


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
