"""Bodies of requests: whole or refused in one line, over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, StreamingResponse

from miniflux.apps.serve import bodies
from miniflux.apps.serve.bodies import Bodies
from miniflux.apps.web import bodies as shared
from miniflux.apps.web.bodies import App, Message, RefusedError

JSON = "content-type: application/json"


class Seen:
    """What came to the app."""

    def __init__(self) -> None:
        self.bodies, self.pieces = list[bytes](), list[int]()


@contextmanager
def served(seen: Seen, http: str = "h11", **more: Any) -> Generator[tuple[int, Bodies]]:
    app, gone = FastAPI(), threading.Event()

    @app.api_route("/", methods=["GET", "POST", "DELETE"])
    async def taken(request: Request) -> dict[str, int]:
        seen.bodies.append(await request.body())
        return {"bytes": len(seen.bodies[-1])}

    @app.post("/parsed")
    async def parsed(given: dict[str, Any]) -> dict[str, int]:
        return {"fields": len(given)}

    @app.post("/form")
    async def form(request: Request) -> list[str]:
        async with request.form() as fields:
            return sorted(fields)

    @app.post("/stream")
    async def stream(request: Request) -> StreamingResponse:
        await request.body()

        async def until_gone() -> Any:
            try:
                yield b"begun"
                await asyncio.sleep(60)
            finally:  # its client has left
                gone.set()

        return StreamingResponse(until_gone())

    app.state.gone = gone
    guarded = Bodies(app, **more)  # pyright: ignore
    server = uvicorn.Server(uvicorn.Config(guarded, port=0, log_level="critical", lifespan="off", http=http))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1], guarded
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def ask(port: int, head: str, pieces: Iterator[bytes] | list[bytes] = (), path: str = "/") -> tuple[int, Any]:  # type: ignore
    """The status and the JSON of an answer; sends until it is hung up on."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n".encode())
        with suppress(OSError):  # refused meanwhile
            for piece in pieces:
                client.sendall(piece)
        return answer(client)


def answer(client: socket.socket) -> tuple[int, Any]:
    with client.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(file.readline, b"\r\n"))
        body = file.read(int(headers["content-length"]))
    if status >= 400:
        assert headers["content-type"] == "application/json" and headers["connection"] == "close"
    return status, json.loads(body)


def chunked(pieces: Iterator[bytes] | list[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
    yield b"0\r\n\r\n"


def drops(count: int, pause: float) -> Iterator[bytes]:
    for _ in range(count):
        yield b"x"
        time.sleep(pause)


@pytest.fixture(params=[kind for kind in ("h11", "httptools") if find_spec(kind)])
def http(request: pytest.FixtureRequest) -> str:
    return request.param


def small(scope: Message) -> int:
    return 1000


def test_bodies_come_as_they_were(http: str) -> None:
    seen = Seen()
    with served(seen, http, limit=small) as (port, guarded):
        assert ask(port, f"{JSON}\r\ncontent-length: 1000", [b"x" * 400, b"y" * 600]) == (200, {"bytes": 1000})
        assert ask(port, f"{JSON}\r\ntransfer-encoding: chunked", chunked([b"x" * 400, b"y" * 600]))[0] == 200
        assert seen.bodies == [b"x" * 400 + b"y" * 600] * 2
        assert ask(port, JSON) == ask(port, "content-length: 0") == (200, {"bytes": 0})
        assert ask(port, "transfer-encoding: chunked", [b"0\r\n\r\n"]) == (200, {"bytes": 0})
        assert ask(port, f"{JSON}\r\ncontent-length: 7", [b'{"a":1}'], "/parsed") == (200, {"fields": 1})
        assert ask(port, f"{JSON}\r\ncontent-encoding: identity\r\ncontent-length: 2", [b"{}"], "/parsed")[0] == 200
        form = b'--b\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n--b--\r\n'
        head = f"content-type: multipart/form-data; boundary=b\r\ncontent-length: {len(form)}"
        assert ask(port, head, [form], "/form") == (200, ["a"])
        assert guarded.held == 0


def test_who_asks_before_sending_is_told_at_once(http: str) -> None:
    with served(Seen(), http, limit=small) as (port, _):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 100")
            client.sendall(b"hello")
            assert answer(client) == (200, {"bytes": 5})
        assert ask(port, "expect: 100-continue\r\ncontent-length: 5000")[0] == 413


def test_a_gigabyte_is_refused_at_its_first_bytes(http: str) -> None:
    seen = Seen()
    with served(seen, http) as (port, guarded):
        status, said = ask(port, f"{JSON}\r\ncontent-length: {2**30}", [b"x" * 100])
        assert (status, said) == (413, {"detail": f"the body has more than {bodies.PICTURES:,} bytes"})
        assert ask(port, f"content-type: text/plain\r\ncontent-length: {bodies.ELSE + 1}")[0] == 413
        assert ask(port, f"content-length: {2**63 - 1}")[0] == 413
        assert not seen.bodies and guarded.held == 0


def test_a_gigabyte_that_does_not_say_so_is_refused_at_the_first_byte_too_many(http: str) -> None:
    seen = Seen()
    with served(seen, http, limit=small) as (port, guarded):
        assert ask(port, "transfer-encoding: chunked", chunked([b"x" * 1000]))[0] == 200
        assert ask(port, "transfer-encoding: chunked", chunked([b"x" * 1001]))[0] == 413
        hundreds = (b"x" * 1000 for _ in range(300))
        assert ask(port, "transfer-encoding: chunked", chunked(hundreds))[0] == 413
        assert len(seen.bodies) == 1 and guarded.held == 0


def test_whoever_sends_without_end_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "DRAINED_BYTES", 2**18)
    with served(Seen(), limit=small) as (port, guarded):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            with pytest.raises(OSError, match=r"reset|pipe"):
                client.sendall(b"".join(chunked([b"x" * 2**20] * 100)))
        assert guarded.held == 0 and ask(port, "content-length: 1", [b"x"])[0] == 200


def test_all_together_are_bounded(http: str) -> None:
    with served(Seen(), http, limit=lambda _: 1000, total=1500) as (port, guarded):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as first:
            first.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n" + b"x" * 999)
            until(lambda: guarded.held == 999)
            status, said = ask(port, "content-length: 600", [b"x" * 600])
            assert status == 503 and "try again" in said["detail"] and guarded.held == 999
            assert ask(port, "content-length: 500", [b"x" * 500])[0] == 200
            first.sendall(b"x")
            assert answer(first)[0] == 200
        assert guarded.held == 0 and ask(port, "content-length: 600", [b"x" * 600])[0] == 200


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_a_stream_was_asked_with_is_let_go_when_it_begins() -> None:
    with served(Seen()) as (port, guarded):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"POST /stream HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n" + b"x" * 9)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            assert guarded.held == 0
        assert guarded.app.state.gone.wait(10)  # type: ignore[attr-defined]  # the app still learns who leaves


