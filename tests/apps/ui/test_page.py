"""What people do on the page, done in a browser."""

from __future__ import annotations

import io
import json
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from miniflux.apps.ui import form
from miniflux.apps.ui.launch import Page
from miniflux.replay import replay
from miniflux.result import Result
from miniflux.service import Job
from miniflux.settings import read_picture
from tests.apps.ui.conftest import Tab

pytestmark = pytest.mark.browser


def pixels(tab: Tab, id: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(tab.fetch(f"studio/picture/{id}.png"))).convert("RGB"))


def test_draws_the_picture_that_the_library_draws(tab: Tab, page: Page) -> None:
    """Lock, seed, steps; the facts beside the picture are its own; another strength of the LoRA is another picture."""
    tab.fill("seed", 7)
    (id,) = tab.draw()
    details = tab.details()
    assert (details["seed"], details["steps"], details["model"]) == ("7", "2", "nano-dev")
    request = next(e.request for sessions in page.site.history._sessions.values() for e in sessions if e.id == id)
    with page.site.models.use(request) as pipe:
        drawn = pipe.generate(**request.arguments()).images[0]
    assert np.array_equal(pixels(tab, id), np.asarray(drawn))

    tab.type_into(".mf-lora input[type=range]", "0.5")
    (other,) = tab.draw()
    assert tab.details()["LoRA realism"] == "strength 0.5"
    assert not np.array_equal(pixels(tab, id), pixels(tab, other))
    tab.type_into(".mf-lora input[type=range]", "1")


def test_repeated_request_is_answered_from_the_cache(tab: Tab) -> None:
    tab.fill("seed", 17).draw()
    (id,) = tab.draw()
    tab.until(lambda: "cache" in tab.message.lower(), "the word cache")
    assert tab.all(f"[data-id='{id}'] .mf-badge")
    tab.fill("seed", 18).draw()
    assert "cache" not in tab.message.lower()


def test_cancel_in_the_middle_leaves_everything_usable(tab: Tab, gate: threading.Event) -> None:
    before = tab.pictures
    tab.fill("steps", 60).fill("seed", 11).press("#mf-draw")
    tab.until(lambda: any("step 1 of 60" in job for job in tab.jobs), "the first step")
    tab.until(lambda: tab.js("return document.querySelector('.mf-image').src.startsWith('data:')"), "a preview")
    tab.press(".mf-cancel")
    tab.until(lambda: not tab.jobs and "Stopped" in tab.message, "the end")
    assert tab.pictures == before
    gate.set()
    assert len(tab.fill("steps", 2).draw()) == 1


def test_three_requests_of_two_people_are_served_in_order(
    tab: Tab, stranger: Tab, page: Page, gate: threading.Event
) -> None:
    """Places and estimates are shown, neither sees the other's, and what the line cannot take is refused politely."""
    finished: list[int] = []
    deliver = page.site.queue.deliver
    assert deliver is not None

    def noted(job: Job, which: int, result: Result) -> None:
        finished.append(job.requests[which].seed)
        deliver(job, which, result)

    page.site.queue.deliver = noted
    before = tab.pictures
    tab.fill("seed", 101).press("#mf-draw").until(lambda: any("step 1 of 2" in job for job in tab.jobs), "the first")
    stranger.fill("steps", 2).press("#mf-lock input").fill("seed", 102).press("#mf-draw")
    stranger.until(lambda: any("place 1 in line" in job for job in stranger.jobs), "a place in line")
    assert "s left" in stranger.jobs[0]
    assert len(stranger.jobs) == 1 and stranger.pictures == []
    tab.fill("seed", 103).press("#mf-draw")
    tab.until(lambda: any("place 2 in line" in job and "s left" in job for job in tab.jobs), "the third")
    tab.fill("seed", 104).press("#mf-draw").until(lambda: len(tab.jobs) == 3, "the fourth")
    tab.fill("seed", 105).press("#mf-draw").until(lambda: "the queue is full" in tab.message, "a polite no")
    tab.js("document.querySelectorAll('.mf-cancel')[2].click()")
    tab.until(lambda: len(tab.jobs) == 2, "the fourth to be gone")
    gate.set()
    tab.until(lambda: not tab.jobs and len(tab.pictures) == len(before) + 2, "the end")
    stranger.until(lambda: len(stranger.pictures) == 1, "the other's picture")
    page.site.queue.deliver = deliver
    assert finished == [101, 102, 103]
    assert not set(tab.pictures) & set(stranger.pictures)
    assert stranger.fetch(f"studio/picture/{tab.pictures[0]}.png")[:4] != b"\x89PNG"


