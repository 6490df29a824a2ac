"""OpenAI's shape, asked by the official client over a socket."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image

from miniflux.apps.serve.asked import NO_EFFECT
from miniflux.apps.serve.openai import Edit
from miniflux.service.jobs import keys
from tests.apps.serve.conftest import Serve, Served, listening, opened, plain, png

PROMPT = "a red circle on a blue background"
Live = tuple[Served, str]


def client_of(served: Served, url: str, **more: Any) -> OpenAI:
    return OpenAI(**{"api_key": served.key, "base_url": f"{url}/v1", "max_retries": 0, "timeout": 60, **more})


@pytest.fixture
def client(live: Live) -> Iterator[OpenAI]:
    with client_of(*live) as found:
        yield found


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def file(picture: Image.Image, name: str = "a.png") -> io.BytesIO:
    data = io.BytesIO(png(picture))
    data.name = name
    return data


def test_generations(client: OpenAI) -> None:
    answer = client.images.generate(
        model="nano", prompt=PROMPT, n=2, size="96x64", extra_body={"seed": 11, "num_inference_steps": 2}
    )
    assert answer.data is not None and len(answer.data) == 2 and answer.size == "96x64"
    assert abs(answer.created - time.time()) < 60 and answer.output_format == "png"
    for i, one in enumerate(answer.data):
        image = opened(one.b64_json or "")
        assert image.size == (96, 64) and image.getpixel((0, 0)) == plain((1, 1), 11 + i).getpixel((0, 0))
        assert one.to_dict()["seed"] == 11 + i
    assert answer.usage is not None
    assert answer.usage.output_tokens == 2 * 6 * 4
    assert answer.usage.total_tokens == answer.usage.input_tokens + 48


def test_addresses_and_formats(client: OpenAI) -> None:
    answer = client.images.generate(
        model="nano", prompt=PROMPT, response_format="url", size="64x64", output_format="webp", output_compression=50
    )
    assert answer.data is not None and answer.data[0].b64_json is None
    got = httpx.get(answer.data[0].url or "", trust_env=False)
    assert got.headers["content-type"] == "image/webp" and opened(got.content).size == (64, 64)


def test_edit_of_a_picture_with_a_mask(live: Live, client: OpenAI) -> None:
    """OpenAI's masks are transparent where something is to be drawn."""
    served, _ = live
    mask = plain((64, 64), 1)
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(0, (0, 0, 32, 64))
    mask.putalpha(alpha)
    with_response = client.images.with_raw_response.edit(
        model="nano-fill", image=file(plain((64, 64), 5)), mask=file(mask), prompt="a star"
    )
    job = served.store.job(with_response.headers["x-job-id"])
    assert job is not None and job.request.image is not None and job.request.mask is not None
    kept = served.inputs.mask(job.request.mask)
    assert kept[:, :32].min() == 1 and kept[:, 32:].max() == 0
    answer = with_response.parse()
    assert answer.data is not None and opened(answer.data[0].b64_json or "").size == (64, 64)


def test_edit_of_several_pictures(live: Live, client: OpenAI) -> None:
    served, _ = live
    answer = client.images.with_raw_response.edit(
        model="nano2",
        image=[file(plain((64, 64), 5)), file(plain((80, 64), 6), "b.png")],
        prompt="both",
        n=2,
        size="64x64",
        extra_body={"seed": 3, "loras": "[]"},
    )
    job = served.store.job(answer.headers["x-job-id"])
    assert job is not None and job.request.images == 2 and job.request.seed == 3
    assert [dict(use.about)["index"] for use in job.request.conditions] == [1, 2]


def test_variations(live: Live, client: OpenAI) -> None:
    served, _ = live
    with pytest.raises(openai.BadRequestError, match="Redux"):
        client.images.create_variation(model="nano", image=file(plain((64, 64), 5)))
    answer = client.images.with_raw_response.create_variation(
        model="nano", image=file(plain((64, 64), 5)), extra_body={"strength": 0.7, "prompt": "a star"}
    )
    job = served.store.job(answer.headers["x-job-id"])
    assert job is not None and job.request.strength == 0.7 and job.request.prompt == "a star"


def test_streaming_with_partial_images(client: OpenAI) -> None:
    stream = client.images.generate(
        model="nano",
        prompt=PROMPT,
        size="64x64",
        stream=True,
        partial_images=2,
        extra_body={"seed": 21, "num_inference_steps": 6},
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]  # pyright: ignore
    for event in events:
        assert event.size == "64x64" and event.output_format == "png" and event.background == "opaque"
        assert opened(event.b64_json).size == (64, 64)
    last = events[-1]
    assert last.type == "image_generation.completed" and last.usage.output_tokens == 16
    assert opened(last.b64_json).getpixel((0, 0)) == plain((1, 1), 21).getpixel((0, 0))


