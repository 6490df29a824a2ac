"""What all routes share: the store, the pictures, the models, and what the operator has decided."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request as WebRequest

from miniflux.apps.serve.offers import Offers
from miniflux.apps.serve.watching import Watch
from miniflux.apps.web.door import Door, split
from miniflux.service.jobs.blobs import Blobs
from miniflux.service.jobs.inputs import Inputs
from miniflux.service.jobs.store import Store

ASKING = 16  # pictures that are fetched at the same time, and requests whose pictures are opened


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the operator has decided.

    Attributes:
        keys: whether a key is asked for; without, everybody may do everything, and sees all jobs.
        models: names of the models that may be asked for, the first one where none is named; None for all that are
            here.
        aliases: more names of models, and whose they are.
        weights, folder: where models are looked for, as of `service.Catalogue`.
        loras, networks: folders whose files may be named; None for the bundled ones alone.
        waiting: jobs that may wait at once.
        seconds: that a job may take once it runs.
        pixels: of a picture that is drawn, at most.
        expiry_seconds, expiry_bytes: how long pictures are kept, and how many bytes of them.
        url: where clients reach the server, for the addresses in its answers; None for the one that they ask.
        door: the names that it answers to where no key is asked for, which would keep other pages of a browser out.
        hosts: that pictures may be fetched from, and webhooks be sent to, although they are on a private network.
        secret: signs the addresses of pictures; random, they are void after a restart.
    """

    keys: bool = True
    models: tuple[str, ...] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    weights: Path | None = None
    folder: Path | None = None
    loras: Path | None = None
    networks: Path | None = None
    waiting: int = 256
    seconds: float = 600.0
    pixels: int = 2**24
    expiry_seconds: float = 86_400.0
    expiry_bytes: int = 10 * 2**30
    url: str | None = None
    door: Door = field(default_factory=Door)
    hosts: tuple[str, ...] = ()
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)


@dataclass(frozen=True, kw_only=True)
class Site:
    """The server's parts."""

    store: Store
    blobs: Blobs
    inputs: Inputs
    options: Options
    offers: Offers
    watch: Watch
    fetching: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(ASKING))
    asking: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(ASKING, "miniflux-asking"))

    def base(self, web: WebRequest) -> str:
        """Where the client reaches the server, without a slash at its end."""
        if self.options.url is not None:
            return self.options.url.rstrip("/")
        host = web.headers.get("host", "")
        if split(host) is None:
            name, port = web.scope.get("server") or ("localhost", None)
            host = f"{name}:{port}" if port else str(name)
        return f"{web.scope.get('scheme', 'http')}://{host}"

    def address(self, base: str, name: str) -> str:
        """Where a picture is, for whoever is told; as long as pictures are kept."""
        until = int(time.time() + self.options.expiry_seconds)
        return f"{base}/v1/pictures/{name}?until={until}&signature={self.signature(name, until)}"

    def signature(self, name: str, until: int) -> str:
        """Of the address of a picture, which nobody can make who does not know the secret."""
        return hmac.new(self.options.secret, f"{name} {until}".encode(), hashlib.sha256).hexdigest()


def site_of(web: WebRequest) -> Site:
    """The site that a request came to."""
    site: Any = web.app.state.site
    assert isinstance(site, Site)
    return site
