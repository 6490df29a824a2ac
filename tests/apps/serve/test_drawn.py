"""What is asked for in either shape is drawn by a real worker: the same bytes as the library draws."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from miniflux.service import Models
from miniflux.service.jobs.worker import Worker, encoded
from miniflux.settings import Request
from tests.apps.serve.conftest import Served, opened, plain, png, text_of

PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "seed": 5, "output_format": "png"}


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("drawn"))
    served.painter.at_work.clear()
    worker = Worker("worker", served.bench, served.blobs, Models(given=served.inputs))  # pyright: ignore
    thread = threading.Thread(target=worker.serve, daemon=True)
    thread.start()
    with TestClient(served.app, raise_server_exceptions=False) as client:
        served.client = client
        yield served
    worker.stop.set()
    thread.join(60)
    served.close()


def sample(drawing: Served, model: str, **body: Any) -> bytes:
    told = drawing.result(drawing.post(f"/v1/{model}", **{"prompt": PROMPT, **SMALL, **body}))
    assert told["status"] == "Ready", told
    answer = drawing.client.get(told["result"]["sample"])
    assert answer.status_code == 200
    return answer.content


def test_the_same_bytes(drawing: Served) -> None:
    request = Request(prompt=PROMPT, model="nano-schnell", seed=5, steps=2, width=64, height=64)
    (image,) = Models().draw(request, lambda done, preview: None).images
    assert sample(drawing, "nano-schnell") == encoded(image, {"format": "png"})[0]
    body = {"model": "nano-schnell", "prompt": PROMPT, "size": "64x64", "seed": 5, "num_inference_steps": 2, "n": 2}
    answer = drawing.post("/v1/images/generations", **body).json()
    assert opened(answer["data"][0]["b64_json"]).tobytes() == image.tobytes()
    assert [one["seed"] for one in answer["data"]] == [5, 6]


def test_whatever_steers(drawing: Served) -> None:
    """Each changes the picture, and nothing of it is refused by who draws."""
    picture, mask = plain((64, 64), 9), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    photo, net = text_of(picture), {"kind": "ControlNet", "network": "canny", "image": text_of(plain((64, 64), 3))}
    drawn = {
        "plain": sample(drawing, "nano"),
        "lora": sample(drawing, "nano", loras=[{"name": "realism", "strength": 0.9}]),
        "net": sample(drawing, "nano", conditions=[net]),
        "changed": sample(drawing, "nano", input_image=photo, strength=0.6),
        "inpainted": sample(drawing, "nano", input_image=photo, mask=text_of(mask)),
        "negative": sample(drawing, "nano", negative_prompt="a star", true_cfg_scale=3.0),
    }
    assert len(set(drawn.values())) == len(drawn)
    kept = opened(drawn["inpainted"]).crop((48, 0, 64, 64))
    assert max(abs(a - b) for a, b in zip(kept.tobytes(), picture.crop((48, 0, 64, 64)).tobytes(), strict=True)) < 60
    filled = sample(drawing, "nano-fill", image=photo, mask=text_of(mask))
    assert filled != drawn["inpainted"]
    for model, more in (("nano-kontext", {}), ("nano2", {"input_image_2": text_of(plain((64, 64), 1))}), ("nano3", {})):
        looked = sample(drawing, model, input_image=photo, **more)
        assert looked != sample(drawing, model, input_image=text_of(plain((64, 64), 40)), **more)


def test_streaming_previews(drawing: Served) -> None:
    """Models with a table of colours show what they have so far."""
    body = {"model": "nano", "prompt": PROMPT, "size": "64x64", "num_inference_steps": 6, "stream": True}
    answer = drawing.post("/v1/images/generations", **body, partial_images=2)
    names = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    assert names == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    answer = drawing.post("/v1/images/generations", **body, partial_images=3, n=2)
    told = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]
    partial = [one for one in told if one["type"] == "image_generation.partial_image"]
    which = [(one["partial_image_index"], one["image_index"]) for one in partial]
    assert which == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({one["b64_json"] for one in partial}) == 6
    assert [one["image_index"] for one in told if one["type"] == "image_generation.completed"] == [0, 1]


def test_refused_by_who_draws(drawing: Served) -> None:
    """What is known only when networks are loaded."""
    net = {"kind": "ControlNet", "network": "canny", "image": text_of(plain((64, 64), 3))}
    told = drawing.result(drawing.post("/v1/nano2", **{"prompt": PROMPT, **SMALL}, conditions=[net]))
    assert told["status"] == "Error" and "FLUX.1" in told["details"]["error"] and "/" not in told["details"]["error"]
    answer = drawing.post("/v1/images/generations", model="nano2", prompt=PROMPT, conditions=[net])
    assert answer.status_code == 400 and "FLUX.1" in answer.json()["error"]["message"]


def test_png_is_png(drawing: Served) -> None:
    files = {"image": ("a.png", png(plain((64, 64), 9))), "mask": ("m.png", png(Image.new("L", (64, 64), 255)))}
    data = {"model": "nano-fill", "prompt": PROMPT, "seed": "5", "num_inference_steps": "2"}
    answer = drawing.client.post("/v1/images/edits", headers=drawing.headers, files=files, data=data)
    assert answer.status_code == 200, answer.text
    assert opened(answer.json()["data"][0]["b64_json"]).format == "PNG"
