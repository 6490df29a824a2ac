"""What people meet every day, on a desk and on a phone: what is in view, what stays, what can be undone."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from miniflux.apps.cli import main
from miniflux.apps.ui.launch import Page
from miniflux.lora.attaching import BUNDLED_LORAS
from tests.apps.ui.conftest import Tab, browser

pytestmark = pytest.mark.browser

DESK, PHONE = 1280, 390


@pytest.fixture(params=[DESK, PHONE], ids=["wide", "narrow"])
def sized(request: pytest.FixtureRequest, tab: Tab) -> Iterator[Tab]:
    """The page, loaded in a window of both widths, with some pictures in its history."""
    tab.resized(request.param, 844).open()
    while len(tab.pictures) < 3:
        tab.fill("seed", 50 + len(tab.pictures)).draw()
    tab.js("scrollTo(0, 0)")
    yield tab
    tab.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    tab.open()


def picture(tab: Tab, id: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(tab.fetch(f"studio/picture/{id}.png"))).convert("RGB"))


def test_fresh_page_draws_what_the_command_line_draws(stranger: Tab, tmp_path: Path) -> None:
    """Nothing is touched but the seed: no LoRA is on, and every pixel is the same."""
    assert not stranger.all(".mf-lora input[type=checkbox]:checked")
    (id,) = stranger.fill("seed", 7).draw()
    main(["generate", stranger.value("prompt"), "--seed", "7", "-o", str(tmp_path / "cli.png")])
    with Image.open(tmp_path / "cli.png") as drawn:
        assert np.array_equal(picture(stranger, id), np.asarray(drawn))


def test_seed_that_is_written_is_kept_and_an_empty_one_is_random(tab: Tab) -> None:
    """Writing one locks it, wiping it out unlocks it; no server is asked for that."""
    locked = "return document.querySelector('#mf-lock input').checked"
    tab.press("#mf-lock input").until(lambda: not tab.js(locked), "no lock")
    tab.fill("seed", 12).until(lambda: tab.js(locked), "the lock")
    tab.draw()
    assert tab.details()["seed"] == tab.value("seed") == "12"
    seeds: set[str] = set()
    for empty in ("", "-1"):
        tab.fill("seed", empty).until(lambda: not tab.js(locked), "no lock")
        tab.draw()
        tab.until(lambda: tab.value("seed") not in ("", "-1"), "the seed that was taken")
        seeds.add(tab.value("seed"))
        assert tab.details()["seed"] == tab.value("seed")
    assert len(seeds) == 2 and "12" not in seeds


def test_controls_never_lie_over_prompt_and_draw(sized: Tab) -> None:
    """However far the controls are scrolled, whatever is open: nothing of them is where the words are."""
    for name in ("more", "batch", "grid"):
        sized.press(f"#mf-{name} button")
    wide = sized.js("return innerWidth") > 900
    for share in (0, 0.1, 0.3, 0.5, 0.8, 1):
        if wide:
            sized.js(
                "const it = document.querySelector('#mf-settings'); it.scrollTop = arguments[0] * it.scrollHeight",
                share,
            )
            assert sized.in_view("#mf-prompt textarea") and sized.in_view("#mf-draw")
        inside = sized.js("""const box = document.querySelector('#mf-compose').getBoundingClientRect(), found = [];
            for (let y = Math.max(box.top + 3, 0); y < Math.min(box.bottom - 3, innerHeight); y += 4)
              for (let x = box.left + 6; x < box.right - 6; x += 9)
                found.push(...document.elementsFromPoint(x, y).filter((it) => it.closest('#mf-settings')));
            return found.length""")
        assert inside == 0


def test_left_column_stays_in_view_on_a_desk(tab: Tab) -> None:
    tab.resized(DESK, 700).open()
    try:
        while len(tab.pictures) < 8:
            tab.fill("seed", 80 + len(tab.pictures)).draw()
        for y in (0, 300, 10_000):
            tab.js("scrollTo(0, arguments[0])", y)
            assert tab.in_view("#mf-prompt textarea") and tab.in_view("#mf-draw")
        assert tab.js("return scrollY") > 200
    finally:
        tab.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_phone_has_words_picture_and_history_before_all_controls(tab: Tab) -> None:
    """The history begins within the second screen; the groups of controls are closed, and open at a touch."""
    tab.resized(PHONE, 844).open()
    try:
        if not tab.pictures:
            tab.draw()
        groups = "return document.querySelectorAll('#mf-settings .label-wrap.open').length"
        tab.until(lambda: tab.js(groups) == 0, "closed groups")
        tops = [
            tab.box(f"#mf-{name}")["top"] + tab.js("return scrollY")
            for name in ("compose", "stage", "history", "settings")
        ]
        assert tops == sorted(tops) and tops[2] < 1200 and tab.js("return document.documentElement.scrollHeight") < 2200
        assert tab.js("return document.documentElement.scrollWidth") <= PHONE
        for name, part in (
            ("Settings", "settings"),
            ("History", "history"),
            ("Picture", "stage"),
            ("Prompt", "compose"),
        ):
            tab.js(
                "[...document.querySelectorAll('.mf-nav button')].find((x) => x.textContent === arguments[0]).click()",
                name,
            )
            tab.until(lambda part=part: 0 <= tab.box(f"#mf-{part}")["top"] < 600, f"the way to {name}")
        tab.press("#mf-settings .mf-room button.label-wrap").until(lambda: tab.in_view("#mf-model input"), "the model")
        tab.js("scrollTo(0, document.documentElement.scrollHeight)")
        tab.until(lambda: tab.in_view(".mf-go-draw"), "Draw, in the bar")
        before = tab.pictures
        tab.fill("seed", 4321).press(".mf-go-draw")
        tab.until(lambda: len(tab.pictures) > len(before) and not tab.jobs, "a picture")
        tab.until(lambda: tab.in_view(".mf-image"), "the picture, in view")
    finally:
        tab.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_messages_are_in_view_wherever_the_page_is(sized: Tab, tmp_path: Path) -> None:
    """At the top, at the end; with an error, which stays until it is closed."""
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    for y in (0, 100_000):
        sized.drop(bad)
        sized.js("scrollTo(0, arguments[0])", y)
        sized.until(lambda: sized.in_view(".mf-message"), "the message")
        box = sized.box(".mf-toast")
        assert box["left"] >= 0 and box["right"] <= sized.js("return innerWidth") and "bad.safetensors" in sized.message
        sized.press(".mf-close").until(lambda: not sized.in_view(".mf-message"), "it to be gone")


def test_enlarged_picture_by_keyboard_and_by_hand(sized: Tab) -> None:
    """Enter opens, arrows go through the history and stop at its ends, Escape closes and the focus is back."""

    def keys(*keys: str) -> None:
        sized.driver.switch_to.active_element.send_keys(*keys)

    def seen() -> str:
        return sized.js("return document.querySelector('.mf-viewer[open] img')?.src ?? ''")

    ids = sized.pictures
    sized.press(f"[data-id='{ids[0]}'] .mf-tile")
    sized.js("document.querySelector('#mf-enlarge').focus()")
    keys(Keys.ENTER)
    sized.until(lambda: ids[0] in seen(), "the picture")
    box = sized.box(".mf-viewer img")
    width, height = sized.js("return [innerWidth, innerHeight]")
    assert 0.8 * min(width - 150 * (width > 900), height) < box["width"] <= width and box["height"] <= height
    for key, at in ((Keys.ARROW_LEFT, 0), (Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1)):
        keys(key)
        sized.until(lambda at=at: ids[at] in seen(), f"picture {at}")
    for _ in ids:
        keys(Keys.ARROW_RIGHT)
    sized.until(lambda: ids[-1] in seen(), "the last one")
    keys(Keys.ESCAPE)
    sized.until(lambda: not seen(), "the page")
    assert sized.js("return document.activeElement.id") == "mf-enlarge"
    assert ids[-1] in sized.js("return document.querySelector('.mf-image').src")
    sized.press("#mf-enlarge").until(seen, "the picture")
    assert sized.in_view(".mf-shut")
    sized.press(".mf-shut").until(lambda: not seen(), "the page")


def test_tiles_say_their_prompts(sized: Tab) -> None:
    sized.fill("prompt", "<b>a green ring</b> on a black background").draw()
    tile = "document.querySelector('.mf-tiles .mf-words')"
    assert sized.js(f"return {tile}.textContent") == "<b>a green ring</b> on a black background"
    assert sized.js(f"return {tile}.offsetHeight") > 10 and not sized.all(".mf-words b")
    assert "a green ring" in sized.js("return document.querySelector('.mf-tile').title")
    sized.fill("prompt", "a red circle on a blue background")


def test_delete_can_be_undone(sized: Tab) -> None:
    """The next one is looked at, not the newest; two deleted are two back, at their places; pressed twice is once."""
    ids = sized.pictures
    sized.press(f"[data-id='{ids[1]}'] .mf-tile")
    sized.js("const it = document.querySelector('#mf-remove'); it.click(); it.click()")
    sized.until(lambda: sized.pictures == [ids[0], *ids[2:]] and "Deleted" in sized.message, "one less")
    sized.until(
        lambda: sized.js("return document.querySelector('.mf-tile[aria-current]').parentElement.dataset.id") == ids[2],
        "the next",
    )
    sized.until(lambda: sized.in_view(".mf-undo"), "Undo")
    sized.press("#mf-remove").until(lambda: "2 pictures deleted" in sized.message, "two less")
    assert sized.pictures == [ids[0], *ids[3:]]
    sized.press(".mf-undo").until(lambda: sized.pictures == ids, "both")
    sized.until(lambda: "back" in sized.message and not sized.in_view(".mf-undo"), "a word, without Undo")
    assert sized.fetch(f"studio/picture/{ids[1]}.png")[:4] == b"\x89PNG"


def test_all_pictures_as_one_file(sized: Tab) -> None:
    data = sized.fetch(sized.one("#mf-download-all").get_attribute("href"))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None and len(archive.namelist()) == len(sized.pictures)
        assert archive.read(archive.namelist()[-1]) == sized.fetch(f"studio/picture/{sized.pictures[0]}.png")


LEFT: dict[str, Any] = {
    "prompt": "a small cyan cross on a red background", "steps": "9", "guidance": "2.5", "scale": "4", "images": "2",
    "seed": str(2**64 - 3), "width": "96", "height": "160", "window_to": "0.6", "shift": "1.5", "negative": "fog",
    "restart": "0.3, 0.6, 1",
}  # fmt: skip
LISTS = {"method": "cfg: ", "solver": "heun", "schedule": "karras", "step_cache": "taylor: ", "aspect": "own size"}


def test_controls_survive_a_reload(stranger: Tab) -> None:
    """Everything that can be written or chosen, the LoRA too; what is drawn then is what is seen."""
    stranger.press("#mf-more button").one("#mf-shift textarea, #mf-shift input")
    stranger.choose("method", "cfg").until(
        lambda: not stranger.js("return document.querySelector('#mf-negative textarea, #mf-negative input').disabled"),
        "cfg",
    )
    for name, text in (("solver", "heun"), ("schedule", "karras"), ("step_cache", "taylor")):
        stranger.choose(name, text)
    for name, value in LEFT.items():
        stranger.fill(name, value)
    stranger.until(lambda: stranger.value("aspect") == "own size", "the answer to the size")
    stranger.type_into(".mf-lora input[type=range]", "0.45")
    time.sleep(0.3)  # as long as the page may take to write it down
    for _ in range(2):
        stranger.open().one("#mf-shift textarea, #mf-shift input")
        assert {name: stranger.value(name) for name in LEFT} == LEFT
        assert {name: stranger.value(name) for name in LISTS if not stranger.value(name).startswith(LISTS[name])} == {}
        assert stranger.js("return document.querySelector('#mf-lock input').checked")
        assert stranger.js("return document.querySelector('.mf-lora input[type=number]').value") == "0.45"
        stranger.until(
            lambda: (
                not stranger.js("return document.querySelector('#mf-negative textarea, #mf-negative input').disabled")
            ),
            "cfg",
        )
    stranger.draw(more=2)
    details = stranger.details()
    assert (details["prompt"], details["steps"], details["size"]) == (LEFT["prompt"], "9", "96 × 160")
    assert (
        details["LoRA realism"] == "strength 0.45"
        and "taylor" in details["cache"]
        and details["negative prompt"] == "fog"
    )


def test_what_a_browser_has_kept_is_not_believed(stranger: Tab) -> None:
    """A model that is gone, numbers out of bounds, other kinds, no JSON: the page is as at first, and works."""
    for text in (
        '{"model": "gone", "method": "x", "steps": -5, "width": "wide", "prompt": 3, "lock": null, "loras": 5}',
        "[1]",
        "{",
        "null",
    ):
        for store in ("sessionStorage", "localStorage"):
            stranger.js(f"{store}.setItem('miniflux-controls', arguments[0])", text)
        stranger.driver.execute_cdp_cmd("Page.navigate", {"url": "about:blank"})
        stranger.open()
        assert (stranger.value("model"), stranger.value("steps"), stranger.value("width")) == ("nano-dev", "20", "128")
    stranger.fill("steps", 2).draw()
    assert stranger.console() == []


def test_dropped_lora_can_be_removed(stranger: Tab, page: Page, tmp_path: Path) -> None:
    """And is gone after a reload as well; the bundled one stays."""
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes((BUNDLED_LORAS / "realism.safetensors").read_bytes())
    stranger.drop(copy).until(lambda: len(stranger.all(".mf-lora")) == 3, "a second row")
    assert len(stranger.all(".mf-lora-remove")) == 1
    stranger.press(".mf-lora-remove").until(lambda: len(stranger.all(".mf-lora")) == 2, "the bundled ones")
    stranger.until(lambda: "mine is removed" in stranger.message, "a word")
    stranger.open()
    time.sleep(0.5)
    assert len(stranger.all(".mf-lora")) == 2
    stranger.fill("steps", 2).draw()
    assert not [name for name in stranger.details() if name.startswith("LoRA")]


def test_long_names_stay_inside_also_with_all_details_open(stranger: Tab, tmp_path: Path) -> None:
    """Of LoRAs, in their list, in their receipts, in the settings of a picture and below the enlarged one."""
    copy = tmp_path / f"{'a-long-name' * 12}.safetensors"
    copy.write_bytes((BUNDLED_LORAS / "realism.safetensors").read_bytes())
    stranger.drop(copy).fill("prompt", "a red circle " * 90).fill("steps", 2).draw()
    stranger.details()
    for width in (DESK, PHONE):
        stranger.resized(width, 844)
        stranger.js("document.querySelectorAll('.mf-details').forEach((one) => one.open = true)")
        outside = """return [...document.querySelectorAll('.mf-lora *, .mf-facts *')].filter((one) => {
          const card = one.closest('.mf-room, #mf-stage').getBoundingClientRect(), box = one.getBoundingClientRect();
          return box.right > card.right || box.left < card.left;
        }).map((one) => one.className || one.textContent)"""
        assert stranger.js(outside) == []
        values = stranger.js("return [...document.querySelectorAll('.mf-facts dd')].map((one) => one.clientWidth)")
        assert min(values) > 150
        stranger.js("document.querySelector('#mf-enlarge').click()")
        words, button = stranger.box(".mf-large-words"), stranger.box(".mf-newer")
        assert words["bottom"] <= button["top"] or words["left"] >= button["right"]
        stranger.press(".mf-shut")


def test_another_picture_can_be_looked_at_while_one_is_drawn(tab: Tab, gate: Any) -> None:
    gate.set()
    while len(tab.pictures) < 2:
        tab.fill("seed", 60 + len(tab.pictures)).draw()
    gate.clear()
    shown = "return document.querySelector('.mf-image').src"
    tab.fill("seed", 7001).press("#mf-draw").until(lambda: tab.js(shown).startswith("data:"), "a preview")
    tab.press(f"[data-id='{tab.pictures[1]}'] .mf-tile")
    tab.until(lambda: tab.pictures[1] in tab.js(shown), "the picture that was chosen")
    time.sleep(0.4)
    assert tab.pictures[1] in tab.js(shown)
    gate.set()
    tab.until(lambda: not tab.jobs, "the end")


class Server:
    """`miniflux ui` in a process of its own, which can be stopped and started again at its place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.url = folder, 0, ""
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "miniflux", "ui", "--history", str(self.folder)]
        command += ["--port", str(self.port)] if self.port else []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
        assert self.process.stdout is not None
        found = re.search(r"http://\S+:(\d+)", self.process.stdout.readline())
        assert found is not None
        self.url, self.port = found.group(0), int(found.group(1))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.mark.parametrize("width", [DESK, PHONE], ids=["wide", "narrow"])
