"""`miniflux serve` under load: nano pictures for many clients at once, against the same pictures drawn by the library
in the same batches; the start, answers from what is there, and memory over many requests.

The server is a process of its own, with one worker; the library draws in this process before and after, while the
server idles. Clients run here, too, and take their share of the machine.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from timing import Report, Taken, options

from miniflux.service import Models
from miniflux.settings import Request

COLOURS, SHAPES = ("red", "green", "blue", "yellow", "white"), ("circle", "square", "star", "heart")
WARM = 8  # pictures before anything is measured


def prompt(i: int) -> str:
    return f"a {COLOURS[i % 5]} {SHAPES[i // 5 % 4]} on a black background"


class Served:
    """The command, in a folder of its own."""

    def __init__(self, folder: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        words = ["-m", "miniflux", "serve", "--insecure-no-keys", "--port", str(port), "--data", folder]
        self.process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            trust_env=False,
            timeout=600,
            limits=httpx.Limits(max_connections=64),
        )

    def draw(self, i: int, **more: object) -> float:
        """One picture; returns the seconds until it was here."""
        begin = time.perf_counter()
        body = {"model": "nano", "prompt": prompt(i), "seed": i, "response_format": "b64_json", **more}
        answer = self.client.post("/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == 1
        return time.perf_counter() - begin

    def first(self) -> None:
        """Wait until it answers with a picture."""
        while True:
            try:
                self.draw(0)
                return
            except httpx.TransportError:
                time.sleep(0.02)

    def resident(self) -> int:
        """Bytes of the server and its worker."""
        return sum(map(_resident, (self.process.pid, *self.workers())))

    def workers(self) -> list[int]:
        """The processes that it has started, by whichever of its threads."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(30)


def _resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def directly(models: Models, numbers: Sequence[int]) -> float:
    """The same pictures by the library, in the batches that a worker makes; returns the seconds."""
    requests = [Request(prompt=prompt(i), model="nano", seed=i) for i in numbers]
    most, begin = models.most_at_once(requests[0]), time.perf_counter()
    for start in range(0, len(requests), most):
        models.draw_together(requests[start : start + most], lambda which, done, preview: None)
    return time.perf_counter() - begin


def main() -> None:
    parser = options(__doc__, rounds=1)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--long", type=int, default=1000, help="requests over which memory is measured")
    asked = parser.parse_args()
    report = Report("The server under load, nano", "the library in the same batches")
    models = Models()
    directly(models, range(WARM))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        served = Served(folder)
        try:
            served.first()
            report.add("from the command to the first picture", Taken(time.perf_counter() - begin, 0.0))
            numbers = range(1, asked.requests + 1)
            before = directly(models, numbers)
            begin = time.perf_counter()
            with ThreadPoolExecutor(asked.clients) as pool:
                waits = sorted(pool.map(served.draw, numbers))
            whole = time.perf_counter() - begin
            after = directly(models, numbers)
            limit = Taken((before + after) / 2, abs(before - after) / (before + after))
            report.add(f"{asked.requests} pictures for {asked.clients} clients", Taken(whole, 0.0), limit)
            told = {"p50": statistics.median(waits), "p95": waits[int(0.95 * len(waits))]}
            for name, seconds in told.items():
                report.add(f"one of them, {name}", Taken(seconds, 0.0))
            again = [served.draw(i) for i in range(1, 51)]
            report.add("one that was drawn before", Taken(statistics.median(again), 0.0))
            if asked.long:
                small = {"size": "64x64", "num_inference_steps": 2}
                with ThreadPoolExecutor(8) as pool:
                    list(pool.map(lambda i: served.draw(i, **small), range(1000, 1100)))
                    begun = served.resident()
                    list(pool.map(lambda i: served.draw(i, **small), range(2000, 2000 + asked.long)))
                grown = served.resident() - begun
                print(f"memory over {asked.long} requests: {grown / 1e6:+.1f} MB of {begun / 1e6:.0f} MB")
        finally:
            served.stop()
    report.write(asked.json)


if __name__ == "__main__":
    main()
