"""Who may ask the page for what, decided before anything of the page is asked.

A browser lets any page on the web send requests to this one. It says where they come from (`Origin`,
`Sec-Fetch-Site`), and under which name it found us (`Host`); a foreign name that was made to point here (DNS
rebinding) is seen by the second alone. Programs such as curl say neither, and need the cookie that `/` gives.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser

from miniflux.apps.ui.routes import COOKIE, UPLOAD, valid
from miniflux.apps.web.bodies import Message, Receive, Refusal, RefusedError, Send, announced, paced
from miniflux.apps.web.door import Door
from miniflux.apps.web.listening import address
from miniflux.service import new_session

YEAR = 365 * 24 * 3600
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "form-action 'self'; base-uri 'self'; object-src 'none'; frame-ancestors 'self'"
)
"""The browser itself refuses whatever would go elsewhere. Gradio's own scripts stand in the page and make functions."""

OPEN = re.compile(r"/|/(theme\.css|robots\.txt|favicon\.ico|manifest\.json|pwa_icon)|/(assets|svelte|static)/.*")
"""What everybody may have: the page itself, which holds nothing of anybody."""

READ = re.compile(
    r"/config/?|/logout|/studio/.*"
    r"|/gradio_api/(info/?|user/?|token/?|login_check/?|app_id/?|theme\.css|queue/data|queue/status|upload_progress)"
    r"|/gradio_api/heartbeat/[^/]+|/gradio_api/file=.+"
)
WRITE = re.compile(r"/login/?|/studio/.*|/gradio_api/(upload|queue/join/?|run/[^/]+/?|reset/?|cancel)")
"""What the page asks of Gradio. Its other routes (recordings, deep links, proxies, monitors) write files, fetch or tell
what is nobody's business; none is served."""

