"""The command `miniflux serve`."""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from miniflux.apps.serve.place import Place, default_folder, needs_extra
from miniflux.errors import InputError

PORT = 8000
END_SECONDS = 5  # answers that are on their way when the server ends may take so long


def add(commands: Any) -> None:
    """Add the command to the command line."""
    serve = commands.add_parser(
        "serve",
        help="an HTTP server for programs: BFL's and OpenAI's request shapes",
        description="Serve pictures to programs that speak the API of Black Forest Labs, or OpenAI's images API. The "
        "bundled nano models work at once. Jobs, results and keys survive a restart.",
        epilog="Needs the extra: pip install 'miniflux[serve]'. A key first: miniflux keys add NAME",
    )
    serve.add_argument("--host", default="127.0.0.1", metavar="H", help="who can reach it: a name or an address of "
                       "this machine, 0.0.0.0 or :: for everybody; default %(default)s, only you")  # fmt: skip
    serve.add_argument("--port", type=int, default=PORT, metavar="N", help="default %(default)s")
    place(serve)
    serve.add_argument("--models", nargs="+", metavar="NAME", help="those that may be asked for, the first one where "
                       "none is named; default: all that are here")  # fmt: skip
    serve.add_argument("--workers", type="count", default=1, metavar="N", help="processes that draw; with several GPUs "
                       "one for each; default %(default)s")  # fmt: skip
    serve.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help="have Ray place the server and up to "
                       "--workers workers, more while jobs wait; of a cluster that runs: auto, or its address. Needs "
                       "the extra ray")  # fmt: skip
    serve.add_argument("--ui", action="store_true", help="serve the page of miniflux ui as well, at /ui; needs the "
                       "extra ui, too")  # fmt: skip
    serve.add_argument("--insecure-no-keys", action="store_true", help="let everybody who reaches it draw, and see all "
                       "jobs")  # fmt: skip
    serve.add_argument("--folder", type="path", metavar="FOLDER", help="models in it can be asked for as well")
    serve.add_argument("--weights", type="path", metavar="FOLDER", help="look for the files of variants here first")
    serve.add_argument("--loras", type="path", metavar="FOLDER", help="LoRAs that can be asked for by name")
    serve.add_argument("--networks", type="path", metavar="FOLDER", help="ControlNets and others that steer, likewise")
    serve.add_argument("--device", metavar="NAME", help="cpu, cuda, mps ...; default the best there is")
    serve.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16; default what suits the device")
    serve.add_argument("--memory-gb", type=positive, metavar="N", help="of weights that one worker keeps loaded; the "
                       "models used least recently go first; default: as many as there is free memory for")  # fmt: skip
    serve.add_argument(
        "--queue", type="count", default=256, metavar="N", help="jobs that may wait; default %(default)s"
    )
    serve.add_argument("--time-limit", type=positive, default=600.0, metavar="SECONDS", help="that a job may take once "
                       "it is begun; default %(default)g")  # fmt: skip
    serve.add_argument("--hang", type=positive, default=900.0, metavar="SECONDS", help="without a step, after which a "
                       "worker is ended and another started; default %(default)g")  # fmt: skip
    serve.add_argument("--keep-hours", type=positive, default=24.0, metavar="N", help="of pictures; default "
                       "%(default)g")  # fmt: skip
    serve.add_argument("--keep-gb", type=positive, default=10.0, metavar="N", help="of pictures, at most; default "
                       "%(default)g")  # fmt: skip
    serve.add_argument("--url", metavar="URL", help="where clients reach it, if that is a proxy")
    serve.add_argument("--allow-fetch", action="append", default=[], metavar="HOST", help="fetch pictures from, and "
                       "send webhooks to, this host of a private network; may be given several times")  # fmt: skip
    serve.add_argument("-v", "--verbose", action="store_true", help="say more about what is done")
    serve.set_defaults(run=run)


def place(command: argparse.ArgumentParser) -> None:
    """Add the options that say where everything is kept."""
    command.add_argument("--data", type="path", metavar="FOLDER", help="for jobs, keys and pictures; default "
                         f"MINIFLUX_DATA, else {default_folder()}")  # fmt: skip
    command.add_argument("--database", metavar="URL", help="for jobs and keys, instead of a file in that folder: "
                         "postgresql+psycopg://USER:PASSWORD@HOST/NAME; default MINIFLUX_DATABASE")  # fmt: skip


def positive(text: str) -> float:
    """A number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e9:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return found


def place_of(options: argparse.Namespace) -> Place:
    """Where everything is kept; errors as of `Place`."""
    return Place(Path(options.data or default_folder()), options.database or os.environ.get("MINIFLUX_DATABASE"))


def run(options: argparse.Namespace) -> None:
    """Serve until it is stopped.

    Raises:
        MissingExtraError: a package of the extra is not installed.
        InputError: nobody has a key; a port that is taken; a model or a folder that is not there; `--ui` with `--ray`.
        OutputError: the folder cannot be written to.
    """
    if options.ui and options.ray is not None:
        raise InputError("--ui with --ray: the page is one process with one queue; start miniflux ui beside the server")
    try:
        import uvicorn

        from miniflux.apps.serve.starting import app_of, door_of, duty_of
        from miniflux.service.jobs import keys
        from miniflux.service.jobs.migrations import migrate
        from miniflux.service.jobs.store import Store
        from miniflux.service.jobs.supervisor import Supervisor
        from miniflux.service.logs import json_lines
    except ModuleNotFoundError as error:
        raise needs_extra(error) from error
    from miniflux.apps.web.listening import listen
    from miniflux.apps.web.serving import Connection, Server

    where = place_of(options)
    store = Store(where.url)
    migrate(store)
    if not options.insecure_no_keys and not keys.any_there(store):
        raise InputError(
            "nobody has a key: make one with miniflux keys add NAME, or let everybody in with --insecure-no-keys"
        )
    for name in ("miniflux.serve", "miniflux.service.jobs"):
        logging.getLogger(name).setLevel(logging.INFO)
    if options.ray is not None:
        from miniflux.apps.serve import on_ray

        with json_lines():
            on_ray.run(options, where)
        return
    listening = listen(options.host, options.port)
    try:
        app = app_of(options, where, listening.names)
        with ExitStack() as stack:
            stack.enter_context(json_lines())
            page = None
            if options.ui:
                from miniflux.apps.serve.beside import beside

                opened = door_of(options.url, listening.names)
                page = stack.enter_context(beside(app, opened, options, where))
            config = uvicorn.Config(
                page or app,
                http=Connection,
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_config=None,
                ws="none",
                timeout_graceful_shutdown=END_SECONDS,
            )

            def ending() -> None:
                app.state.site.watch.close()
                if page is not None:
                    page.page.end()

            server = Server(config, ending)
            stack.enter_context(Supervisor(duty_of(options, where), options.workers, hang=options.hang))
            urls = " and ".join(f"http://{name}:{listening.port}" for name in listening.hosts)
            more = "" if page is None else ", the page at /ui"
            print(f"miniflux: serving at {urls}, described at /docs{more} (Ctrl+C ends it)", flush=True)
            server.run(listening.sockets)
    finally:
        listening.close()
        store.close()
