"""Who may come in, before anything is asked: connections that ask for nothing, requests that can be read in two ways,
pages of others where no key is needed; and HEAD."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from miniflux.apps.serve.starting import door_of
from miniflux.apps.web import serving
from miniflux.errors import InputError
from tests.apps.serve.conftest import Serve, Served, listening

PROMPT = "a red circle on a blue background"
UNFINISHED = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, int]]:
    served = Served(tmp_path_factory.mktemp("doors"))
    with listening(served.app) as url:
        yield served, int(url.rpartition(":")[2])
    served.close()


def said(port: int, *pieces: bytes, wait: float = 20) -> bytes:
    """All that is answered until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as wire:
        for piece in pieces:
            wire.sendall(piece)
        return b"".join(iter(lambda: wire.recv(65536), b""))


# Connections


@pytest.mark.parametrize("begun", [b"", b"GET / HT", UNFINISHED])
@pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_heads_are_not_waited_for(
    here: tuple[Served, int], monkeypatch: pytest.MonkeyPatch, begun: bytes, before: bytes
) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.2)
    assert said(here[1], before + begun, wait=4).count(b"200 OK") == bool(before)  # uvicorn's own patience is 5 s


def test_a_head_that_drips_is_not_waited_for(here: tuple[Served, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", here[1]), timeout=4) as wire:
        wire.sendall(UNFINISHED)
        with pytest.raises(OSError, match=r"reset|pipe|abort"):
            drip(wire)


def drip(wire: socket.socket) -> None:
    until = time.monotonic() + 4
    while time.monotonic() < until:
        wire.sendall(b"a: b\r\n")
        time.sleep(0.02)


def test_an_answer_that_takes_long_is_waited_for(here: tuple[Served, int], monkeypatch: pytest.MonkeyPatch) -> None:
    served, port = here
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(served.painter, "seconds", 0.05)
    asked = {"model": "nano", "prompt": PROMPT, "size": "64x64", "num_inference_steps": 12}
    url = f"http://127.0.0.1:{port}/v1/images/generations"
    assert httpx.post(url, json=asked, headers=served.headers, trust_env=False, timeout=60).status_code == 200


def test_connections_are_bounded_and_the_silent_ones_make_room(
    here: tuple[Served, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "places", lambda: 20)
    port = here[1]
    with ExitStack() as stack:
        wires = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(60)]
        for wire in wires:
            try:
                wire.sendall(UNFINISHED)
            except OSError:  # it had to make room
                continue
        for _ in range(3):
            assert httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200
        assert len(closed(wires)) >= 40


def closed(wires: list[socket.socket]) -> list[socket.socket]:
    found: list[socket.socket] = []
    for wire in wires:
        wire.settimeout(0.05)
        try:
            if wire.recv(100) == b"":
                found.append(wire)
        except TimeoutError:
            continue
        except OSError:
            found.append(wire)
    return found


def test_where_all_have_asked_the_next_is_told_to_come_again(
    here: tuple[Served, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, port = here
    monkeypatch.setattr(served.painter, "seconds", 0.05)
    key = f"x-key: {served.key}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as wire:
        asked = httpx.post(
            f"http://127.0.0.1:{port}/v1/nano",
            json={"prompt": PROMPT, "steps": 200},
            headers=served.headers,
            trust_env=False,
        )
        wire.sendall(f"GET /v1/jobs/{asked.json()['id']}/events HTTP/1.1\r\nHost: x\r\n".encode() + key)
        assert b"200 OK" in wire.recv(65536)
        monkeypatch.setattr(serving, "places", lambda: 1)
        answer = said(port, UNFINISHED)
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 2" in answer
        monkeypatch.undo()
        served.store.cancel(asked.json()["id"])


def test_there_are_fewer_places_than_files() -> None:
    resource = pytest.importorskip("resource")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert serving.places() > 0 and (files == resource.RLIM_INFINITY or serving.places() <= files // 2)


# Requests in two ways


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/nano", "/healthz"])
@pytest.mark.parametrize("keyed", [True, False])
def test_a_body_of_two_lengths_is_refused_and_ends_the_connection(
    here: tuple[Served, int], path: str, keyed: bool
) -> None:
    served, port = here
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"x-key: {served.key}\r\n" if keyed else ""
    head += "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    answer = said(port, head.encode() + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", wait=4)
    assert answer.startswith(b"HTTP/1.1 400") and b"Content-Length and Transfer-Encoding" in answer
    assert b"connection: close" in answer and answer.count(b"HTTP/1.1") == 1


# Pages of others


def test_without_keys_it_answers_to_its_own_names_alone(tmp_path: Path) -> None:
    served = Served(tmp_path, keys=False, door=door_of("https://draw.example.org/flux", {"localhost", "box"}))
    try:
        with listening(served.app) as url, httpx.Client(base_url=url, trust_env=False) as client:
            port = int(url.rpartition(":")[2])
            for host in ("127.0.0.1", f"127.0.0.1:{port}", "localhost:1", "[::1]:80", "box", "draw.example.org"):
                assert client.get("/v1/models", headers={"host": host}).status_code == 200, host
            for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "10.9.8.7", "localhost.x"):
                for path in ("/v1/models", "/v1/credits", "/metrics", "/docs", "/healthz"):
                    answer = client.get(path, headers={"host": host})
                    assert answer.status_code == 421 and "--url" in answer.text, (host, path)
            assert client.get("/v1/models", headers={"host": "evil example"}).status_code == 400
            files, form = {"image": b"x"}, {"prompt": PROMPT}
            for origin in ("https://evil.example", "null", f"http://127.0.0.1:{port + 1}", "http://localhost.evil"):
                answer = client.post("/v1/images/edits", files=files, data=form, headers={"origin": origin})
                assert answer.status_code == 403 and answer.json()["error"]["code"] == "forbidden", origin
            for origin in (f"http://127.0.0.1:{port}", "https://draw.example.org"):
                assert client.get("/v1/models", headers={"origin": origin}).status_code == 200
    finally:
        served.close()


def test_with_keys_browsers_of_others_may_ask(here: tuple[Served, int]) -> None:
    """A key is what a foreign page does not have."""
    served, port = here
    headers = {**served.headers, "host": "any.example", "origin": "https://else.example"}
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=headers, trust_env=False).status_code == 200


def test_names_of_a_proxy() -> None:
    assert door_of(None, {"box"}).allowed == ()
    assert door_of("https://me@draw.example.org:444/x", ()).allowed == (("draw.example.org", 444),)
    for url in ("draw.example.org", "https://a b/", "https://x:99999/", "ftp://x/"):
        with pytest.raises(InputError, match=r"--url .*whole address"):
            door_of(url, ())


@pytest.mark.parametrize("host", ["x:65536", "x:99999", "a b", "[::1", "[12]", "", "::1"])
def test_no_host_that_is_none_is_repeated(serve: Serve, host: str) -> None:
    served = serve()
    headers = {**served.headers, "host": host}
    told = served.client.post("/v1/nano", json={"prompt": PROMPT, "seed": 1}, headers=headers).json()
    assert told["polling_url"].startswith("http://testserver:80/v1/")
    headers["host"] = "x.example:65535"
    told = served.client.post("/v1/nano", json={"prompt": PROMPT, "seed": 1}, headers=headers).json()
    assert told["polling_url"].startswith("http://x.example:65535/v1/")


# HEAD


def test_head_is_get_without_a_body(here: tuple[Served, int]) -> None:
    served, port = here
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=served.headers, trust_env=False) as client:
        sample = served.blobs.add(b"picture", "png")
        site = served.app.state.site
        picture = site.address(f"http://127.0.0.1:{port}", sample)
        for path in ("/healthz", "/readyz", "/metrics", "/docs", "/v1/models", picture):
            got, head = client.get(path), client.head(path)
            assert got.status_code == head.status_code == 200 and head.content == b"", path
            assert head.headers["content-type"] == got.headers["content-type"]
            if path != "/metrics":  # which has grown
                assert head.headers["content-length"] == str(len(got.content))
        assert client.head("/v1/nope/nope").status_code == client.get("/v1/nope/nope").status_code
        assert client.head("/v1/images/generations").status_code == 405
        assert client.head("/v1/jobs/x/events").status_code == 405  # would not end
        assert client.head("/v1/models", headers={"x-key": "mf-wrong"}).status_code == 401
        # The connection is still in step.
        both = b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = said(port, both)
        assert answer.count(b"HTTP/1.1 200") == 2 and answer.count(b"ok\n") == 1
        assert 'method="HEAD",route="/healthz"' in client.get("/metrics").text
