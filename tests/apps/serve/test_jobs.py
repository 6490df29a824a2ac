"""Jobs, their events, pictures by signed addresses, keys, webhooks, and what is said when something is in trouble."""

from __future__ import annotations

import http.server
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from miniflux.apps.serve.app import tell, tidy
from miniflux.apps.serve.webhooks import verified
from miniflux.errors import InputError, OutputError
from miniflux.service.jobs import keys
from tests.apps.serve.conftest import Serve, Served, listening, opened, plain, text_of

PROMPT = "a red circle on a blue background"
SMALL = {"prompt": PROMPT, "width": 64, "height": 64, "output_format": "png"}


def events_of(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_a_job_and_its_pictures(shared: Served) -> None:
    id = shared.result(shared.post("/v1/nano", **SMALL, seed=3))["id"]
    about = shared.get(f"/v1/jobs/{id}").json()
    assert about["state"] == "done" and about["steps_done"] == about["steps"] == 20 and about["place"] == 0
    (picture,) = about["pictures"]
    assert picture["seed"] == 3 and (picture["width"], picture["height"]) == (64, 64)
    answer = shared.client.get(picture["url"])
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert opened(answer.content).getpixel((0, 0)) == plain((1, 1), 3).getpixel((0, 0))
    tag = answer.headers["etag"]
    assert shared.client.get(picture["url"], headers={"if-none-match": tag}).status_code == 304


def test_addresses_are_signed_and_expire(serve: Serve) -> None:
    served = serve(expiry_seconds=-5.0)
    sample = served.result(served.post("/v1/nano", **SMALL))["result"]["sample"]
    assert served.client.get(sample).status_code == 403  # five seconds too late
    site = served.app.state.site
    (name,) = [path.name for path in served.blobs.folder.iterdir()]
    until = int(time.time()) + 60
    right = {"until": until, "signature": site.signature(name, until)}
    assert served.client.get(f"/v1/pictures/{name}", params=right).status_code == 200
    for wrong in ({"until": until + 1}, {"signature": "0" * 64}, {"signature": "é"}, {"until": -1}, {"until": 2**50}):
        answer = served.client.get(f"/v1/pictures/{name}", params={**right, **wrong})
        assert answer.status_code in (403, 422), answer.text
    for path in ("../jobs.sqlite", "..%2Fjobs.sqlite", f"{name}.png", "%2Fetc%2Fpasswd"):
        signed = {"until": until, "signature": site.signature(path.replace("%2F", "/"), until)}
        assert served.client.get(f"/v1/pictures/{path}", params=signed).status_code in (401, 404)


def test_events(serve: Serve) -> None:
    served = serve()
    served.client.__exit__(None, None, None)
    served.painter.at_work.clear()
    time.sleep(0.05)
    with (
        listening(served.app) as url,
        httpx.Client(base_url=url, headers=served.headers, timeout=30, trust_env=False) as client,
    ):
        id = client.post("/v1/nano", json=SMALL).json()["id"]
        with client.stream("GET", f"/v1/jobs/{id}/events", params={"previews": 2}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            found: list[tuple[str, dict[str, Any]]] = []
            for name, data in events_of(answer):
                if not found:
                    assert (name, data["state"], data["place"]) == ("progress", "waiting", 1)
                    served.painter.seconds = 0.02
                    served.painter.at_work.set()
                found.append((name, data))
        names = [name for name, _ in found]
        assert names[-1] == "done" and names.count("preview") == 2 and set(names) == {"progress", "preview", "done"}
        done = [data["steps_done"] for name, data in found if name == "progress"]
        assert done == sorted(done) and len(set(done)) > 2
        previews = [data for name, data in found if name == "preview"]
        assert all(client.get(data["url"]).status_code == 200 for data in previews)
        assert client.get(found[-1][1]["pictures"][0]["url"]).status_code == 200
        with client.stream("GET", f"/v1/jobs/{id}/events") as answer:
            assert [name for name, _ in events_of(answer)] == ["preview", "preview", "done"]
    served.client.__enter__()


def test_cancelling(serve: Serve) -> None:
    served = serve()
    served.painter.seconds = 0.1
    running = served.post("/v1/nano", **SMALL, steps=1000).json()["id"]
    waiting = served.post("/v1/nano", **SMALL).json()["id"]
    assert served.client.delete(f"/v1/jobs/{waiting}", headers=served.headers).json()["state"] == "cancelled"
    assert served.client.delete(f"/v1/jobs/{running}", headers=served.headers).status_code == 200
    until = time.monotonic() + 10
    while served.get("/v1/get_result", id=running).json()["status"] == "Pending":
        assert time.monotonic() < until
        time.sleep(0.02)
    told = served.get("/v1/get_result", id=running).json()
    assert told["status"] == "Error" and told["details"]["error"] == "cancelled"
    assert served.client.delete(f"/v1/jobs/{running}", headers=served.headers).json()["state"] == "cancelled"


def test_another_keys_job_is_not_there(serve: Serve) -> None:
    served = serve()
    id = served.result(served.post("/v1/nano", **SMALL))["id"]
    other = {"authorization": f"Bearer {keys.add(served.store, 'other')}"}
    for method, path in (("GET", f"/v1/jobs/{id}"), ("DELETE", f"/v1/jobs/{id}"), ("GET", f"/v1/jobs/{id}/events")):
        answer = served.client.request(method, path, headers=other)
        nobody = served.client.request(method, path.replace(id, "0" * 32), headers=other)
        assert answer.status_code == nobody.status_code == 404 and answer.json() == nobody.json()
    answer = served.client.get("/v1/get_result", params={"id": id}, headers=other)
    assert answer.status_code == 404 and answer.json()["status"] == "Task not found"


@pytest.mark.parametrize("shown", [{}, {"x-key": ""}, {"x-key": "mf-wrong"}, {"authorization": "Basic x"}])
def test_no_key(shared: Served, shown: dict[str, str]) -> None:
    """Nothing of a body is read before the key is known."""
    for method, path in (("POST", "/v1/nano"), ("GET", "/v1/credits"), ("GET", "/v1/get_result"), ("GET", "/v1/nope")):
        answer = shared.client.request(method, path, headers=shown, content=b"{" if method == "POST" else None)
        assert answer.status_code == 401 and set(answer.json()) == {"detail"}
    for path in ("/v1/images/generations", "/v1/images/edits"):
        answer = shared.client.post(path, headers=shown)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"):
        assert shared.client.get(path, headers=shown).status_code == 200


def test_a_key_that_is_taken_away(serve: Serve) -> None:
    served = serve()
    assert served.get("/v1/credits").status_code == 200
    keys.remove(served.store, "somebody")
    assert served.get("/v1/credits").status_code == 401


def test_without_keys(serve: Serve) -> None:
    served = serve(keys=False)
    served.headers = {}
    told = served.result(served.post("/v1/nano", **SMALL))
    assert told["status"] == "Ready"
    assert served.get("/v1/credits").json()["credits"] is None


def test_request_ids_and_the_log(shared: Served, caplog: pytest.LogCaptureFixture) -> None:
    secret = "nobody may read this prompt"
    with caplog.at_level(logging.INFO, "miniflux.serve"):
        headers = {**shared.headers, "x-request-id": "mine-1"}
        answer = shared.client.post("/v1/nano", json={**SMALL, "prompt": secret}, headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        bad = shared.client.get("/healthz", headers={"x-request-id": "a b"})
        assert bad.headers["x-request-id"].startswith("req_")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "miniflux.serve"]
    assert lines[0] | {"milliseconds": 0} == {
        "request": "mine-1",
        "method": "POST",
        "route": "/v1/{model}",
        "status": 200,
        "milliseconds": 0,
        "key": "somebody",
        "job": answer.json()["id"],
    }
    assert lines[1]["route"] == "/healthz"
    assert secret not in caplog.text and shared.key not in caplog.text


def test_addresses_name_the_server(serve: Serve) -> None:
    served = serve(url="https://pictures.example/api/")
    answer = served.post("/v1/nano", **SMALL)
    assert answer.json()["polling_url"].startswith("https://pictures.example/api/v1/get_result?id=")
    served = serve()
    headers = {**served.headers, "host": "evil.example/x?"}
    told = served.client.post("/v1/nano", json=SMALL, headers=headers).json()
    assert told["polling_url"].startswith("http://testserver")


def test_health(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    served.result(served.post("/v1/nano", **SMALL, seed=1))
    served.result(served.post("/v1/nano", **SMALL, seed=1))
    assert served.client.get("/healthz").text == "ok\n"
    assert served.client.get("/readyz").json() == {"ready": True, "workers": 1}
    text = served.client.get("/metrics").text
    for line in (
        'miniflux_jobs{state="done"} 2.0',
        "miniflux_jobs_cached_total 1.0",
        "miniflux_pictures_total 1.0",
        "miniflux_queue_length 0.0",
        'miniflux_batches_total{pictures="1"} 1.0',
        'miniflux_wait_seconds_bucket{le="+Inf"} 1.0',
        "miniflux_wait_seconds_count 1.0",
        'miniflux_worker{what="resident",worker="painter"} 1.0',
        'miniflux_http_requests_total{method="POST",route="/v1/{model}",status="200"} 2.0',
    ):
        assert line in text, line
    monkeypatch.setattr("miniflux.apps.serve.health.SEEN", -1.0)
    answer = served.client.get("/readyz")
    assert answer.status_code == 503 and answer.headers["retry-after"]


def test_the_database_or_the_disk_is_gone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()

    def gone(*_: Any, **__: Any) -> Any:
        raise OperationalError("select", {}, Exception("database is locked"))

    def full(*_: Any, **__: Any) -> Any:
        raise OutputError("cannot be written: No space left on device")

    picture = text_of(plain((64, 64), 1))
    with monkeypatch.context() as patch:
        patch.setattr(served.inputs, "add", full)
        answer = served.post("/v1/nano-kontext", prompt="x", input_image=picture)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert "space" not in answer.text
    with monkeypatch.context() as patch:
        patch.setattr(served.store, "submit", gone)
        answer = served.post("/v1/images/generations", prompt="x")
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error"
        assert answer.headers["retry-after"]
    with monkeypatch.context() as patch:
        patch.setattr(served.store, "reading", gone)
        for path in ("/v1/credits", "/v1/jobs/x", "/v1/get_result?id=x", "/readyz"):
            assert served.get(path).status_code == 503, path
        assert "miniflux_up 0.0" in served.client.get("/metrics").text
    assert served.result(served.post("/v1/nano", **SMALL))["status"] == "Ready"


def test_bodies_that_are_too_large(shared: Served) -> None:
    answer = shared.client.post(
        "/v1/images/generations",
        content=b"{}",
        headers={**shared.headers, "content-type": "application/json", "content-length": "1000000000"},
    )
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


class Receiver(http.server.BaseHTTPRequestHandler):
    """Refuses the first message, takes the others."""

    got: list[tuple[dict[str, str], bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(500 if len(self.got) == 1 else 204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_webhooks(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told until it is heard, signed, and what it says is what polling says."""
    monkeypatch.setattr("miniflux.apps.serve.app.TELLING", 0.05)
    monkeypatch.setattr("miniflux.apps.serve.webhooks.WAITS", (0.1, 0.1))
    Receiver.got = []
    receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    try:
        served = serve(hosts=("127.0.0.1",), url="http://server.example")
        address = f"http://127.0.0.1:{receiver.server_address[1]}/told"
        told = served.result(served.post("/v1/nano", **SMALL, webhook_url=address, webhook_secret="s3cret"))
        until = time.monotonic() + 30
        while len(Receiver.got) < 2:
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.5)
        assert len(Receiver.got) == 2
        headers, body = Receiver.got[1]
        assert verified("s3cret", headers, body) and headers["webhook-id"] == told["id"]
        about = json.loads(body)
        assert about["status"] == "Ready" and about["result"]["seed"] == told["result"]["seed"]
        assert about["result"]["sample"].startswith("http://server.example/v1/pictures/")
    finally:
        receiver.shutdown()
        receiver.server_close()


def test_old_pictures_go(serve: Serve) -> None:
    served = serve()
    told = served.result(served.post("/v1/nano", **SMALL))
    (path,) = served.blobs.folder.iterdir()
    os.utime(path, (1, 1))
    assert served.client.portal is not None
    served.client.portal.call(tidy, served.app.state.site)
    assert not list(served.blobs.folder.iterdir())
    assert served.client.get(told["result"]["sample"]).status_code == 404
    answer = served.get("/v1/get_result", id=told["id"])
    assert answer.status_code == 404 and answer.json()["status"] == "Task not found"
    served.client.portal.call(tell, served.app.state.site)  # nothing to tell


def test_options_that_name_no_model(serve: Serve) -> None:
    with pytest.raises(InputError, match="nano-9"):
        serve(models=("nano-9",))
    with pytest.raises(InputError, match="flux1-dev"):
        serve(models=("flux1-dev",))
    with pytest.raises(InputError, match="nano-9"):
        serve(aliases={"mine": "nano-9"})


def test_the_page_needs_no_network(shared: Served) -> None:
    text = shared.client.get("/docs").text
    assert "/v1/images/generations" in text and "safety_tolerance" in text
    assert "<script" not in text and "http://" not in text.replace("http://server", "") and "https://" not in text


def test_nothing_is_watched_when_nobody_waits(shared: Served) -> None:
    shared.post("/v1/images/generations", prompt=PROMPT, size="64x64", model="nano")
    watch = shared.app.state.site.watch
    until = time.monotonic() + 5
    while watch._jobs:  # pyright: ignore[reportPrivateUsage]
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_folder_of_models(serve: Serve, tmp_path: Path) -> None:
    """Files of the operator's folder are asked for by the names in the list."""
    from miniflux.weights.finding import BUNDLED

    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "mine.safetensors").symlink_to(BUNDLED / "flux1-nano-dev.safetensors")
    served = serve(folder=folder)
    names = {one["id"]: one for one in served.get("/v1/models").json()["data"]}
    assert "mine.safetensors" in names, served.app.state.site.offers.catalogue.refused
    answer = served.post("/v1/images/generations", prompt=PROMPT, model="mine.safetensors", size="64x64")
    assert answer.status_code == 200, answer.text
