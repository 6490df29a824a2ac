"""The shape of Black Forest Labs' API, as docs.bfl.ai publishes it: ask, poll, fetch.

One set of fields for all models: those that the published endpoints have. What has no effect with the model that is
asked for is refused by name, but for what `asking.NO_EFFECT` lists.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Header, Path, Query
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as WebRequest
from starlette.responses import Response

from miniflux.apps.serve.asked import NO_EFFECT, Asked, ConditionAsked, LoraAsked, Strict
from miniflux.apps.serve.doors import id_of, key_of, keyed
from miniflux.apps.serve.jobs import ask
from miniflux.apps.serve.refusals import Answer, UnfitError, documented
from miniflux.apps.serve.site import Site, site_of
from miniflux.service.jobs.records import Job

Status = Literal["Task not found", "Pending", "Request Moderated", "Content Moderated", "Ready", "Error"]
Picture = Annotated[str | None, Field(description="Base64, a data: URL or an http(s) URL.")]
PATH = "/v1/{model}"
REFERENCES = ("input_image", *(f"input_image_{i}" for i in range(2, 11)))
NAMES = {
    **{name: name for name in ("prompt", "seed", "steps", "width", "height", "guidance", "strength", "mask")},
    "negative": "negative_prompt",
    "cfg": "true_cfg_scale",
    "image": "input_image",
    "control": "control_image",
}


class Inputs(Strict):
    """What is to be drawn. Without `width`, `height`, `aspect_ratio` and `resolution` it has the size that the model
    is made for, or that of the given picture."""

    prompt: str | None = Field("", max_length=131_072, examples=["a red circle on a blue background"])
    input_image: Picture = None
    input_image_2: Picture = None
    input_image_3: Picture = None
    input_image_4: Picture = None
    input_image_5: Picture = None
    input_image_6: Picture = None
    input_image_7: Picture = None
    input_image_8: Picture = None
    input_image_9: Picture = None
    input_image_10: Picture = None
    images: str | list[str] | None = Field(None, description="FLUX.3's name for all input images at once.")
    image: Picture = Field(None, description="Fill's name for the picture that is completed.")
    mask: Picture = Field(None, description="White is drawn anew. Without it, what is transparent in `image` is.")
    image_prompt: Picture = Field(None, description="A picture to vary, where a Redux network is.")
    control_image: Picture = Field(None, description="Canny: its edges are kept. Depth: give `preprocessed_image`.")
    preprocessed_image: Picture = Field(None, description="Edges or a depth map, made already.")
    canny_low_threshold: int | None = Field(None, ge=0, le=500)
    canny_high_threshold: int | None = Field(None, ge=0, le=500)
    width: int | None = Field(None, ge=16, le=8192, description="A multiple of 16.")
    height: int | None = Field(None, ge=16, le=8192, description="A multiple of 16.")
    aspect_ratio: str | None = Field(None, max_length=8, description="auto, or WIDTH:HEIGHT from 1:3 to 3:1.")
    resolution: str | None = Field(None, max_length=8, description="768sq, 1k, 1.5k, 2k or 4k.")
    steps: int | None = Field(None, ge=1, le=1000)
    guidance: float | None = Field(None, ge=0, le=1000, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, le=2**64 - 1)
    output_format: Literal["jpeg", "png", "webp"] = "jpeg"
    webhook_url: str | None = Field(None, max_length=2083, description="Told when the job is over.")
    webhook_secret: str | None = Field(None, max_length=512, description="Signs what the webhook is told.")
    negative_prompt: str | None = Field(None, max_length=131_072, description="Ours: what should not be seen.")
    true_cfg_scale: float | None = Field(None, ge=1, le=100, allow_inf_nan=False, description="Ours: its scale.")
    strength: float | None = Field(None, gt=0, le=1, allow_inf_nan=False, description="Ours: how much changes.")
    loras: list[LoraAsked] | None = Field(None, max_length=32, description="Ours: LoRAs of this request.")
    conditions: list[ConditionAsked] | None = Field(None, max_length=8, description="Ours: what else steers it.")
    safety_tolerance: int | None = Field(None, ge=0, le=6, description="Without effect.")
    prompt_upsampling: bool | None = Field(None, description="Without effect.")
    grounding: bool | None = Field(None, description="Without effect.")
    raw: bool | None = Field(None, description="Without effect.")
    interval: float | None = Field(None, ge=0, le=100, allow_inf_nan=False, description="Without effect.")


class AsyncResponse(BaseModel):
    """Where to ask for the result."""

    id: str
    polling_url: str
    cost: float | None = Field(None, description="Pictures that are charged.")
    input_mp: float | None = None
    output_mp: float | None = None


class ResultResponse(BaseModel):
    """How far it is; in `result` the picture's address, when it is Ready."""

    id: str
    status: Status
    result: dict[str, Any] | None = None
    progress: float | None = None
    details: dict[str, Any] | None = None
    preview: dict[str, Any] | None = None
    cost: float | None = None


