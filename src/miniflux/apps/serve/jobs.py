"""Jobs and pictures themselves, whichever shape they were asked for in."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as WebRequest
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from miniflux.apps.serve.asked import Asked
from miniflux.apps.serve.asking import wanted, with_pictures
from miniflux.apps.serve.doors import bounds_of, id_of, key_of, keyed
from miniflux.apps.serve.refusals import Answer, documented, openai_form
from miniflux.apps.serve.site import Site, site_of
from miniflux.apps.serve.watching import ClosingError
from miniflux.service.jobs.blobs import NAME
from miniflux.service.jobs.records import Job, Shown

PREVIEWS = 8  # kept of each picture, at most, for who looks on
PATIENCE = 10.0  # seconds without news after which a comment keeps the connection open
KINDS = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
Id = Annotated[str, Path(max_length=100)]

_at_work: set[asyncio.Task[None]] = set()


class JobTold(BaseModel):
    """A job as it is."""

    id: str
    state: str
    place: int
    steps_done: int
    steps: int
    created: float
    started: float | None
    ended: float | None
    cached: bool
    charged: int
    error: str | None
    seed: int
    pictures: list[dict[str, Any]]


class Events(StreamingResponse):
    """Server-sent events: a generator of (event, data) that is closed when the client goes away."""

    def __init__(
        self, events: AsyncGenerator[tuple[str, Mapping[str, Any]] | None], headers: Mapping[str, str]
    ) -> None:
        self.events = events
        told = {"cache-control": "no-store", "x-accel-buffering": "no", **headers}
        super().__init__(_lines(events), media_type="text/event-stream", headers=told)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends, and listens: whoever has gone is noticed before there is something to send."""
        sending = asyncio.create_task(self.stream_response(send))
        leaving = asyncio.create_task(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, OSError):
                    await task
            await self.events.aclose()


async def _lines(events: AsyncIterator[tuple[str, Mapping[str, Any]] | None]) -> AsyncGenerator[bytes]:
    async for event in events:
        if event is None:
            yield b": still here\n\n"
        else:
            yield f"event: {event[0]}\ndata: {json.dumps(event[1])}\n\n".encode("ascii")


async def ask(web: WebRequest, asked: Asked) -> Job:
    """Put a request into the line; errors as of `asking.wanted` and `Store.submit`."""
    site = site_of(web)
    key, bounds, base = key_of(web), bounds_of(web, site), site.base(web)

    whole = await with_pictures(site, asked)

    def submit() -> Job:
        job = site.store.submit(wanted(site, whole, key, base), bounds)
        if job.cached:  # its files are another's, and may be old: they are told with a new address
            for picture in site.store.pictures(job.id):
                with suppress(OSError):
                    site.blobs.path(picture.blob).touch()
        return job

    job = await asyncio.get_running_loop().run_in_executor(site.asking, submit)
    web.scope["state"]["job"] = job.id
    return job


def cancel_soon(site: Site, id: str) -> None:
    """Stop a job, although whoever asked is being stopped as well."""

    async def cancel() -> None:
        await run_in_threadpool(site.store.cancel, id)

    aside(cancel())


def aside(work: Coroutine[Any, Any, None]) -> None:
    """Do something that nobody waits for."""
    task = asyncio.create_task(work)
    _at_work.add(task)  # the event loop itself holds tasks weakly
    task.add_done_callback(_at_work.discard)


async def all_aside() -> None:
    """Returns when that is done, as far as it was begun in this loop."""
    here = asyncio.get_running_loop()
    await asyncio.gather(*(task for task in _at_work if task.get_loop() is here), return_exceptions=True)


async def gone(web: WebRequest) -> None:
    """Returns when the client has gone away."""
    while (await web.receive())["type"] != "http.disconnect":
        pass


async def until_over(web: WebRequest, job: Job) -> Job | None:
    """The job when it is over; None if the client went away before.

    Raises:
        ClosingError: the server ends before.
    """
    site = site_of(web)
    if job.over:
        return job

    async def followed() -> None:
        async with aclosing(site.watch.follow(job.id)) as news:
            async for _ in news:
                pass

    over, left = asyncio.create_task(followed()), asyncio.create_task(gone(web))
    try:
        await asyncio.wait({over, left}, return_when=asyncio.FIRST_COMPLETED)
        if not over.done():
            return None
        over.result()
    finally:
        for task in (over, left):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    return await run_in_threadpool(site.store.job, job.id) or job


def own_job(web: WebRequest, id: str) -> Job:
    """
    Raises:
        HTTPException: there is none, or it is another's: the answer is the same.
    """
    job = site_of(web).store.job(id)
    if job is None or job.key != id_of(web):
        raise HTTPException(404, "there is no such job")
    web.scope["state"]["job"] = job.id
    return job


