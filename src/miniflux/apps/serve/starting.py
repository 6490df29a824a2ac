"""From the options of `miniflux serve`: the app, and what its workers are started with."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI

from miniflux.apps.serve.app import create_app
from miniflux.apps.serve.place import Place
from miniflux.apps.serve.site import Options
from miniflux.apps.web.door import Door, door
from miniflux.errors import InputError
from miniflux.memory.compute import DTYPES, choose_device
from miniflux.service.jobs.blobs import Blobs
from miniflux.service.jobs.inputs import Inputs
from miniflux.service.jobs.store import Store
from miniflux.service.jobs.worker import Duty


def app_of(options: argparse.Namespace, where: Place, names: Iterable[str] = ()) -> FastAPI:
    """The app.

    Args:
        names: under which it may be asked for, of `listening.Listening`.

    Raises:
        InputError: a model, a folder or a device that is not there; an address that is none.
        OutputError: the folder of the server cannot be written to.
    """
    choose_device(options.device)
    if options.dtype is not None and options.dtype not in DTYPES:
        raise InputError(f"--dtype {options.dtype}: one of {', '.join(DTYPES)} is expected")
    opened = door_of(options.url, names)
    if not all(options.allow_fetch):
        raise InputError("--allow-fetch: the name of a host is expected, got nothing")
    return create_app(
        Store(where.url),
        Blobs(where.pictures),
        Inputs(where.given),
        Options(
            keys=not options.insecure_no_keys,
            models=None if options.models is None else tuple(options.models),
            weights=options.weights,
            folder=options.folder,
            loras=_folder("--loras", options.loras),
            networks=_folder("--networks", options.networks),
            waiting=options.queue,
            seconds=options.time_limit,
            expiry_seconds=3600 * options.keep_hours,
            expiry_bytes=round(options.keep_gb * 2**30),
            url=options.url,
            door=opened,
            hosts=tuple(options.allow_fetch),
            secret=where.secret(),
        ),
    )


def door_of(url: str | None, names: Iterable[str]) -> Door:
    """Under which names something is served: those, and that of the proxy before it.

    Raises:
        InputError: `url` is no address.
    """
    if url is None:
        return replace(door(names, ()), option="--url URL")
    wrong = InputError(f"--url {url}: a whole address is expected, such as https://draw.example.org")
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        raise wrong
    try:
        return replace(door(names, [urlsplit(url).netloc.rpartition("@")[2]]), option="--url URL")
    except ValueError:
        raise wrong from None


def duty_of(options: argparse.Namespace, where: Place) -> Duty:
    """What each worker is started with."""
    return Duty(
        worker="",
        database=where.url,
        blobs=str(where.pictures),
        inputs=str(where.given),
        weights=options.weights,
        device=options.device,
        dtype=options.dtype,
        models=options.folder,
        max_bytes=None if options.memory_gb is None else round(options.memory_gb * 2**30),
    )


def _folder(option: str, folder: str | None) -> Path | None:
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise InputError(f"{option} {folder}: no such folder")
    return Path(folder)
