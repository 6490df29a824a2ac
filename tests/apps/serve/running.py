"""A server as people start it: a process, that can be killed at any moment and started again on the same folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from miniflux.service.jobs.database import sqlite_url
from miniflux.service.jobs.store import Store


class Running:
    """`miniflux serve` on a free port.

    Args:
        data: its folder.
        options: more of the command's options.
    """

    def __init__(self, data: Path, *options: str) -> None:
        self.data, self.options = data, options
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, wait: float = 120) -> Running:
        words = [sys.executable, "-m", "miniflux", "serve", "--port", str(self.port), "--data", str(self.data)]
        log = (self.data.parent / "server.log").open("ab")
        self.process = subprocess.Popen([*words, *self.options], stdout=log, stderr=log, env=os.environ)
        until = time.monotonic() + wait
        while True:
            assert self.process.poll() is None, (self.data.parent / "server.log").read_text()
            try:
                if httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            assert time.monotonic() < until, (self.data.parent / "server.log").read_text()
            time.sleep(0.05)

    @property
    def workers(self) -> list[int]:
        """Process ids of its workers, as they have told the store."""
        return [worker["pid"] for worker in self.store().workers()]

    def store(self) -> Store:
        return Store(sqlite_url(self.data / "jobs.sqlite"))

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def __enter__(self) -> Running:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