def test_reload_keeps_the_history_and_use_settings_fills_the_controls(tab: Tab) -> None:
    tab.fill("prompt", "a small cyan cross on a red background").fill("seed", 2**64 - 3).fill("steps", 3)
    (id,) = tab.draw()
    before = tab.pictures
    tab.open().until(lambda: tab.pictures == before, "the history")
    tab.fill("seed", 0).fill("prompt", "something else").fill("steps", 2)
    tab.press(f"[data-id='{id}'] .mf-tile").press("#mf-use")
    tab.until(lambda: "settings" in tab.message, "the settings")
    assert tab.value("prompt") == "a small cyan cross on a red background"
    assert (tab.value("seed"), tab.value("steps")) == (str(2**64 - 3), "3")
    (again,) = tab.draw()
    assert np.array_equal(pixels(tab, id), pixels(tab, again))
    (other,) = tab.draw("#mf-again")
    assert not np.array_equal(pixels(tab, id), pixels(tab, other))
    assert tab.details()["prompt"] == "a small cyan cross on a red background"


@pytest.mark.parametrize("button", ["#mf-draw", "#mf-again", "#mf-use", "#mf-die"])
def test_press_in_the_first_moment_is_answered(tab: Tab, button: str) -> None:
    """As soon as a button is there, it works: nobody has to wait for a page that looks ready."""
    if not tab.pictures:
        tab.draw()
    before = tab.pictures
    tab.when_loaded(button)
    if button == "#mf-use":
        tab.until(lambda: "The controls have the settings" in tab.message, "the settings")
    elif button == "#mf-die":
        tab.until(lambda: tab.value("seed") != "0", "a seed")
    else:
        tab.until(lambda: len(tab.pictures) == len(before) + 1 and not tab.jobs, "a picture")
    tab.ready()


DROP = """const data = new DataTransfer();
data.items.add(new File(["one\\ntwo\\nthree"], "three.txt", {type: "text/plain"}));
target.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}))"""


@pytest.mark.parametrize("place", ["#mf-stage", "#mf-files", ".mf-header"])
def test_files_are_dropped_anywhere_also_in_the_first_moment(tab: Tab, place: str) -> None:
    tab.when_loaded(place, DROP).until(lambda: "three.txt: 3 prompts" in tab.message, "an answer")
    tab.ready().js("document.querySelector('.mf-message').textContent = ''")
    tab.press("#mf-settings .mf-room button.label-wrap")  # the section with the field for files is closed
    tab.js(f"const target = document.querySelector(arguments[0]); {DROP}", place)
    tab.until(lambda: "three.txt: 3 prompts" in tab.message, "another answer")


def test_presses_that_follow_each_other_at_once_are_all_answered(tab: Tab, gate: threading.Event) -> None:
    """Three of Draw, and two of Cancel, each in one turn of the browser."""
    before = tab.pictures
    tab.press("#mf-lock input")  # a new seed each
    tab.js("for (let i = 0; i < 3; i++) document.querySelector('#mf-draw').click()")
    tab.until(lambda: len(tab.jobs) == 3, "three jobs")
    tab.js("[...document.querySelectorAll('.mf-cancel')].slice(1).forEach((button) => button.click())")
    tab.until(lambda: len(tab.jobs) == 1, "two of them to be gone")
    gate.set()
    tab.until(lambda: not tab.jobs and len(tab.pictures) == len(before) + 1, "the first one's picture")


def test_typing_asks_the_server_nothing(tab: Tab) -> None:
    seed = tab.value("seed")
    tab.js("performance.clearResourceTimings()")
    for text in ("a", "a r", "a red star"):
        tab.fill("prompt", text)
    tab.fill("steps", 7).type_into(".mf-lora input[type=range]", "0.7")
    tab.press("#mf-die").until(lambda: tab.value("seed") != seed, "a seed")
    assert tab.asked == 1
    tab.type_into(".mf-lora input[type=range]", "1")


