"""The shape of OpenAI's images API: one call that waits for the pictures, or tells how they come about.

What changes nothing is listed in `asking.NO_EFFECT`; what is not known is refused by name.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Body, Depends, Header, Path
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request as WebRequest
from starlette.responses import Response

from miniflux.apps.serve.asked import Asked, ConditionAsked, Given, LoraAsked, Strict
from miniflux.apps.serve.bfl import without_effect
from miniflux.apps.serve.doors import keyed
from miniflux.apps.serve.jobs import PATIENCE, Events, ask, cancel_soon, fresh, until_over
from miniflux.apps.serve.offers import Offer
from miniflux.apps.serve.refusals import SOON, Answer, UnfitError, documented, openai_form, refusal
from miniflux.apps.serve.site import Site, site_of
from miniflux.apps.serve.watching import ClosingError
from miniflux.checks import shown
from miniflux.errors import InputError
from miniflux.service.jobs.database import GONE
from miniflux.service.jobs.records import Job
from miniflux.settings import strict

F = TypeVar("F", bound=BaseModel)
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
FILES = 16  # pictures of one edit
NAMES = {
    **{name: name for name in ("prompt", "seed", "strength", "mask", "image")},
    "negative": "negative_prompt",
    "cfg": "true_cfg_scale",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "images": "n",
    "width": "size",
    "height": "size",
    "control": "conditions",
}
FAULTS = {  # how a job failed: status, code
    "input": (400, "invalid_value"),
    "memory": (400, "out_of_memory"),
    "time": (400, "time_limit_exceeded"),
    "cancelled": (400, "cancelled"),
}
Kind = Literal["image_generation", "image_edit"]


class Generation(Strict):
    """Pictures from words."""

    prompt: str = Field(max_length=131_072, examples=["a red circle on a blue background"])
    model: str | None = Field(
        None, max_length=200, description="A name of `/v1/models`; the first one if none is given."
    )
    n: int | None = Field(None, ge=1, le=10, description="Picture i is drawn from the seed plus i.")
    size: str | None = Field(None, max_length=16, description="auto, or WIDTHxHEIGHT in multiples of 16.")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json if it is not said.")
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="Of jpeg and webp.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Nothing transparent is drawn.")
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3, description="Of each picture, while it is drawn.")
    seed: int | None = Field(None, ge=0, le=2**64 - 1, description="Ours: the same one draws the same picture.")
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="Ours.")
    guidance_scale: float | None = Field(None, ge=0, le=1000, allow_inf_nan=False, description="Ours.")
    negative_prompt: str | None = Field(None, max_length=131_072, description="Ours: what should not be seen.")
    true_cfg_scale: float | None = Field(None, ge=1, le=100, allow_inf_nan=False, description="Ours: its scale.")
    loras: list[LoraAsked] | None = Field(None, max_length=32, description="Ours: LoRAs of this request.")
    conditions: list[ConditionAsked] | None = Field(None, max_length=8, description="Ours: what else steers it.")
    quality: str | None = Field(None, max_length=40, description="Without effect.")
    style: str | None = Field(None, max_length=40, description="Without effect.")
    moderation: str | None = Field(None, max_length=40, description="Without effect.")
    user: str | None = Field(None, max_length=1000, description="Without effect.")
    safety_identifier: str | None = Field(None, max_length=1000, description="Without effect.")


class Edit(Generation):
    """Pictures from others. Lists are given as JSON text, in a form."""

    strength: float | None = Field(None, gt=0, le=1, allow_inf_nan=False, description="Ours: how much changes.")
    input_fidelity: str | None = Field(None, max_length=40, description="Without effect.")


class Variation(Edit):
    """Pictures that resemble another."""

    prompt: str = Field("", max_length=131_072, description="Ours.")


BODIES: dict[str, type[BaseModel]] = {
    "/v1/images/generations": Generation,
    "/v1/images/edits": Edit,
    "/v1/images/variations": Variation,
}


class Tokens(BaseModel):
    """Of the input."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens that the network works with: those of the prompt, of pictures it looks at, and of those it draws."""

    input_tokens: int
    input_tokens_details: Tokens
    output_tokens: int
    total_tokens: int


