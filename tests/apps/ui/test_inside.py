"""Looking inside from the page: the maps are the library's own, the picture is the same, memory is bounded."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains

import miniflux
from miniflux.apps.ui import inside
from miniflux.apps.ui import site as of_site
from miniflux.apps.ui.handlers import _telling
from miniflux.apps.ui.inside import Eye, view
from miniflux.apps.ui.recording import Recording
from miniflux.apps.ui.site import opened
from miniflux.conditions import Reference
from miniflux.errors import InputError
from miniflux.sampling.observing import observed
from miniflux.settings import Request
from miniflux.study import attention_maps, patch_maps
from miniflux.study.mapping.maps import Maps
from tests.apps.ui.conftest import Tab
from tests.apps.ui.test_handlers import ANN, BOB, People

PROMPT = "a red circle on a red square"
WORDS = ["a:1", "red:1", "circle", "on", "a:2", "red:2", "square"]
SMALL: dict[str, Any] = {"steps": 2, "width": 64, "height": 64, "seed": 3}


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Iterator[People]:
    with opened(tmp_path_factory.mktemp("site")) as site:
        yield People(site)


def drawn(people: People, session: str = ANN, model: str = "nano-dev", prompt: str = PROMPT, **other: Any) -> Any:
    """A picture in the history of a session."""
    people.site.submit(session, [Request(prompt=prompt, model=model, **{**SMALL, **other})])
    return people.drawn(session)


def tells(people: People, name: str, session: str = ANN, **what: Any) -> dict[str, Any]:
    """An event of the view; what was answered, by the names of the controls."""
    handler = _telling(getattr(people.handlers, name), people.c)
    return people.named(handler(SimpleNamespace(**what), people.web(session)))


def looked(people: People, entry: Any, session: str = ANN) -> Recording:
    """What was seen of a picture, when it has been."""
    job = inside.look(people.site, session, entry)
    job.results(60)
    recording = people.site.shelf(session).recording
    assert recording is not None
    return recording


def seen(model: str, prompt: str = PROMPT, **asked: Any) -> tuple[Eye, Recording]:
    """What is seen of a picture that is drawn without a page."""
    pipe = miniflux.load(model)
    eye = Eye(pipe, prompt)
    with observed(eye):
        result = pipe.generate(prompt, **{**SMALL, **asked})
    return eye, eye.recording(SimpleNamespace(id="x", request=Request(prompt=prompt)), result)


@pytest.mark.parametrize("model", ["nano-dev", "nano2", "nano3"])
def test_what_is_seen_is_what_the_library_sees(people: People, model: str) -> None:
    """In all families: maps of words, what patches look at, the picture itself. Shares of a patch are 1 together."""
    entry = drawn(people, model=model)
    recording = looked(people, entry)
    with people.site.models.use(entry.request) as pipe:
        words = attention_maps(pipe, PROMPT, WORDS, **SMALL)
        patches = patch_maps(pipe, PROMPT, [(1, 2)], **SMALL)
    assert recording.maps.names == words.names and recording.maps.blocks == words.blocks
    np.testing.assert_allclose(recording.maps.values, words.values, atol=1e-6)
    with Image.open(people.site.history.path(ANN, entry.id)) as kept:
        assert np.array_equal(np.asarray(kept.convert("RGB")), np.asarray(recording.maps.image))
    rows, columns = recording.grid
    shares = recording.shares[:, columns + 2]
    assert rows == columns == 4 and shares.shape == (len(WORDS) + 16,)
    np.testing.assert_allclose(shares[len(WORDS) :].reshape(4, 4), patches["1,2"], atol=1e-6)
    np.testing.assert_allclose(shares[: len(WORDS)], [words[word][1, 2] for word in WORDS], atol=1e-6)
    patch = view(recording, at=[2.5 / 4, 1.5 / 4])["patch"]
    assert (patch["row"], patch["column"], patch["box"]) == (1, 2, [0.5, 0.25, 0.25, 0.25])
    assert [share for _, share in patch["words"]] == sorted((share for _, share in patch["words"]), reverse=True)
    assert sum(share for _, share in patch["words"] + patch["rest"]) == pytest.approx(1, abs=1e-5)


def test_references_have_a_share() -> None:
    photo = Image.new("RGB", (64, 64), "yellow")
    more = {"conditions": [Reference(photo)], "steps": 1}
    _, recording = seen("nano-kontext", **more)
    from_it = patch_maps(miniflux.load("nano-kontext"), PROMPT, [(0, 0)], on=1, **{**SMALL, **more})["0,0"].sum()
    shares = dict(view(recording, at=[0, 0])["patch"]["rest"])
    assert shares[inside.THE_REFERENCES] == pytest.approx(float(from_it), abs=1e-5) and from_it > 0.01


def test_view_shows_a_word_a_step_a_block(people: People) -> None:
    recording = looked(people, drawn(people))
    first = view(recording)
    assert first["words"] == WORDS and first["word"] == WORDS[0] and first["patch"] is None
    assert [step["name"] for step in first["steps"]] == [0, 1] and "KiB" in first["about"]
    assert [block["name"] for block in first["blocks"]] == list(recording.maps.blocks)
    one = view(recording, "circle", 1, "single_blocks.0")
    assert len({first["map"], view(recording, "circle")["map"], one["map"]}) == 3
    under = recording.maps.of("circle", steps=[1], blocks=["single_blocks.0"])
    assert one["map"] == inside.Painter(recording.maps).url(under)
    for wrong, expected in (
        ({"word": "star"}, "no name 'star'"),
        ({"step": 99}, "no step 99"),
        ({"step": "one"}, "a step must be"),
        ({"block": "single_blocks.99"}, "no block"),
        ({"at": [2, 0]}, "x must be a finite number from 0 to 1"),
        ({"at": "0,0"}, "must be (x, y)"),
        ({"at": [0.5]}, "must be (x, y)"),
    ):
        with pytest.raises(InputError) as caught:
            view(recording, **wrong)
        assert expected in str(caught.value)


def test_patch_under_a_place_of_a_picture_that_was_cut_back() -> None:
    """Maps cover more than the picture then: its upper left corner is not that of the maps."""
    result: Any = SimpleNamespace(images=[Image.new("RGB", (32, 32))])
    maps = Maps("", ("a",), (0,), ("b.0",), (), np.zeros((1, 1, 1, 1, 4, 4), np.float32), result, (64, 64))
    recording = Recording("x", "", maps, np.zeros((1 + 16, 16), np.float32), 0, (), 1)
    for at, place in (([0, 0], (1, 1)), ([0.75, 0.25], (1, 2)), ([1, 1], (3, 3))):
        patch = view(recording, at=at)["patch"]
        assert (patch["row"], patch["column"]) == place
    assert view(recording, at=[0, 0])["patch"]["box"] == [0, 0, 0.5, 0.5]


def test_too_many_steps_are_thinned_and_too_many_words_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    eye, whole = seen("nano-dev", steps=4)
    each = whole.maps.values.nbytes // 4
    monkeypatch.setattr(inside, "MAP_BYTES", 2 * each + 1)
    _, some = seen("nano-dev", steps=4)
    assert some.maps.steps == (0, 2) and some.bytes < whole.bytes and "2 of 4 steps" in some.about()
    assert np.array_equal(some.maps.values, whole.maps.values[:, [0, 2]])
    monkeypatch.setattr(inside, "MAP_BYTES", each - 1)
    with pytest.raises(InputError, match="are the most that is kept"):
        seen("nano-dev")
    assert eye.unread == []


def test_of_large_pictures_patches_are_seen_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = seen("nano-dev", steps=1)
    monkeypatch.setattr(inside, "PATCHES", 15)
    _, recording = seen("nano-dev", steps=1)
    patch, exact = view(recording, at=[0.3, 0.3])["patch"], view(whole, at=[0.3, 0.3])["patch"]
    assert patch["map"] is None and exact["map"] is not None
    assert dict(patch["words"]) == pytest.approx(dict(exact["words"]), abs=1e-6)
    assert dict(patch["rest"]) == pytest.approx(dict(exact["rest"]), abs=1e-6)


def test_words_that_are_not_read_are_said() -> None:
    eye, recording = seen("nano-dev", "circle " + "and a square " * 40 + "sky", steps=1, t5_length=16)
    assert "sky" in eye.unread and "sky" not in recording.maps.names and "circle" in recording.maps.names
    assert "Not read by the model" in recording.about() and "sky" in recording.about()
    assert len(recording.shares) == len(recording.maps.names) + 16


def test_button_draws_once_more_and_keeps_what_is_seen(people: People) -> None:
    """Also of a picture that the cache would answer; nothing comes into the history."""
    entry, before = drawn(people, seed=11), len(people.site.history.listed(ANN))
    answer = tells(people, "look", id=entry.id)["inside"]
    job = people.site.job(ANN, answer["waits"])
    assert answer["id"] == entry.id and job is not None and job.title.startswith("Looking inside")
    job.wait(60)
    shown = tells(people, "view", id=entry.id, waited=True)["inside"]
    assert shown["words"] == WORDS and shown["caption"] == PROMPT
    assert tells(people, "look", id=entry.id)["inside"] == shown  # nothing is drawn for what is known
    again = tells(people, "view", id=entry.id, word="circle", step=1, block="single_blocks.0", at=[0, 0])["inside"]
    assert again["word"] == "circle" and again["patch"]["row"] == 0
    assert len(people.site.history.listed(ANN)) == before
    people.tells("remove", entry.id)
    assert people.site.shelf(ANN).recording is None  # it holds the picture


def test_what_cannot_be_looked_into_is_said(people: People) -> None:
    mute, grid = drawn(people, prompt="?!"), drawn(people, BOB)
    for session, what, expected in (
        (ANN, {"id": mute.id}, "has no words"),
        (ANN, {"id": grid.id}, grid.id[:8]),  # of somebody else
        (ANN, {}, "no picture"),
    ):
        answer = tells(people, "look", session, **what)["stage"]
        assert answer["kind"] == "error" and expected in answer["text"]
    assert "once more" in tells(people, "view", BOB, id=grid.id)["stage"]["text"]
    people.does("draw_grid", BOB, x_values="1, 2", y="")
    sheet = people.drawn(BOB)
    assert "a grid is several pictures" in tells(people, "look", BOB, id=sheet.id)["stage"]["text"]


def test_cancelled_look_keeps_nothing(people: People) -> None:
    """It stops within a step; what was seen before stays."""
    entry, old = drawn(people, BOB, seed=21), people.site.shelf(BOB).recording
    job = inside.look(people.site, BOB, replace(entry, request=replace(entry.request, steps=100)))
    while not job.status().steps_done and not job.over:
        time.sleep(0.01)
    job.cancel()
    assert job.wait(60) and job.state == "cancelled"
    assert people.site.shelf(BOB).recording is old
    assert tells(people, "view", BOB, id=entry.id, waited=True)["inside"] == {}


def test_recordings_of_all_together_are_bounded(people: People, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each session, and those that were longest unused go first."""
    mine = looked(people, drawn(people))
    assert looked(people, drawn(people, seed=12)).id != mine.id
    monkeypatch.setattr(of_site, "RECORDED_BYTES", int(1.5 * mine.bytes))
    theirs = looked(people, drawn(people, BOB), BOB)
    assert people.site.shelf(BOB).recording is theirs and people.site.shelf(ANN).recording is None


