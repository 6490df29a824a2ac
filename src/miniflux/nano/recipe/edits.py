"""What the editing nano models learn from: holes to be filled as captions say, instructions with their results."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from miniflux.nano import scenes
from miniflux.nano.recipe.text import varied

SIDES = {" on the left": "left", " on the right": "right", " at the top": "top", " at the bottom": "bottom"}
MOVES = {"left": "left", "right": "right", "top": "top", "bottom": "bottom", "": "centre"}
LARGER, SMALLER = 1.35, 0.72
RADII = (0.1, 0.3)  # of shapes that were made smaller or larger


@dataclass(frozen=True)
class Hole:
    """A picture to be completed: what it will show, the words for it, and where it is drawn anew (H, W), 0 to 1."""

    scene: scenes.Scene
    words: str
    mask: np.ndarray


@dataclass(frozen=True)
class Edit:
    """Two scenes, and the words that lead from one to the other; `kind` is that of the instruction."""

    before: scenes.Scene
    after: scenes.Scene
    words: str
    kind: str


@dataclass(frozen=True)
class Blend:
    """Two scenes of one shape each, the words that make a third of them, and that third."""

    first: scenes.Scene
    second: scenes.Scene
    after: scenes.Scene
    words: str


def _scene(rng: random.Random, held_out: bool) -> scenes.Scene:
    return (scenes.two_objects if rng.random() < 0.5 else scenes.one_object)(rng, held_out)


def around(shape: scenes.Shape, width: int, height: int, rng: random.Random) -> np.ndarray:
    """A hole that hides a shape: a box or an ellipse, a little larger, a little off."""
    side, margin = min(width, height), rng.uniform(1.1, 1.7)
    cx, cy, r = shape.x * width, shape.y * height, shape.radius * side
    left, top, right, bottom = (r * margin + rng.uniform(0, 0.06) * side for _ in range(4))
    hole = Image.new("L", (width, height), 0)
    draw, box = ImageDraw.Draw(hole), (cx - left, cy - top, cx + right, cy + bottom)
    if rng.random() < 0.7:
        draw.rectangle(box, fill=255)
    else:  # around the box, whose corners it would leave out
        grow_x, grow_y = 0.21 * (left + right), 0.21 * (top + bottom)
        draw.ellipse((box[0] - grow_x, box[1] - grow_y, box[2] + grow_x, box[3] + grow_y), fill=255)
    return np.asarray(hole, np.float32) / 255


def _anywhere(width: int, height: int, rng: random.Random) -> np.ndarray:
    """A side of the picture, everything, or some box."""
    hole = np.zeros((height, width), np.float32)
    chance = rng.random()
    if chance < 0.5:  # as when a picture is enlarged
        across = rng.random() < 0.5
        length = width if across else height
        part = rng.randint(length // 8, max(length // 8, 5 * length // 8))
        where = slice(0, part) if rng.random() < 0.5 else slice(length - part, length)
        hole[(slice(None), where) if across else (where, slice(None))] = 1
    elif chance < 0.65:
        hole[:] = 1
    else:
        x0, x1 = sorted(rng.sample(range(width + 1), 2))
        y0, y1 = sorted(rng.sample(range(height + 1), 2))
        hole[y0:y1, x0:x1] = 1
    return hole


def described(scene: scenes.Scene) -> str:
    """Words for what a scene shows: none, one or two shapes."""
    shown = [f"a {shape.colour} {shape.kind}" for shape in scene.shapes]
    if len(scene.shapes) == 2:
        first, second = scene.shapes
        dx, dy = second.x - first.x, second.y - first.y
        relation = ("left of" if dx > 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy > 0 else "below")
        shown = [f"{shown[0]} {relation} {shown[1]}"]
    return " on ".join((*shown, f"a {scene.background} background"))


def hole(rng: random.Random, width: int, height: int, held_out: bool = False) -> Hole:
    """A scene with a part of it hidden. A quarter of the holes were around a shape that is not there any more."""
    scene = _scene(rng, held_out)
    words, mask = scene.caption, _anywhere(width, height, rng)
    if rng.random() < 0.75:
        hidden = rng.choice(scene.shapes)
        mask = around(hidden, width, height, rng)
        if rng.random() < 0.15:
            mask = np.maximum.reduce([around(shape, width, height, rng) for shape in scene.shapes])
        chance = rng.random()
        if chance < 0.3:
            left = tuple(shape for shape in scene.shapes if shape is not hidden)
            scene = replace(scene, shapes=left)
            words = described(scene)
        elif chance < 0.55:
            words = f"a {hidden.colour} {hidden.kind}"
    if rng.random() < 0.15:  # a soft edge, drawn anew as far as it goes
        soft = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
        mask = np.maximum(np.asarray(soft, np.float32) / 255, mask)
    if not mask.any():
        mask[:] = 1
    return Hole(scene, varied(words, rng), mask)


def _named(shape: scenes.Shape, scene: scenes.Scene, rng: random.Random) -> str:
    """What people call a shape of a scene: `it` if it is alone, its kind, its colour too where that is not enough."""
    if len(scene.shapes) == 1 and rng.random() < 0.5:
        return "it"
    twice = sum(other.kind == shape.kind for other in scene.shapes) > 1
    return f"the {shape.colour} {shape.kind}" if twice or rng.random() < 0.25 else f"the {shape.kind}"


def _put(scene: scenes.Scene, old: scenes.Shape, new: scenes.Shape | None) -> scenes.Scene:
    shapes = tuple(new if shape is old else shape for shape in scene.shapes)
    return replace(scene, shapes=tuple(shape for shape in shapes if shape is not None), caption="")


def recolour(scene: scenes.Scene, rng: random.Random) -> tuple[scenes.Scene, str]:
    shape = rng.choice(scene.shapes)
    taken = {scene.background, *(other.colour for other in scene.shapes)}
    colour, who = rng.choice([name for name in scenes.PALETTE if name not in taken]), _named(shape, scene, rng)
    said = [f"make {who} {colour}", f"turn {who} {colour}", f"change {who} to {colour}", f"paint {who} {colour}"]
    return _put(scene, shape, replace(shape, colour=colour)), rng.choice(said)


def replaced(scene: scenes.Scene, rng: random.Random) -> tuple[scenes.Scene, str]:
    shape = rng.choice(scene.shapes)
    kind, who = rng.choice([kind for kind in scenes.SHAPES if kind != shape.kind]), _named(shape, scene, rng)
    said = [f"replace {who} with a {kind}", f"turn {who} into a {kind}", f"make {who} a {kind}"]
    return _put(scene, shape, replace(shape, kind=kind)), rng.choice(said)


def removed(scene: scenes.Scene, rng: random.Random) -> tuple[scenes.Scene, str]:
    shape = rng.choice(scene.shapes)
    who = _named(shape, scene, rng)
    return _put(scene, shape, None), rng.choice([f"remove {who}", f"delete {who}", f"take {who} away"])


def moved(scene: scenes.Scene, rng: random.Random) -> tuple[scenes.Scene, str]:
    """Of a single shape, which is somewhere else than where it is to go."""
    (shape,) = scene.shapes
    far = {
        name: at
        for name, at in scenes.POSITIONS.items()
        if max(abs(at[0] - shape.x), abs(at[1] - shape.y)) > 3 * scenes.CENTRE_JITTER
    }
    name = rng.choice(list(far))
    x, y = far[name]
    now = min(scenes.POSITIONS.values(), key=lambda at: abs(at[0] - shape.x) + abs(at[1] - shape.y))
    side = SIDES.get(name, "centre")
    there = replace(shape, x=x + shape.x - now[0], y=y + shape.y - now[1])
    who = _named(shape, scene, rng)
    return _put(scene, shape, there), rng.choice(
        [f"move {who} to the {side}", f"put {who} {name.strip() or 'in the centre'}"]
    )


def resized(scene: scenes.Scene, rng: random.Random) -> tuple[scenes.Scene, str]:
    shape = rng.choice(scene.shapes)
    who, larger = _named(shape, scene, rng), shape.radius < 0.18 or (shape.radius < 0.23 and rng.random() < 0.5)
    radius = shape.radius * (LARGER if larger else SMALLER)
    said = ("larger", "bigger") if larger else ("smaller",)
    return _put(
        scene, shape, replace(shape, radius=min(max(radius, RADII[0]), RADII[1]))
    ), f"make {who} {rng.choice(said)}"


def repainted(scene: scenes.Scene, rng: random.Random) -> tuple[scenes.Scene, str]:
    taken = {scene.background, *(shape.colour for shape in scene.shapes)}
    colour = rng.choice([name for name in scenes.PALETTE if name not in taken])
    said = [f"make the background {colour}", f"change the background to {colour}", f"on a {colour} background"]
    return replace(scene, background=colour, caption=""), rng.choice(said)


KINDS: dict[str, Callable[[scenes.Scene, random.Random], tuple[scenes.Scene, str]]] = {
    "recolour": recolour,
    "replace": replaced,
    "remove": removed,
    "move": moved,
    "resize": resized,
    "background": repainted,
}
OFTEN = {"replace": 5, "move": 5, "recolour": 3, "remove": 3}  # learned long after the others, which count once
ALONE = ("move", "resize")  # of a single shape
MAKING = ("recolour", "replace")  # where another pair comes of it


def edit(rng: random.Random, kind: str | None = None, held_out: bool = False) -> Edit:
    """A scene and an instruction; what it leads to has, or has not, one of the pairs that training never shows."""
    while True:
        chosen = kind or rng.choices(list(KINDS), [OFTEN.get(name, 1) for name in KINDS])[0]
        alone = chosen in ALONE or rng.random() < 0.4
        before = (scenes.one_object if alone else scenes.two_objects)(rng, held_out and chosen not in MAKING)
        after, words = KINDS[chosen](before, rng)
        if any((shape.colour, shape.kind) in scenes.HELD_OUT for shape in after.shapes) == held_out:
            return Edit(before, after, words, chosen)


def blend(rng: random.Random, held_out: bool = False) -> Blend:
    """The shape of one picture, where it is, in the colour of that of another; the result has, or has not, one of the
    pairs that training never shows."""
    while True:
        shown = scenes.one_object(rng), scenes.one_object(rng)
        names = ["first", "second"]
        i = rng.randrange(2)
        (shape,), (giving,) = shown[i].shapes, shown[1 - i].shapes
        if giving.colour in (shape.colour, shown[i].background):
            continue
        if ((giving.colour, shape.kind) in scenes.HELD_OUT) != held_out:
            continue
        a, b = names[i], names[1 - i]
        words = rng.choice(
            [
                f"the shape of the {a} in the colour of the {b}",
                f"the shape of the {a} picture in the colour of the {b} one",
                f"the {a} shape in the {b} colour",
                f"paint the {a} shape in the colour of the {b}",
            ]
        )
        return Blend(*shown, _put(shown[i], shape, replace(shape, colour=giving.colour)), words)