class Image(BaseModel):
    """One picture."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class Images(BaseModel):
    """All pictures of a call."""

    id: str = Field(description="Of the job.")
    created: int
    data: list[Image]
    background: Literal["opaque"]
    output_format: str
    size: str
    usage: Usage


class Model(BaseModel):
    """Something that can be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    served_by: str
    licence: str
    steps: int
    guidance: float | None
    size: str


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["OpenAI"], dependencies=[Depends(keyed)])
    errors = documented(400, 401, 404, 408, 413, 429, 500, 503, openai=True)
    stream = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The pictures."}}
    answers: dict[int | str, dict[str, Any]] = {**errors, **stream}

    @routes.post("/v1/images/generations", response_model=Images, responses=answers)
    async def generations(
        web: WebRequest,
        inputs: Annotated[Generation, Body()],
        idempotency_key: Annotated[str | None, Header(max_length=1000)] = None,
    ) -> Response:
        """Draw pictures from words."""
        return await _answered(web, inputs, asked(inputs, once=idempotency_key), "image_generation")

    @routes.post("/v1/images/edits", response_model=Images, responses=answers, openapi_extra=_form(Edit, mask=True))
    async def edits(
        web: WebRequest, idempotency_key: Annotated[str | None, Header(max_length=1000)] = None
    ) -> Response:
        """Change a picture where a mask says, or by a strength; or look at several, with a model that does."""
        inputs, pictures, mask = await _read(web, Edit)
        return await _answered(web, inputs, asked(inputs, pictures, mask, once=idempotency_key), "image_edit")

    @routes.post(
        "/v1/images/variations", response_model=Images, responses=answers, openapi_extra=_form(Variation, mask=False)
    )
    async def variations(
        web: WebRequest, idempotency_key: Annotated[str | None, Header(max_length=1000)] = None
    ) -> Response:
        """Vary a picture: by Redux, where such a network is; or by a strength."""
        inputs, pictures, mask = await _read(web, Variation)
        if mask is not None:
            raise UnfitError("mask", "a variation has none: ask for an edit")
        found = asked(inputs, pictures, vary=inputs.strength is None, once=idempotency_key)
        return await _answered(web, inputs, found, "image_edit")

    @routes.get("/v1/models", response_model=ModelList, responses=documented(401, 500, 503, openai=True))
    def models(web: WebRequest) -> Response:
        """Every name that something answers to."""
        return Answer({"object": "list", "data": [_model(offer) for offer in site_of(web).offers.names()]})

    @routes.get(
        "/v1/models/{name:path}", response_model=Model, responses=documented(400, 401, 404, 500, 503, openai=True)
    )
    def model(web: WebRequest, name: Annotated[str, Path(max_length=200)]) -> Response:
        """One of them."""
        return Answer(_model(site_of(web).offers.find(name)))

    return routes


def _model(offer: Offer) -> dict[str, Any]:
    listed = offer.listed
    owner = "miniflux" if listed.bundled else "local" if listed.path else "black-forest-labs"
    return {
        "id": offer.name,
        "object": "model",
        "created": 0,  # nothing says when
        "owned_by": owner,
        "served_by": listed.name,
        "licence": listed.licence,
        "steps": listed.steps,
        "guidance": listed.guidance,
        "size": f"{listed.size}x{listed.size}",
    }


# Reading


def asked(
    inputs: Generation,
    pictures: list[tuple[str, Given]] | None = None,
    mask: Given | None = None,
    *,
    vary: bool = False,
    once: str | None = None,
) -> Asked:
    """The request without its shape.

    Raises:
        UnfitError: parameters contradict each other, or the size is none.
    """
    width = height = None
    if inputs.size not in (None, "auto"):
        found = SIZE.fullmatch(inputs.size or "")
        if found is None:
            raise UnfitError("size", f"auto or WIDTHxHEIGHT is expected, got {inputs.size!r}")
        width, height = int(found[1]), int(found[2])
    kind, quality = inputs.output_format or "png", inputs.output_compression
    if kind == "png" and quality not in (None, 100):
        raise UnfitError("output_compression", "is for jpeg and webp; png loses nothing")
    if inputs.partial_images and not inputs.stream:
        raise UnfitError("partial_images", "are told in a stream: give stream as well")
    if inputs.stream and inputs.response_format == "url":
        raise UnfitError("response_format", "events hold pictures as b64_json")
    return Asked(
        names=NAMES,
        model=inputs.model,
        prompt=inputs.prompt,
        negative=inputs.negative_prompt,
        cfg=inputs.true_cfg_scale,
        seed=inputs.seed,
        images=inputs.n or 1,
        steps=inputs.num_inference_steps,
        guidance=inputs.guidance_scale,
        width=width,
        height=height,
        pictures=() if vary else pictures or (),
        mask=mask,
        clear=True,
        strength=getattr(inputs, "strength", None),
        varied=(pictures or ()) if vary else (),
        loras=inputs.loras or (),
        conditions=inputs.conditions or (),
        format=kind,
        quality=None if kind == "png" else quality,
        previews=inputs.partial_images or 0,
        output={"shape": "openai"},
        once=once,
    )


