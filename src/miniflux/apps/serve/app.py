"""The server as an ASGI app: `create_app`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool

from miniflux.apps.serve import bfl, health, jobs, openai
from miniflux.apps.serve.bfl import told_of
from miniflux.apps.serve.bodies import Bodies
from miniflux.apps.serve.doors import Doors
from miniflux.apps.serve.health import Measures
from miniflux.apps.serve.offers import Offers
from miniflux.apps.serve.pages import page
from miniflux.apps.serve.refusals import Answer, install, too_much
from miniflux.apps.serve.site import Options, Site
from miniflux.apps.serve.watching import Watch, meanwhile
from miniflux.apps.serve.webhooks import UndeliveredError, deliver, next_try
from miniflux.errors import InputError, MinifluxError
from miniflux.service import Catalogue
from miniflux.service.jobs.blobs import Blobs
from miniflux.service.jobs.database import GONE
from miniflux.service.jobs.inputs import Inputs
from miniflux.service.jobs.records import Job
from miniflux.service.jobs.store import Store
from miniflux.version import __version__

log = logging.getLogger(__name__)

MINUTE = 60.0
TELLING = 1.0  # seconds between two looks for webhooks that are due
ABOUT = """Pictures by FLUX models, for programs that speak the API of Black Forest Labs or OpenAI's images API.

What is not known is refused by name; what is taken and changes nothing says so in its description, and in the header
`x-without-effect` of the answer."""


def create_app(store: Store, blobs: Blobs, inputs: Inputs, options: Options | None = None) -> FastAPI:
    """The server. Workers draw what it puts into the store.

    Raises:
        InputError: `options` names a model that is not here.
    """
    options = options or Options()
    offers = Offers(Catalogue(options.weights, options.folder), options.models, options.aliases)
    site = Site(store=store, blobs=blobs, inputs=inputs, options=options, offers=offers, watch=Watch(store))
    measures = Measures(site)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(site.watch.running())
            for seconds, act in ((TELLING, tell), (MINUTE, tidy)):
                await stack.enter_async_context(meanwhile(_again_and_again(seconds, act, site)))
            yield
            await jobs.all_aside()

    app = FastAPI(
        title="miniflux",
        version=__version__,
        description=ABOUT,
        lifespan=running,
        default_response_class=Answer,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.site, app.state.measures = site, measures
    app.state.bodies = {bfl.PATH: bfl.Inputs, **openai.BODIES}
    install(app)
    for part in (health, jobs, openai, bfl):  # the last one takes any name below /v1
        app.include_router(part.router())

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()))

    app.add_middleware(Bodies, refuse=too_much)
    app.add_middleware(Doors, site=site, measures=measures)  # the outermost
    return app


async def _again_and_again(seconds: float, act: Callable[[Site], Awaitable[None]], site: Site) -> None:
    """Do something every so many seconds, whatever becomes of it."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await act(site)
        except (GONE, OSError, MinifluxError) as error:
            log.warning("%s: %s", act.__name__, str(error).partition("\n")[0])
        except Exception:
            log.exception("%s failed", act.__name__)


async def tell(site: Site) -> None:
    """Call the webhooks that are due."""
    due = await run_in_threadpool(site.store.to_tell)
    await asyncio.gather(*(_told(site, job) for job in due))


async def _told(site: Site, job: Job) -> None:
    assert job.webhook is not None
    again: float | None = None
    try:
        payload = await told_of(site, job)
        await deliver(job.webhook, job.webhook_secret, payload, job.id, site.options.hosts)
    except (UndeliveredError, InputError) as error:
        again = next_try(job.webhook_tries + 1)
        log.warning("job %s: its webhook was not told: %s", job.id, str(error).partition("\n")[0])
    await run_in_threadpool(site.store.was_told, job.id, again)


async def tidy(site: Site) -> None:
    """Let go what is old, and look what models there are."""
    await run_in_threadpool(_tidied, site)


def _tidied(site: Site) -> None:
    options, store = site.options, site.store
    site.blobs.expire(options.expiry_seconds, options.expiry_bytes)
    store.forget_pictures(lambda name: name in site.blobs)
    store.forget(options.expiry_seconds)
    site.inputs.expire(store.needed())
    site.offers.refresh()
