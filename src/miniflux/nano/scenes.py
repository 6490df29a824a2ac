"""The scenes the nano models draw: one or two flat shapes on a flat background, and a caption that says which.

Coordinates are those of the unit square, x to the right, y down; a shape is given in units of its radius. On a canvas
that is not square, positions stretch with it and radii follow the shorter side.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 220, 50),
    "orange": (245, 140, 30),
    "purple": (140, 60, 180),
    "pink": (250, 150, 190),
    "cyan": (60, 210, 220),
    "brown": (130, 80, 40),
    "gray": (128, 128, 128),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}


def _star() -> list[tuple[float, float]]:
    """Five points at radius 1, five corners at 0.45 between them, the first point up."""
    radii = (1.0, 0.45)
    angles = [math.pi * i / 5 - math.pi / 2 for i in range(10)]
    return [(radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]


def _cross() -> list[tuple[float, float]]:
    arm, end = 0.33, 1.0
    quarter = [(-arm, -end), (arm, -end), (arm, -arm)]  # turned by a right angle three times
    return [p for turn in range(4) for p in (_turned(q, turn) for q in quarter)]


def _turned(point: tuple[float, float], quarters: int) -> tuple[float, float]:
    x, y = point
    for _ in range(quarters):
        x, y = -y, x
    return x, y


def _heart() -> list[tuple[float, float]]:
    """The curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, moved and scaled to radius 1."""
    points: list[tuple[float, float]] = []
    for i in range(40):
        t = 2 * math.pi * i / 40
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 17, -y / 17))
    return points


SHAPES: dict[str, list[tuple[float, float]] | None] = {
    "circle": None,
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0.0, -1.0), (0.866, 0.5), (-0.866, 0.5)],
    "star": _star(),
    "ring": None,
    "cross": _cross(),
    "heart": _heart(),
    "diamond": [(0.0, -1.0), (0.65, 0.0), (0.0, 1.0), (-0.65, 0.0)],
}
RING_HOLE = 0.55

SIZES = {"small": 0.14, "": 0.2, "large": 0.27}
POSITIONS = {
    "": (0.5, 0.5),
    " on the left": (0.27, 0.5),
    " on the right": (0.73, 0.5),
    " at the top": (0.5, 0.27),
    " at the bottom": (0.5, 0.73),
}
RELATIONS = {
    "left of": ((0.29, 0.5), (0.71, 0.5)),
    "right of": ((0.71, 0.5), (0.29, 0.5)),
    "above": ((0.5, 0.29), (0.5, 0.71)),
    "below": ((0.5, 0.71), (0.5, 0.29)),
}
PAIR_RADIUS = 0.15
LARGE_OFF_CENTRE = 0.85  # a large shape away from the centre shrinks by this, to stay inside
RADIUS_JITTER = (0.93, 1.07)
CENTRE_JITTER = 0.03

# (colour, shape) pairs that no training picture contains: drawing them shows that the model composes what it learned.
HELD_OUT = frozenset(
    {
        ("red", "star"),
        ("blue", "heart"),
        ("green", "ring"),
        ("yellow", "cross"),
        ("purple", "triangle"),
        ("orange", "diamond"),
        ("cyan", "square"),
        ("pink", "circle"),
    }
)


@dataclass(frozen=True)
class Shape:
    """One object: what, in which colour, where (unit square) and how large (unit of the shorter side)."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows and the caption that describes it."""

    background: str
    shapes: tuple[Shape, ...]
    caption: str


def _pair(rng: random.Random, taken: set[str], held_out: bool) -> tuple[str, str]:
    """A (colour, shape) whose colour is not taken; from the held-out pairs or from all the others."""
    while True:
        colour, kind = rng.choice(list(PALETTE)), rng.choice(list(SHAPES))
        if colour not in taken and ((colour, kind) in HELD_OUT) == held_out:
            return colour, kind


def _placed(rng: random.Random, kind: str, colour: str, centre: tuple[float, float], radius: float) -> Shape:
    x, y = (c + rng.uniform(-CENTRE_JITTER, CENTRE_JITTER) for c in centre)
    return Shape(kind, colour, x, y, radius * rng.uniform(*RADIUS_JITTER))


