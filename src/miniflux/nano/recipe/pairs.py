"""Pairs of what a model drew and what it meant: the same scene, drawn cleanly where its shapes came out.

The model draws a scene from its caption; where its shapes lie in the picture and how large they are is measured, and
the renderer draws the same scene at just these places. Scenes that came out as something else are left out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from miniflux.models.autoencoder import Autoencoder
from miniflux.models.flux1 import Flux1
from miniflux.nano import scenes
from miniflux.nano.recipe.distil import GUIDANCE_RANGE
from miniflux.nano.recipe.flow import SHORT, velocity
from miniflux.nano.recipe.text import TextEncoders, varied
from miniflux.sampling import flux1_schedule, pack, unpack
from miniflux.training.flow import mixed_precision

STEPS = 8  # of Euler's method, from noise to picture
LIKE = 0.7  # overlap (intersection over union) of a drawn shape with the clean one; less is another shape
FOREGROUND = 60.0  # distance in RGB from the background
COLOUR = 40.0  # most that a channel of a shape's colour may be off


def _cover(kind: str) -> np.ndarray:
    """The coverage, 0 to 1, of a shape with a radius of 160 pixels in the middle of 400."""
    return np.asarray(scenes.mask(scenes.Shape(kind, "", 0.5, 0.5, 0.4), 400, 400), float) / 255


def _middle(kind: str) -> tuple[float, float]:
    """Where the centre of mass of a shape lies, in radii from its centre: x and y."""
    cover, at = _cover(kind), np.arange(400) + 0.5
    x, y = (float((cover.sum(axis) @ at / cover.sum() - 200) / 160) for axis in (0, 1))
    return x, y


AREA = {kind: float(_cover(kind).sum()) / 160**2 for kind in scenes.SHAPES}  # in squared radii
MIDDLE = {kind: _middle(kind) for kind in scenes.SHAPES}


def snapped(pixels: np.ndarray, scene: scenes.Scene) -> scenes.Scene | None:
    """The scene with the places and sizes that its shapes have in the picture, within the bounds of training pictures;
    None where something else was drawn.

    Args:
        pixels: the picture, (H, W, 3), 0 to 255.
        scene: what it should show; its shapes stand where the caption says, in the size that it says.
    """
    height, width, _ = pixels.shape
    background = np.asarray(scenes.PALETTE[scene.background], float)
    ys, xs = np.mgrid[0:height, 0:width] + 0.5
    nearest = np.argmin([np.hypot(xs - shape.x * width, ys - shape.y * height) for shape in scene.shapes], axis=0)
    shapes: list[scenes.Shape] = []
    for i, shape in enumerate(scene.shapes):
        towards = np.asarray(scenes.PALETTE[shape.colour], float) - background
        cover = ((pixels - background) @ towards / (towards @ towards)).clip(0, 1)  # how much of a pixel is the shape
        cover = np.where((cover > 0.1) & (nearest == i), cover, 0)
        area = float(cover.sum())
        if area < 4:
            return None
        radius = float(np.sqrt(area / AREA[shape.kind]))
        x, y = (float((cover * at).sum()) / area - MIDDLE[shape.kind][k] * radius for k, at in enumerate((xs, ys)))
        shapes.append(_within(shape, x / width, y / height, radius / min(width, height)))
    found = replace(scene, shapes=tuple(shapes))
    clean = np.asarray(scenes.render(found, width, height), float)
    drawn, wanted = (np.linalg.norm(picture - background, axis=-1) > FOREGROUND for picture in (pixels, clean))
    for i, shape in enumerate(found.shapes):
        here, there = drawn & (nearest == i), wanted & (nearest == i)
        both = here & there
        if both.sum() < LIKE * (here | there).sum() or not both.any():
            return None
        if np.abs(np.median(pixels[both], axis=0) - scenes.PALETTE[shape.colour]).max() > COLOUR:
            return None
    return found


def _within(shape: scenes.Shape, x: float, y: float, radius: float) -> scenes.Shape:
    """The shape at another place and in another size, as far as training pictures go."""
    low, high = (shape.radius * factor for factor in scenes.RADIUS_JITTER)
    jitter = scenes.CENTRE_JITTER
    return replace(
        shape,
        x=float(np.clip(x, shape.x - jitter, shape.x + jitter)),
        y=float(np.clip(y, shape.y - jitter, shape.y + jitter)),
        radius=float(np.clip(radius, low, high)),
    )


class _Middle(random.Random):
    """Random choices without jitter: a number between two is the one in their middle."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