async def _read(web: WebRequest, model: type[F]) -> tuple[F, list[tuple[str, Given]], Given | None]:
    """A form: its fields, its pictures in order, and its mask.

    Raises:
        RequestValidationError: a field is not what it may be.
        UnfitError: a picture is missing, or a part is there twice.
    """
    kind = web.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise UnfitError("the body", f"a form of the kind multipart/form-data is expected, got {shown(kind)}")
    async with web.form(max_files=FILES + 1, max_fields=64, max_part_size=2 * 2**20) as form:
        fields, pictures, mask = await _parts(form, model)
    try:
        inputs = model.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from None
    if not pictures:
        raise UnfitError("image", "is missing: a file in a form of the kind multipart/form-data")
    return inputs, pictures, mask


async def _parts(
    form: FormData, model: type[BaseModel]
) -> tuple[dict[str, Any], list[tuple[str, Given]], Given | None]:
    fields: dict[str, Any] = {}
    pictures: list[tuple[str, Given]] = []
    mask: Given | None = None
    for name, part in form.multi_items():
        if name in ("image", "image[]", "mask"):
            given: Given = await part.read() if isinstance(part, UploadFile) else part
            if name != "mask":
                pictures.append(("image", given))
            elif mask is None:
                mask = given
            else:
                raise UnfitError("mask", "is there twice")
            continue
        if isinstance(part, UploadFile):
            raise UnfitError(name, "a file is not expected here")
        if name in fields:
            raise UnfitError(name, "is there twice")
        fields[name] = part if _textual(model, name) else _value(part)
    return fields, pictures, mask


def _textual(model: type[BaseModel], name: str) -> bool:
    """Whether a field of a form is taken as it is; others are numbers, truth values and lists, as JSON writes them."""
    field = model.model_fields.get(name)
    return field is None or not {"int", "float", "bool", "list"} & set(re.findall(r"\w+", str(field.annotation)))


def _value(text: str) -> Any:
    try:
        return strict.parsed("a field", text)
    except InputError:
        return text  # which is then refused as a value of another kind


def _form(model: type[BaseModel], *, mask: bool) -> dict[str, Any]:
    """The body of a form, for the OpenAPI document: fields, and files."""
    about = model.model_json_schema(ref_template="#/components/schemas/{model}")
    about.pop("$defs", None)
    file = {"type": "string", "format": "binary"}
    properties = {name: _plain(field) for name, field in about["properties"].items()}
    files: dict[str, Any] = {"image": {"type": "array", "items": file, "minItems": 1, "maxItems": FILES}}
    files |= {"mask": file} if mask else {}
    required = [*about.get("required", []), "image"]
    schema = {"type": "object", "properties": {**files, **properties}, "required": required}
    content = {"multipart/form-data": {"schema": {**schema, "additionalProperties": False}}}
    return {"requestBody": {"required": True, "content": content}}


