"""Causal tracing: on a nano model the word of the colour carries the colour, and nothing else does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

import miniflux
from miniflux import study
from miniflux.errors import InputError
from miniflux.study.values.tracing import colour

CLEAN, CORRUPTED = "a red circle on a blue background", "a green circle on a blue background"
ASKED: dict[str, Any] = {"seed": 1, "steps": 4, "width": 64, "height": 64}


@cache
def nano() -> miniflux.Pipeline:
    return miniflux.load("nano")


def test_the_word_of_the_colour_carries_it(tmp_path: Path) -> None:
    """As the tokens enter the blocks; CLIP's summary has no part in it."""
    words = ["red", "circle", "blue", "background", "text"]
    table = study.trace(nano(), CLEAN, CORRUPTED, "txt_in.out", tokens=words, metric=colour("red", "green"), **ASKED)
    shares = {cell.tokens: cell.recovered for cell in table.cells}
    assert table.clean > 0.8 and table.corrupted < 0.2
    assert table.best().tokens in ("red", "text") and shares["red"] > 0.8
    assert max(abs(shares[word]) for word in ("circle", "blue", "background")) < 0.2
    assert shares["text"] == pytest.approx(1)
    summary = study.trace(nano(), CLEAN, CORRUPTED, "vector_in.out", metric=colour("red", "green"), **ASKED)
    assert abs(summary.cells[0].recovered) < 0.2
    printed = str(table)
    assert "txt_in.out  steps all" in printed and "background" in printed
    pytest.importorskip("matplotlib")
    assert table.plot(tmp_path / "table.png").stat().st_size > 1000


def test_steps_and_blocks() -> None:
    """By the distance of latents: the velocity of all steps brings everything back, that of some steps a part."""
    points = ["final_layer.out", "double_blocks.0.img_in"]
    table = study.trace(nano(), CLEAN, CORRUPTED, points, over_steps=[range(4), 0, [1, 2]], **ASKED)
    assert [(cell.point, cell.steps) for cell in table.cells] == [
        (point, steps) for point in points[::-1] for steps in ("0-3", "0", "1-2")
    ]
    found = {(cell.point, cell.steps): cell.recovered for cell in table.cells}
    assert found["final_layer.out", "0-3"] == 1
    assert 0 < found["final_layer.out", "0"] < 1
    assert table.clean == 0 and table.corrupted < 0
    assert found["double_blocks.0.img_in", "0"] == 0  # noise, which is the same in both


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"corrupted": CLEAN}, "says 0 of both prompts"),
        ({"clean": [CLEAN]}, "clean must be one prompt"),
        ({"tokens": ["orange"]}, "'orange' is not in the prompt"),
        ({"tokens": "red"}, "a list of groups"),
        ({"points": "double_blocks.0.img_out", "tokens": ["red"]}, "has no text tokens"),
        ({"points": "double_blocks.0.nothing"}, "no point"),
        ({"over_steps": [[9]]}, "steps must be from 0 to 0"),
        ({"images": 2}, "one picture is traced"),
        ({"metric": lambda result: float("nan")}, "what the metric says"),
    ],
)
def test_bad_input_is_refused(given: dict[str, Any], said: str) -> None:
    asked = {"clean": CLEAN, "corrupted": CORRUPTED, "points": "txt_in.out", **ASKED, "steps": 1, **given}
    with pytest.raises(InputError, match=said):
        study.trace(nano(), **asked)


def test_colours() -> None:
    measure = colour("red", "green")
    result = nano().generate(CLEAN, **ASKED)
    assert measure(result) > 0.8
    assert colour("green", "red")(result) < 0.2
    with pytest.raises(InputError, match="a colour must be one of"):
        colour("mauve", "red")