def test_streaming_an_edit(client: OpenAI) -> None:
    stream = client.images.edit(
        model="nano-kontext", image=file(plain((64, 64), 5)), prompt="blue", stream=True, partial_images=1
    )
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_models(client: OpenAI) -> None:
    names = {model.id for model in client.models.list()}
    assert {"nano", "nano-dev", "nano3"} <= names and "flux-dev" not in names
    model = client.models.retrieve("nano")
    assert model.object == "model" and model.owned_by == "miniflux"
    assert model.to_dict()["served_by"] == "nano-dev"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("../../etc/passwd")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"size": "1000x64"}, "size"),
        ({"size": "64"}, "size"),
        ({"size": "8192x8192"}, "size"),
        ({"n": 11}, "n"),
        ({"n": 0}, "n"),
        ({"response_format": "bytes"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"background": "transparent"}, "background"),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"frame_count": 4}, "frame_count"),
        ({"svg": {"model": "x"}}, "svg"),
        ({"seed": 2**64 - 1, "n": 2}, "seed"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": 2.0, "model": "nano3"}, "guidance_scale"),
        ({"negative_prompt": "fog"}, "negative_prompt"),
        ({"strength": 0.5}, "strength"),
        ({"image": "x"}, "image"),
        ({"loras": [{"name": "none"}]}, "loras.0.name"),
    ],
)
def test_refused_by_name(client: OpenAI, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="nano", prompt=PROMPT, extra_body=body)
    assert caught.value.param == param and param in str(caught.value)
    assert caught.value.type == "invalid_request_error" and caught.value.code
    assert caught.value.request_id


def test_a_form_that_is_none(live: Live) -> None:
    served, url = live
    answer = httpx.post(f"{url}/v1/images/edits", json={"prompt": "x"}, headers=served.headers, trust_env=False)
    assert answer.status_code == 400 and "multipart/form-data is expected" in answer.json()["error"]["message"]


def test_errors_of_forms(live: Live, client: OpenAI) -> None:
    served, url = live
    for body, param in (({"seed": "x"}, "seed"), ({"sed": "1"}, "sed"), ({"loras": "[{}]"}, "loras.0.name")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(model="nano2", image=file(plain((64, 64), 5)), prompt="x", extra_body=body)
        assert caught.value.param == param
    bearer = {"authorization": f"Bearer {served.key}"}
    answer = httpx.post(
        f"{url}/v1/images/edits", headers=bearer, files={"mask": png(plain((8, 8), 1))}, trust_env=False
    )
    assert answer.status_code == 400 and answer.json()["error"]["param"] in ("prompt", "image")
    answer = httpx.post(f"{url}/v1/images/edits", headers=bearer, json={"prompt": "x"}, trust_env=False)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="no picture"):
        client.images.edit(model="nano2", image=("a.png", b"<svg/>"), prompt="x")
    with pytest.raises(openai.BadRequestError, match="looks at no pictures"):
        client.images.edit(model="nano", image=file(plain((64, 64), 5)), prompt="x")


def test_errors_by_their_kinds(live: Live, client: OpenAI) -> None:
    served, url = live
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(model="gpt-image-2", prompt=PROMPT)
    assert missing.value.param == "model" and missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as wrong, client_of(served, url, api_key="mf-wrong") as stranger:
        stranger.images.generate(model="nano", prompt=PROMPT)
    assert wrong.value.code == "invalid_api_key"
    poor = keys.add(served.store, "poor", per_day=1)
    with client_of(served, url, api_key=poor) as limited:
        limited.images.generate(model="nano", prompt=PROMPT, size="64x64")
        with pytest.raises(openai.RateLimitError) as caught:
            limited.images.generate(model="nano", prompt=PROMPT, size="64x64")
    assert caught.value.code == "quota_exceeded" and int(caught.value.response.headers["retry-after"]) > 80_000


@pytest.mark.parametrize(
    ("kind", "error", "code"),
    [
        ("input", openai.BadRequestError, "invalid_value"),
        ("memory", openai.BadRequestError, "out_of_memory"),
        ("time", openai.BadRequestError, "time_limit_exceeded"),
        ("fault", openai.InternalServerError, "server_error"),
    ],
)
def test_jobs_that_fail(live: Live, client: OpenAI, kind: str, error: type[openai.APIStatusError], code: str) -> None:
    served, _ = live
    served.painter.refuses = (kind, "too strange to draw")
    try:
        with pytest.raises(error, match="too strange") as caught:
            client.images.generate(model="nano", prompt=PROMPT)
        assert caught.value.code == code
        with pytest.raises(openai.APIError, match="too strange"):
            list(client.images.generate(model="nano", prompt=PROMPT, stream=True))
    finally:
        served.painter.refuses = None


