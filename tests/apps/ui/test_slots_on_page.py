"""Pictures in the page's slots, in a browser: painted on, looked at, followed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains

import miniflux
from miniflux.apps.ui.launch import Page
from miniflux.apps.ui.slots import ITSELF
from miniflux.nano import scenes
from tests.apps.ui.conftest import Tab
from tests.steered import network

pytestmark = pytest.mark.browser

SCENE = scenes.Scene("gray", (scenes.Shape("circle", "orange", 0.3, 0.5, 0.2),), "")


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    scenes.render(SCENE, 160, 96).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def opened(tab: Tab) -> Tab:
    """The page, loaded anew, with the slots in view."""
    tab.open().press("#mf-pictures > button.label-wrap")
    tab.one("#mf-control input[type=file]")
    return tab.fill("prompt", "a blue square on a gray background").fill("steps", 2).fill("seed", 5)


def put(tab: Tab, slot: str, path: Path, shown: str) -> None:
    tab.one(f"#mf-{slot} input[type=file]").send_keys(str(path))
    tab.one(f"#mf-{slot} {shown}")


def drawn(tab: Tab, id: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(tab.fetch(f"studio/picture/{id}.png"))).convert("RGB"))


def test_what_is_not_painted_stays_as_it_is(page: Page, tab: Tab, scene: Path) -> None:
    """The picture gives the size; what is painted over is drawn anew, and no other byte differs. Drawn again from the
    history it needs nothing."""
    opened(tab)
    put(tab, "image", scene, "canvas")
    canvas = tab.one("#mf-image canvas")
    tab.js("arguments[0].scrollIntoView({block: 'center'})", canvas)
    stroke = ActionChains(tab.driver).move_to_element_with_offset(canvas, 20, -5).click_and_hold()
    for _ in range(4):
        stroke.move_by_offset(10, 2)
    stroke.release().perform()
    (id,) = tab.draw()
    before, after = np.asarray(Image.open(scene)), drawn(tab, id)
    assert before.shape == after.shape
    changed = (before != after).any(axis=2)
    assert changed.any() and changed.mean() < 0.5 and not changed[:, :40].any()
    request = page.site.history.listed(tab.driver.get_cookie("miniflux_session")["value"])[0].request
    assert request.strength == 0.75 and request.mask is not None
    mask = page.site.models.given.mask(request.mask).numpy()  # pyright: ignore[reportOptionalMemberAccess]
    assert not changed[mask == 0].any() and (mask == 1).any()
    told = tab.press(f'.mf-tiles > [data-id="{id}"]').details()
    assert told["image"] == f"{request.image[:12]}…" and told["strength"] == "0.75"  # pyright: ignore
    (again,) = tab.draw("#mf-again")
    other = (before != drawn(tab, again)).any(axis=2)
    assert other.any() and not other[mask == 0].any()
    assert not tab.console()


def test_references_control_pictures_and_their_edges(page: Page, tab: Tab, scene: Path) -> None:
    """Each slot shows what is in it. Without a network or a model that reads it, a control picture is refused in words;
    references steer."""
    pytest.importorskip("cv2")
    opened(tab)
    put(tab, "control", scene, "img")
    first = tab.one("#mf-control img").get_attribute("src")
    tab.press("#mf-edges").until(lambda: "edges" in tab.message, "the edges")
    tab.until(lambda: tab.one("#mf-control img").get_attribute("src") != first, "the preview")
    assert tab.until(lambda: tab.js("return document.querySelector('#mf-control img').naturalWidth"), "a picture")
    tab.press("#mf-draw").until(lambda: "load a Canny or Depth model" in tab.message, "a refusal")
    assert not tab.console()


def test_a_network_of_the_folder_sees_the_control_picture(page: Page, tab: Tab, scene: Path, tmp_path: Path) -> None:
    catalogue = page.site.models.catalogue
    before, catalogue.folder = catalogue.folder, tmp_path
    try:
        file = network(tmp_path / "union.safetensors", modes=3)
        opened(tab)
        put(tab, "control", scene, "img")
        put(tab, "references", scene, "img")
        tab.choose("network", "union.safetensors").fill("network_mode", "tile")
        (id,) = tab.draw()
        request = page.site.history.listed(tab.driver.get_cookie("miniflux_session")["value"])[0].request
        conditions = request.conditions
        assert [(use.kind, use.network) for use in conditions] == [("Reference", None), ("ControlNet", file)]
        assert dict(conditions[1].about)["mode"] == "tile"
        steered = [
            miniflux.conditions.Reference(str(scene)),
            miniflux.conditions.ControlNet(miniflux.conditions.load(file), str(scene), mode="tile"),
        ]
        pipe = miniflux.load("nano")
        # With whatever else the tests before have left in the controls.
        assert not request.loras and dict(conditions[1].about)["scale"] == 1
        alone = pipe.generate(**request.arguments(), conditions=steered)
        assert np.array_equal(drawn(tab, id), np.asarray(alone.images[0]))
    finally:
        catalogue.folder = before
        del catalogue.networks["union.safetensors"]


@pytest.mark.parametrize("way", ["controlnet", "lora"])
def test_the_bundled_ones_draw_along_edges(page: Page, tab: Tab, scene: Path, way: str) -> None:
    """nano-dev sees edges by the bundled ControlNet and by the bundled Canny LoRA, without a file of the user's."""
    opened(tab).choose("model", "nano-dev")
    put(tab, "control", scene, "img")
    if way == "controlnet":
        tab.choose("network", "canny (bundled)").fill("network_mode", "")
        steered = miniflux.conditions.ControlNet(miniflux.conditions.load("canny"), str(scene))
    else:
        tab.choose("network", ITSELF)
        tab.type_into("[data-id=canny][type=range]", "1")  # which switches it on
        steered = miniflux.conditions.Control(str(scene))
    (id,) = tab.draw()
    request = page.site.history.listed(tab.driver.get_cookie("miniflux_session")["value"])[0].request
    pipe = miniflux.load("nano")
    for use in request.loras:
        miniflux.lora.attach(pipe, use.file, use.strength)
    assert [use.file for use in request.loras] == (["canny"] if way == "lora" else [])
    alone = pipe.generate(**request.arguments(), conditions=[steered])
    assert np.array_equal(drawn(tab, id), np.asarray(alone.images[0]))
    if way == "lora":
        tab.press("#mf-on-canny")
    else:
        tab.choose("network", ITSELF)
    assert not tab.console()
