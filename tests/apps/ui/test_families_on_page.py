"""FLUX.2 and FLUX.3 on the page, in a browser: each model's own controls, references, LoRAs, longer prompts, and the
same bytes from the saved picture."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import miniflux
from miniflux.apps.ui.launch import Page, served
from miniflux.apps.ui.site import opened
from miniflux.replay import replay
from tests.apps.ui.conftest import Tab, browser
from tests.small_models import lora, shelf

pytestmark = pytest.mark.browser

NAMES = ("flux2-dev", "flux2-klein-4b", "flux2-klein-base-4b", "flux3-klein")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shelf(tmp_path_factory.mktemp("models"), NAMES)


@pytest.fixture(scope="module")
def shelved(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page of its own, with the models in its list."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        with opened(folder, waiting=3, shelf=str(models)) as site, served(site, port=None) as page:
            yield page


@pytest.fixture(scope="module")
def own_tab(shelved: Page) -> Iterator[Tab]:
    driver = browser()
    yield Tab(driver, shelved.url).open()
    driver.quit()


@pytest.fixture
def family(own_tab: Tab) -> Tab:
    """Nothing left of the tests before; the seed stays."""
    own_tab.driver.get("about:blank")  # the page writes down its controls when it goes
    origin = {"origin": own_tab.url.rstrip("/"), "storageTypes": "local_storage"}
    own_tab.driver.execute_cdp_cmd("Storage.clearDataForOrigin", origin)
    return own_tab.open().press("#mf-lock input")


def called(page: Page, name: str) -> str:
    """What the list calls a model."""
    return next(one.name for one in page.site.listed.values() if one.path and Path(one.path).parent.name == name)


def chosen(tab: Tab, page: Page, name: str) -> Tab:
    """With a model, and a small picture of few steps."""
    tab.choose("model", called(page, name))
    wanted = str(miniflux.variants.variant(name).steps)
    tab.until(lambda: tab.value("steps") == wanted, f"{wanted} steps")
    return tab


def small(tab: Tab) -> Tab:
    return tab.fill("steps", 2).fill("width", 64).fill("height", 64).fill("seed", 5).fill("prompt", "a cat")


def usable(tab: Tab, name: str) -> bool:
    return not tab.js(
        "return document.querySelector(`#mf-${arguments[0]} textarea, #mf-${arguments[0]} input`).disabled", name
    )


def shown(tab: Tab) -> tuple[bool, bool, str]:
    """Whether guidance and a negative prompt can be used, and the method."""
    return usable(tab, "guidance"), usable(tab, "negative"), tab.value("method").partition(":")[0]


def saved(tab: Tab, id: str, folder: Path) -> Path:
    path = folder / f"{id}.png"
    path.write_bytes(tab.fetch(f"studio/picture/{id}.png"))
    return path


def test_each_model_brings_its_controls(shelved: Page, family: Tab) -> None:
    """Guidance where there is an input; CFG and a negative prompt with base models; steps and size of each."""
    for name, guidance, negative, method in (
        ("flux2-dev", True, False, "none"),
        ("flux2-klein-base-4b", False, True, "cfg"),
        ("flux2-klein-4b", False, False, "none"),
        ("flux3-klein", False, False, "none"),
    ):
        chosen(family, shelved, name)
        wanted = guidance, negative, method
        family.until(lambda wanted=wanted: shown(family) == wanted, f"the controls of {name}")
        assert family.value("width") == family.value("height") == "1024"
    assert not family.console()


def test_a_base_model_with_a_negative_prompt_and_a_lora(
    shelved: Page, family: Tab, models: Path, tmp_path: Path
) -> None:
    """Drawn, used, drawn again from the cache, with another seed, and the same bytes from the saved file."""
    style = lora(tmp_path / "style.safetensors", "flux2-klein-base-4b")
    small(chosen(family, shelved, "flux2-klein-base-4b")).fill("negative", "a dog")
    family.drop(style)
    assert "style.safetensors: " in family.message and called(shelved, "flux2-klein-base-4b") in family.message
    (id,) = family.draw()
    told = family.press(f'.mf-tiles > [data-id="{id}"]').details()
    assert told["negative prompt"] == "a dog" and told["guide"].startswith("method cfg, scale 4")
    assert told["LoRA style"] == "strength 1.0"
    made = replay(saved(family, id, tmp_path), loras=[style])
    assert made.same and not made.differences
    (other,) = family.draw("#mf-again")
    assert other != id
    family.press(f'.mf-tiles > [data-id="{id}"]').press("#mf-use")
    family.until(lambda: "The controls have the settings" in family.message, "the settings")
    assert family.value("negative") == "a dog" and float(family.value("scale")) == 4
    family.press("#mf-draw").until(lambda: "From the cache" in family.message, "an answer from the cache")
    assert not family.console()


def test_references_of_flux3_and_flux2(shelved: Page, family: Tab, tmp_path: Path) -> None:
    """As large as the first one; that of FLUX.3 is seen whole, and the picture is cut back to it."""
    photos = [tmp_path / f"{i}.png" for i in range(2)]
    for i, (path, size) in enumerate(zip(photos, ((90, 67), (70, 64)), strict=True)):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)
    for name, count, size in (("flux3-klein", 1, (90, 67)), ("flux2-klein-4b", 2, (80, 64))):
        family.open()
        small(chosen(family, shelved, name))
        family.press("#mf-pictures > button.label-wrap")
        family.one("#mf-references input[type=file]").send_keys("\n".join(map(str, photos[:count])))
        family.until(lambda count=count: len(family.all("#mf-references img")) >= count, "the references")
        if not family.js("return document.querySelector('#mf-as_reference input').checked"):
            family.press("#mf-as_reference input")
        (id,) = family.draw()
        path = saved(family, id, tmp_path)
        assert Image.open(path).size == size
        given = [Image.open(io.BytesIO(photo.read_bytes())) for photo in photos[:count]]
        assert replay(path, pictures=given).same
    assert not family.console()


def test_a_longer_prompt(shelved: Page, family: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by the model that can, drawn, and taken back."""
    writers = shelved.site.models.writers
    monkeypatch.setattr(writers, "write", partial(writers.write, max_new_tokens=8))
    small(chosen(family, shelved, "flux2-dev"))
    family.press("#mf-longer > button.label-wrap").one("#mf-rewrite")
    assert family.value("writer") == f"text encoder of {called(shelved, 'flux2-dev')}"
    family.press("#mf-rewrite").until(lambda: "The prompt is rewritten" in family.message, "a longer prompt")
    longer = family.until(lambda: (text := family.value("prompt")) != "a cat" and text)
    (id,) = family.draw()
    assert family.press(f'.mf-tiles > [data-id="{id}"]').details()["prompt"] == longer
    family.press("#mf-take-back").until(lambda: family.value("prompt") == "a cat", "the prompt as it was")
    assert not family.console()


def test_who_cannot_write_is_said(tab: Tab) -> None:
    """Without a language model there is no button, but the reason."""
    tab.open().press("#mf-longer > button.label-wrap")
    assert "No language model that can write is here" in tab.until(lambda: tab.value("unable"), "the reason")
    assert not tab.all("#mf-rewrite")
