"""Told to end while clients wait: each is told so in the form that it speaks, and no job is lost that has a name."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.apps.serve.running import Running

LONG = {"model": "nano", "prompt": "a red circle on a blue background", "num_inference_steps": 1000, "n": 10}


def test_clients_that_wait_are_told(tmp_path: Path) -> None:
    with (
        Running(tmp_path / "data", "--insecure-no-keys", "--models", "nano") as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        named = {"idempotency-key": "mine"}
        path = "/v1/images/generations"

        def follow(id: str) -> str:
            return client.get(f"/v1/jobs/{id}/events").text

        store = server.store()
        first = threads.submit(client.post, path, json=LONG)
        second = threads.submit(client.post, path, json={**LONG, "seed": 2}, headers=named)
        stream = threads.submit(client.post, path, json={**LONG, "stream": True, "seed": 3})
        asked = client.post("/v1/nano", json={"prompt": "a blue star", "seed": 4})
        events = threads.submit(follow, asked.json()["id"])
        until = time.monotonic() + 30
        while sum(store.numbers().get(f"state {state}", 0) for state in ("waiting", "running")) < 4:
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.5)  # so that they wait

        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        for waits in (first, second):
            answer = waits.result(30)
            assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error", answer.text
            assert "the server ends" in answer.json()["error"]["message"] and int(answer.headers["retry-after"]) > 0
            assert len(answer.headers["x-job-id"]) > 10
        for text in (stream.result(30).text, events.result(30)):
            name, data = last(text)
            assert name == "error" and data["error"]["type"] == "server_error", text
        server.process.wait(30)
        said = (tmp_path / "server.log").read_text()
        assert "Traceback" not in said, said

        ids = {"first": first.result().headers["x-job-id"], "stream": stream.result().headers["x-job-id"]}
        ids |= {"second": second.result().headers["x-job-id"], "asked": asked.json()["id"]}
        jobs = {name: store.job(id) for name, id in ids.items()}
        for name, job in jobs.items():
            assert job is not None
            if name in ("second", "asked"):
                assert job.state == "waiting", name
            else:  # as if its client had hung up: one that is drawn ends with its worker, or goes back to end there
                assert job.state == "cancelled" or job.stopping, (name, job)
        store.close()


def last(text: str) -> tuple[str, dict[str, Any]]:
    """The last event of a stream."""
    name, _, data = text.strip().rpartition("\n\n")[2].removeprefix("event: ").partition("\ndata: ")
    return name, json.loads(data)
