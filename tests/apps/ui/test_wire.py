"""The page as it is served, asked byte by byte: what no well-behaved client sends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from miniflux.apps.ui.launch import Page, served
from miniflux.apps.ui.routes import COOKIE
from miniflux.apps.ui.site import opened
from miniflux.apps.web import serving
from tests.apps.ui.test_listening import has_ipv6

SESSION = "s" * 32
LIMIT = 2**20
PATIENCE = 60.0  # seconds, on however busy a machine


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("wire")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        with opened(folder) as site:
            site.uploads.file_bytes, site.uploads.session_bytes = LIMIT, 2 * LIMIT
            with served(site, host="::" if has_ipv6() else "0.0.0.0", port=0, allow_hosts=["draw.example.org"]) as page:
                yield page


def port(page: Page) -> int:
    return int(page.url.rpartition(":")[2])


def say(page: Page, text: str, more: bytes = b"") -> bytes:
    """What the server answers to a text; the whole of it, until it closes or has said what it announced."""
    with socket.create_connection(("127.0.0.1", port(page)), timeout=PATIENCE) as wire:
        wire.sendall(text.replace("\n", "\r\n").encode() + more)
        data = b""
        while piece := wire.recv(65536):
            data += piece
            head, end, rest = data.partition(b"\r\n\r\n")
            length = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            if end and length and len(rest) >= length[0]:
                break
        return data


def status(page: Page, text: str, more: bytes = b"") -> int:
    return int(say(page, text, more).split(b" ", 2)[1])


def asks(page: Page) -> httpx.Client:
    client = httpx.Client(base_url=page.url, trust_env=False, timeout=PATIENCE)
    assert client.get("/").status_code == 200
    return client


def lying(page: Page) -> list[Path]:
    walked = os.walk(page.site.uploads.folder)  # which takes no offence at folders that go meanwhile
    return [Path(at) / name for at, _, names in walked for name in names]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET / HTTP/1.0\n\n", 400),
        ("GET / HTTP/1.1\n\n", 400),
        ("GET / HTTP/1.0\nHost: 127.0.0.1\n\n", 200),
        ("GET / HTTP/1.1\nHost: 127.0.0.1\nHost: evil.example\n\n", 400),
        ("GET / HTTP/1.1\nHost: evil.example\n\n", 421),
        ("GET / HTTP/1.1\nHost: evil.example\nX-Forwarded-Host: draw.example.org\n\n", 421),
        ("GET / HTTP/1.1\nHost: LocalHost.:1\n\n", 200),
        ("GET http://evil.example/ HTTP/1.1\nHost: 127.0.0.1\n\n", 400),
        ("OPTIONS * HTTP/1.1\nHost: 127.0.0.1\n\n", 400),
        ("CONNECT evil.example:443 HTTP/1.1\nHost: 127.0.0.1\n\n", 400),
        ("GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\nHost: 127.0.0.1\n\n", 404),
        ("GET /assets/..%2f..%2f..%2fetc/passwd HTTP/1.1\nHost: 127.0.0.1\n\n", 404),
        ("GET /gradio_api/file=/etc/passwd HTTP/1.1\nHost: 127.0.0.1\n\n", 403),
        ("GET / HTTP/1.1\nHost: 127.0.0.1\nConnection: Upgrade\nUpgrade: websocket\nOrigin: http://evil.example\n"
         "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\nSec-WebSocket-Version: 13\n\n", 403),
    ],
)  # fmt: skip
def test_odd_requests(page: Page, text: str, expected: int) -> None:
    assert status(page, text) == expected


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_the_page_is_there_by_ipv6(page: Page) -> None:
    with httpx.Client(base_url=f"http://[::1]:{port(page)}", trust_env=False, timeout=PATIENCE) as client:
        assert client.get("/").status_code == 200
        assert client.get("/config").status_code == 200
        assert client.get("/config", headers={"origin": f"http://[::1]:{port(page)}"}).status_code == 200
        assert client.get("/config", headers={"origin": page.url}).status_code == 403


def test_a_foreign_page_cannot_draw(page: Page) -> None:
    """DNS rebinding, and a page of another origin: neither gets a job into the line, and the page itself does."""
    client = asks(page)
    config = client.get("/config").json()
    roll = next(i for i, one in enumerate(config["dependencies"]) if one["api_name"] == "roll")
    body = {"fn_index": config["dependencies"][roll]["id"], "data": [], "session_hash": "x"}
    for path in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
        for headers in (
            {"host": f"evil.example:{port(page)}", "origin": f"http://evil.example:{port(page)}"},
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"sec-fetch-site": "cross-site"},
        ):
            assert client.post(path, json=body, headers=headers).status_code in (403, 421)
    assert client.post("/gradio_api/run/predict", json=body, headers={"origin": page.url}).status_code == 200
    assert (
        httpx.post(f"{page.url}/gradio_api/run/predict", json=body, trust_env=False, timeout=PATIENCE).status_code
        == 403
    )


def test_uploads_need_a_session(page: Page) -> None:
    files = {"files": ("a.txt", b"x")}
    refused = httpx.post(f"{page.url}/gradio_api/upload", files=files, trust_env=False, timeout=PATIENCE)
    assert refused.status_code == 403 and refused.text.count("\n") == 1
    (path,) = asks(page).post("/gradio_api/upload", files=files).json()
    assert Path(path).read_bytes() == b"x" and page.site.uploads.folder in Path(path).parents


HEAD = (
    f"POST /gradio_api/upload HTTP/1.1\nHost: 127.0.0.1\nCookie: {COOKIE}={SESSION}\n"
    "Content-Type: multipart/form-data; boundary=b\n"
)
PART = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n'


@pytest.mark.parametrize("said", ["", "GET / HT", "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
@pytest.mark.parametrize("asked", [False, True], ids=["at first", "after a request"])
def test_who_asks_for_nothing_is_not_waited_for(
    page: Page, monkeypatch: pytest.MonkeyPatch, said: str, asked: bool
) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", port(page)), timeout=4) as wire:  # uvicorn's own patience is 5 s
        if asked:
            wire.sendall(b"HEAD /robots.txt HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert wire.recv(65536).startswith(b"HTTP/1.1")
        wire.sendall(said.encode())
        assert wire.recv(65536) == b""


def test_answer_that_takes_long_is_waited_for(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.1)
    stream = f"GET /gradio_api/heartbeat/x HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {COOKIE}={SESSION}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port(page)), timeout=PATIENCE) as wire:
        wire.sendall(stream.encode())
        assert b" 200 " in wire.recv(65536)
        wire.settimeout(1)
        while True:
            try:
                assert wire.recv(65536), "closed"
            except TimeoutError:
                break


def test_large_uploads_are_refused_before_they_are_sent(page: Page) -> None:
    before = lying(page)
    for expects in ("", "Expect: 100-continue\n"):
        begun = time.monotonic()
        answer = say(page, f"{HEAD}{expects}Content-Length: 3000000000\n\n", PART)
        assert b" 413 " in answer.split(b"\r\n")[0] and b"in one go" in answer
        assert time.monotonic() - begun < PATIENCE
    assert lying(page) == before


def test_large_uploads_are_refused_while_they_stream(page: Page) -> None:
    before = lying(page)
    block = PART + b"x" * (LIMIT // 2)
    chunk = f"{len(block):x}\r\n".encode() + block + b"\r\n"
    more = f"{LIMIT:x}\r\n".encode() + b"y" * LIMIT + b"\r\n"
    assert status(page, f"{HEAD}Transfer-Encoding: chunked\n\n", chunk + more) == 413
    assert lying(page) == before


def test_a_sender_that_goes_leaves_nothing(page: Page) -> None:
    before = lying(page)
    with socket.create_connection(("127.0.0.1", port(page))) as wire:
        wire.sendall(f"{HEAD}Content-Length: 5000\n\n".replace("\n", "\r\n").encode() + PART + b"x" * 100)
        end = time.monotonic() + PATIENCE
        while lying(page) == before and time.monotonic() < end:
            time.sleep(0.01)
    end = time.monotonic() + PATIENCE
    while lying(page) != before and time.monotonic() < end:
        time.sleep(0.01)
    assert lying(page) == before


def test_json_is_bounded(page: Page) -> None:
    client = asks(page)
    body = json.dumps({"data": ["x" * (5 * 2**20)]}).encode()
    for sent in (body, iter([body])):  # with its length, and in chunks without
        assert client.post("/gradio_api/queue/join", content=sent).status_code == 413


def test_a_foreign_file_is_not_read(page: Page, tmp_path: Path) -> None:
    """Whoever names a file that was not sent is not given what is in it."""
    (tmp_path / "secret.txt").write_text("secret prompt")
    client = asks(page)
    config = client.get("/config").json()
    files = next(one for one in config["dependencies"] if one["api_name"] == "files")
    data = [
        [{"path": str(tmp_path / "secret.txt"), "meta": {"_type": "gradio.FileData"}}]
        if next(c for c in config["components"] if c["id"] == id)["type"] == "file"
        else None
        for id in files["inputs"]
    ]
    answer = client.post("/gradio_api/run/predict", json={"fn_index": files["id"], "data": data, "session_hash": "x"})
    assert answer.status_code >= 400 and "secret prompt" not in answer.text


def test_a_picture_in_a_slot_is_shown_to_who_sent_it(page: Page) -> None:
    """And to nobody else: not without the cookie, not with another; nor anything that is no picture."""
    ann, bob, kinds = asks(page), asks(page), dict[str, str]()
    with contextlib.closing(ann), contextlib.closing(bob):
        for name in ("a.png", "a.html"):
            (kinds[name],) = ann.post("/gradio_api/upload", files={"files": (name, b"data")}).json()
        shown = ann.get(f"/gradio_api/file={kinds['a.png']}")
        assert (shown.status_code, shown.content, shown.headers["content-type"]) == (200, b"data", "image/png")
        assert shown.headers["x-content-type-options"] == "nosniff"
        assert ann.get(f"/gradio_api/file={kinds['a.html']}").status_code == 404
        assert bob.get(f"/gradio_api/file={kinds['a.png']}").status_code == 404
        for path in ("/etc/passwd", "etc/passwd", f"{page.site.folder}"):
            assert ann.get(f"/gradio_api/file={path}").status_code == 404
        assert httpx.get(f"{page.url}/gradio_api/file={kinds['a.png']}", trust_env=False).status_code == 403
