"""Image to image: a picture is drowned in noise up to a level, and drawn anew from there (SDEdit, arXiv 2108.01073)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miniflux.conditions.condition import Added, Picture, Scene
from miniflux.errors import InputError
from miniflux.families import Family
from miniflux.models.transformer import TransformerConfig
from miniflux.pictures import digest_of, open_picture
from miniflux.sampling import Schedule, from_strength


@dataclass(frozen=True, eq=False)
class Img2Img:
    """A picture to change.

    Attributes:
        image: it, or its latents (1, C, h, w); or its SHA-256, where only that is known: then it can be described, and
            not be drawn.
        strength: how much of it to change, above 0 up to 1: of the steps of a whole picture, this last share is made.

    Raises:
        InputError: it is no picture, or pixels are not from -1 to 1.
    """

    image: Picture | str
    strength: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.image, Tensor):
            if self.image.ndim != 4:
                check_pixels("pixels", self.image)
        elif not is_digest(self.image):
            object.__setattr__(self, "image", open_picture(self.image))

    def check(self, family: Family, config: TransformerConfig) -> None:
        """Every network that draws can."""

    def levels(self, levels: Schedule) -> Schedule:
        return from_strength(levels, self.strength)

    @property
    def known(self) -> Picture | None:
        """The picture, if more than its hash is known."""
        return None if isinstance(self.image, str) else self.image

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height of the picture; None of latents, and where it is not known."""
        if isinstance(self.image, Tensor):
            return (self.image.shape[2], self.image.shape[1]) if self.image.ndim == 3 else None
        return None if isinstance(self.image, str) else self.image.size

    def described(self) -> dict[str, Any]:
        return {
            "image": self.image if isinstance(self.image, str) else digest_of(self.image),
            "strength": self.strength,
        }

    def tokens(self, rows: int, columns: int) -> int:
        return 0

    def added(self, scene: Scene) -> Added:
        assert not isinstance(self.image, str), "only its hash is known"
        return Added(start=scene.encode(self.image))


def is_digest(given: object) -> bool:
    """Whether it is a SHA-256 as 64 hexadecimal digits."""
    return isinstance(given, str) and re.fullmatch("[0-9a-f]{64}", given) is not None


def check_pixels(what: str, pixels: Tensor) -> None:
    """Raises InputError unless they are (3, H, W), from -1 to 1."""
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise InputError(f"{what} must be (3, H, W), got a tensor {tuple(pixels.shape)}")
    if not pixels.is_floating_point() or not bool(torch.isfinite(pixels).all()):
        raise InputError(f"{what} must be finite floating-point numbers, got a tensor of {pixels.dtype}")
    low, high = pixels.min().item(), pixels.max().item()
    if low < -1 or high > 1:
        raise InputError(f"{what} must lie in [-1, 1] (levels from 0 to 255: / 127.5 - 1), got {low:g} to {high:g}")