def test_timeouts_and_retries(live: Live) -> None:
    """A client that gives up is not waited for; one that names its request finds it again."""
    served, url = live
    served.painter.at_work.clear()
    time.sleep(0.05)
    before = {job["id"] for job in _jobs(served)}
    with client_of(served, url, timeout=0.5) as hasty, pytest.raises(openai.APITimeoutError):
        hasty.images.generate(model="nano", prompt=PROMPT)
    until(lambda: {job["state"] for job in _jobs(served) if job["id"] not in before} == {"cancelled"})
    before = {job["id"] for job in _jobs(served)}
    with client_of(served, url, timeout=0.5, max_retries=4) as patient:
        threading.Timer(1.2, served.painter.at_work.set).start()
        answer = patient.images.generate(model="nano", prompt=PROMPT, extra_headers={"idempotency-key": "once"})
    assert answer.data
    (job,) = [job for job in _jobs(served) if job["id"] not in before]
    assert job["state"] == "done"


def _jobs(served: Served) -> list[dict[str, Any]]:
    from sqlalchemy import select

    from miniflux.service.jobs.tables import JOBS

    with served.store.reading() as c:
        return [dict(row) for row in c.execute(select(JOBS.c.id, JOBS.c.state)).mappings()]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(live: Live, stream: bool) -> None:
    """While its picture is drawn: that stops."""
    served, url = live
    before = {job["id"] for job in _jobs(served)}
    served.painter.seconds = 0.1
    try:
        bearer = {"authorization": f"Bearer {served.key}"}
        body = {"model": "nano", "prompt": PROMPT, "num_inference_steps": 1000, "stream": stream}
        with httpx.Client(timeout=20.0 if stream else 1.0, trust_env=False) as client:
            if stream:
                with client.stream("POST", f"{url}/v1/images/generations", json=body, headers=bearer):
                    time.sleep(0.5)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{url}/v1/images/generations", json=body, headers=bearer)
        until(lambda: {job["state"] for job in _jobs(served) if job["id"] not in before} == {"cancelled"})
    finally:
        served.painter.seconds = 0.0


def test_what_has_no_effect(live: Live, client: OpenAI) -> None:
    fields = set(Edit.model_fields) & set(NO_EFFECT)
    assert fields == {"quality", "style", "moderation", "user", "safety_identifier", "input_fidelity"}
    answer = client.images.with_raw_response.generate(
        model="nano", prompt=PROMPT, quality="high", user="me", moderation="low"
    )
    assert set(answer.headers["x-without-effect"].split(", ")) == {"quality", "user", "moderation"}


def test_a_full_line_is_waited_for(serve: Serve) -> None:
    """The client tries again after `Retry-After`."""
    served = serve(waiting=1)
    served.client.__exit__(None, None, None)
    served.painter.at_work.clear()
    time.sleep(0.05)
    with listening(served.app) as url, client_of(served, url, max_retries=5) as client:
        first = httpx.post(f"{url}/v1/nano", json={"prompt": "x"}, headers=served.headers, trust_env=False)
        assert first.status_code == 200
        threading.Timer(0.5, served.painter.at_work.set).start()
        assert client.images.generate(model="nano", prompt=PROMPT).data
    served.client.__enter__()


def test_strange_texts_come_back(live: Live) -> None:
    """Half characters, zeros and what is no JSON are refused or drawn, never a fault."""
    served, url = live
    bearer = {"authorization": f"Bearer {served.key}", "content-type": "application/json"}
    bodies = [
        b'{"prompt": "\\ud800", "model": "nano"}',
        b'{"prompt": "x", "model": "\\udfff"}',
        b'{"prompt": "a\\u0000b", "model": "nano", "size": "64x64"}',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "guidance_scale": NaN}',
        b'{"prompt": "x", "guidance_scale": 1e999}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"\xff\xfe",
        b"",
        b"null",
        json.dumps({"\ud83d": 1, "prompt": "x"}).encode(),
    ]
    with httpx.Client(base_url=url, headers=bearer, trust_env=False, timeout=60) as client:
        answers = [client.post("/v1/images/generations", content=body) for body in bodies]
    assert [answer.status_code for answer in answers] == [400, 400, 200, 400, 400, 400, 400, 400, 400, 400, 400, 400]
    assert all(answer.json()["error"]["message"] for answer in answers if answer.status_code != 200)
