"""BFL's shape, as a client knows it that was written from docs.bfl.ai."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from PIL import Image

from miniflux.apps.serve.asked import NO_EFFECT
from miniflux.apps.serve.bfl import Inputs
from miniflux.apps.serve.offers import BLIND, EDGES, HOSTED
from miniflux.lora.attaching import BUNDLED_LORAS
from miniflux.service.jobs import keys
from miniflux.variants import VARIANTS
from tests.apps.serve.conftest import Serve, Served, opened, plain, text_of

PROMPT = "a red circle on a blue background"


def drawn_by_polling(base: str, key: str, model: str, **body: Any) -> tuple[dict[str, Any], bytes]:
    """The example of the documentation: ask, poll the address that comes, fetch the sample without a key."""
    with httpx.Client(timeout=60, trust_env=False) as client:
        headers = {"accept": "application/json", "x-key": key, "Content-Type": "application/json"}
        request = client.post(f"{base}/v1/{model}", headers=headers, json=body)
        request.raise_for_status()
        polling_url = request.json()["polling_url"]
        while True:
            result = client.get(polling_url, headers={"accept": "application/json", "x-key": key}).json()
            if result["status"] == "Ready":
                return result, client.get(result["result"]["sample"]).content
            assert result["status"] == "Pending", result
            time.sleep(0.05)


def test_ask_poll_fetch(live: tuple[Served, str]) -> None:
    served, url = live
    before = time.time()
    result, data = drawn_by_polling(url, served.key, "nano", prompt=PROMPT, width=96, height=64, seed=7, steps=3)
    about = result["result"]
    assert set(result) >= {"id", "status", "result", "progress", "details", "preview"}
    assert about["prompt"] == PROMPT and about["seed"] == 7
    assert before - 1 < about["start_time"] <= about["end_time"] < time.time() + 1
    assert about["duration"] == pytest.approx(about["end_time"] - about["start_time"])
    assert result["progress"] == 1 and result["cost"] == 1
    image = opened(data)
    assert image.size == (96, 64) and image.format == "JPEG"  # the published default


@pytest.mark.parametrize(("asked", "format", "kind"), [("png", "PNG", "image/png"), ("webp", "WEBP", "image/webp")])
def test_formats(shared: Served, asked: str, format: str, kind: str) -> None:
    told = shared.result(shared.post("/v1/nano", prompt=PROMPT, width=64, height=64, seed=1, output_format=asked))
    answer = shared.client.get(told["result"]["sample"])
    assert answer.headers["content-type"] == kind and opened(answer.content).format == format
    if format == "PNG":
        assert opened(answer.content).getpixel((0, 0)) == plain((1, 1), 1).getpixel((0, 0))


def test_a_seed_is_told(shared: Served) -> None:
    """Random ones differ, and asked for again by what was told they draw the same file."""
    first, second = (shared.result(shared.post("/v1/nano", prompt=PROMPT, width=64, height=64)) for _ in range(2))
    seed = first["result"]["seed"]
    assert seed != second["result"]["seed"]
    again = shared.result(shared.post("/v1/nano", prompt=PROMPT, width=64, height=64, seed=seed))
    names = [told["result"]["sample"].partition("?")[0] for told in (first, again)]
    assert names[0] == names[1]


def test_every_model_has_its_place(shared: Served) -> None:
    bundled = [name for name, v in VARIANTS.items() if v.bundled]
    assert "nano-dev" in bundled
    for name in ("nano-schnell", "nano2", "nano3"):
        job = shared.job(shared.post(f"/v1/{name}", prompt=PROMPT))
        assert job.request.model == name and job.output["size"] == [128, 128]
    assert shared.job(shared.post("/v1/nano", prompt=PROMPT)).request.model == "nano-dev"


def test_tables_name_models() -> None:
    assert set(HOSTED.values()) | set(BLIND) | set(EDGES) <= VARIANTS.keys()
    assert not HOSTED.keys() & VARIANTS.keys()


def test_hosted_names(serve: Serve) -> None:
    served = serve(aliases={"flux-kontext-pro": "nano-kontext"}, models=("nano-dev", "flux-kontext-pro"))
    picture = text_of(plain((64, 48), 3))
    job = served.job(served.post("/v1/flux-kontext-pro", prompt="make it blue", input_image=picture))
    assert job.request.model == "nano-kontext" and job.output["size"] == [64, 48]
    assert [use.kind for use in job.request.conditions] == ["Reference"]
    away = served.post("/v1/flux-dev", prompt=PROMPT)
    assert away.status_code == 404 and "weights of flux1-dev" in away.text
    assert served.post("/v1/nano-schnell", prompt=PROMPT).status_code == 404  # here, and not to be asked for
    unknown = served.post("/v1/flux-9", prompt=PROMPT)
    assert unknown.status_code == 404 and "'flux-9'" in unknown.json()["detail"] and "nano-dev" in unknown.text


@pytest.mark.parametrize("name", ["..%2F..%2Fetc%2Fpasswd", "%2Fetc%2Fpasswd", "nano%00", "nano%0d%0ax-evil: 1", "."])
def test_names_that_are_paths(shared: Served, name: str) -> None:
    answer = shared.client.post(f"/v1/{name}", json={"prompt": PROMPT}, headers=shared.headers)
    assert answer.status_code in (404, 405) and "x-evil" not in answer.headers


def test_unknown_parameters_are_refused_by_name(shared: Served) -> None:
    answer = shared.post("/v1/nano", prompt=PROMPT, image_promt="x")
    (about,) = answer.json()["detail"]
    assert answer.status_code == 422 and about["loc"] == ["body", "image_promt"]
    assert "unknown parameter 'image_promt'" in about["msg"] and "image_prompt" in about["msg"]


@pytest.mark.parametrize(
    ("model", "body", "name"),
    [
        ("nano", {"width": 100}, "width"),
        ("nano", {"width": 64.5}, "width"),
        ("nano", {"height": 10**9}, "height"),
        ("nano", {"steps": 0}, "steps"),
        ("nano", {"steps": True}, "steps"),
        ("nano", {"seed": -1}, "seed"),
        ("nano", {"seed": 2**64}, "seed"),
        ("nano", {"prompt": 7}, "prompt"),
        ("nano", {"guidance": "high"}, "guidance"),
        ("nano-schnell", {"guidance": 3.0}, "guidance"),
        ("nano", {"output_format": "gif"}, "output_format"),
        ("nano", {"aspect_ratio": "99:1"}, "aspect_ratio"),
        ("nano", {"aspect_ratio": "wide"}, "aspect_ratio"),
        ("nano", {"aspect_ratio": "1:1", "width": 64}, "width"),
        ("nano", {"resolution": "8k"}, "resolution"),
        ("nano", {"width": 8192, "height": 8192}, "width"),
        ("nano", {"input_image": text_of(plain((64, 64), 1))}, "input_image"),
        ("nano", {"mask": text_of(plain((64, 64), 1))}, "mask"),
        ("nano", {"strength": 0.5}, "strength"),
        ("nano", {"control_image": text_of(plain((64, 64), 1))}, "control_image"),
        ("nano", {"canny_low_threshold": 5}, "canny_low_threshold"),
        ("nano", {"image_prompt": text_of(plain((64, 64), 1))}, "image_prompt"),
        ("nano", {"negative_prompt": "fog"}, "negative_prompt"),
        ("nano", {"webhook_secret": "x"}, "webhook_secret"),
        ("nano", {"webhook_url": "http://127.0.0.1/"}, "webhook_url"),
        ("nano", {"webhook_url": "file:///etc/passwd"}, "webhook_url"),
        ("nano", {"loras": [{"name": "../../etc/passwd"}]}, "loras.0.name"),
        ("nano", {"loras": [{"name": "realism", "scale": 1}]}, "loras.0.scale"),
        ("nano", {"conditions": [{"kind": "Magic"}]}, "conditions.0.kind"),
        ("nano", {"conditions": [{"kind": "ControlNet", "network": "canny"}]}, "conditions.0.image"),
        ("nano-fill", {}, "input_image"),
        ("nano-fill", {"image": text_of(plain((64, 64), 1))}, "mask"),
        ("nano-kontext", {"input_image": "no base64!"}, "input_image"),
        ("nano-kontext", {"input_image": "http://169.254.169.254/latest"}, "input_image"),
    ],
)
def test_refused_by_name(shared: Served, model: str, body: dict[str, Any], name: str) -> None:
    answer = shared.post(f"/v1/{model}", **{"prompt": PROMPT, **body})
    assert answer.status_code == 422, answer.text
    about = answer.json()["detail"][0]
    assert ".".join(map(str, about["loc"][1:])) == name, about
    assert name in about["msg"], about


def test_what_has_no_effect_is_said(shared: Served) -> None:
    fields = set(Inputs.model_fields) & set(NO_EFFECT)
    assert fields == {"safety_tolerance", "prompt_upsampling", "grounding", "raw", "interval"}
    answer = shared.post("/v1/nano", prompt=PROMPT, safety_tolerance=2, prompt_upsampling=True)
    assert set(answer.headers["x-without-effect"].split(", ")) == {"safety_tolerance", "prompt_upsampling"}
    assert "x-without-effect" not in shared.post("/v1/nano", prompt=PROMPT).headers


@pytest.mark.parametrize(
    ("ratio", "resolution", "size"),
    [
        ("16:9", None, [176, 96]),
        ("9:16", "768sq", [576, 1024]),
        (None, "1k", [1024, 1024]),
        ("auto", "1K", [1024, 1024]),
    ],
)
def test_shapes(shared: Served, ratio: str | None, resolution: str | None, size: list[int]) -> None:
    body = {name: value for name, value in (("aspect_ratio", ratio), ("resolution", resolution)) if value is not None}
    shared.painter.at_work.clear()
    job = shared.job(shared.post("/v1/nano", prompt=PROMPT, **body))
    shared.store.cancel(job.id)
    shared.painter.at_work.set()
    assert job.output["size"] == size


def test_pictures_to_look_at(shared: Served) -> None:
    pictures = [text_of(plain((64, 64), i)) for i in range(3)]
    job = shared.job(
        shared.post("/v1/nano2", prompt="both", input_image=pictures[0], input_image_2=pictures[1], width=64, height=64)
    )
    uses = [dict(use.about) for use in job.request.conditions]
    assert [use["index"] for use in uses] == [1, 2] and len({use["picture"] for use in uses}) == 2
    assert all(use["picture"] in shared.inputs for use in uses)
    job = shared.job(shared.post("/v1/nano3", prompt="one", images=pictures))
    assert [dict(use.about)["index"] for use in job.request.conditions] == [1, 2, 3]


def test_completing(shared: Served) -> None:
    """White of a mask is drawn anew; so is what is transparent, where there is no mask."""
    picture, mask = plain((96, 64), 2), Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 48, 64))
    given = shared.job(
        shared.post("/v1/nano-fill", prompt="a star", image=text_of(picture), mask=text_of(mask), seed=4)
    )
    picture.putalpha(Image.eval(mask, lambda x: 255 - x))
    clear = shared.job(shared.post("/v1/nano-fill", prompt="a star", image=text_of(picture), seed=4))
    assert given.request.mask == clear.request.mask is not None and given.output["size"] == [96, 64]
    kept = shared.inputs.mask(given.request.mask or "")
    assert kept[:, :48].min() == 1 and kept[:, 48:].max() == 0
    other = shared.post("/v1/nano-fill", image=text_of(picture), mask=text_of(mask.resize((32, 32))))
    assert other.status_code == 422 and "32x32" in other.text
    black = shared.post("/v1/nano-fill", image=text_of(picture), mask=text_of(Image.new("L", (96, 64))))
    assert black.status_code == 422 and "black" in black.text


def test_inpainting_and_strength_with_any_model(shared: Served) -> None:
    picture = text_of(plain((100, 70), 2))
    mask = text_of(Image.new("L", (100, 70), 255))
    job = shared.job(shared.post("/v1/nano", prompt="x", input_image=picture, mask=mask))
    assert job.request.mask is not None and job.output["size"] == [96, 64]  # the nearest whole tokens
    job = shared.job(shared.post("/v1/nano", prompt="x", input_image=picture, strength=0.5, width=64, height=64))
    assert job.request.strength == 0.5 and job.request.mask is None and job.output["size"] == [64, 64]
    large = shared.job(shared.post("/v1/nano", input_image=text_of(plain((768, 384), 1)), strength=0.4))
    assert large.output["size"] == [192, 96]  # what the model has learned


def test_loras_and_control(serve: Serve, tmp_path: Any) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "mine.safetensors").write_bytes(b"x")
    served = serve(loras=folder)
    loras = [{"name": "realism", "strength": 0.5}, {"name": "mine"}]
    job = served.job(served.post("/v1/nano", prompt="x", loras=loras))
    assert [(use.file.rpartition("/")[2], use.scale) for use in job.request.loras] == [
        ("realism.safetensors", 0.5),
        ("mine.safetensors", 1.0),
    ]
    answer = served.post("/v1/nano", prompt="x", loras=[{"name": "theirs"}])
    assert answer.status_code == 422 and "'theirs'" in answer.text and str(folder) not in answer.text
    net = {"kind": "ControlNet", "network": "canny", "image": text_of(plain((64, 64), 1)), "strength": 0.8, "stop": 0.5}
    job = served.job(served.post("/v1/nano", prompt="x", conditions=[net]))
    about = dict(job.request.conditions[0].about)
    assert about["scale"] == 0.8 and about["window"] == (0.0, 0.5)
    answer = served.post("/v1/nano", prompt="x", conditions=[{**net, "network": "../canny"}])
    assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == ["body", "conditions.0.network"]


def test_a_bundled_lora_is_no_path(serve: Serve, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a file or folder elsewhere whose name is that of a bundled one, nor one in the working folder."""
    (tmp_path / "x" / "realism").mkdir(parents=True)
    (tmp_path / "realism").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    served = serve()
    for name in ("x/realism", f"{tmp_path}/realism", "./realism", "../realism", "realism/", "realism.safetensors"):
        answer = served.post("/v1/nano", prompt="x", loras=[{"name": name}])
        assert answer.status_code == 422, name
        assert answer.json()["detail"][0]["loc"] == ["body", "loras.0.name"]
    job = served.job(served.post("/v1/nano", prompt="x", loras=[{"name": "realism"}]))
    assert job.request.loras[0].file == str(BUNDLED_LORAS / "realism.safetensors")


