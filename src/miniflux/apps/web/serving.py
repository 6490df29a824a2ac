"""uvicorn, told what has to end before it waits, and how many may connect and for how long without asking."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # until the head of a request is complete, from the connection or from the last answer
LEAVING = 64  # that are refused may stay for LEAVING_SECONDS: an answer to who still sends is lost if they go at once
LEAVING_SECONDS = 1.0
CONNECTIONS = 2048  # at once, where the system lets a process open twice as many files
FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 2\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Server(uvicorn.Server):
    """uvicorn that ends streams of events before it waits for the answers that are on their way: they end only with who
    listens to them, and the end of the lifespan comes after that wait.

    Args:
        ending: ends them.
    """

    def __init__(self, config: uvicorn.Config, ending: Callable[[], None]) -> None:
        super().__init__(config)
        self._ending = ending

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # that it cancels what is left is no news
        self._ending()
        await super().shutdown(sockets)


class Connection(H11Protocol):
    """A connection that asks for nothing is closed after a while: uvicorn waits for ever for the end of a request's
    head. Where there are too many, the one that has asked for nothing for the longest time makes room; if all have
    asked, the new one is told to come again. Otherwise the process runs out of files, and cannot even say so."""

    _timer: asyncio.TimerHandle | None = None
    _since = 0.0
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        others = [one for one in self.connections if isinstance(one, Connection)]
        super().connection_made(transport)
        if len(others) >= places():
            silent = [one for one in others if one._timer is not None]
            if silent:
                min(silent, key=lambda one: one._since)._leave()
            else:
                self._refuse(transport, len(others) < places() + LEAVING)
                return
        self._expect()

    def _refuse(self, transport: asyncio.Transport, patiently: bool) -> None:
        self._refused = True
        transport.write(FULL)
        if patiently:
            self.loop.call_later(LEAVING_SECONDS, transport.close)
        else:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._asked()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        cycle: Any = self.cycle  # of the last request; None before the first
        if cycle is not None and not cycle.response_complete:
            self._asked()

    def on_response_complete(self) -> None:
        self._expect()  # before uvicorn begins with a request that is here already
        super().on_response_complete()
        if not self.cycle.response_complete:
            self._asked()

    def _expect(self) -> None:
        self._asked()
        self._since = time.monotonic()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._leave)

    def _asked(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave(self) -> None:
        self._asked()
        self.transport.close()  # after the last answer, if some of that is still on its way


def places() -> int:
    """Connections at once: half of what the process may open, since databases, files and workers need some."""
    if sys.platform == "win32":
        return CONNECTIONS
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if files == resource.RLIM_INFINITY else min(CONNECTIONS, files // 2)
