"""Bodies of requests: of bounded size, in bounded time, and refused in one line."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

PATIENCE, SLOWEST = 30.0, 2**14  # a body may take so many seconds, and one more for so many bytes
DRAINED_BYTES, DRAINED_SECONDS = 8 * 2**20, 2.0  # of a refused body, so that its sender gets to read why

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class RefusedError(Exception):
    """A request is refused: the status, and one line that says why."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status, self.line = status, line


class Refusal(PlainTextResponse):
    """One line of text. Some of a body that is still coming is read away: who is cut while sending never reads it."""

    def __init__(self, refused: RefusedError) -> None:
        line = refused.line.encode("ascii", "backslashreplace").decode()
        super().__init__(f"miniflux: {line}\n", refused.status, {"connection": "close"})

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await drained(super().__call__, scope, receive, send)


async def drained(answer: App, scope: Message, receive: Receive, send: Send) -> None:
    """Answer, and read some of a body away that is still coming."""

    async def held(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    await answer(scope, receive, held)
    end, got = time.monotonic() + DRAINED_SECONDS, 0
    with contextlib.suppress(asyncio.TimeoutError):
        while got < DRAINED_BYTES and (left := end - time.monotonic()) > 0:
            rest = await asyncio.wait_for(receive(), left)
            got += len(rest.get("body", b""))
            if rest["type"] != "http.request" or not rest.get("more_body", False):
                break
    await send({"type": "http.response.body", "body": b""})


async def paced(receive: Receive, patience: float | None = None, slowest: float | None = None) -> AsyncGenerator[bytes]:
    """The pieces of a body as they come.

    Args:
        patience, slowest: other than `PATIENCE` and `SLOWEST`.

    Raises:
        RefusedError: it comes too slowly, or its sender is gone.
    """
    patience, slowest = PATIENCE if patience is None else patience, SLOWEST if slowest is None else slowest
    begun, got = time.monotonic(), 0
    while True:
        left = begun + patience + got / slowest - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), max(left, 0.001))
        except asyncio.TimeoutError:
            raise RefusedError(408, "the body came too slowly") from None
        if message["type"] != "http.request":
            raise RefusedError(400, "the body ended early")
        piece = message.get("body", b"")
        got += len(piece)
        if piece:
            yield piece
        if not message.get("more_body", False):
            return


def announced(headers: Headers) -> int | None:
    """The bytes of a body by its headers; None if they do not say.

    Raises:
        RefusedError: they say nonsense.
    """
    length = headers.get("content-length")
    if length is not None and "transfer-encoding" in headers:  # read in two ways, one request is two (RFC 9112 6.3)
        raise RefusedError(400, "Content-Length and Transfer-Encoding together")
    if length is None:
        return None if "transfer-encoding" in headers else 0
    if not length.isascii() or not length.isdigit() or len(length) > 19:  # 19: eight bytes hold no more
        raise RefusedError(400, "a Content-Length that is no number")
    return int(length)