def one_object(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene with one shape; `held_out` draws from the pairs that training never shows."""
    background = rng.choice(list(PALETTE))
    colour, kind = _pair(rng, {background}, held_out)
    size, position = rng.choice(list(SIZES)), rng.choice(list(POSITIONS))
    radius = SIZES[size] * (LARGE_OFF_CENTRE if size == "large" and position else 1.0)
    words = f"a {size} {colour} {kind}{position} on a {background} background"
    return Scene(background, (_placed(rng, kind, colour, POSITIONS[position], radius),), " ".join(words.split()))


def two_objects(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene with two shapes of different colours, the first of them a held-out pair if so asked."""
    background = rng.choice(list(PALETTE))
    colour1, kind1 = _pair(rng, {background}, held_out)
    colour2, kind2 = _pair(rng, {background, colour1}, False)
    relation = rng.choice(list(RELATIONS))
    first, second = RELATIONS[relation]
    shapes = (
        _placed(rng, kind1, colour1, first, PAIR_RADIUS),
        _placed(rng, kind2, colour2, second, PAIR_RADIUS),
    )
    caption = f"a {colour1} {kind1} {relation} a {colour2} {kind2} on a {background} background"
    return Scene(background, shapes, caption)


def mask(shape: Shape, width: int, height: int, supersample: int = 4) -> Image.Image:
    """Coverage of a shape on a canvas of (width, height) pixels: an antialiased greyscale picture."""
    s = supersample
    canvas = Image.new("L", (width * s, height * s), 0)
    draw = ImageDraw.Draw(canvas)
    cx, cy, r = shape.x * width * s, shape.y * height * s, shape.radius * min(width, height) * s
    points = SHAPES[shape.kind]
    if points is not None:
        draw.polygon([(cx + r * x, cy + r * y) for x, y in points], fill=255)
    else:
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        if shape.kind == "ring":
            hole = RING_HOLE * r
            draw.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=0)
    return canvas.reduce(s)


def render(scene: Scene, width: int, height: int) -> Image.Image:
    """The flat picture of a scene, (width, height) RGB pixels."""
    picture = Image.new("RGB", (width, height), PALETTE[scene.background])
    for shape in scene.shapes:
        picture.paste(PALETTE[shape.colour], (0, 0), mask(shape, width, height))
    return picture


def render_lit(scene: Scene, width: int, height: int, rng: random.Random) -> Image.Image:
    """The same scene under a lamp at the upper left: rounded bodies, a highlight, a soft shadow, a trace of grain."""
    side = min(width, height)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    lamp = 1.12 - 0.34 * (0.5 * xs / width + 0.5 * ys / height)  # the background darkens away from the lamp
    pixels = np.asarray(PALETTE[scene.background], np.float32) * lamp[..., None]
    for shape in scene.shapes:
        cover = mask(shape, width, height)
        radius = shape.radius * side
        fallen = Image.new("L", (width, height), 0)
        fallen.paste(cover, (round(0.28 * radius), round(0.34 * radius)))
        shadow = np.asarray(fallen.filter(ImageFilter.GaussianBlur(0.22 * radius)), np.float32) / 255
        pixels = pixels * (1 - 0.45 * shadow[..., None])
        # The blurred coverage serves as the height of the body; its slope gives the normal.
        hill = np.asarray(cover.filter(ImageFilter.GaussianBlur(0.3 * radius)), np.float32) / 255 * radius * 1.5
        slope_y, slope_x = np.gradient(hill)
        length = np.sqrt(slope_x**2 + slope_y**2 + 1)
        diffuse = (0.45 * slope_x + 0.55 * slope_y + 0.70) / length  # dot product with the direction to the lamp
        glint = np.clip(diffuse, 0, 1) ** 24
        body = np.asarray(PALETTE[shape.colour], np.float32) * (0.35 + 0.75 * np.clip(diffuse, 0, 1))[..., None]
        body = body + 110 * glint[..., None]
        alpha = np.asarray(cover, np.float32)[..., None] / 255
        pixels = pixels * (1 - alpha) + body * alpha
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, 2.0, (height, width, 1))
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