def test_slow_ones_are_cut(http: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "DRAINED_SECONDS", 0.05)
    with served(Seen(), http, patience=0.2, slowest=1e9) as (port, guarded):
        assert ask(port, "content-length: 9", [b"x"]) == (408, {"detail": "the body came too slowly"})
        assert ask(port, "transfer-encoding: chunked", chunked(drops(50, 0.02)))[0] == 408
        assert guarded.held == 0


def test_whoever_leaves_leaves_nothing(http: str) -> None:
    seen = Seen()
    with served(seen, http) as (port, guarded):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n" + b"x" * 999)
            until(lambda: guarded.held == 999)
        until(lambda: guarded.held == 0)
        assert not seen.bodies


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "deflate", "identity, gzip", "x", ""])
def test_compressed_bodies_are_refused(http: str, coding: str) -> None:
    seen = Seen()
    with served(seen, http) as (port, _):
        status, said = ask(port, f"{JSON}\r\ncontent-encoding: {coding}\r\ncontent-length: 2", [b"{}"])
        assert status == 415 and "Content-Encoding" in said["detail"] and not seen.bodies


def test_headers_and_addresses_are_bounded(http: str) -> None:
    with served(Seen(), http) as (port, _):
        assert ask(port, "x: " + "y" * 20_000)[0] == 200
        assert ask(port, "\r\n".join(f"x{i}: {'y' * 1000}" for i in range(33)))[0] == 431
        assert ask(port, "a: b", path="/?" + "x" * 8000)[0] == 200
        assert ask(port, "a: b", path="/?" + "x" * 8200)[0] == 414
        assert ask(port, "a: b", path="/" + "x" * 8200)[0] == 414


def test_lengths_that_are_none() -> None:
    seen = Seen()

    async def app(*_: Any) -> None:
        raise AssertionError("asked")

    for said in (b"-1", b"x", b"1.5", b"", b"\xb2", b"9" * 20, b"9" * 5000):
        scope = {"type": "http", "path": "/", "query_string": b"", "headers": [(b"content-length", said)]}
        sent = list[Message]()

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message, sent: list[Message] = sent) -> None:
            sent.append(message)

        asyncio.run(Bodies(app)(scope, receive, send))
        assert sent[0]["status"] == 400
    assert not seen.bodies


def test_other_forms_of_refusal() -> None:
    def openai(scope: Message, refused: RefusedError) -> App:
        return JSONResponse({"error": refused.line, "path": scope["path"]}, refused.status, {"connection": "close"})

    with served(Seen(), limit=small, refuse=openai) as (port, _):
        status, said = ask(port, "content-length: 2000", path="/v1/x")
        assert status == 413 and said == {"error": "the body has more than 1,000 bytes", "path": "/v1/x"}


def test_limits_go_by_kind() -> None:
    for kind, limit in (
        ("application/json", bodies.PICTURES),
        ("Application/JSON; charset=utf-8", bodies.PICTURES),
        ("multipart/form-data; boundary=x", bodies.PICTURES),
        ("text/plain", bodies.ELSE),
        ("", bodies.ELSE),
    ):
        assert bodies.by_kind({"headers": [(b"content-type", kind.encode())]}) == limit
    assert bodies.by_kind({"headers": []}) == bodies.ELSE
