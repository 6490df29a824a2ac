"""The command `miniflux ui`."""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from miniflux.errors import InputError, MissingExtraError


def add(commands: Any) -> None:
    """Add the command to the command line."""
    ui = commands.add_parser(
        "ui",
        help="a page to draw on, in your browser",
        description="Serve a page to draw on. It asks nobody outside for anything and works with the network cut.",
        epilog="Needs the extra: pip install 'miniflux[ui]'. The page says what each of its controls does.",
    )
    ui.add_argument("--host", default="127.0.0.1", metavar="H", help="who can reach it; default %(default)s, only you")
    ui.add_argument("--port", type=int, metavar="N", help="default: the first that is free from 7860")
    ui.add_argument("--auth", type=_auth, metavar="USER:PASSWORD", help="let in only who knows them")
    ui.add_argument("--model", default="nano", metavar="NAME", help="chosen at first; default %(default)s")
    ui.add_argument("--weights", metavar="FOLDER", help="look for models here first")
    ui.add_argument("--device", metavar="NAME", help="cpu, cuda, mps ...; default the best there is")
    ui.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16; default what suits the device")
    ui.add_argument("--queue", type=int, default=64, metavar="N", help="jobs that may wait; default %(default)s")
    ui.add_argument("--workers", type=int, default=1, metavar="N", help="pictures drawn at once, as far as memory "
                    "allows; default %(default)s")  # fmt: skip
    ui.add_argument("--cache", metavar="FOLDER", help="keep drawn pictures here, to answer repeated requests at once; "
                    "default: in memory")  # fmt: skip
    ui.add_argument("--history", metavar="FOLDER", help="keep the pictures of every browser here; default: a temporary "
                    "folder, gone when the page is")  # fmt: skip
    ui.add_argument("-v", "--verbose", action="store_true", help="say more about what is done")
    ui.set_defaults(run=run)


def _auth(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError("expected USER:PASSWORD")
    return user, password


@contextmanager
def _no_stubs() -> Generator[None]:
    """While it is imported, Gradio parses the source of all its components and writes stubs for editors beside it: half
    of the time that its import takes, and files that nobody asked for. It leaves out components that have no source
    file, as those of a notebook; for so long, Python says that they have none. A Gradio that does not ask is imported
    as ever."""
    getfile = inspect.getfile

    def hidden(what: Any) -> str:
        if isinstance(what, type) and what.__module__.startswith("gradio."):
            raise OSError("source code not available")  # as Python says of such classes
        return getfile(what)

    inspect.getfile = hidden
    try:
        yield
    finally:
        inspect.getfile = getfile


def run(options: argparse.Namespace) -> None:
    """Serve the page until it is stopped.

    Raises:
        MissingExtraError: Gradio is not installed.
        InputError: a port that is taken, a model that is not there.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C: the temporary folder goes as well
    with tempfile.TemporaryDirectory(prefix="miniflux-ui-", ignore_cleanup_errors=True) as temporary:
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(temporary) / "uploads"))  # read when Gradio is imported
        try:
            with _no_stubs():
                from miniflux.apps.ui.launch import served
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise MissingExtraError("the page needs Gradio: pip install 'miniflux[ui]'") from error
        from miniflux.apps.ui.site import opened

        with opened(
            Path(options.history or temporary),
            first=options.model,
            weights=options.weights,
            device=options.device,
            dtype=options.dtype,
            waiting=options.queue,
            workers=options.workers,
            cache=options.cache,
        ) as site:
            try:
                with served(site, host=options.host, port=options.port, auth=options.auth) as page:
                    print(f"miniflux: the page is at {page.url} (Ctrl+C ends it)", flush=True)
                    threading.Thread(target=site.prepare).start()  # while the browser fetches the page
                    page.wait()
            except OSError as error:
                raise InputError(f"--host {options.host} --port {options.port}: {error}") from error
