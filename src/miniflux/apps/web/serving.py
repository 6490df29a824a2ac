"""uvicorn, told what has to end before it waits."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import uvicorn


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