def test_a_lora_beside_a_reference_that_decides_the_size(shared: Served) -> None:
    body = {"prompt": "x", "input_image": text_of(plain((64, 64), 1)), "loras": [{"name": "realism"}]}
    assert shared.job(shared.post("/v1/nano-kontext", **body)).output["size"] == [64, 64]


def test_equal_requests_are_drawn_once(serve: Serve) -> None:
    served = serve()
    body = {"prompt": PROMPT, "width": 64, "height": 64, "seed": 5, "output_format": "png"}
    first = served.result(served.post("/v1/nano", **body))
    again = served.post("/v1/nano", **body)
    assert again.json()["cost"] == 0 and served.result(again)["cost"] == 0
    assert len(served.painter.began) == 1
    other = served.result(served.post("/v1/nano", **{**body, "output_format": "jpeg"}))
    assert len(served.painter.began) == 2
    assert first["result"]["sample"].partition("?")[0] != other["result"]["sample"].partition("?")[0]


def test_asked_again_under_the_same_name(serve: Serve) -> None:
    served = serve()
    headers = {**served.headers, "idempotency-key": "order 66".replace(" ", "-")}
    ids = [
        served.client.post("/v1/nano", json={"prompt": PROMPT}, headers=headers).json()["id"] for _ in range(2)
    ]  # without a seed, too
    assert ids[0] == ids[1]
    other = served.client.post("/v1/nano", json={"prompt": "another"}, headers=headers)
    assert other.status_code == 422 and "order-66" in other.text


