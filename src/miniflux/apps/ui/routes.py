"""What the page asks for beside Gradio's own: how far the queue is, the pictures, and a place to send files to.

A browser session is a random token in a cookie that scripts cannot read. Whoever does not know it sees nothing of what
belongs to it; a picture's name, which cannot be guessed either, is of no use without the token.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, HTTPException
from fastapi import Request as WebRequest
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from PIL import Image

from miniflux.apps.ui import fitting, form
from miniflux.apps.ui.site import Site
from miniflux.apps.web.bodies import Refusal, RefusedError, announced, paced
from miniflux.errors import MinifluxError
from miniflux.service import Entry, Job

COOKIE = "miniflux_session"
SERVER = secrets.token_hex(8)
"""Which process answers: a page that was loaded from another one must be loaded again."""
UPLOAD = "/gradio_api/upload"


def valid(token: str | None) -> str | None:
    """The token, if it can be one of ours."""
    return token if token and re.fullmatch("[A-Za-z0-9_-]{16,128}", token) else None


def session_of(cookies: Any) -> str:
    """The session that a request belongs to.

    Raises:
        HTTPException: it has none.
    """
    token = valid(cookies.get(COOKIE))
    if token is None:
        raise HTTPException(403, "no session: open the page first, and let it keep a cookie")
    return token


def router(site: Site, allowed: Callable[..., Any]) -> APIRouter:
    """The routes; `allowed` refuses who has not logged in."""
    routes = APIRouter(dependencies=[Depends(allowed)])

    @routes.post(UPLOAD)
    async def upload(web: WebRequest) -> Response:
        """Instead of Gradio's own, which takes files from anybody and keeps them until the page ends."""
        session = session_of(web.cookies)
        kind = web.headers.get("content-type", "")
        try:
            length = announced(web.headers)
            paths = await site.uploads.receive(session, kind, length, paced(web.receive))
        except RefusedError as refused:
            return Refusal(refused)
        return JSONResponse([str(path) for path in paths])

    @routes.get(f"{UPLOAD}_progress")
    async def progress() -> Response:
        """Gradio's script asks how far an upload is, for a bar that this page does not show."""
        return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    @routes.get("/gradio_api/file={place:path}")
    def shown(web: WebRequest, place: str) -> Response:
        """A picture in a slot of the page; Gradio's own route gives any file in its folder to anybody."""
        session, path = session_of(web.cookies), Path(place)
        if not site.uploads.own(session, path):
            raise HTTPException(404, "no such picture")
        return FileResponse(path, headers={"cache-control": "private, no-store"})

    @routes.get("/studio/state")
    def state(web: WebRequest, mark: str = "", seen: str = "") -> JSONResponse:
        return JSONResponse(state_of(site, session_of(web.cookies), mark, seen), headers={"cache-control": "no-store"})

    @routes.get("/studio/about/{id}")
    def about(web: WebRequest, id: str) -> JSONResponse:
        request = _entry(site, session_of(web.cookies), id).request
        return JSONResponse(form.described(request, fitting.listed_as(request.model, site.listed)))

    @routes.get("/studio/picture/{id}.png")
    def picture(web: WebRequest, id: str, download: bool = False, bare: bool = False) -> Response:
        session = session_of(web.cookies)
        _entry(site, session, id)
        path = site.history.path(session, id)
        headers = {"cache-control": "private, max-age=31536000, immutable"}
        if download:
            headers["content-disposition"] = f'attachment; filename="miniflux-{id[:8]}.png"'
        if not path.is_file():
            raise HTTPException(404, "the picture is gone")
        if not bare:
            return FileResponse(path, media_type="image/png", headers=headers)
        try:
            with Image.open(path) as image:
                plain = Image.frombytes(image.mode, image.size, image.tobytes())
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise HTTPException(404, "the picture is damaged") from None
        data = io.BytesIO()
        plain.save(data, "PNG")
        return Response(data.getvalue(), media_type="image/png", headers=headers)

    @routes.get("/studio/pictures.zip")
    def pictures(web: WebRequest) -> StreamingResponse:
        headers = {"content-disposition": 'attachment; filename="miniflux.zip"', "cache-control": "no-store"}
        return StreamingResponse(
            site.history.zipped(session_of(web.cookies)), media_type="application/zip", headers=headers
        )

    assert upload and progress and shown and state and about and picture and pictures
    return routes


def _entry(site: Site, session: str, id: str) -> Entry:
    try:
        return site.history.get(session, id)
    except MinifluxError:
        raise HTTPException(404, "no such picture") from None


def state_of(site: Site, session: str, mark: str = "", seen: str = "") -> dict[str, Any]:
    """What has changed for a session.

    Args:
        mark: the state of the history that the page has; it is sent again only if it has changed.
        seen: `ID:STEPS` of the preview that the page has.
    """
    jobs = [_job(job, seen) for job in site.queue.jobs(session)]
    ended = [{"id": job.id, "state": job.state, "error": job.status().error} for job in site.ended(session)]
    entries = site.history.listed(session)
    now = hashlib.blake2b("".join(entry.id for entry in entries).encode(), digest_size=8).hexdigest()
    said: dict[str, Any] = {"jobs": [job for job in jobs if job], "ended": ended, "mark": now, "server": SERVER}
    if now != mark:
        said["entries"] = [
            {
                "id": entry.id,
                "url": f"studio/picture/{entry.file}",
                "caption": form.caption(entry.request),
                "line": form.line(entry.request),
                "cached": entry.cached,
                "title": entry.title,
            }
            for entry in entries
        ]
    return said


def _job(job: Job, seen: str) -> dict[str, Any] | None:
    status = job.status()
    if status.place is None:
        return None
    preview = None
    if status.state == "running" and status.steps_done and seen != f"{job.id}:{status.steps_done}":
        preview = as_url(job.preview())
    return {
        "id": job.id,
        "title": job.title or form.caption(job.requests[0]) or "(no prompt)",
        "state": status.state,
        "place": status.place,
        "done": status.steps_done,
        "steps": status.steps,
        "left": status.seconds_left,
        "preview": preview,
    }


def as_url(image: Image.Image | None) -> str | None:
    """A preview as an address that holds it."""
    if image is None:
        return None
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
