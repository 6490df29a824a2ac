"""Judging pictures: does a picture show the scene that its caption asks for?

Written apart from the renderer's training data: it looks only at pixels. Background: median colour of the corners.
Object: the largest connected patches that differ from it. Colour: nearest palette colour of their median. Shape: best
overlap with each shape drawn at the same place over a range of radii. Position: centre of the bounding box.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from miniflux.nano import scenes

TOLERANCE = 0.13  # of the canvas, between the centre of the bounding box and the named place
FOREGROUND = 60.0  # distance in RGB from the background
MINIMUM_AREA = 0.004  # of the canvas; smaller patches are ignored


@dataclass(frozen=True)
class Verdict:
    """Which of the four properties are right, and how clean the outlines are.

    Attributes:
        outline: overlap (intersection over union, 0 to 1) of what was found for each object with the cleanly drawn
            shape that it is most like, averaged; 0 for an object that is not there. True pictures have about 0.96.
    """

    background: bool
    colour: bool
    shape: bool
    position: bool
    outline: float

    @property
    def all(self) -> bool:
        return self.background and self.colour and self.shape and self.position


def nearest_colour(rgb: np.ndarray) -> str:
    """The palette colour closest to an RGB value."""
    return min(scenes.PALETTE, key=lambda name: float(np.sum((np.asarray(scenes.PALETTE[name]) - rgb) ** 2)))


def _patches(foreground: np.ndarray) -> list[np.ndarray]:
    """Connected patches of a boolean picture, largest first."""
    labels = np.zeros(foreground.shape, int)
    patches: list[np.ndarray] = []
    height, width = foreground.shape
    for y, x in zip(*np.nonzero(foreground), strict=True):
        if labels[y, x]:
            continue
        label = len(patches) + 1
        stack, members = [(y, x)], []
        labels[y, x] = label
        while stack:
            a, b = stack.pop()
            members.append((a, b))
            for c, d in ((a + 1, b), (a - 1, b), (a, b + 1), (a, b - 1)):
                if 0 <= c < height and 0 <= d < width and foreground[c, d] and not labels[c, d]:
                    labels[c, d] = label
                    stack.append((c, d))
        patch = np.zeros(foreground.shape, bool)
        rows, columns = zip(*members, strict=True)
        patch[list(rows), list(columns)] = True
        patches.append(patch)
    return sorted(patches, key=lambda p: -int(p.sum()))


@cache
def _outline(kind: str) -> tuple[float, tuple[float, float]]:
    """The extent of a shape, and how far the middle of its box lies from its centre (y, x), in radii."""
    unit = np.asarray(scenes.mask(scenes.Shape(kind, "", 0.5, 0.5, 0.4), 200, 200)) > 127
    ys, xs = np.nonzero(unit)
    span = (max(np.ptp(ys), np.ptp(xs)) + 1) / 80
    return float(span), (((ys.max() + ys.min() + 1) / 2 - 100) / 80, ((xs.max() + xs.min() + 1) / 2 - 100) / 80)


def _shape_of(patch: np.ndarray) -> tuple[str, float]:
    """The shape whose drawing overlaps a patch best, and that overlap (intersection over union)."""
    height, width = patch.shape
    side = min(height, width)
    rows, columns = np.nonzero(patch)
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    best, name = -1.0, ""
    for kind in scenes.SHAPES:
        span, middle = _outline(kind)
        for factor in (0.9, 0.95, 1.0, 1.05, 1.1):
            radius = factor * extent / span
            y = (rows.min() + rows.max() + 1) / 2 - middle[0] * radius
            x = (columns.min() + columns.max() + 1) / 2 - middle[1] * radius
            drawn = (
                np.asarray(scenes.mask(scenes.Shape(kind, "", x / width, y / height, radius / side), width, height))
                > 127
            )
            overlap = float((drawn & patch).sum() / max(1, (drawn | patch).sum()))
            if overlap > best:
                best, name = overlap, kind
    return name, best


def judge(image: Image.Image, scene: scenes.Scene) -> Verdict:
    """Compare a picture with the scene it should show. Positions are those of the caption, without the jitter."""
    pixels = np.asarray(image.convert("RGB"), float)
    height, width, _ = pixels.shape
    corner = max(2, min(height, width) // 16)
    corners = [
        pixels[y, x] for y in (slice(0, corner), slice(-corner, None)) for x in (slice(0, corner), slice(-corner, None))
    ]
    background = np.median(np.concatenate([c.reshape(-1, 3) for c in corners]), axis=0)
    foreground = np.linalg.norm(pixels - background, axis=-1) > FOREGROUND
    found = [p for p in _patches(foreground) if p.sum() >= MINIMUM_AREA * height * width]
    colour = shape = position = len(found) == len(scene.shapes)
    remaining, overlaps = list(found), 0.0
    for wanted in scene.shapes:
        if not remaining:
            colour = shape = position = False
            break
        centres = [_centre(p, width, height) for p in remaining]
        distances = [max(abs(x - wanted.x), abs(y - wanted.y)) for x, y in centres]
        nearest = int(np.argmin(distances))
        patch = remaining.pop(nearest)
        position = position and bool(distances[nearest] <= TOLERANCE + scenes.CENTRE_JITTER)
        colour = colour and nearest_colour(np.median(pixels[patch], axis=0)) == wanted.colour
        kind, overlap = _shape_of(patch)
        shape, overlaps = shape and kind == wanted.kind, overlaps + overlap
    outline = overlaps / max(1, len(scene.shapes))
    return Verdict(nearest_colour(background) == scene.background, colour, shape, position, outline)


def _centre(patch: np.ndarray, width: int, height: int) -> tuple[float, float]:
    rows, columns = np.nonzero(patch)
    return (columns.min() + columns.max() + 1) / 2 / width, (rows.min() + rows.max() + 1) / 2 / height
