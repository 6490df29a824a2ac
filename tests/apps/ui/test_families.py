"""FLUX.2 and FLUX.3 behind the page, asked without a browser: what each model's controls are, and what they draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miniflux.apps.cli import main
from miniflux.apps.ui import form
from miniflux.apps.ui.site import opened
from miniflux.replay import replay
from miniflux.sampling import guide
from miniflux.settings import AtLevels, Request
from tests.apps.ui.test_handlers import ANN, People
from tests.small_models import lora, model, shelf

NAMES = ("flux2-dev", "flux2-klein-4b", "flux2-klein-base-4b", "flux3-klein", "flux3-klein-base")
OF_A_METHOD = ("scale", "negative", "window_from", "window_to")
PHOTO = Image.fromarray(np.random.default_rng(2).integers(0, 256, (67, 90, 3), np.uint8), "RGB")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shelf(tmp_path_factory.mktemp("models"), NAMES)


@pytest.fixture(scope="module")
def people(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[People]:
    with opened(tmp_path_factory.mktemp("site"), shelf=str(models)) as site:
        yield People(site)


@pytest.fixture(scope="module")
def listed(people: People) -> dict[str, str]:
    """What the list calls each model."""
    names = {Path(one.path).parent.name: name for name, one in people.site.listed.items() if one.path}
    assert set(names) == set(NAMES)
    return names


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "method", "grey"),
    [
        ("flux2-dev", 50, 4.0, ("none", 3.0), {*OF_A_METHOD}),
        ("flux2-klein-4b", 4, None, ("none", 3.0), {"guidance", *OF_A_METHOD}),
        ("flux2-klein-base-4b", 50, None, ("cfg", 4.0), {"guidance"}),
        (
            "flux3-klein",
            16,
            None,
            ("none", 3.0),
            {"guidance", "step_cache", *OF_A_METHOD},
        ),
        ("flux3-klein-base", 50, None, ("cfg", 4.0), {"guidance", "step_cache"}),
    ],
)
def test_a_model_brings_its_controls(
    people: People, listed: dict[str, str], name: str, steps: int, guidance: float | None, method: Any, grey: set[str]
) -> None:
    """Steps, guidance, method and size are those of the model that is chosen, whatever was there before; what has no
    effect is grey, and says why."""
    told = people.does("model", model=listed[name], method="apg", step_cache="tea")
    assert told["steps"] == steps and told["width"]["value"] == 1024
    assert (told["method"], told["scale"]["value"]) == method
    assert guidance is None or told["guidance"]["value"] == guidance
    dark = {control for control in ("guidance", "step_cache", *OF_A_METHOD) if not told[control]["interactive"]}
    assert dark == grey
    if "step_cache" in grey:
        assert told["step_cache"]["value"] == "none" and "step caches watch" in told["step_cache"]["info"]
    if name.endswith("base-4b"):
        assert "it is drawn with the method cfg" in told["guidance"]["info"]


def drawn(people: People, **other: Any) -> Any:
    told = people.does("draw", seed="3", **other)
    assert told["stage"]["kind"] != "error", told
    return people.drawn()


def test_a_base_model_draws_what_the_command_line_draws(
    people: People, listed: dict[str, str], models: Path, tmp_path: Path
) -> None:
    """With its own CFG and a negative prompt; the method none is no CFG at all."""
    base: dict[str, Any] = {"model": listed["flux2-klein-base-4b"], "prompt": "a cat", "negative": "a dog"}
    entry = drawn(people, **base, method="cfg", scale=4.0)
    out, bare = str(tmp_path / "out.png"), str(tmp_path / "bare.png")
    path = people.site.models.catalogue.listed()
    given = next(one.path for one in path if one.name == base["model"])
    command = ("generate", "a cat", "--model", given, "--size", "64", "--steps", "2", "--seed", "3", "-o")
    assert main([*command, out, "--negative", "a dog"]) == main([*command, bare, "--guidance", "1"]) == 0
    assert np.array_equal(pixels(people, entry), np.asarray(Image.open(out)))
    entry = drawn(people, **base, method="none")
    assert entry.request.guidance == 1.0 and entry.request.negative is None
    assert np.array_equal(pixels(people, entry), np.asarray(Image.open(bare)))


def pixels(people: People, entry: Any) -> np.ndarray:
    return np.asarray(Image.open(people.site.history.path(ANN, entry.id)))


def test_guidance_of_a_base_model_is_shown_as_its_method(people: People, listed: dict[str, str]) -> None:
    """Of requests that say nothing of it, too; and what is shown asks for the same picture."""
    site, name = people.site, listed["flux2-klein-base-4b"]
    one = site.listed[name]
    levels = AtLevels((1.0, 0.5), (3.0, 1.0))
    for request, scale in (
        (Request(prompt="a", model=one.model), 4.0),
        (Request(prompt="a", model=one.model, guidance=2.5, negative="b"), 2.5),
        (Request(prompt="a", model=one.model, guide=guide("cfg", scale=6)), 6.0),
        (Request(prompt="a", model=one.model, guidance=levels, schedule=(1.0, 0.5, 0.0)), 3.0),
    ):
        values, _ = form.values_from(request, site.shelf(ANN), site.listed)
        assert (values["method"], values["scale"]) == ("cfg", scale)
        again = form.request_from(values, site.shelf(ANN), site.listed)
        usual = form.values_from(again, site.shelf(ANN), site.listed)[0]
        assert usual == values
        assert again.plan(one.variant).described()["guide"] == request.plan(one.variant).described()["guide"]
        assert dict(form.described(request, one))["guide"].startswith("method cfg, scale")


def test_cut_back_to_a_reference(people: People, listed: dict[str, str], tmp_path: Path) -> None:
    """As large as the reference: drawn on its canvas, cut back to it; used again, drawn again, answered from the cache,
    and made again from its file."""
    PHOTO.save(tmp_path / "photo.png")
    given: dict[str, Any] = {"model": listed["flux3-klein"], "prompt": "a cat"}
    slots = {"references": [str(tmp_path / "photo.png")], "as_reference": True}
    entry = drawn(people, **given, **slots)
    assert Image.open(people.site.history.path(ANN, entry.id)).size == PHOTO.size
    assert (entry.request.width, entry.request.height) == (96, 80)
    used = people.tells("use", entry.id)
    assert used["as_reference"] is False and used["rest"]["value"]["conditions"][0]["crop"] is True
    controls = {name: used[name]["value"] for name in ("steps", "width", "height", "rest", "method")}
    told = people.does("draw", seed="3", **given, **controls)
    assert told["stage"]["kind"] == "cached"
    assert people.tells("again", entry.id)["stage"]["kind"] != "error"
    assert Image.open(people.site.history.path(ANN, people.drawn().id)).size == PHOTO.size
    path = people.site.history.path(ANN, entry.id)
    assert replay(path, pictures=[PHOTO]).same


@pytest.mark.filterwarnings("ignore:the answer was cut off")
def test_prompts_are_rewritten_and_taken_back(people: People, listed: dict[str, str]) -> None:
    """By the one that is whole; the others say what they lack, by their names and no path."""
    found, refused = people.site.models.writers.listed()
    (writer,) = found
    assert writer == f"text encoder of {listed['flux2-dev']}" and len(refused) == 4
    assert all("12 missing, such as" in reason for reason in refused.values()), refused
    assert not any(str(people.site.models.catalogue.folder) in reason for reason in refused.values())
    words = {"prompt": "a cat", "writer": writer, "told": "Say more.", "heat": "0.9"}
    told = people.does("rewrite", **words)
    assert told["prompt"] not in ("", "a cat") and told["before"] == "a cat" and told["take_back"]["visible"]
    back = people.named(people.handlers.take_back(people.given(before="a cat")))
    assert back == {"prompt": "a cat", "take_back": back["take_back"]} and not back["take_back"]["visible"]
    for wrong, said in (
        ({"prompt": " "}, "there is no prompt that could be rewritten"),
        ({"heat": "hot"}, "temperature: expected a number, got 'hot'"),
        ({"heat": "-1"}, "temperature must be a finite number of at least 0"),
        ({"writer": "somebody"}, "language model 'somebody' is not here; there are text encoder of"),
    ):
        stage = people.does("rewrite", **{**words, **wrong})["stage"]
        assert stage["kind"] == "error" and said in stage["text"]


@pytest.mark.parametrize("name", ["flux2-dev", "flux3-klein"])
def test_a_lora_is_compared_with_the_model_that_is_here(
    people: People, listed: dict[str, str], tmp_path: Path, name: str
) -> None:
    """Not with the release whose name its file has."""
    file = lora(tmp_path / f"for {name}.safetensors", name)
    told = people.does("files", model=listed[name], files=[str(file)])
    assert told["stage"]["kind"] == "ok", told["stage"]
    row = next(row for row in told["loras"] if row["label"] == f"for {name}")
    assert row["on"] and not row["reason"] and "1 of 1 modules applied" in row["about"]
    entry = drawn(people, model=listed[name], prompt="a cat", loras=told["loras"])
    assert [use.scale for use in entry.request.loras] == [1.0]


def test_who_cannot_write_is_said(tmp_path: Path) -> None:
    model(tmp_path / "models" / "klein", "flux2-klein-4b", writes=False)
    with opened(tmp_path / "site", shelf=str(tmp_path / "models")) as site:
        one = People(site)
        assert not one.c.writer.visible and not one.c.rewrite.visible and one.c.unable.visible
        text = one.c.unable.value
        assert "No language model that can write is here" in text and "12 missing" in text and str(tmp_path) not in text
        model(tmp_path / "models" / "whole", "flux2-klein-4b")
        told = one.named(one.handlers.arrive({one.c.kept: "{}"}, one.web(ANN)))
        assert told["writer"]["visible"] and told["rewrite"]["visible"] and not told["unable"]["visible"]


def test_a_page_of_a_base_model_begins_with_its_method(models: Path, tmp_path: Path) -> None:
    path = models / "flux3-klein-base"
    with opened(tmp_path / "site", first=str(path)) as site:
        c = People(site).c
        assert (c.method.value, c.scale.value, c.steps.value) == ("cfg", 4.0, 50)
        assert c.negative.interactive and not c.guidance.interactive and not c.step_cache.interactive
