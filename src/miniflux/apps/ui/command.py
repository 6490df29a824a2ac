"""The command `miniflux ui`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

from miniflux.apps.ui.surroundings import clean, imported
from miniflux.errors import InputError

log = logging.getLogger(__name__)

HONOURED = ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_ROOT_PATH")  # of Gradio's settings


def add(commands: Any) -> None:
    """Add the command to the command line."""
    ui = commands.add_parser(
        "ui",
        help="a page to draw on, in your browser",
        description="Serve a page to draw on. It asks nobody outside for anything and works with the network cut.",
        epilog="Needs the extra: pip install 'miniflux[ui]'. The page says what each of its controls does.",
    )
    ui.add_argument("--host", metavar="H", help="who can reach it: a name or an address of this machine, 0.0.0.0 or :: "
                    "for everybody in the network; default 127.0.0.1, only you")  # fmt: skip
    ui.add_argument("--port", type=int, metavar="N", help="default: the first that is free from 7860")
    ui.add_argument("--auth", type=_auth, metavar="USER:PASSWORD", help="let in only who knows them")
    ui.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="also answer to this name, NAME "
                    "or NAME:PORT, by which a proxy in front is asked; may be given several times")  # fmt: skip
    ui.add_argument("--model", default="nano", metavar="NAME", help="chosen at first: a name, or the path of a file or "
                    "folder; default %(default)s")  # fmt: skip
    ui.add_argument("--models", type="path", metavar="FOLDER",
                    help="list all models in this folder and in those inside: "
                    "safetensors, GGUF, fp8, fine-tunes, pipelines")  # fmt: skip
    ui.add_argument("--weights", type="path", metavar="FOLDER", help="look for models here first")
    ui.add_argument("--device", metavar="NAME", help="cpu, cuda, mps ...; default the best there is")
    ui.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16; default what suits the device")
    ui.add_argument("--queue", type="count", default=64, metavar="N", help="jobs that may wait; default %(default)s")
    ui.add_argument("--workers", type="count", default=1, metavar="N", help="pictures drawn at once, as far as memory "
                    "allows; default %(default)s")  # fmt: skip
    ui.add_argument("--cache", type="path", metavar="FOLDER",
                    help="keep drawn pictures here, to answer repeated requests at once; "
                    "default: in memory")  # fmt: skip
    ui.add_argument("--history", type="path", metavar="FOLDER",
                    help="keep the pictures of every browser here; default: a temporary "
                    "folder, gone when the page is")  # fmt: skip
    ui.add_argument("-v", "--verbose", action="store_true", help="say more about what is done")
    ui.set_defaults(run=run)


def _auth(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password) or user != user.strip():
        raise argparse.ArgumentTypeError("expected USER:PASSWORD, without spaces around USER")
    return user, password


def _from_environment(options: argparse.Namespace) -> str:
    """Fill host and port from what users of Gradio set; the root that the page is served under.

    Raises:
        InputError: a port that is no number.
    """
    options.host = options.host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    port = os.environ.get("GRADIO_SERVER_PORT", "").strip()
    if options.port is None and port:
        if not (port.isascii() and port.isdigit()):
            raise InputError(f"GRADIO_SERVER_PORT={port}: expected 0 to 65535")
        options.port = int(port)
    root = os.environ.get("GRADIO_ROOT_PATH", "")
    clean(*HONOURED)
    return root


def run(options: argparse.Namespace) -> None:
    """Serve the page until it is stopped.

    Raises:
        MissingExtraError: Gradio is not installed.
        InputError: a port that is taken, a model that is not there.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C: the temporary folder goes as well
    root = _from_environment(options)
    with imported() as temporary:
        from miniflux.apps.ui.launch import served
        from miniflux.apps.ui.site import opened

        with (
            opened(
                Path(options.history) if options.history else temporary,
                first=options.model,
                weights=options.weights,
                device=options.device,
                dtype=options.dtype,
                waiting=options.queue,
                workers=options.workers,
                cache=options.cache,
                shelf=options.models,
            ) as site,
            served(
                site,
                host=options.host,
                port=options.port,
                auth=options.auth,
                allow_hosts=options.allow_host,
                root=root,
            ) as page,
        ):
            if not page.only_here and options.auth is None:
                log.warning("everybody who reaches this machine can draw here; --auth USER:PASSWORD asks who they are")
            print(f"miniflux: the page is at {' and '.join(page.urls)} (Ctrl+C ends it)", flush=True)
            threading.Thread(target=site.prepare).start()  # while the browser fetches the page
            page.wait()