def test_page_starts_without_the_room_of_studies() -> None:
    """Only a press of the button imports it."""
    for path in Path(inside.__file__).parent.glob("*.py"):
        if path.name != "inside.py":
            top = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ImportFrom)]
            names = {f"{node.module}.{alias.name}" for node in top for alias in node.names}
            assert not {name for name in names if name.startswith("miniflux.study") or name.endswith("ui.inside")}


@pytest.mark.browser
def test_words_steps_blocks_and_patches_on_the_page(tab: Tab) -> None:
    (id,) = tab.fill("seed", 31).draw()
    try:
        tab.press("#mf-inside > button").until(lambda: tab.in_view("#mf-look"), "the button")
        tab.press("#mf-look")
        tab.until(lambda: tab.all(".mf-word"), "the words")
        assert [word.text for word in tab.all(".mf-word")][:3] == ["a:1", "red", "circle"]
        maps = [source(tab, "#mf-map img")]

        def press(selector: str) -> None:
            tab.press(selector).until(lambda: source(tab, "#mf-map img") not in maps, "another map")
            assert tab.js("return document.querySelector(arguments[0]).ariaPressed", selector) == "true"
            maps.append(source(tab, "#mf-map img"))

        press("[data-kind=word][data-name=circle]")
        press("[data-kind=step][data-name='1']")
        press("[data-kind=block][data-name='single_blocks.0']")
        assert len(tab.all("[data-kind=step] img")) == 2
        image = tab.one("#mf-map img")
        tab.js("arguments[0].scrollIntoView({block: 'center'})", image)
        ActionChains(tab.driver).move_to_element_with_offset(image, 5 - image.size["width"] // 2, 5).click().perform()
        tab.until(lambda: tab.all("#mf-patch tr"), "the patch")
        assert "row 5, column 1" in tab.one("#mf-patch figcaption").text
        shares = [float(cell.text.rstrip(" %")) for cell in tab.all("#mf-patch td")]
        assert abs(sum(shares) - 100) < 1
        assert tab.pictures[0] == id and not tab.jobs and not tab.console()
    finally:
        tab.press("#mf-inside > button")


def source(tab: Tab, selector: str) -> str:
    """Of a picture that may be replaced meanwhile."""
    return str(tab.js("return document.querySelector(arguments[0]).src", selector))
