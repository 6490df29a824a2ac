"""The scenes are those of the reference description, and training never sees a held-out pair."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miniflux.nano import scenes
from miniflux.nano.recipe.adherence import judge
from miniflux.nano.scenes import HELD_OUT, PALETTE, SHAPES, Scene, Shape, one_object, render, render_lit, two_objects
from tests import reference


@pytest.fixture(scope="module")
def about() -> dict[str, Any]:
    return reference.scenes()


def test_palette_shapes_and_places_are_the_described_ones(about: dict[str, Any]) -> None:
    assert {name: tuple(rgb) for name, rgb in about["palette_srgb"].items()} == PALETTE
    assert list(about["shapes"]) == list(SHAPES)
    for name, shape in about["shapes"].items():
        if shape["kind"] == "polygon":
            np.testing.assert_allclose(SHAPES[name], shape["points"], atol=6e-5)
    assert about["shapes"]["ring"]["inner_radius"] == scenes.RING_HOLE
    one, two = about["one_object"], about["two_objects"]
    assert one["sizes"] == scenes.SIZES and {k: tuple(v) for k, v in one["positions"].items()} == scenes.POSITIONS
    assert {k: tuple(map(tuple, v)) for k, v in two["relations"].items()} == scenes.RELATIONS
    assert two["radius"] == scenes.PAIR_RADIUS
    assert tuple(one["jitter"]["radius_factor"]) == scenes.RADIUS_JITTER
    assert one["jitter"]["centre"] == scenes.CENTRE_JITTER
    assert {tuple(pair) for pair in about["held_out_pairs"]} == HELD_OUT


def test_training_never_sees_a_held_out_pair() -> None:
    """Otherwise composing unseen pairs would prove nothing."""
    rng = random.Random(0)
    for i in range(3000):
        scene = (two_objects if i % 2 else one_object)(rng)
        assert not {(shape.colour, shape.kind) for shape in scene.shapes} & HELD_OUT
        assert len({scene.background, *(shape.colour for shape in scene.shapes)}) == 1 + len(scene.shapes)


def test_held_out_scenes_show_a_held_out_pair() -> None:
    rng = random.Random(0)
    for i in range(200):
        scene = (two_objects if i % 2 else one_object)(rng, held_out=True)
        assert (scene.shapes[0].colour, scene.shapes[0].kind) in HELD_OUT


def test_captions_say_what_is_drawn() -> None:
    rng = random.Random(1)
    for i in range(200):
        scene = (two_objects if i % 2 else one_object)(rng)
        words = scene.caption.split()
        assert words[-2:] == [scene.background, "background"] and "  " not in scene.caption
        for shape in scene.shapes:
            assert f"{shape.colour} {shape.kind}" in scene.caption


@pytest.mark.parametrize("size", [(128, 128), (64, 64), (192, 96), (64, 160)])
def test_shapes_stay_inside_and_the_judge_agrees(size: tuple[int, int]) -> None:
    """The judge must find every drawn scene right, or its verdicts on the model mean nothing."""
    rng = random.Random(2)
    for i in range(12):
        scene = (two_objects if i % 2 else one_object)(rng, held_out=i % 3 == 0)
        image = render(scene, *size)
        border = np.concatenate([np.asarray(image)[edge].reshape(-1, 3) for edge in ((0,), (-1,))])
        assert image.size == size and (border == PALETTE[scene.background]).all()
        if min(size) >= 96:
            verdict = judge(image, scene)
            assert verdict.all and verdict.outline > 0.9, scene.caption


def test_the_judge_measures_outlines() -> None:
    """A disc whose edge goes in and out by a tenth of its radius: its overlap with the best disc has a closed form."""
    scene, radius = Scene("blue", (Shape("circle", "red", 0.5, 0.5, 0.2),), ""), 0.2 * 128
    y, x = np.mgrid[:128, :128] - 63.5
    edge = radius * (1 + 0.1 * np.cos(6 * np.arctan2(y, x)))
    pixels = np.where((np.hypot(x, y) < edge)[..., None], PALETTE["red"], PALETTE["blue"])
    wavy, clean = (judge(image, scene) for image in (Image.fromarray(pixels.astype(np.uint8)), render(scene, 128, 128)))
    # The same radius on the mean: |edge - radius| is 0.1 * 2 / pi of it, above and below in equal parts.
    expected = (1 - 0.1 * 2 / np.pi) / (1 + 0.1 * 2 / np.pi)
    assert wavy.all and abs(wavy.outline - expected) < 0.03 and clean.outline > 0.95
    assert judge(render(Scene("blue", (), ""), 128, 128), scene).outline == 0


@pytest.mark.parametrize("change", ["background", "colour", "shape", "position", "empty", "extra"])
def test_the_judge_sees_what_is_wrong(change: str) -> None:
    asked = Scene("blue", (Shape("circle", "red", 0.5, 0.5, 0.2),), "")
    drawn = {
        "background": Scene("green", asked.shapes, ""),
        "colour": Scene("blue", (Shape("circle", "orange", 0.5, 0.5, 0.2),), ""),
        "shape": Scene("blue", (Shape("square", "red", 0.5, 0.5, 0.2),), ""),
        "position": Scene("blue", (Shape("circle", "red", 0.73, 0.5, 0.2),), ""),
        "empty": Scene("blue", (), ""),
        "extra": Scene("blue", (*asked.shapes, Shape("circle", "red", 0.15, 0.15, 0.1)), ""),
    }[change]
    verdict = judge(render(drawn, 128, 128), asked)
    assert not verdict.all
    if change in ("background", "colour", "shape", "position"):
        assert not getattr(verdict, change)


def test_lit_scenes_keep_the_composition() -> None:
    """Light changes shades, not places: background and object colours stay the nearest ones in most pixels."""
    rng = random.Random(3)
    scene = one_object(rng)
    flat, lit = (np.asarray(image, float) for image in (render(scene, 128, 128), render_lit(scene, 128, 128, rng)))
    assert 2 < np.abs(flat - lit).mean() < 60
