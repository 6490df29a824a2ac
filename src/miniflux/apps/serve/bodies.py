"""Bodies of requests to the server: read whole, of bounded size and in bounded time, before the app sees any of them.

Each is bounded by its kind, all together by `total`, and a slow one by `paced`. What is too large is refused at once
where `Content-Length` says so, else at the first byte too many. Bodies count until an answer begins: until then the app
holds what it parsed of them.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from miniflux.apps.web.bodies import App, Message, Receive, RefusedError, Send, announced, drained, paced

PICTURES = 64 * 2**20  # of JSON with pictures in base64, and of forms
ELSE = 2**16  # of anything else
TOTAL = 256 * 2**20  # of all bodies at once
SLOWEST = 2**16  # bytes a second, beside the patience of half a minute
HEADER_BYTES, ADDRESS_BYTES = 2**15, 2**13


def by_kind(scope: Message) -> int:
    """The bytes that the body of a request may have."""
    kind = Headers(raw=scope["headers"]).get("content-type", "").partition(";")[0].strip().lower()
    return PICTURES if kind in ("application/json", "multipart/form-data") else ELSE


def in_json(scope: Message, refused: RefusedError) -> App:
    """The answer to a refused request, as FastAPI gives one."""
    headers = {"connection": "close", **({"retry-after": "2"} if refused.status == 503 else {})}
    return JSONResponse({"detail": refused.line}, refused.status, headers)


class Bodies:
    """ASGI middleware; see the top of this file.

    Args:
        app: what is asked with the bodies that are fine.
        limit: the bytes that a request may have.
        total: bytes of all requests that are on their way.
        refuse: how the others are answered.
        patience, slowest: as of `paced`.
    """

    def __init__(
        self,
        app: App,
        *,
        limit: Callable[[Message], int] = by_kind,
        total: int = TOTAL,
        refuse: Callable[[Message, RefusedError], App] = in_json,
        patience: float | None = None,
        slowest: float = SLOWEST,
    ) -> None:
        self.app, self.limit, self.total, self.refuse = app, limit, total, refuse
        self.patience, self.slowest = patience, slowest
        self.held = 0  # bytes of all requests

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held = _Held(self)
        try:
            try:
                length = _head(scope)
                body = None if length == 0 else await self._whole(length, self.limit(scope), receive, held)
            except RefusedError as refused:
                held.release()
                await drained(self.refuse(scope, refused), scope, receive, send)
                return
            first = [] if body is None else [body]
            del body

            async def replayed() -> Message:
                return {"type": "http.request", "body": first.pop(), "more_body": False} if first else await receive()

            async def answered(message: Message) -> None:
                held.release()
                await send(message)

            await self.app(scope, replayed, answered)
        finally:
            held.release()

    async def _whole(self, length: int | None, limit: int, receive: Receive, held: _Held) -> bytes:
        too_large = RefusedError(413, f"the body has more than {limit:,} bytes")
        if length is not None and length > limit:
            raise too_large
        body = bytearray()
        async for piece in paced(receive, self.patience, self.slowest):
            body += piece
            held.take(len(piece))
            if len(body) > limit:
                raise too_large
            if self.held > self.total:
                raise RefusedError(503, "too much is being sent at once; try again")
        return bytes(body)


class _Held:
    """The bytes that one request holds of all."""

    def __init__(self, bodies: Bodies) -> None:
        self.bodies, self.count = bodies, 0

    def take(self, count: int) -> None:
        self.bodies.held += count
        self.count += count

    def release(self) -> None:
        self.bodies.held -= self.count
        self.count = 0


def _head(scope: Message) -> int | None:
    """The bytes of the body that a request announces; None if it does not say.

    Raises:
        RefusedError: its headers are too long, or such that its body is not read.
    """
    if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
        raise RefusedError(431, f"the headers have more than {HEADER_BYTES:,} bytes")
    if len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"]) > ADDRESS_BYTES:
        raise RefusedError(414, f"the address has more than {ADDRESS_BYTES:,} bytes")
    headers = Headers(raw=scope["headers"])
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RefusedError(415, "compressed bodies are not read: send it without Content-Encoding")
    return announced(headers)
