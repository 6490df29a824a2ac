"""Build the page and serve it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from miniflux.apps.ui import layout, look
from miniflux.apps.ui.handlers import connect
from miniflux.apps.ui.routes import Sessions, router
from miniflux.apps.ui.site import Site

MAX_UPLOAD = "4gb"


@dataclass(frozen=True)
class Page:
    """A page that is served.

    Attributes:
        url: where.
        site: what is behind it.
        blocks: Gradio's application.
    """

    url: str
    site: Site
    blocks: gr.Blocks

    def wait(self) -> None:
        """Serve until the process is told to stop (KeyboardInterrupt)."""
        while True:
            time.sleep(1)  # signals end it at once, on Windows as well


def blocks(site: Site) -> tuple[gr.Blocks, layout.Controls]:
    """The page, not served yet, and its controls."""
    with gr.Blocks(title="miniflux", analytics_enabled=False, fill_width=True) as page:
        controls = layout.build(site)
        connect(page, site, controls)
    return page, controls


@contextlib.contextmanager
def served(
    site: Site, *, host: str = "127.0.0.1", port: int | None = None, auth: tuple[str, str] | None = None
) -> Generator[Page]:
    """Serve the page while the context lasts.

    Gradio would by default ask for newer versions of itself, count its users, offer a link through a server of its
    makers, keep the inputs of every run, and describe itself to programs. All of that is off.

    Args:
        port: None for the first that is free from 7860.
        auth: user and password; None to let everybody in who can reach it.

    Raises:
        OSError: the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # also for the threads that Gradio starts
    page, _ = blocks(site)
    app, url, _ = page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        max_file_size=MAX_UPLOAD,
        theme=look.theme(),
        css_paths=[Path(__file__).with_name("page.css")],
        favicon_path=Path(__file__).with_name("icon.svg"),
        app_kwargs={"middleware": [Middleware(Sessions)], "docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    _add(app, site)
    try:
        yield Page(url.rstrip("/"), site, page)
    finally:
        page.close(verbose=False)


def _add(app: Any, site: Site) -> None:
    """Our routes, before Gradio's own, which take whatever is left."""
    before = len(app.router.routes)

    def allowed(user: Any = None) -> None:
        """Replaced below by Gradio's own check."""

    check = next(
        (dependency.call for route in app.router.routes for dependency in _dependencies(route) if _checks(dependency)),
        allowed,
    )
    app.include_router(router(site, check))
    routes = app.router.routes
    routes[:] = [*routes[before:], *routes[:before]]


def _dependencies(route: Any) -> list[Any]:
    return getattr(getattr(route, "dependant", None), "dependencies", [])


def _checks(dependency: Any) -> bool:
    return getattr(dependency.call, "__name__", "") == "login_check"