def test_server_that_is_gone_is_told_at_once_and_so_is_its_return(tmp_path: Path, width: int) -> None:
    """Within a moment, in view, also to who presses Draw; after the return everything written is still there."""
    server, driver = Server(tmp_path), browser()
    try:
        tab = Tab(driver, server.url).resized(width, 844).open()
        (id,) = tab.fill("steps", 2).fill("seed", 5).draw()
        tab.fill("prompt", "a white heart on a black background").fill("seed", 99)
        if width == PHONE:
            tab.js("scrollTo(0, document.documentElement.scrollHeight)")
        server.stop()
        gone = time.monotonic()
        tab.until(lambda: tab.in_view(".mf-banner") and "does not answer" in tab.one(".mf-banner").text, "the news")
        assert time.monotonic() - gone < 3
        if width == DESK:  # and at its top: nothing is under it
            assert tab.box(".mf-banner")["bottom"] <= tab.box(".mf-header")["top"]
        tab.press("#mf-draw")
        time.sleep(0.3)
        assert tab.in_view(".mf-banner") and not tab.jobs
        server.start()
        tab.until(lambda: "started again" in tab.message, "the news of the return")
        tab.ready().until(lambda: tab.pictures == [id], "the history")
        assert not tab.in_view(".mf-banner")
        assert (tab.value("prompt"), tab.value("seed")) == ("a white heart on a black background", "99")
        assert len(tab.draw()) == 1
    finally:
        driver.quit()
        server.stop()


def test_server_that_stands_still_for_a_moment_is_back_without_a_reload(tmp_path: Path) -> None:
    server, driver = Server(tmp_path), browser()
    try:
        tab = Tab(driver, server.url).open()
        tab.js("window.same = true")
        driver.execute_cdp_cmd("Network.enable", {})
        dead = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", dead)
        tab.until(lambda: tab.in_view(".mf-banner"), "the news")
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**dead, "offline": False})
        tab.until(lambda: "is back" in tab.message and not tab.in_view(".mf-banner"), "the return")
        assert tab.js("return window.same")
    finally:
        driver.quit()
        server.stop()
