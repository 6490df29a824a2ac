"""The command `miniflux keys`: who may ask the server for pictures."""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniflux.apps import console
from miniflux.apps.serve.command import place, place_of
from miniflux.apps.serve.place import JOBS, default_folder, needs_extra
from miniflux.errors import InputError

if TYPE_CHECKING:
    from miniflux.service.jobs.store import Store


def add(commands: Any) -> None:
    """Add the command to the command line."""
    keys = commands.add_parser(
        "keys",
        help="who may ask the server for pictures, and for how many",
        description="Keys of the server. Changes are seen by a server that runs at once.",
        epilog="Needs the extra: pip install 'miniflux[serve]'.",
    )
    acts = keys.add_subparsers(dest="act", metavar="ACT", required=True)
    new = acts.add_parser("add", help="make a key, and print it once", description="Make a key. It is printed once, "
                          "and kept nowhere: what is kept tells it from others, and opens nothing.")  # fmt: skip
    new.add_argument("name", metavar="NAME", help="what you call it")
    new.add_argument("--per-day", type=int, metavar="N", help="pictures in any 24 hours; default: no bound")
    new.add_argument("--per-minute", type=int, metavar="N", help="requests in any minute; default: no bound")
    new.add_argument("--priority", type=int, default=0, metavar="P", help="a higher one is worth a minute of waiting "
                     "per level; -10 to 10, default %(default)s")  # fmt: skip
    lists = acts.add_parser("list", help="names, bounds, and what was used of them", description="List the keys.")
    gone = acts.add_parser("remove", help="take a key away", description="Take a key away: it opens nothing from now "
                           "on. Jobs that were asked for with it are drawn.")  # fmt: skip
    gone.add_argument("name", metavar="NAME", help="of the key")
    for act, do in ((new, _add), (lists, _list), (gone, _remove)):
        place(act)
        act.add_argument("-v", "--verbose", action="store_true", help="say more about what is done")
        act.set_defaults(run=_run, do=do)


def _run(options: argparse.Namespace) -> None:
    """Do it.

    Raises:
        MissingExtraError: a package of the extra is not installed.
        InputError, OutputError: as the functions of `service.jobs.keys`, and `Place`.
    """
    try:
        from miniflux.service.jobs.migrations import migrate
        from miniflux.service.jobs.store import Store
    except ModuleNotFoundError as error:
        raise needs_extra(error) from error
    folder = Path(options.data or default_folder())
    elsewhere = options.database or os.environ.get("MINIFLUX_DATABASE")
    if options.do is not _add and not elsewhere and not (folder / JOBS).exists():
        raise InputError(f"{folder}: nobody has a key here; miniflux keys add NAME makes one")
    store = Store(place_of(options).url)
    try:
        migrate(store)
        options.do(store, options)
    finally:
        store.close()


def _add(store: Store, options: argparse.Namespace) -> None:
    from miniflux.service.jobs import keys

    bounds = {"per_day": options.per_day, "per_minute": options.per_minute, "priority": options.priority}
    console.say(keys.add(store, options.name, **bounds))


def _list(store: Store, options: argparse.Namespace) -> None:
    from miniflux.service.jobs import keys

    for key in keys.listed(store):
        day, minute = store.used(key.id)
        made = datetime.date.fromtimestamp(key.created).isoformat()
        console.say(
            f"{key.name}: {day}{_of(key.per_day)} pictures in 24 hours, {minute}{_of(key.per_minute)} requests in the "
            f"last minute, priority {key.priority}, made {made}"
        )


def _remove(store: Store, options: argparse.Namespace) -> None:
    from miniflux.service.jobs import keys

    keys.remove(store, options.name)


def _of(bound: int | None) -> str:
    return "" if bound is None else f" of {bound}"
