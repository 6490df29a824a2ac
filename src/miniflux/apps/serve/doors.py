"""Who comes in: a name for every request, a line about it in the log, and the key that it needs."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from functools import partial
from typing import Annotated, Any

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request as WebRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miniflux.apps.serve.health import Measures
from miniflux.apps.serve.refusals import SOON, refusal, too_much, unwelcome
from miniflux.apps.serve.site import Site
from miniflux.apps.serve.watching import ClosingError
from miniflux.apps.web.bodies import RefusedError, announced, drained
from miniflux.service.jobs import keys
from miniflux.service.jobs.database import GONE
from miniflux.service.jobs.keys import Key
from miniflux.service.jobs.records import Bounds

log = logging.getLogger("miniflux.serve")

ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
STREAM = "/events"  # where a GET does not end, there is no HEAD
OPEN = "/v1/pictures/"  # needs no key: its addresses are signed

X_KEY = APIKeyHeader(name="x-key", auto_error=False, scheme_name="x-key", description="A key, as BFL's clients send it")
BEARER = HTTPBearer(auto_error=False, scheme_name="bearer", description="A key, as OpenAI's clients send it")


def keyed(_: Annotated[Any, Security(X_KEY)], __: Annotated[Any, Security(BEARER)]) -> None:
    """Tells the OpenAPI document what `Doors` asks for."""


class Doors:
    """Around the whole app; without anything of FastAPI, so that nothing of a body is read before the key is known."""

    def __init__(self, app: ASGIApp, site: Site, measures: Measures) -> None:
        self.app, self.site, self.measures = app, site, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, began = Headers(scope=scope), time.perf_counter()
        asked = headers.get("x-request-id", "")
        name = asked if ID.fullmatch(asked) else f"req_{secrets.token_hex(12)}"
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request"] = name
        status, body = 0, scope["method"] != "HEAD" or scope["path"].endswith(STREAM)
        scope = scope if body else {**scope, "method": "GET"}

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = MutableHeaders(scope=message)
                more["x-request-id"] = name
                more.setdefault("x-content-type-options", "nosniff")
            await send(message if body or message["type"] != "http.response.body" else {**message, "body": b""})

        try:
            answer = await self._refusal(scope, headers, state)
            await (self.app if answer is None else answer)(scope, receive, sent)
        except asyncio.CancelledError:  # the server has waited as long as it does when it ends
            if status or not self.site.watch.closing:
                raise
            await refusal(scope["path"], 503, str(ClosingError()), wait=SOON)(scope, receive, sent)
        except BaseException:
            status = status or 500
            raise
        finally:
            method = "HEAD" if not body else scope["method"]
            self._tell(scope, method, state, status, time.perf_counter() - began)

    async def _refusal(self, scope: Scope, headers: Headers, state: dict[str, Any]) -> ASGIApp | None:
        """What to answer who may not come in; None for who may."""
        path, keyed = scope["path"], self.site.options.keys
        try:
            announced(headers)
            if not keyed:
                self._own(scope, headers)
        except RefusedError as refused:
            return partial(drained, too_much(scope, refused))
        if not keyed or not path.startswith("/v1/") or path.startswith(OPEN):
            return None
        try:
            key = await run_in_threadpool(keys.known, self.site.store, key_in(headers))
        except GONE:
            return refusal(path, 503, "the keys cannot be read at the moment; try again", wait=SOON)
        if key is None:
            return unwelcome(scope)
        state["key"] = key
        return None

    def _own(self, scope: Scope, headers: Headers) -> None:
        """Where everybody may come in, a browser must not be led here by pages of others.

        Raises:
            RefusedError: nothing is served under the name that was asked for, or another page asks.
        """
        hosts, origin, door = headers.getlist("host"), headers.get("origin"), self.site.options.door
        asked = door.serves(hosts[0] if len(hosts) == 1 else None, str((scope.get("server") or ("",))[0]))
        if origin is not None and not door.own(origin, asked):
            raise RefusedError(403, "asked by a page from elsewhere")

    def _tell(self, scope: Scope, method: str, state: dict[str, Any], status: int, seconds: float) -> None:
        """Log and count it: the route, never the address, which may hold a signature."""
        method = method if method in METHODS else "other"
        route = getattr(scope.get("route"), "path", "none")
        self.measures.seen(method, route, status, seconds)
        about = {"request": state["request"], "method": method, "route": route, "status": status}
        about |= {"milliseconds": round(1000 * seconds, 1)}
        key: Key | None = state.get("key")
        about |= {} if key is None else {"key": key.name}
        about |= {name: state[name] for name in ("job",) if name in state}
        log.info("%s", json.dumps(about), extra={"fields": about})


def key_in(headers: Headers) -> str:
    """The key that a request shows: that of BFL's header, else that of OpenAI's; empty if there is none."""
    shown = headers.get("x-key")
    if shown is not None:
        return shown
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def key_of(web: WebRequest) -> Key | None:
    """Whose request it is; None where no keys are asked for."""
    key: Key | None = web.scope["state"].get("key")
    return key


def bounds_of(web: WebRequest, site: Site) -> Bounds:
    """What may be asked for."""
    key = key_of(web)
    return Bounds(waiting=site.options.waiting) if key is None else key.bounds(site.options.waiting)


def id_of(web: WebRequest) -> str:
    """The id of the key of a request, as jobs know it."""
    key = key_of(web)
    return "" if key is None else key.id