def nominal(rng: random.Random) -> scenes.Scene:
    """A random scene whose shapes stand exactly where the caption says, in exactly that size."""
    exact = _Middle(rng.getrandbits(64))
    return (scenes.two_objects if rng.random() < 0.6 else scenes.one_object)(exact)


@dataclass(frozen=True)
class Pair:
    """A way from noise to a picture, and the picture that was meant.

    Attributes:
        states: (steps, L, 64), the noise first; the picture it ends in is not among them.
        levels: their noise levels, and 0.
        clean: (L, 64), latents of the clean drawing of `scene`.
    """

    scene: scenes.Scene
    caption: str
    guidance: float
    states: Tensor
    levels: tuple[float, ...]
    clean: Tensor


@torch.no_grad()
def roll(
    model: Flux1, encoders: TextEncoders, captions: list[str], noise: Tensor, size: tuple[int, int], guidance: Tensor
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """Euler's method from noise (B, L, 64) at a strength (B,) of guidance: the picture (B, L, 64), the states on the
    way (B, steps, L, 64), and their noise levels."""
    text = encoders(captions, SHORT)
    levels = tuple(flux1_schedule(STEPS, noise.shape[1]))
    x, states = noise, list[Tensor]()
    for now, then in pairwise(levels):
        states.append(x)
        with mixed_precision():
            v = velocity(model, x, size, torch.full((len(x),), now), text, guidance=guidance)
        x = x + (then - now) * v.float()
    return x, torch.stack(states, dim=1), levels


class Pairs:
    """Pairs of one canvas, kept in memory and renewed little by little.

    Args:
        model: nano-dev, whose pictures they are.
        size: (width, height).
        guidance: from where to where its strength is drawn.
        lit: what is meant is the scene under a lamp.

    Attributes:
        made, kept: how many were drawn, and how many of them showed what they should.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        model: Flux1,
        encoders: TextEncoders,
        size: tuple[int, int],
        seed: int,
        guidance: tuple[float, float] = GUIDANCE_RANGE,
        lit: bool = False,
    ) -> None:
        self.autoencoder, self.model, self.encoders, self.size = autoencoder, model, encoders, size
        self.guidance, self.lit, self.rng = guidance, lit, random.Random(seed)
        self.pairs: list[Pair] = []
        self.oldest, self.made, self.kept = 0, 0, 0

    def __len__(self) -> int:
        return len(self.pairs)

    @torch.no_grad()
    def make(self, count: int) -> list[Pair]:
        """Draw `count` scenes; those that show what they should, as pairs."""
        width, height = self.size
        wanted = [nominal(self.rng) for _ in range(count)]
        captions = [varied(scene.caption, self.rng) for scene in wanted]
        noise = torch.randn(count, (width // 16) * (height // 16), 64)
        guidance = torch.empty(count).uniform_(*self.guidance)
        x0, states, levels = roll(self.model, self.encoders, captions, noise, self.size, guidance)
        with mixed_precision():
            pixels = self.autoencoder.decode(unpack(x0, height, width)).float()
        drawn = (127.5 * (pixels.clamp(-1, 1) + 1)).permute(0, 2, 3, 1).numpy()
        found = [(i, snapped(picture, scene)) for i, (picture, scene) in enumerate(zip(drawn, wanted, strict=True))]
        meant = [(i, scene) for i, scene in found if scene is not None]
        self.made, self.kept = self.made + count, self.kept + len(meant)
        if not meant:
            return []
        clean = latents_of(self.autoencoder, [self._render(scene) for _, scene in meant])
        return [
            Pair(scene, captions[i], float(guidance[i]), states[i], levels, latents)
            for (i, scene), latents in zip(meant, clean, strict=True)
        ]

    def _render(self, scene: scenes.Scene) -> np.ndarray:
        return np.asarray(
            scenes.render_lit(scene, *self.size, self.rng) if self.lit else scenes.render(scene, *self.size)
        )

    def renew(self, count: int, most: int) -> None:
        """Draw `count` more; when there are `most` they replace the oldest."""
        for pair in self.make(count):
            if len(self.pairs) < most:
                self.pairs.append(pair)
            else:
                self.pairs[self.oldest] = pair
                self.oldest = (self.oldest + 1) % most

    def draw(self, batch: int) -> list[Pair]:
        """`batch` random ones."""
        return [self.pairs[self.rng.randrange(len(self.pairs))] for _ in range(batch)]


@torch.no_grad()
def latents_of(autoencoder: Autoencoder, pictures: list[np.ndarray]) -> Tensor:
    """Packed latents (N, L, 64) of pictures (H, W, 3) of bytes."""
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with mixed_precision():
        return pack(autoencoder.encode(x.contiguous(memory_format=torch.channels_last)).float().contiguous())