def _plain(field: Mapping[str, Any]) -> dict[str, Any]:
    """A field as a form can hold it: never null, and lists as JSON text."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    kind = {"type": "string"} if kinds[0].get("type") == "array" else dict(kinds[0])
    return {**kind, "description": field.get("description", "")}


# Answering


async def _answered(web: WebRequest, inputs: Generation, asked: Asked, kind: Kind) -> Response:
    """Put it into the line, and wait; whoever does not wait does not want it any more, unless it has a name by which
    it is asked for again."""
    site = site_of(web)
    job = await ask(web, asked)
    headers = {"x-job-id": job.id, **without_effect(inputs)}
    if inputs.stream:
        return Events(_happening(site, job, kind, asked), headers)
    over = job
    try:
        over = await until_over(web, job)
    except ClosingError as error:
        return refusal(web.url.path, 503, str(error), wait=SOON, headers=headers)
    finally:
        if (over is None or not over.over) and asked.once is None:
            cancel_soon(site, job.id)
    if over is None:
        return Response(status_code=499)  # nobody reads it
    if over.state != "done":
        status, code = FAULTS.get(over.error_kind or over.state, (500, "server_error"))
        return Answer(openai_form(status, over.error or over.state, None, code), status, headers)
    answer = await run_in_threadpool(_images, site, over, inputs.response_format == "url", site.base(web))
    return Answer(answer, headers=headers)


def _images(site: Site, job: Job, addresses: bool, base: str) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for picture in site.store.pictures(job.id):
        where = {"url": site.address(base, picture.blob)} if addresses else {"b64_json": _base64(site, picture.blob)}
        data.append({**where, "seed": picture.seed})
    shared = {name: value for name, value in _about(job).items() if name != "quality"}
    return {"id": job.id, "created": int(time.time()), "data": data, **shared, "usage": usage(job, job.pictures)}


def _about(job: Job) -> dict[str, Any]:
    """What every answer and every event repeats."""
    width, height = job.output["size"]
    return {
        "background": "opaque",
        "output_format": job.output["format"],
        "quality": "auto",
        "size": f"{width}x{height}",
    }


def usage(job: Job, pictures: int) -> dict[str, Any]:
    """Tokens of so many of its pictures."""
    given, (width, height) = job.output["usage"], job.output["size"]
    details = {"text_tokens": given["text"], "image_tokens": given["image"]}
    read, drawn = sum(details.values()), pictures * (width // 16) * (height // 16)
    return {
        "input_tokens": read,
        "input_tokens_details": details,
        "output_tokens": drawn,
        "total_tokens": read + drawn,
    }


def _base64(site: Site, blob: str) -> str:
    return base64.b64encode(site.blobs.path(blob).read_bytes()).decode("ascii")


async def _happening(
    site: Site, job: Job, kind: Kind, asked: Asked
) -> AsyncGenerator[tuple[str, Mapping[str, Any]] | None]:
    """The events of a stream."""
    finished, shown = False, set[tuple[int, int]]()
    told: dict[int, int] = {}  # partial images of each picture

    def event(name: str, data: str, **more: Any) -> tuple[str, dict[str, Any]]:
        full = f"{kind}.{name}"
        return full, {"type": full, "b64_json": data, "created_at": int(time.time()), **_about(job), **more}

    try:
        yield None  # so that the client sees at once that it is taken
        async with aclosing(site.watch.follow(job.id, PATIENCE)) as news:
            async for moved in news:
                if moved is None:
                    yield None
                elif asked.previews and moved.previews > len(shown):
                    for one in await fresh(site, job, shown):
                        index = told.get(one.number, 0)
                        if index < asked.previews:
                            told[one.number] = index + 1
                            data = await run_in_threadpool(_base64, site, one.blob)
                            yield event("partial_image", data, partial_image_index=index, image_index=one.number)
        last = await run_in_threadpool(site.store.job, job.id)
        finished = True
        if last is None or last.state != "done":
            status, code = FAULTS.get("" if last is None else last.error_kind or last.state, (500, "server_error"))
            message = "the job is gone" if last is None else last.error or last.state
            yield "error", openai_form(status, message, None, code)
            return
        for picture in await run_in_threadpool(site.store.pictures, job.id):
            data = await run_in_threadpool(_base64, site, picture.blob)
            yield event("completed", data, usage=usage(job, 1), seed=picture.seed, image_index=picture.number)
    except ClosingError as error:
        yield "error", openai_form(503, str(error))
    except (GONE, OSError):
        yield "error", openai_form(503, "the database or the disk does not answer; try again")
    finally:
        if not finished and asked.once is None:
            cancel_soon(site, job.id)
