"""Image to image: a picture is drowned in noise up to a level, and drawn anew from there (SDEdit, arXiv 2108.01073)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from miniflux.conditions.condition import Added, Picture, Scene
from miniflux.families import Family
from miniflux.models.flux1 import Flux1Config
from miniflux.pictures import digest_of
from miniflux.sampling import Schedule, from_strength


@dataclass(frozen=True, eq=False)
class Img2Img:
    """A picture to change.

    Attributes:
        image: it, or its latents (1, C, h, w); or its SHA-256, where only that is known: then it can be described, and
            not be drawn.
        strength: how much of it to change, above 0 up to 1: of the steps of a whole picture, this last share is made.
    """

    image: Picture | str
    strength: float = 1.0

    def check(self, family: Family, config: Flux1Config) -> None:
        """Every network that draws can."""

    def levels(self, levels: Schedule) -> Schedule:
        return from_strength(levels, self.strength)

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
