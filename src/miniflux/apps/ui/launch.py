"""Build the page and serve it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.routes import App, mount_gradio_app

from miniflux.apps.ui import layout, look
from miniflux.apps.ui.guard import Guard
from miniflux.apps.ui.handlers import connect
from miniflux.apps.ui.routes import router
from miniflux.apps.ui.site import Site
from miniflux.apps.web.door import Door, door
from miniflux.apps.web.listening import listen
from miniflux.apps.web.serving import Connection, Server

SWEEP_SECONDS = 60.0
CONNECTIONS = 512  # at once; more are told to come again
END_SECONDS = 2  # answers that are on their way when the page ends may take so long


@dataclass(frozen=True)
class Page:
    """A page that is served.

    Attributes:
        url: where.
        urls: all addresses under which it can be opened; the first is `url`.
        only_here: whether only this machine can reach it.
        site: what is behind it.
        blocks: Gradio's application.
        thread: that serves.
    """

    url: str
    urls: list[str]
    only_here: bool
    site: Site
    blocks: gr.Blocks
    thread: threading.Thread

    def wait(self) -> None:
        """Serve until the process is told to stop (KeyboardInterrupt)."""
        while self.thread.is_alive():
            time.sleep(1)  # signals end it at once, on Windows as well


def blocks(site: Site) -> tuple[gr.Blocks, layout.Controls]:
    """The page, not served yet, and its controls."""
    with gr.Blocks(title="miniflux", analytics_enabled=False, fill_width=True) as page:
        controls = layout.build(site)
        connect(page, site, controls)
    return page, controls


@dataclass(frozen=True)
class Application:
    """The page as an ASGI application, for whoever serves it.

    Attributes:
        app: the page behind its guard.
        inner: the page without it.
        blocks, gradio: Gradio's application, as it is built and as it answers.
    """

    app: Guard
    inner: FastAPI
    blocks: gr.Blocks
    gradio: App

    def running(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """While it is served; whoever asks `app` for its lifespan gets the same."""
        return self.inner.router.lifespan_context(self.inner)

    def end(self) -> None:
        """End the queue and all streams of events; to be called in the loop that serves."""
        self.blocks.close(verbose=False)
        self.gradio.stop_event.set()


@contextlib.contextmanager
def built(site: Site, names: Door, *, auth: tuple[str, str] | None = None, root: str = "") -> Generator[Application]:
    """The page, which can be served while the context lasts.

    Args:
        names: under which it answers.
        auth, root: as of `served`.
    """
    before = {name: os.environ.get(name) for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR")}
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # also for the threads that Gradio starts
    os.environ["GRADIO_TEMP_DIR"] = str(site.uploads.folder)  # files from elsewhere are never read
    try:
        page, _ = blocks(site)
        app, gradio = _application(site, page, auth, root)
        yield Application(Guard(app, names, site.uploads.seen), app, page, gradio)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def served(
    site: Site,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: tuple[str, str] | None = None,
    allow_hosts: Iterable[str] = (),
    root: str = "",
) -> Generator[Page]:
    """Serve the page while the context lasts.

    Gradio's own `launch` is not used: it asks the page through the proxies of this machine whether it is there, looks
    for a free port on 127.0.0.1 whatever the host, and serves whoever asks under whatever name. It would also look for
    newer versions of itself, count its users, offer a link through a server of its makers, keep the inputs of every
    run, and describe itself to programs.

    Args:
        host: a name or an address of this machine; `0.0.0.0` or `::` for all.
        port: None for the first that is free from 7860, 0 for any.
        auth: user and password; None to let everybody in who can reach it.
        allow_hosts: names, or NAME:PORT, under which a proxy serves the page.
        root: the path (`/draw`) or whole address under which a proxy serves it.

    Raises:
        InputError: it cannot listen there, or a name or root is none.
    """
    allowed, root = list(allow_hosts), root.rstrip("/")
    door((), allowed, root)  # what is wrong is said before anything is built
    listening = listen(host, port)
    try:
        with built(site, door(listening.names, allowed, root), auth=auth, root=root) as page:
            server = Server(_config(page.app), page.end)
            thread = threading.Thread(target=server.run, args=(listening.sockets,), daemon=True, name="miniflux-ui")
            thread.start()
            try:
                while not server.started and thread.is_alive():
                    time.sleep(0.005)
                if not server.started:
                    raise RuntimeError("the server ended while it started")
                urls = [f"http://{name}:{listening.port}" for name in listening.hosts]
                yield Page(urls[0], urls, listening.only_here, site, page.blocks, thread)
            finally:
                server.should_exit = True
                thread.join(END_SECONDS + 3)
    finally:
        listening.close()


def _config(app: Guard) -> uvicorn.Config:
    """For uvicorn, in a thread of ours and on sockets of ours."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="on",
        proxy_headers=False,  # the guard judges them
        server_header=False,
        access_log=False,
        log_config=None,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=END_SECONDS,
    )


def _application(site: Site, page: gr.Blocks, auth: tuple[str, str] | None, root: str) -> tuple[FastAPI, App]:
    """Our routes, then Gradio's, which take whatever is left; and Gradio's alone."""

    @contextlib.asynccontextmanager
    async def sweeping(_: FastAPI) -> AsyncGenerator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(SWEEP_SECONDS)
                await asyncio.to_thread(site.sweep)

        task = asyncio.create_task(sweep())
        yield
        task.cancel()

    silent: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(**silent, lifespan=sweeping)
    mount_gradio_app(
        app,
        page,
        path="/",
        auth=auth,
        root_path=root or None,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        show_error=False,
        max_file_size=site.uploads.file_bytes,
        theme=look.theme(),
        css_paths=[Path(__file__).with_name("page.css")],
        favicon_path=str(Path(__file__).with_name("icon.svg")),
        app_kwargs=silent,
    )
    page.config = page.get_config_file()  # with the style, which Gradio reads after it has written this
    page.has_launched = True  # Gradio then looks where files come from
    mount = app.router.routes.pop()
    gradio = mount.app  # type: ignore[attr-defined]
    app.include_router(router(site, _login_check(gradio)))
    app.router.routes.append(mount)
    return app, gradio


def _login_check(gradio: App) -> Callable[..., Any]:
    """Gradio's own check, which refuses who has not logged in."""
    for route in gradio.router.routes:
        for dependency in getattr(getattr(route, "dependant", None), "dependencies", []):
            if getattr(dependency.call, "__name__", "") == "login_check":
                return dependency.call
    raise RuntimeError("this version of Gradio checks passwords in a way that is not known here")
