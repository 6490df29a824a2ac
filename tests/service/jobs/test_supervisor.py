"""Real processes that hang or crash, looked after by a supervisor."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from miniflux.service.jobs.records import Wanted
from miniflux.service.jobs.store import Store
from miniflux.service.jobs.supervisor import Supervisor
from miniflux.service.jobs.worker import Duty
from miniflux.settings import Request

WORKER = """
import json, os, sys, threading, time
from pathlib import Path
import torch
from PIL import Image
from miniflux.result import Result
from miniflux.service import Catalogue
from miniflux.service.jobs import worker as workers
from miniflux.service.jobs.blobs import Blobs
from miniflux.service.jobs.workbench import Workbench

duty, how, often = workers.Duty(**json.loads(sys.stdin.readline())), sys.argv[1], int(sys.argv[2])

class StandIn:
    catalogue = Catalogue()
    def loaded(self): return {}
    def most_at_once(self, request): return 1
    def draw_together(self, requests, step):
        before = Path(duty.blobs).parent / "before"
        begun = len(before.read_text()) if before.exists() else 0
        before.write_text("x" * (begun + 1))
        step(0, 1, {})
        if begun < often:
            os._exit(3) if how == "crash" else time.sleep(1e6)
        return [Result([Image.new("RGB", (8, 8))], torch.empty(0), [{"seed": 0}])]

workers.SIGNS = 0.1
one = workers.Worker(duty.worker, Workbench(duty.database), Blobs(duty.blobs), StandIn())
threading.Thread(target=one.live, daemon=True).start()
threading.Thread(target=lambda: (sys.stdin.read(), one.stop.set()), daemon=True).start()
one.serve()
"""


@pytest.mark.parametrize(("how", "often", "state"), [("hang", 1, "done"), ("crash", 1, "done"), ("crash", 9, "failed")])
def test_a_worker_that_hangs_or_crashes(
    url: str, store: Store, tmp_path: Path, how: str, often: int, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another takes its place and draws the job; one with which three have crashed is given up."""
    if not store.local and (how, often) != ("crash", 1):
        pytest.skip("the same on SQLite")

    class Watching(Supervisor):
        def begin(self, duty: Duty) -> subprocess.Popen[bytes]:
            words = [sys.executable, "-c", WORKER, how, str(often)]
            process = subprocess.Popen(words, stdin=subprocess.PIPE)
            assert process.stdin is not None
            process.stdin.write(f"{duty.text()}\n".encode())
            process.stdin.flush()
            return process

    monkeypatch.setattr("miniflux.service.jobs.supervisor.SOON", 0.0)
    id = store.submit(Wanted(request=Request(prompt="x"), kin="k", steps=2)).id
    duty = Duty(worker="", database=url, blobs=str(tmp_path / "blobs"), inputs=str(tmp_path / "inputs"))
    with Watching(duty, 1, hang=0.5):
        until = time.monotonic() + 120
        while not (job := store.jobs([id])[id]).over and time.monotonic() < until:
            time.sleep(0.05)
    assert job.state == state and job.tries == min(often + 1, 3)
    assert len(store.pictures(id)) == (state == "done") and store.used("")[0] == (state == "done")
    assert store.workers() == []