def test_failures(serve: Serve) -> None:
    served = serve()
    served.painter.refuses = ("input", "too strange to draw")
    told = served.result(served.post("/v1/nano", prompt=PROMPT))
    assert told["status"] == "Error" and told["details"]["error"] == "too strange to draw" and told["result"] is None
    assert told["cost"] == 0
    missing = served.get("/v1/get_result", id="0" * 32)
    assert missing.status_code == 404 and missing.json()["status"] == "Task not found"


def test_credits(serve: Serve) -> None:
    served = serve()
    assert served.get("/v1/credits").json() == {"credits": None, "used": 0, "per_day": None, "per_minute": None}
    served.headers = {"x-key": keys.add(served.store, "poor", per_day=2)}
    assert served.get("/v1/credits").json()["credits"] == 2
    for seed in (1, 2):
        assert served.post("/v1/nano", prompt=PROMPT, seed=seed).status_code == 200
    assert served.get("/v1/credits").json() == {"credits": 0.0, "used": 2, "per_day": 2, "per_minute": None}
    answer = served.post("/v1/nano", prompt=PROMPT, seed=3)
    assert answer.status_code == 429 and 86_000 < int(answer.headers["retry-after"]) <= 86_400
    served.headers = {"x-key": keys.add(served.store, "slow", per_minute=1)}
    assert served.post("/v1/nano", prompt=PROMPT, seed=4).status_code == 200
    answer = served.post("/v1/nano", prompt=PROMPT, seed=5)
    assert answer.status_code == 429 and 0 < int(answer.headers["retry-after"]) <= 60


def test_the_line_is_bounded(serve: Serve) -> None:
    served = serve(waiting=2)
    served.painter.at_work.clear()
    time.sleep(0.05)
    for seed in (1, 2):
        assert served.post("/v1/nano", prompt=PROMPT, seed=seed).status_code == 200
    answer = served.post("/v1/nano", prompt=PROMPT, seed=3)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
