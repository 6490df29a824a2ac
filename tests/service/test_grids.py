"""Batches and grids: the requests of every pair of values, and one labelled picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from miniflux.errors import InputError
from miniflux.sampling import guide
from miniflux.service import Axis, Grid, batch, parse_prompts
from miniflux.settings import LoraUse, Request

BASE = Request(
    prompt="a star",
    loras=(LoraUse("realism", 1.0), LoraUse("other", 0.5)),
    guide=guide("cfg", scale=2.0),
    seed=5,
    images=3,
    steps=4,
)


def test_a_list_of_prompts() -> None:
    prompts = parse_prompts("a star\n\n  a ring, red \r\n<b>x</b>\n")
    assert prompts == ["a star", "a ring, red", "<b>x</b>"]
    assert [request.prompt for request in batch(BASE, prompts)] == prompts
    assert all(request.seed == 5 and request.loras == BASE.loras for request in batch(BASE, prompts))
    for text in ("", " \n ", "a\n" * 300):
        with pytest.raises(InputError, match="1 to 256 lines"):
            parse_prompts(text)


def test_lists_of_prompts_in_files() -> None:
    """Marks and encodings are not in the prompts; only LF, CR and both end a line."""
    text = "a Wärter\r\nb\u2028still b\u0085and\x0bof\x0cb\x1cto\rc\n\n"
    prompts = ["a Wärter", "b\u2028still b\u0085and\x0bof\x0cb\x1cto", "c"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"):
        assert parse_prompts(text.encode(encoding)) == prompts
    assert parse_prompts(text) == parse_prompts("\ufeff" + text) == prompts
    assert parse_prompts("a \ud83d\ude00\ncaf\udcc3\udca9") == ["a \U0001f600", "café"]
    for given in ("façade".encode("cp1252"), b"a\0b", "a\0b", "a \ud800", b"", b"\xff\xfe"):
        with pytest.raises(InputError, match="list of prompts"):
            parse_prompts(given)
    assert Axis.parse("prompt", "a\u2028b\r\nc").values == ("a\u2028b", "c")


@pytest.mark.parametrize(
    ("setting", "text", "values"),
    [
        ("seed", "1-4, 9", (1, 2, 3, 4, 9)),
        ("steps", "2, 4,8", (2, 4, 8)),
        ("guidance", "1, 2.5", (1.0, 2.5)),
        ("solver", "euler, heun", ("euler", "heun")),
        ("prompt", "a, b\nc", ("a, b", "c")),
        ("lora", "-1, 0, 0.5", (-1.0, 0.0, 0.5)),
    ],
)
def test_axes_from_text(setting: str, text: str, values: tuple[Any, ...]) -> None:
    assert Axis.parse(setting, text) == Axis(setting, values)


def test_what_axes_change() -> None:
    """Each its own field and nothing else."""
    for setting, value, read in (
        ("seed", 9, lambda r: r.seed),
        ("guidance", 2.5, lambda r: r.guidance),
        ("solver", "heun", lambda r: r.solver),
        ("schedule", "beta", lambda r: r.schedule),
        ("shift", 2.0, lambda r: r.shift),
        ("lora", 0.25, lambda r: r.loras[0].scale),
        ("lora 2", 0.25, lambda r: r.loras[1].scale),
        ("guide.scale", 4.0, lambda r: r.guide.scale),
        ("guide.rescale", 0.5, lambda r: r.guide.rescale),
    ):
        changed = Axis(setting, (value,)).apply(BASE, value)
        assert read(changed) == value and read(BASE) != value
    assert Axis("lora 2", (0.25,)).apply(BASE, 0.25).loras[0] == BASE.loras[0]


@pytest.mark.parametrize(
    ("setting", "text", "message"),
    [
        ("power", "1", "unknown setting 'power'"),
        ("steps", "two", "steps: expected a whole number, got 'two'"),
        ("guidance", "x", "guidance: expected a number"),
        ("seed", "1-100000", "more than 256 values"),
        ("seed", "4-1", "1 to 256 values"),
        ("steps", "0", "steps must be"),
        ("solver", "leapfrog", "unknown solver"),
        ("lora 3", "1", "has 2 LoRAs"),
        ("lora x", "1", "expected a whole number"),
        ("guide.power", "1", "no guide with such a setting"),
        ("lora", "nan", "finite"),
    ],
)
def test_bad_axes_are_refused_by_name(setting: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Grid(BASE, Axis.parse(setting, text)).requests()


def test_grids_that_cannot_be() -> None:
    with pytest.raises(InputError, match="both axes are 'seed'"):
        Grid(BASE, Axis.parse("seed", "1-2"), Axis.parse("seed", "3-4"))
    with pytest.raises(InputError, match="400 pictures"):
        Grid(BASE, Axis.parse("seed", "1-20"), Axis.parse("steps", "1-20"))


def test_requests_row_by_row() -> None:
    grid = Grid(BASE, Axis.parse("seed", "1-3"), Axis.parse("steps", "2,4"))
    assert [(r.seed, r.steps, r.images) for r in grid.requests()] == [
        (seed, steps, 1) for steps in (2, 4) for seed in (1, 2, 3)
    ]
    assert [r.seed for r in Grid(BASE, Axis.parse("seed", "1-3")).requests()] == [1, 2, 3]


def test_the_sheet_holds_every_picture_and_its_labels() -> None:
    """Each picture whole, in its cell; something dark is written above and at the left, and what it says matters."""
    grid = Grid(BASE, Axis.parse("seed", "1-3"), Axis.parse("steps", "2,4"))
    images = [Image.effect_noise((64, 48), 90).convert("RGB") for _ in range(6)]
    sheet = np.asarray(grid.picture(images))
    top, left = sheet.shape[0] - 2 * 52, sheet.shape[1] - 3 * 68
    for k, image in enumerate(images):
        j, i = divmod(k, 3)
        cell = sheet[top + 52 * j : top + 52 * j + 48, left + 68 * i : left + 68 * i + 64]
        assert np.array_equal(cell, np.asarray(image))
    assert sheet[: top - 4, left:].min() < 100 and sheet[top:, : left - 1].min() < 100
    other = Grid(BASE, Axis.parse("seed", "1-2, 8"), Axis.parse("steps", "2,4"))
    assert not np.array_equal(np.asarray(other.picture(images)), sheet)
    assert grid.columns == ["seed 1", "seed 2", "seed 3"] and grid.rows == ["steps 2", "steps 4"]
    row = Grid(BASE, Axis.parse("guidance", "1,2.5"))
    assert row.columns == ["guidance 1", "guidance 2.5"] and row.picture(images[:2]).size[0] == 2 * 68


def test_long_prompts_are_cut_in_labels() -> None:
    grid = Grid(BASE, Axis("prompt", ("x" * 100_000, "<b>\x00")))
    assert max(map(len, grid.columns)) < 100
    assert grid.picture([Image.new("RGB", (64, 64))] * 2).size[0] == 2 * 68
