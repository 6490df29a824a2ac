"""What a client is told when it does not get what it asked for, in the form of the shape that it speaks.

BFL's form is FastAPI's own, `{"detail": ...}`; OpenAI's is `{"error": {"message", "type", "param", "code"}}`, with 400
for what does not validate.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, MutableMapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as WebRequest
from starlette.responses import Response
from starlette.types import Scope

from miniflux.apps.serve.offers import UnknownModelError
from miniflux.apps.serve.site import site_of
from miniflux.apps.web.bodies import RefusedError
from miniflux.checks import shown, without_folders
from miniflux.errors import InputError, MinifluxError, OutputError, QueueFullError, QuotaError
from miniflux.service.jobs.database import GONE

log = logging.getLogger(__name__)

SOON = 2  # seconds after which to try again where the server itself is in trouble
OURS = ("/v1/images", "/v1/models", "/v1/jobs")  # paths that speak OpenAI's form
CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    429: "rate_limit_exceeded",
}


class Answer(Response):
    """JSON in ASCII: whatever strange characters a client sent, what repeats them can be written."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class UnfitError(InputError):
    """A parameter is not what it may be.

    Attributes:
        param: its name, as the client knows it.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message if message.startswith(param) else f"{param}: {message}")
        self.param = param


class Failure(BaseModel):
    """What OpenAI's clients read of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failed(BaseModel):
    """An error in OpenAI's form."""

    error: Failure


class Told(BaseModel):
    """An error in BFL's form."""

    detail: str | list[dict[str, Any]]


def openai_form(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI tells it."""
    kind = "invalid_request_error"
    if status >= 500:
        kind = "server_error"
    elif status == 401:
        kind = "authentication_error"
    elif status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def refusal(
    path: str,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    wait: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """The answer in the form that belongs to a path.

    Args:
        status: 422 becomes 400 in OpenAI's form.
        wait: seconds until it is worth to try again.
        headers: more of them.
    """
    headers = {**(headers or {}), **({} if wait is None else {"Retry-After": str(max(1, math.ceil(wait)))})}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if path.startswith(OURS):
        status = 400 if status == 422 else status
        return Answer(openai_form(status, message, param, code), status, headers)
    if status == 422:
        about = {"loc": ["body", *([] if param is None else [param])], "msg": message, "type": code or "value_error"}
        return Answer({"detail": [about]}, status, headers)
    return Answer({"detail": message}, status, headers)


def documented(*codes: int, openai: bool = False) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for the OpenAPI document."""
    said = {
        400: "The request is not understood.",
        401: "No key, or none that is known.",
        403: "The signature is wrong, or its time is over.",
        404: "There is no such thing, or it is another's.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        422: "A parameter is not what it may be.",
        429: "The line is full, or the key has used what it may; `Retry-After` says when to try again.",
        500: "An error of the server.",
        503: "The database or the disk does not answer, or the server ends; `Retry-After` says when to try again.",
    }
    model = Failed if openai else Told
    return {code: {"model": model, "description": said[code]} for code in codes}


def install(app: FastAPI) -> None:
    """Make every error of the app speak the form of its path."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(MinifluxError, _refused)
    app.add_exception_handler(GONE, _gone)
    app.add_exception_handler(OSError, _gone)
    app.add_exception_handler(Exception, _fault)


async def _invalid(web: WebRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError | ValidationError)
    found = [_about(one, _known(web)) for one in error.errors()]
    where, message, kind = found[0] if found else ((), "the request is not understood", "value_error")
    param = ".".join(str(part) for part in where) or None
    if web.url.path.startswith(OURS):
        code = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}.get(kind)
        return Answer(openai_form(400, message, param, code or "invalid_value"), 400)
    detail = [{"loc": ["body", *where], "msg": message, "type": kind} for where, message, kind in found]
    return Answer({"detail": detail}, 422)


def _about(error: Mapping[str, Any], known: str) -> tuple[tuple[str | int, ...], str, str]:
    """Where an error of pydantic is, what it says with the field named, and its type. Values are shown in short."""
    where = tuple(part for part in error["loc"] if part not in ("body", "query", "path", "header"))
    name, kind = ".".join(str(part) for part in where), str(error["type"])
    if kind == "extra_forbidden":
        return where, f"unknown parameter {shown(name)}{known if len(where) == 1 else ''}", kind
    if kind == "missing":
        return where, f"{name or 'the body'} is missing", kind
    if kind == "json_invalid":
        return (), "the body is no JSON", kind
    value = "" if isinstance(error.get("input"), dict | list) else f", got {shown(error.get('input'))}"
    return where, f"{name or 'the body'}: {error['msg']}{value}", kind


def _known(web: WebRequest) -> str:
    """For a message about an unknown field: those that there are."""
    models: Mapping[str, type[BaseModel]] = web.app.state.bodies
    model = models.get(getattr(web.scope.get("route"), "path", ""))
    return "" if model is None else f"; there are {', '.join(model.model_fields)}"


async def _http(web: WebRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = refusal(web.url.path, error.status_code, str(error.detail))
    for name, value in (error.headers or {}).items():
        answer.headers[name] = value
    return answer


async def _refused(web: WebRequest, error: Exception) -> Response:
    """Refusals of the library, whose messages are for whoever asked."""
    path, line = web.url.path, without_folders(str(error).partition("\n")[0])
    if isinstance(error, QuotaError):
        return refusal(path, 429, line, code="quota_exceeded", wait=error.seconds)
    if isinstance(error, QueueFullError):
        return refusal(path, 429, line, code="queue_full", wait=await _line_of(web))
    if isinstance(error, OutputError):
        return await _gone(web, error)
    if isinstance(error, UnknownModelError):
        return refusal(path, 404, line, param="model", code="model_not_found")
    param = error.param if isinstance(error, UnfitError) else None
    return refusal(path, 422, line, param=param, code="invalid_value" if path.startswith(OURS) else None)


async def _line_of(web: WebRequest) -> float:
    """Seconds that the line will take."""
    try:
        return await run_in_threadpool(site_of(web).store.seconds_of_line)
    except GONE:
        return SOON


async def _gone(web: WebRequest, error: Exception) -> Response:
    log.error("the database or the disk: %s", str(error).partition("\n")[0], exc_info=error)
    return refusal(web.url.path, 503, "the server cannot keep anything at the moment; try again", wait=SOON)


async def _fault(web: WebRequest, error: Exception) -> Response:
    return refusal(web.url.path, 500, "an error of the server")


def too_much(scope: MutableMapping[str, Any], refused: RefusedError) -> Answer:
    """For whose body is not read."""
    wait = SOON if refused.status == 503 else None
    answer = refusal(scope["path"], refused.status, refused.line, wait=wait)
    answer.headers["connection"] = "close"
    return answer


def unwelcome(scope: Scope) -> Answer:
    """For who has no key."""
    return refusal(scope["path"], 401, "a key is needed: x-key: KEY, or Authorization: Bearer KEY")
