"""`miniflux serve --ui`: the page of `miniflux ui` below `/ui`, beside the API, in the same process.

An ASGI application around both, and not a route of the API: so neither sees anything of the other. The doors and the
bounds of bodies of the API know nothing of uploads of gigabytes and of streams that never end; the page's guard, which
judges browsers, knows nothing of programs. What they share is the lifespan, the end, and the keys.
"""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.routing import Router

from miniflux.apps.serve.place import Place
from miniflux.apps.serve.site import Site
from miniflux.apps.ui.surroundings import clean, imported
from miniflux.apps.web.bodies import Message, Receive, Refusal, RefusedError, Send
from miniflux.apps.web.door import Door
from miniflux.service.jobs import keys
from miniflux.service.jobs.database import GONE

if TYPE_CHECKING:  # Gradio is imported when its surroundings are ready
    from miniflux.apps.ui.launch import Application

log = logging.getLogger("miniflux.serve")

PATH = "/ui"
FIRST = "nano"  # model, where none is named
ASKED = 'Basic realm="miniflux: any name, and a key as the password", charset="UTF-8"'
REFUSED = 'xBasic realm="miniflux"'
"""Of all but the page itself. Browsers ask people for a key when they see the first and not when they see this one: a
page that is open while its key is removed would have them asked with every look at its jobs."""


@dataclass(frozen=True)
class Beside:
    """The API and the page; an ASGI application.

    Attributes:
        api: answers everything that is not below `PATH`.
        page: answers what is, if the key is right.
    """

    api: FastAPI
    page: Application

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if scope["type"] == "lifespan":
            await Router(lifespan=self._running)(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and path in ("/", PATH):
            await _to_the_page(send)
        elif scope["type"] == "http" and path.startswith(f"{PATH}/"):
            await self._ask_page(scope, receive, send)
        else:
            await self.api(scope, receive, send)

    @asynccontextmanager
    async def _running(self, _: Any) -> AsyncGenerator[None]:
        async with self.api.router.lifespan_context(self.api), self.page.running():
            yield

    async def _ask_page(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            await self._let_in(Headers(raw=scope["headers"]))
        except RefusedError as refused:
            answer = Refusal(refused)
            if refused.status == 401:
                answer.headers["www-authenticate"] = ASKED if scope["path"] == f"{PATH}/" else REFUSED
            await answer(scope, receive, send)
            return
        path = str(scope["path"])[len(PATH) :]
        await self.page.app({**scope, "path": path, "raw_path": path.encode()}, receive, send)

    async def _let_in(self, headers: Headers) -> None:
        """
        Raises:
            RefusedError: a key is needed, and none that opens the page is shown.
        """
        site: Site = self.api.state.site
        if not site.options.keys:
            return
        given = password_in(headers)
        if not given:
            raise RefusedError(401, "a key is needed: any name, and the key as the password")
        try:
            key = await run_in_threadpool(keys.known, site.store, given)
        except GONE:
            raise RefusedError(503, "the keys cannot be read at the moment; try again") from None
        if key is None:
            log.info("somebody was kept from the page: there is no such key")
            raise RefusedError(401, "there is no such key")
        if key.per_day is not None or key.per_minute is not None:
            raise RefusedError(401, "this key has a quota, and the page counts nothing: it opens to keys without one")


def password_in(headers: Headers) -> str:
    """The password of HTTP's Basic authentication; empty if there is none."""
    kind, _, rest = headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return ""
    try:
        return base64.b64decode(rest.strip(), validate=True).decode("utf-8").partition(":")[2]
    except ValueError:
        return ""


async def _to_the_page(send: Send) -> None:
    """By an address that holds whatever a proxy takes away from it."""
    headers = [(b"location", f"{PATH[1:]}/".encode()), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 307, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


@contextmanager
def beside(api: FastAPI, door: Door, options: Any, where: Place) -> Generator[Beside]:
    """The page beside the API, as long as the context lasts.

    It draws by a queue and by models of its own, in this process: what it draws is in no database, and the workers load
    nothing for it. Its history is in the folder of the server, with the bounds of `service.History`; what is sent to it
    is in a temporary folder, which goes.

    Args:
        door: the names of both.
        options: of the command.

    Raises:
        MissingExtraError: Gradio is not installed.
        OutputError: the folder of the server cannot be written to.
    """
    offers = api.state.site.offers
    clean()
    with imported():
        from miniflux.apps.ui.launch import built
        from miniflux.apps.ui.site import opened

        with (
            opened(
                where.folder / "page",
                first=offers.find(options.models[0] if options.models else FIRST).listed.name,
                only=None if options.models is None else {offer.listed.name for offer in offers.names()},
                weights=options.weights,
                device=options.device,
                dtype=options.dtype,
                waiting=options.queue,
                shelf=options.folder,
            ) as site,
            built(site, door, root=f"{(options.url or '').rstrip('/')}{PATH}") as page,
        ):
            threading.Thread(target=site.prepare).start()
            yield Beside(api, page)