def told(site: Site, job: Job, base: str) -> dict[str, Any]:
    """A job as its own client may see it."""
    pictures = site.store.pictures(job.id) if job.state == "done" else []
    return {
        "id": job.id,
        "state": job.state,
        "place": site.store.place(job),
        "steps_done": job.steps_done,
        "steps": job.steps,
        "created": job.created,
        "started": job.started,
        "ended": job.ended,
        "cached": job.cached,
        "charged": job.charged,
        "error": job.error,
        "seed": job.request.seed,
        "pictures": [
            {"url": site.address(base, one.blob), "seed": one.seed, "width": one.width, "height": one.height}
            for one in pictures
        ],
    }


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["jobs"])
    errors = documented(401, 404, 422, 500, 503, openai=True)
    errors[400] = documented(400, openai=True)[400]

    @routes.get("/v1/jobs/{id}", response_model=JobTold, responses=errors, dependencies=[Depends(keyed)])
    def look(web: WebRequest, id: Id) -> Response:
        """How far a job is, and its pictures."""
        return Answer(told(site_of(web), own_job(web, id), site_of(web).base(web)))

    @routes.delete("/v1/jobs/{id}", response_model=JobTold, responses=errors, dependencies=[Depends(keyed)])
    def cancel(web: WebRequest, id: Id) -> Response:
        """Stop a job: at once if it waits, within one step if it is drawn. One that is over stays as it is."""
        site = site_of(web)
        own_job(web, id)
        site.store.cancel(id)
        return Answer(told(site, own_job(web, id), site.base(web)))

    @routes.get(
        "/v1/jobs/{id}/events",
        response_class=StreamingResponse,
        responses={**errors, 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
        dependencies=[Depends(keyed)],
    )
    async def events(
        web: WebRequest, id: Id, previews: Annotated[int, Query(ge=0, le=PREVIEWS)] = 3
    ) -> StreamingResponse:
        """Server-sent events: `progress`, `preview`, and at last `done`, `failed` or `cancelled`; or `error`, if the
        server ends."""
        job = await run_in_threadpool(own_job, web, id)
        return Events(_happening(site_of(web), job, previews, site_of(web).base(web)), {})

    @routes.get(
        "/v1/pictures/{name}",
        response_class=FileResponse,
        responses={
            **documented(400, 403, 404, 422, 500, 503),
            200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in KINDS.values()}},
        },
    )
    def picture(
        web: WebRequest,
        name: Annotated[str, Path(max_length=80)],
        until: Annotated[int, Query(ge=0, le=2**40)],
        signature: Annotated[str, Query(max_length=64)],
    ) -> Response:
        """A picture, for who has its signed address."""
        site = site_of(web)
        right = hmac.compare_digest(site.signature(name, until).encode(), signature.encode("utf-8", "replace"))
        if not right or time.time() > until:
            raise HTTPException(403, "the address is wrong, or its time is over")
        if not NAME.fullmatch(name) or name not in site.blobs:
            raise HTTPException(404, "the picture is not kept any more")
        digest, ending = name.split(".")
        headers = {
            "etag": f'"{digest}"',
            "cache-control": f"private, max-age={max(0, until - int(time.time()))}, immutable",
            "content-security-policy": "default-src 'none'; sandbox",
            "x-content-type-options": "nosniff",
        }
        if web.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return FileResponse(site.blobs.path(name), media_type=KINDS[ending], headers=headers)

    return routes


async def fresh(site: Site, job: Job, shown: set[tuple[int, int]]) -> list[Shown]:
    """Previews that are not among those shown, which they are from now on."""
    found = [one for one in await run_in_threadpool(site.store.shown, job.id) if (one.number, one.step) not in shown]
    shown |= {(one.number, one.step) for one in found}
    return found


async def _happening(
    site: Site, job: Job, previews: int, base: str
) -> AsyncGenerator[tuple[str, Mapping[str, Any]] | None]:
    """What happens to a job, for its client."""
    if previews and not job.over:
        await run_in_threadpool(site.store.want_previews, job.id, previews)
    shown: set[tuple[int, int]] = set()
    yield None
    try:
        async with aclosing(site.watch.follow(job.id, PATIENCE)) as news:
            async for moved in news:
                if moved is None:
                    yield None
                    continue
                if moved.previews > len(shown):
                    for one in await fresh(site, job, shown):
                        address = site.address(base, one.blob)
                        yield "preview", {"id": job.id, "picture": one.number, "step": one.step, "url": address}
                if not moved.over:
                    about = {"id": job.id, "state": moved.state, "steps_done": moved.steps, "steps": job.steps}
                    if moved.state == "waiting":
                        about["place"] = await run_in_threadpool(site.store.place, job)
                    yield "progress", about
    except ClosingError as error:
        yield "error", openai_form(503, str(error))
        return
    last = await run_in_threadpool(site.store.job, job.id)
    if last is not None and last.over:
        yield last.state, await run_in_threadpool(told, site, last, base)