class Credits(BaseModel):
    """Pictures that the key may still ask for today; null if there is no bound."""

    credits: float | None
    used: int
    per_day: int | None
    per_minute: int | None


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["BFL"], dependencies=[Depends(keyed)])

    @routes.get("/v1/get_result", response_model=ResultResponse, responses=documented(400, 401, 404, 422, 500, 503))
    def get_result(web: WebRequest, id: Annotated[str, Query(max_length=100)]) -> Response:
        """How far a job is, and its picture."""
        site = site_of(web)
        job = site.store.job(id)
        if job is None or job.key != id_of(web):
            return Answer({"id": id, "status": "Task not found", "result": None, "progress": None}, 404)
        web.scope["state"]["job"] = job.id
        answer = result_of(site, job, site.base(web))
        return Answer(answer, 404 if answer["status"] == "Task not found" else 200)

    @routes.get("/v1/credits", response_model=Credits, responses=documented(401, 500, 503))
    def credits(web: WebRequest) -> Response:
        """What the key may still ask for."""
        key = key_of(web)
        used = site_of(web).store.used(id_of(web))[0]
        bounds = {
            "per_day": None if key is None else key.per_day,
            "per_minute": None if key is None else key.per_minute,
        }
        left = None if key is None or key.per_day is None else float(max(0, key.per_day - used))
        return Answer({"credits": left, "used": used, **bounds})

    @routes.post(
        PATH,
        response_model=AsyncResponse,
        responses=documented(400, 401, 404, 408, 413, 422, 429, 500, 503),
        openapi_extra={"parameters": [{"name": "x-request-id", "in": "header", "schema": {"type": "string"}}]},
    )
    async def generate(
        web: WebRequest,
        model: Annotated[str, Path(max_length=200, examples=["nano"])],
        inputs: Annotated[Inputs, Body()],
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    ) -> Response:
        """Put a picture into the line."""
        site = site_of(web)
        job = await ask(web, asked(model, inputs, idempotency_key))
        base = site.base(web)
        width, height = job.output["size"]
        answer = {
            "id": job.id,
            "polling_url": f"{base}/v1/get_result?id={job.id}",
            "cost": float(job.charged),
            "output_mp": round(width * height / 1e6, 4),
        }
        return Answer(answer, headers=without_effect(inputs))

    return routes


def without_effect(inputs: BaseModel) -> dict[str, str]:
    """A header that names what was taken and changes nothing."""
    found = [name for name in NO_EFFECT if getattr(inputs, name, None) is not None and name in inputs.model_fields_set]
    return {"x-without-effect": ", ".join(found)} if found else {}


def asked(model: str, inputs: Inputs, once: str | None = None) -> Asked:
    """The request without its shape.

    Raises:
        UnfitError: a threshold has no effect.
    """
    images = [] if inputs.images is None else [inputs.images] if isinstance(inputs.images, str) else inputs.images
    pictures = [("image", inputs.image)]
    pictures += [(name, getattr(inputs, name)) for name in REFERENCES]
    pictures += [(f"images.{i}", picture) for i, picture in enumerate(images)]
    made = inputs.preprocessed_image is not None
    control = ("preprocessed_image", inputs.preprocessed_image) if made else ("control_image", inputs.control_image)
    thresholds = {"low": inputs.canny_low_threshold, "high": inputs.canny_high_threshold}
    for name, value in thresholds.items():
        if value is not None and (made or control[1] is None):
            raise UnfitError(f"canny_{name}_threshold", "is for the edges of control_image, and there is none")
    return Asked(
        names={**NAMES, "image": "image" if inputs.image is not None else "input_image"},
        model=model,
        prompt=inputs.prompt or "",
        negative=inputs.negative_prompt,
        cfg=inputs.true_cfg_scale,
        seed=inputs.seed,
        steps=inputs.steps,
        guidance=inputs.guidance,
        width=inputs.width,
        height=inputs.height,
        ratio=inputs.aspect_ratio,
        resolution=inputs.resolution,
        pictures=[(name, picture) for name, picture in pictures if picture is not None],
        mask=inputs.mask,
        strength=inputs.strength,
        control=None if control[1] is None else (control[0], control[1]),
        edged=made,
        edges={name: float(value) for name, value in thresholds.items() if value is not None},
        varied=[] if inputs.image_prompt is None else [("image_prompt", inputs.image_prompt)],
        loras=inputs.loras or (),
        conditions=inputs.conditions or (),
        format=inputs.output_format,
        output={"shape": "bfl"},
        once=once,
        webhook=inputs.webhook_url,
        webhook_secret=inputs.webhook_secret,
    )


def result_of(site: Site, job: Job, base: str) -> dict[str, Any]:
    """What is told of a job: to who polls, and to its webhook."""
    told: dict[str, Any] = {"id": job.id, "result": None, "details": None, "preview": None}
    told["progress"] = 1.0 if job.state == "done" else job.steps_done / max(1, job.steps)
    told["cost"] = float(job.charged)
    if not job.over:
        return {**told, "status": "Pending"}
    if job.state != "done":
        return {**told, "status": "Error", "details": {"error": job.error, "kind": job.error_kind}}
    pictures = site.store.pictures(job.id)
    if not pictures:
        return {**told, "status": "Task not found", "details": {"error": "its pictures have expired"}}
    assert job.started is not None and job.ended is not None
    samples = [site.address(base, picture.blob) for picture in pictures]
    result = {
        "sample": samples[0],
        "prompt": job.request.prompt,
        "seed": pictures[0].seed,
        "start_time": job.started,
        "end_time": job.ended,
        "duration": job.ended - job.started,
        **({"samples": samples} if len(samples) > 1 else {}),
    }
    return {**told, "status": "Ready", "result": result}


async def told_of(site: Site, job: Job) -> dict[str, Any]:
    """What a webhook is told."""
    return await run_in_threadpool(result_of, site, job, str(job.output.get("base", "")))