def test_late_answer_to_the_loading_changes_nothing_that_was_set(tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strength that is set before the server has said which LoRAs this browser dropped."""
    late, rows = threading.Event(), form.rows

    def held(*arguments: Any, **named: Any) -> Any:
        assert len(arguments) > 2 or named or late.wait(60)  # two arguments: what a page that was loaded asks for
        return rows(*arguments, **named)

    monkeypatch.setattr(form, "rows", held)
    tab.open().type_into(".mf-lora input[type=range]", "0.45")
    assert tab.asked == 0
    late.set()
    tab.until(lambda: tab.asked == 1, "the answer")
    tab.fill("steps", 2).draw()
    assert tab.details()["LoRA realism"] == "strength 0.45"


def test_batch(tab: Tab, tmp_path: Path) -> None:
    """From the text box, which a dropped file fills."""
    (tmp_path / "words.txt").write_text(
        "a red circle on a blue background\n\na green ring on a black background\n", "utf-8"
    )
    if not tab.js("return document.querySelector('#mf-prompts')?.offsetParent"):
        tab.press("#mf-batch button")
    tab.drop(tmp_path / "words.txt")
    assert "2 prompts" in tab.message
    tab.one("#mf-prompts textarea")
    made = tab.draw("#mf-draw-all", more=2)
    assert tab.details()["prompt"] == "a green ring on a black background"
    assert len(made) == 2


def test_grid_is_one_labelled_picture_that_replays(tab: Tab, tmp_path: Path) -> None:
    tab.press("#mf-grid button")
    tab.one("#mf-x_values textarea, #mf-x_values input")
    tab.fill("x_values", "1-3").choose("y", "solver").fill("y_values", "euler, heun")
    (id,) = tab.draw("#mf-draw-grid")
    path = tmp_path / "grid.png"
    path.write_bytes(tab.fetch(f"studio/picture/{id}.png"))
    reading = read_picture(path)
    assert [(r.seed, r.solver) for r in reading.requests] == [(s, m) for m in ("euler", "heun") for s in (1, 2, 3)]
    width, height = Image.open(path).size
    assert width > 3 * 128 and height > 2 * 128
    assert replay(path).same


def test_download_then_replay_gives_the_same_pixels(tab: Tab, tmp_path: Path) -> None:
    """And dropped on the page it fills the controls; without settings nothing can be read from it."""
    tab.fill("prompt", "a white heart on a black background").fill("seed", 5)
    tab.draw()
    path, bare = tmp_path / "picture.png", tmp_path / "bare.png"
    path.write_bytes(tab.fetch(tab.one("#mf-download").get_attribute("href")))
    bare.write_bytes(tab.fetch(tab.one("#mf-bare").get_attribute("href")))
    assert replay(path).same
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(bare)))
    assert read_picture(bare).origin == "none"
    tab.fill("prompt", "something else").fill("seed", 9)
    tab.drop(path)
    assert tab.value("prompt") == "a white heart on a black background"
    assert tab.value("seed") == "5"
    tab.drop(bare)
    assert "no settings" in tab.message
    assert tab.value("seed") == "5"


def test_settings_of_other_programs_say_what_was_not_understood(tab: Tab, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text(
        "parameters", "a blue star\nNegative prompt: fog\nSteps: 3, Sampler: Euler, Seed: 77, Size: 128x128, Wibble: 3"
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png", pnginfo=info)
    tab.drop(tmp_path / "theirs.png")
    assert "A1111" in tab.message and "Wibble" in tab.message
    assert (tab.value("prompt"), tab.value("seed")) == ("a blue star", "77")


def test_settings_under_more_are_drawn_with_and_come_back(tab: Tab) -> None:
    """The section is closed at first; *Use these settings* opens it where something in it is not as usual."""
    tab.open().press("#mf-more button").one("#mf-shift textarea, #mf-shift input")
    tab.choose("method", "cfg").until(lambda: not disabled(tab, "window_to"), "the method's window")
    tab.choose("step_cache", "taylor").fill("window_to", 0.6).fill("shift", "1.5").fill("restart", "0.3, 0.6, 1")
    tab.fill("steps", 8).fill("seed", 3).fill("width", 64).fill("height", 64).draw()
    details = tab.details()
    assert "window 0, 0.6" in details["guide"].replace("0.0", "0")
    assert (details["shift"], details["restart"]) == ("1.5", "0.3, 0.6, 1") and "taylor" in details["cache"]
    tab.open().press("#mf-use").until(lambda: "The controls have" in tab.message, "the settings")
    assert tab.js("return document.querySelector('#mf-shift').offsetParent !== null")
    assert [tab.value(name) for name in ("window_to", "shift", "restart")] == ["0.6", "1.5", "0.3, 0.6, 1"]
    (again,) = tab.draw()
    assert tab.all(f"[data-id='{again}'] .mf-badge")  # the same picture, from the cache
    tab.choose("method", "none").until(lambda: disabled(tab, "window_to"), "no method")
    tab.choose("step_cache", "none").fill("window_to", 1).fill("shift", "").fill("restart", "")
    assert disabled(tab, "window_to") and "Without effect" in tab.js(
        "return document.querySelector('#mf-window_to').textContent"
    )


def disabled(tab: Tab, name: str) -> bool:
    return tab.js(f"return document.querySelector('#mf-{name} input').disabled")


def test_settings_of_comfyui_fill_the_controls(tab: Tab, tmp_path: Path) -> None:
    """A workflow with nodes that mean nothing here: what is understood goes into the controls, the rest is listed."""
    nodes = {
        "3": ("KSampler", {"seed": 424242, "steps": 6, "cfg": 2.5, "sampler_name": "dpmpp_2m", "scheduler": "beta",
              "denoise": 1.0, "model": ["7", 0], "positive": ["6", 0], "negative": ["9", 0], "latent_image": ["5", 0]}),
        "4": ("UNETLoader", {"unet_name": "somebody's.safetensors", "weight_dtype": "default"}),
        "5": ("EmptyLatentImage", {"width": 192, "height": 128, "batch_size": 2}),
        "6": ("CLIPTextEncode", {"text": "a lighthouse at dusk", "clip": ["4", 1]}),
        "7": ("LoraLoaderModelOnly", {"model": ["8", 0], "lora_name": "realism.safetensors", "strength_model": 0.6}),
        "8": ("WobbleModel", {"model": ["4", 0], "amount": 3}),
        "9": ("CLIPTextEncode", {"text": "fog", "clip": ["4", 1]}),
    }  # fmt: skip
    graph = {id: {"class_type": kind, "inputs": inputs} for id, (kind, inputs) in nodes.items()}
    info = PngInfo()
    info.add_text("prompt", json.dumps(graph))
    Image.new("RGB", (8, 8)).save(tmp_path / "workflow.png", pnginfo=info)
    tab.drop(tmp_path / "workflow.png")
    assert "ComfyUI" in tab.message
    assert "somebody's" in tab.message and "WobbleModel" in tab.message
    seen = {name: tab.value(name) for name in ("prompt", "negative", "seed", "steps", "width", "height", "images")}
    assert seen == {
        "prompt": "a lighthouse at dusk", "negative": "fog", "seed": "424242", "steps": "6", "width": "192",
        "height": "128", "images": "2",
    }  # fmt: skip
    assert (tab.value("solver"), tab.value("schedule"), tab.value("scale")) == ("dpmpp-2m", "beta-comfyui", "2.5")
    assert tab.js("return document.querySelector('.mf-lora input[type=number]').value") == "0.6"
    tab.draw(more=2)
    details = tab.details()
    assert (details["negative prompt"], details["LoRA realism"]) == ("fog", "strength 0.6")
    tab.choose("method", "none").until(
        lambda: tab.js("return document.querySelector('#mf-negative textarea').disabled"), "no method"
    )


def test_broken_lora_is_refused_and_changes_nothing(tab: Tab, tmp_path: Path) -> None:
    broken, pretender = tmp_path / "broken.safetensors", tmp_path / "pretender.safetensors"
    broken.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    header = json.dumps({"lora_unet_what.lora_up.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}})
    pretender.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(16))
    rows = tab.js("return document.querySelector('.mf-loras').innerHTML")
    before = tab.pictures
    for file in (broken, pretender):
        tab.drop(file)
        assert file.name in tab.message
        assert str(tmp_path) not in tab.message and "uploads" not in tab.message
        assert tab.js("return document.querySelector('.mf-loras').innerHTML") == rows
    assert tab.pictures == before
    assert len(tab.draw()) == 1


def test_dropped_lora_gives_its_receipt_and_works_beside_the_other(tab: Tab, page: Page, tmp_path: Path) -> None:
    copy = tmp_path / "second one.safetensors"
    source = Path(page.site.models.lora("realism").source)
    copy.write_bytes(source.read_bytes() + b"")
    tab.drop(copy)
    assert "8 of 8 modules" in tab.message
    tab.until(lambda: len(tab.all(".mf-lora")) == 3, "a row more")
    tab.type_into("[data-id=realism][type=range]", "1")
    tab.draw()
    details = tab.details()
    assert [value for name, value in details.items() if name.startswith("LoRA")] == ["strength 1.0", "strength 1.0"]
    tab.open().until(lambda: len(tab.all(".mf-lora")) == 3, "the new row, after a reload")
    assert [box.is_selected() for box in tab.all(".mf-lora input[type=checkbox]")] == [True, False, True]


def test_model_without_guidance_says_why_it_is_grey(tab: Tab) -> None:
    tab.choose("model", "nano-schnell")
    tab.until(lambda: tab.js("return document.querySelector('#mf-guidance input').disabled"), "grey guidance")
    assert "no input for it" in tab.js("return document.querySelector('#mf-guidance').innerText")
    tab.until(lambda: tab.value("steps") == "4", "its steps")
    tab.draw()
    assert tab.details()["model"] == "nano-schnell"
    tab.choose("model", "nano-dev").until(lambda: tab.value("steps") == "20", "the first model again")


HOSTILE = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> {{value}} ${window.hacked=1} '
    "\N{GRINNING FACE} \x07\u202e "
)


def test_hostile_prompt_is_text(tab: Tab) -> None:
    """Markup, templates, emoji, control characters, and a hundred thousand letters."""
    prompt = HOSTILE + "x" * (100_000 - len(HOSTILE))
    tab.fill("prompt", prompt)
    (id,) = tab.draw()
    shown = tab.details()["prompt"]
    assert shown.replace("\r", "") == prompt
    assert tab.js("return document.querySelector('.mf-caption').textContent").startswith(HOSTILE)
    assert not tab.js("return window.hacked")
    assert not tab.all("#mf-stage img[src=x], #mf-stage script")
    assert id in tab.pictures


def test_keyboard_alone(tab: Tab) -> None:
    """Ctrl+Enter draws; everything can be reached; the focus is seen."""
    before = len(tab.pictures)
    tab.js("document.querySelector('#mf-prompt textarea').focus()")
    field = tab.driver.switch_to.active_element
    field.send_keys(Keys.CONTROL, Keys.ENTER)
    tab.until(lambda: len(tab.pictures) == before + 1 and not tab.jobs, "the picture")
    seen: list[str] = []
    tab.js("document.querySelector('.mf-theme').focus()")
    for _ in range(60):
        tab.driver.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(
            tab.js(
                "const e = document.activeElement, s = getComputedStyle(e); const box = e.closest('[id^=mf-]'); "
                "return (box ? box.id : e.tagName) + ' ' + (s.outlineStyle !== 'none' || s.boxShadow !== 'none')"
            )
        )
    reached = {one.split()[0] for one in seen}
    assert {"mf-prompt", "mf-draw", "mf-model", "mf-steps", "mf-seed", "mf-die", "mf-use", "mf-download"} <= reached
    assert not [one for one in seen if one.endswith("false") and not one.startswith(("BODY", "HTML"))]


def test_drawing_and_cancelling_by_keyboard_alone(tab: Tab, gate: threading.Event) -> None:
    """Write, go on to Draw, press it; go on to Cancel, press it; the focus is never lost."""

    def active() -> WebElement:
        return tab.driver.switch_to.active_element

    def tab_to(selector: str) -> WebElement:
        for _ in range(100):
            if tab.js("return document.activeElement.matches(arguments[0])", selector):
                return active()
            active().send_keys(Keys.TAB)
        raise AssertionError(f"{selector} is not reached")

    before = tab.pictures
    tab.js("document.querySelector('#mf-prompt textarea').focus()")
    active().send_keys(Keys.CONTROL, "a")
    active().send_keys("a red ring on a blue background")
    tab_to("#mf-draw").send_keys(Keys.SPACE)
    tab.until(lambda: any("step 1 of 2" in job for job in tab.jobs), "the first step")
    tab_to(".mf-cancel").send_keys(Keys.ENTER)
    tab.until(lambda: not tab.jobs and "Stopped" in tab.message, "the end")
    assert tab.js("return document.activeElement.className").startswith("mf-message")
    gate.set()
    tab.js("document.querySelector('#mf-draw').focus()")
    active().send_keys(Keys.ENTER)
    tab.until(lambda: len(tab.pictures) == len(before) + 1 and not tab.jobs, "the picture")
    assert tab.details()["prompt"] == "a red ring on a blue background"
    tab_to("#mf-again").send_keys(Keys.ENTER)
    tab.until(lambda: len(tab.pictures) == len(before) + 2 and not tab.jobs, "another one")
    assert active().get_attribute("id") == "mf-again"
    tile = tab_to(".mf-tile:not([aria-current])")
    name = tile.get_attribute("aria-label")
    tile.send_keys(Keys.ENTER)
    tab.until(lambda: tab.one(".mf-tile[aria-current]").get_attribute("aria-label") == name, "its tile")


CONTRAST = """
const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
const light = ([r, g, b]) => {
  const part = (x) => ((x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
};
const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
const found = [];
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_ELEMENT);
while (texts.nextNode()) {
  const element = texts.currentNode, style = getComputedStyle(element), box = element.getBoundingClientRect();
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const field = element.matches("textarea, input:not([type=range], [type=checkbox], [type=file])") && element.value;
  const words = own || field;
  if (!words || !box.width || !box.height || style.visibility === "hidden" || +style.opacity === 0) continue;
  if (element.closest(".hide, script, style, [aria-hidden=true], :disabled")) continue;  // exempt: what is inactive
  const layers = [];
  let opacity = 1;
  for (let up = element; up; up = up.parentElement) {
    const ground = getComputedStyle(up);
    opacity *= +ground.opacity;
    layers.push(parse(ground.backgroundColor));
    if (layers.at(-1)[3] === 1) break;
  }
  let ground = [255, 255, 255, 1];
  for (const layer of layers.reverse()) ground = over(layer, ground);
  const ink = parse(style.color);
  ink[3] *= opacity;
  const [a, b] = [light(over(ink, ground)), light(ground)].sort((x, y) => y - x);
  const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
  const ratio = (a + 0.05) / (b + 0.05);
  const name = `${element.tagName}.${element.className} ${(element.value || element.textContent).slice(0, 40)}`;
  found.push([ratio, large ? 3 : 4.5, `${ratio.toFixed(2)} ${name}`]);
}
return found;
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["wide", "narrow"])
def test_look(tab: Tab, width: int, dark: bool) -> None:
    """At both widths, in both themes: nothing to scroll sideways, contrast AA (WCAG 1.4.3), buttons big enough."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    tab.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    if tab.js("return document.body.classList.contains('dark')") != dark:
        tab.press(".mf-theme")
    tab.js("document.querySelectorAll('.mf-details').forEach((one) => one.open = true)")
    try:
        assert tab.js("return document.documentElement.scrollWidth") <= width
        window = tab.js("return getComputedStyle(document.documentElement).colorScheme")  # of its own scroll bar
        assert window == ("dark" if dark else "light")
        tab.js("const it = document.querySelector('.mf-message'); it.hidden = false; it.className += ' mf-error'")
        tab.js("document.querySelector('.mf-message').textContent = 'what is wrong'")
        field = tab.one("#mf-model input")
        tab.js("arguments[0].scrollIntoView({block: 'center'})", field)
        field.click()
        tab.one("[role=listbox] [role=option]")
        tab.until(lambda: not tab.js("return document.getAnimations().length"), "colours that have changed")
        told = tab.js(CONTRAST)
        assert len(told) > 50 and all(
            any(word in text for _, _, text in told) for word in ("what is wrong", "nano-sch")
        )
        assert not [text for ratio, least, text in told if ratio < least]
        heights = tab.js("return [...document.querySelectorAll('.mf-button')].map((one) => one.offsetHeight)")
        assert min(height for height in heights if height) >= 24
    finally:
        tab.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        tab.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_goes_outside_and_the_console_is_silent(tab: Tab, page: Page) -> None:
    """Of all that the tests above did, since the browser began."""
    outside = [url for url in tab.requests() if not url.startswith((page.url, "data:", "blob:", "about:", "chrome"))]
    assert not outside
    assert tab.console() == []
