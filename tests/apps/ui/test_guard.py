"""Who may ask the page for what: names, origins, sessions, bodies, passwords; without a browser and without a page."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from miniflux.apps.ui import guard
from miniflux.apps.ui.guard import Guard
from miniflux.apps.ui.routes import COOKIE
from miniflux.apps.web import bodies
from miniflux.apps.web.door import Door, allowed_host, door, prefix_of, split
from miniflux.errors import InputError

SESSION = f"{COOKIE}={'a' * 32}"
HERE = {"host": "127.0.0.1:7860"}
OWN = {**HERE, "cookie": SESSION, "origin": "http://127.0.0.1:7860"}
JOIN = "/gradio_api/queue/join"


class Answer:
    def __init__(self) -> None:
        self.status, self.headers, self.body = 0, list[tuple[bytes, bytes]](), b""
        self.scope: dict[str, Any] = {}
        self.read = b""

    @property
    def cookies(self) -> list[str]:
        return [value.decode() for name, value in self.headers if name == b"set-cookie"]


def ask(
    headers: dict[str, str],
    path: str = "/",
    method: str = "GET",
    served: Door | None = None,
    local: str = "127.0.0.1",
    pieces: list[bytes] | None = None,
    inner: Guard | None = None,
    status: int = 200,
    pause: float = 0.0,
) -> Answer:
    """What a request is answered; the page behind says `status` to whatever reaches it."""
    answer = Answer()

    async def page(scope: Any, receive: Any, send: Any) -> None:
        answer.scope = scope
        while True:
            message = await receive()
            answer.read += message.get("body", b"")
            if not message.get("more_body"):
                break
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"set-cookie", b"x=1; SameSite=none; Secure")],
            }
        )
        await send({"type": "http.response.body", "body": b"page"})

    waiting = list(pieces or [b""])

    async def receive() -> Any:
        await asyncio.sleep(pause)
        if not waiting:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], list(message["headers"])
        else:
            answer.body += message.get("body", b"")

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "server": (local, 7860),
        "client": ("127.0.0.1", 5),
    }
    whole = inner or Guard(page, served or Door())
    whole.app = page
    asyncio.run(whole(scope, receive, send))
    return answer


# Host


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1:7860", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1"),
        ("localhost:7860", "127.0.0.1"),
        ("LOCALHOST:7860", "127.0.0.1"),
        ("localhost.:7860", "127.0.0.1"),
        ("[::1]:7860", "::1"),
        ("[0:0:0:0:0:0:0:1]:7860", "::1"),
        ("[::ffff:127.0.0.1]:7860", "127.0.0.1"),
        ("localhost:8000", "127.0.0.1"),  # through ssh -L
        ("192.168.1.5:7860", "192.168.1.5"),
        ("192.168.1.5:7860", "::ffff:192.168.1.5"),  # by a socket for both kinds
        ("[fe80::1]:7860", "fe80::1%eth0"),
    ],
)
def test_own_names_and_addresses_are_served(host: str, local: str) -> None:
    assert ask({"host": host}, local=local).status == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example:7860", "xlocalhost"),
        *(
            "10.1.2.3:7860",
            "0.0.0.0:7860",
            "[2001:db8::1]:7860",
            "127.1",
            "2130706433",
            "0x7f000001",
            "draw.example.org",
        ),
    ],
)
def test_dns_rebinding_is_refused(host: str) -> None:
    """A foreign name that points here: the browser sends it as Host, with the page that it thinks it is as Origin."""
    for headers in ({}, {"origin": f"http://{host}", "sec-fetch-site": "same-origin", "cookie": SESSION}):
        for method, path in (("GET", "/"), ("POST", JOIN), ("GET", "/studio/state"), ("GET", "/gradio_api/queue/data")):
            answer = ask({"host": host, **headers}, path, method)
            assert answer.status == 421
            assert answer.body.count(b"\n") == 1 and b"--allow-host" in answer.body


@pytest.mark.parametrize(
    "host", ["", "a b", "user@127.0.0.1", "127.0.0.1:port", "127.0.0.1:99999", "[::1", "::1", "a/b", "[localhost]"]
)
def test_host_that_is_none_is_refused(host: str) -> None:
    assert ask({"host": host}).status == 400
    assert split(host) is None


def test_no_host_and_two_hosts_are_refused() -> None:
    assert ask({}).status == 400
    assert ask({"host": "127.0.0.1", "Host": "evil.example"}).status == 400
    assert ask(HERE, "http://evil.example/").status == 400


def test_allowed_host_is_served_and_no_other() -> None:
    served = door({"localhost"}, ["Draw.Example.org", "two.example:8443", "müller.example"])
    for host in ("draw.example.org", "draw.example.org:1234", "two.example:8443", "xn--mller-kva.example"):
        assert ask({"host": host}, served=served).status == 200
    for host in ("two.example", "sub.draw.example.org", "evil.example"):
        assert ask({"host": host}, served=served).status == 421


@pytest.mark.parametrize("text", ["", "http://a.example", "a.example/path", "a b", "a.example:x", "*"])
def test_allow_host_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--allow-host"):
        allowed_host(text)


# Proxies


def test_what_proxies_say_counts_only_with_allow_host() -> None:
    told = {**HERE, "x-forwarded-host": "draw.example.org", "x-forwarded-proto": "https", "x-gradio-server": "http://e"}
    plain = ask(told)
    names = {name for name, _ in plain.scope["headers"]}
    assert plain.status == 200 and plain.scope["scheme"] == "http"
    assert not {b"x-forwarded-host", b"x-forwarded-proto", b"x-gradio-server"} & names
    assert all("Secure" not in cookie for cookie in plain.cookies)

    served = door({"localhost"}, ["draw.example.org"])
    proxied = ask(told, served=served)
    assert proxied.status == 200 and proxied.scope["scheme"] == "https"
    assert all("Secure" in cookie for cookie in proxied.cookies) and len(proxied.cookies) == 2
    assert ask({**told, "x-forwarded-host": "evil.example"}, served=served).status == 421
    assert ask({**told, "host": "evil.example"}, served=served).status == 421


def test_origin_behind_a_proxy() -> None:
    served = door({"localhost"}, ["draw.example.org"])
    by_proxy = {"cookie": SESSION, "origin": "https://draw.example.org"}
    for host in ({"host": "draw.example.org"}, {**HERE, "x-forwarded-host": "draw.example.org"}, HERE):
        assert ask({**host, **by_proxy}, JOIN, "POST", served).status == 200
    other = {**by_proxy, "origin": "https://draw.example.org:9000"}
    assert ask({**HERE, **other}, JOIN, "POST", served).status == 403
    assert ask({**HERE, **by_proxy}, JOIN, "POST").status == 403


@pytest.mark.parametrize(("root", "prefix"), [("", ""), ("/draw/", "/draw"), ("https://a.example/x/y", "/x/y")])
def test_prefix_is_taken_away_or_was(root: str, prefix: str) -> None:
    served = door({"localhost"}, [], root)
    assert served.prefix == prefix == prefix_of(root)
    assert ask(HERE, f"{prefix}/theme.css", served=served).scope["path"] == "/theme.css"
    assert ask(HERE, "/theme.css", served=served).scope["path"] == "/theme.css"
    if prefix:
        assert ask(HERE, prefix, served=served).status == 308


@pytest.mark.parametrize("root", ["draw", "//evil.example", "ftp://a"])
def test_prefix_that_is_none_is_refused(root: str) -> None:
    with pytest.raises(InputError, match="GRADIO_ROOT_PATH"):
        prefix_of(root)


# Origin


@pytest.mark.parametrize(
    "origin",
    [
        *("http://evil.example", "null", "", "http://127.0.0.1:3000", "http://127.0.0.1", "http://localhost:7860"),
        *("https://127.0.0.1:7861", "file://", "http://127.0.0.1:7860.evil.example", "127.0.0.1:7860"),
    ],
)
@pytest.mark.parametrize("path", [JOIN, "/gradio_api/upload", "/login", "/gradio_api/run/predict", "/studio/undo"])
def test_only_the_page_itself_may_post(origin: str, path: str) -> None:
    headers = {**HERE, "cookie": SESSION, "origin": origin}
    assert ask(headers, path, "POST").status == 403
    assert ask(OWN, path, "POST").status == 200


@pytest.mark.parametrize("path", ["/gradio_api/queue/data", "/gradio_api/heartbeat/x", "/studio/state", "/config"])
def test_only_the_page_itself_may_open_streams_and_read(path: str) -> None:
    assert ask({**OWN, "origin": "http://evil.example"}, path).status == 403
    for site in ("cross-site", "same-site"):
        assert (
            ask({**HERE, "cookie": SESSION, "sec-fetch-site": site, "sec-fetch-mode": "navigate"}, path).status == 403
        )
    assert ask({**OWN, "sec-fetch-site": "same-origin"}, path).status == 200


def test_programs_without_origin_need_the_cookie() -> None:
    for method, path in (
        ("POST", JOIN),
        ("POST", "/gradio_api/upload"),
        ("GET", "/config"),
        ("GET", "/gradio_api/queue/data"),
    ):
        assert ask(HERE, path, method).status == 403
        assert ask({**HERE, "cookie": f"{COOKIE}=short"}, path, method).status == 403
        assert ask({**HERE, "cookie": SESSION}, path, method).status == 200


def test_websockets_are_closed() -> None:
    told: list[Any] = []

    async def send(message: Any) -> None:
        told.append(message)

    async def never(*_: Any) -> None:
        raise AssertionError

    asyncio.run(Guard(never)({"type": "websocket", "path": "/", "headers": []}, never, send))
    assert told == [{"type": "websocket.close", "code": 1008}]


def test_who_comes_by_a_link_keeps_the_session() -> None:
    """Browsers hold a strict cookie back then; without the second request another would replace it."""
    link = {**HERE, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    for headers in (link, {**HERE, "referer": "http://other.example/"}):
        answer = ask(headers)
        assert answer.status == 200 and not answer.cookies and b"refresh" in answer.body
    assert ask({**HERE, "referer": "http://127.0.0.1:7860/"}).body == b"page"
    assert ask({**link, "sec-fetch-dest": "iframe"}).status == 403


# What is served at all, and cookies


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/proxy=https://x.hf.space", "/gradio_api/stream/x", "/gradio_api/deep_link", "/monitoring"),
        *(
            "/gradio_api/openapi.json",
            "/docs",
            "/gradio_api/vibe-code",
            "/gradio_api/runs",
        ),
        *("/assets/../../../etc/passwd", "/studio/picture/../x.png", "/gradio_api/dev/reload", "/studio"),
    ],
)
def test_the_rest_of_gradio_is_not_there(path: str) -> None:
    assert ask(OWN, path).status == 404


@pytest.mark.parametrize(
    "path", ["/gradio_api/process_recording", "/gradio_api/vibe-edit", "/gradio_api/stream/x", "/"]
)
def test_the_rest_of_gradio_takes_nothing(path: str) -> None:
    assert ask(OWN, path, "POST").status == 404
    assert ask(OWN, path, "OPTIONS").status == 405
    assert ask(OWN, path, "PUT").status == 405


def test_every_cookie_is_strict() -> None:
    cookies = ask(HERE).cookies
    assert len(cookies) == 2
    for cookie in cookies:
        assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
        assert "none" not in cookie and "Secure" not in cookie


# Bodies


def test_bodies_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_BYTES", 100)
    announced = {**OWN, "content-length": "101"}
    chunked = {**OWN, "transfer-encoding": "chunked"}
    assert ask(announced, JOIN, "POST", pieces=[b"x" * 101]).status == 413
    assert ask(chunked, JOIN, "POST", pieces=[b"x" * 60, b"x" * 60]).status == 413
    whole = ask(chunked, JOIN, "POST", pieces=[b"x" * 40, b"y" * 60])
    assert whole.status == 200 and whole.read == b"x" * 40 + b"y" * 60
    assert ask({**OWN, "content-length": "-1"}, JOIN, "POST").status == 400
    assert ask({**OWN, "content-length": "²"}, JOIN, "POST").status == 400


def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BUFFERED_BYTES", 100)
    assert ask({**OWN, "transfer-encoding": "chunked"}, JOIN, "POST", pieces=[b"x" * 101]).status == 503


def test_slow_and_broken_bodies_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE", 0.05)
    monkeypatch.setattr(bodies, "DRAINED_SECONDS", 0.05)
    chunked = {**OWN, "transfer-encoding": "chunked"}
    assert ask(chunked, JOIN, "POST", pieces=[b"x"] * 20, pause=0.02).status == 408
    cut = ask({**OWN, "content-length": "9"}, JOIN, "POST", pieces=[b"x", b""], inner=None)
    assert cut.read == b"x"


# Passwords


def test_wrong_passwords_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Guard(None)  # type: ignore[arg-type]
    for _ in range(guard.WRONG_PASSWORDS):
        assert ask(OWN, "/login", "POST", inner=asked, status=400).status == 400
    assert ask(OWN, "/login", "POST", inner=asked).status == 429
    monkeypatch.setattr(guard, "WRONG_SECONDS", -1.0)
    assert ask(OWN, "/login", "POST", inner=asked).status == 200


def test_right_passwords_are_not_counted() -> None:
    asked = Guard(None)  # type: ignore[arg-type]
    for _ in range(2 * guard.WRONG_PASSWORDS):
        assert ask(OWN, "/login", "POST", inner=asked).status == 200