BODY_BYTES = 4 * 2**20  # of a request that is no upload; the largest is a list of prompts, of at most 1 MiB
BUFFERED_BYTES = 64 * 2**20  # of all such requests together
WRONG_PASSWORDS, WRONG_SECONDS, WRONG_KEPT = 10, 300.0, 4096

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass
class Guard:
    """ASGI middleware around the whole page; see the top of this file.

    Args:
        app: the page.
        door: the names it is served under.
        seen: told every session that asks for something.
    """

    app: App
    door: Door = field(default_factory=Door)
    seen: Callable[[str], None] = lambda session: None

    def __post_init__(self) -> None:
        self._buffered = 0
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await self._answer(scope, receive, send)
        except RefusedError as refused:

            async def answer(message: Message) -> None:
                if message["type"] == "http.response.start":
                    _dress(message, None, False)
                await send(message)

            await Refusal(refused)(scope, receive, answer)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(raw=scope["headers"])
        asked, secure = self._asked(headers, scope)
        self._strip(scope, secure)
        path, method = str(scope["path"]), str(scope["method"])
        arrives = self._origin(headers, asked, method, path)
        if path == self.door.prefix and path:
            await send({"type": "http.response.start", "status": 308, "headers": [(b"location", f"{path}/".encode())]})
            await send({"type": "http.response.body", "body": b""})
            return
        self._path(method, path)
        session = valid(cookie_parser(headers.get("cookie", "")).get(COOKIE))
        if session is None and arrives:
            await _again(send)
            return
        if session is None and not OPEN.fullmatch(path) and not path.startswith("/studio/"):
            raise RefusedError(403, "no session: open the page first, and let it keep a cookie")
        if session is not None:
            self.seen(session)
        token = new_session() if session is None and path == "/" else None
        logs_in = method == "POST" and path.startswith("/login")
        if logs_in:
            self._may_log_in(scope)
        stream = receive if path == UPLOAD else await self._whole(announced(headers), receive)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                _dress(message, token, secure)
                if logs_in and message["status"] < 400:
                    self._wrong.pop(_client(scope), None)
            await send(message)

        await self.app(scope, stream, answer)

    # Where it comes from

    def _asked(self, headers: Headers, scope: Scope) -> tuple[tuple[str, int | None], bool]:
        """The name and port the page was asked for, and whether over https; refuses those that are not ours."""
        hosts = headers.getlist("host")
        local = str((scope.get("server") or ("",))[0])
        asked = self.door.serves(hosts[0] if len(hosts) == 1 else None, local)
        if not self.door.allowed:
            return asked, False
        for host in headers.get("x-forwarded-host", "").split(",")[::-1]:  # the first is what the browser asked for
            if host.strip():
                asked = self.door.serves(host.strip(), local)
        return asked, headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower() == "https"

    def _strip(self, scope: Scope, secure: bool) -> None:
        """Take away the prefix, and what Gradio would otherwise believe of the request: anybody can write that."""
        if not str(scope["path"]).startswith("/"):
            raise RefusedError(400, "expected a path")  # a whole address is for proxies
        untrue = {b"x-gradio-server", b"forwarded"}
        if not self.door.allowed:
            untrue |= {b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-for"}
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name.lower() not in untrue]
        scope["scheme"] = "https" if secure else "http"
        prefix = self.door.prefix
        if prefix and str(scope["path"]).startswith(f"{prefix}/"):
            scope["path"] = str(scope["path"])[len(prefix) :]
            scope["raw_path"] = scope["path"].encode()

    def _origin(self, headers: Headers, asked: tuple[str, int | None], method: str, path: str) -> bool:
        """Refuse what other pages send. True for somebody who comes by a link, without the cookie for that reason."""
        origin = headers.get("origin")
        if origin is not None and not self.door.own(origin, asked):
            raise RefusedError(403, "asked by another page than this one")
        site = headers.get("sec-fetch-site", "").lower()
        front = method in ("GET", "HEAD") and path in ("/", self.door.prefix)
        if not site:  # an old browser, or one that asks over http in the local network
            referrer = headers.get("referer")
            return front and referrer is not None and not self.door.own(referrer.partition("?")[0], asked)
        if site in ("none", "same-origin"):
            return False
        if not front or headers.get("sec-fetch-mode") != "navigate" or headers.get("sec-fetch-dest") != "document":
            raise RefusedError(403, "asked by another page than this one")
        return True

    def _path(self, method: str, path: str) -> None:
        if method in ("GET", "HEAD"):
            known = OPEN.fullmatch(path) or READ.fullmatch(path)
        elif method == "POST":
            known = WRITE.fullmatch(path)
        else:
            raise RefusedError(405, f"{method[:20]} is not used here")
        if known is None or ".." in path.split("/"):
            raise RefusedError(404, "nothing is here")

    # Bodies

    async def _whole(self, length: int | None, receive: Receive) -> Receive:
        """Read a body of bounded size, and give it to the page in one piece."""
        if length == 0:
            return receive
        if length is not None and length > BODY_BYTES:
            raise RefusedError(413, f"larger than {BODY_BYTES} bytes")
        body = bytearray()
        try:
            async for piece in paced(receive):
                body += piece
                self._buffered += len(piece)
                if len(body) > BODY_BYTES:
                    raise RefusedError(413, f"larger than {BODY_BYTES} bytes")
                if self._buffered > BUFFERED_BYTES:
                    raise RefusedError(503, "too much is being sent at once; try again")
        finally:
            self._buffered -= len(body)
        first = [bytes(body)]

        async def replayed() -> Message:
            return {"type": "http.request", "body": first.pop()} if first else await receive()

        return replayed

    # Passwords

    def _may_log_in(self, scope: Scope) -> None:
        """Ten wrong passwords in five minutes from one place, and it has to wait. Each try counts as wrong until it is
        right, so that many at once gain nothing."""
        who, now = _client(scope), time.monotonic()
        tries = [when for when in self._wrong.pop(who, []) if now - when < WRONG_SECONDS]
        self._wrong[who] = tries
        if len(self._wrong) > WRONG_KEPT:
            self._wrong.popitem(last=False)
        if len(tries) >= WRONG_PASSWORDS:
            raise RefusedError(429, "too many wrong passwords; wait five minutes")
        tries.append(now)


def _client(scope: Scope) -> str:
    """Where a request comes from; of IPv6 the network, which one machine has whole."""
    found = address(str((scope.get("client") or ("",))[0]))
    return ":".join(found.exploded.split(":")[:4]) if found is not None and found.version == 6 else str(found)


def _dress(message: Message, token: str | None, secure: bool) -> None:
    """Headers of every answer: no asking elsewhere, and cookies that other pages and scripts never get."""
    headers = MutableHeaders(raw=message.setdefault("headers", []))
    headers["content-security-policy"] = POLICY
    headers["x-content-type-options"] = "nosniff"
    headers["referrer-policy"] = "same-origin"
    cookies = headers.getlist("set-cookie")
    del headers["set-cookie"]
    if token is not None:
        cookies.append(f"{COOKIE}={token}; Path=/; Max-Age={YEAR}")
    for cookie in cookies:
        first, *rest = (part.strip() for part in cookie.split(";"))
        kept = [part for part in rest if part.partition("=")[0].lower() not in ("samesite", "secure", "httponly")]
        strict = ["HttpOnly", "SameSite=Strict", *(["Secure"] if secure else [])]
        headers.append("set-cookie", "; ".join([first, *kept, *strict]))


async def _again(send: Send) -> None:
    """Somebody came by a link of another page; browsers then keep our cookie back. They bring it when the page itself
    asks for itself."""
    text = b'<!doctype html><meta http-equiv="refresh" content="0"><title>miniflux</title>'
    message: Message = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"text/html"), (b"content-length", str(len(text)).encode())],
    }
    _dress(message, None, False)
    await send(message)
    await send({"type": "http.response.body", "body": text})
