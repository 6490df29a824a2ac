"""What stands between a network of one family and everything that draws with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from miniflux.sampling.forwards import Told, Velocity
from miniflux.sampling.latents import pack, unpack
from miniflux.sampling.schedules import Curve

Size = tuple[int, int]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Frame:
    """How a reference is brought to whole tokens: to this width and height, and of that so much is seen of its middle,
    or where that is more, as much mirrored around it."""

    resized: Size
    canvas: Size

    @property
    def inside(self) -> Box | None:
        """Where the picture is on a canvas that is larger: left, top, right, bottom in pixels; None if none of it is
        mirrored."""
        (width, height), (across, down) = self.resized, self.canvas
        if self.canvas == self.resized or across < width or down < height:
            return None
        left, top = (across - width) // 2, (down - height) // 2
        return left, top, left + width, top + height


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    Attributes:
        name: what a variant says of itself.
        patch: rows and columns of a latent that are one token.
        image_ids: (batch, rows, columns) -> positions of the image tokens (B, L, A).
        text_ids: (batch, length) -> positions of the text tokens (B, T, A).
        reference_ids: (number of the reference from 1, rows, columns) -> positions of its tokens (1, L, A).
        reference_frame: (width, height, how many references there are) -> how one of this size is seen; raises
            InputError for sizes that its models never see.
        whole: whether a single reference is seen whole, mirrored around itself where tokens need more, and the picture
            that has its size cut back to it.
        once: whether its networks can look at references once, for all steps.
        shift: (image tokens, steps) -> how a model whose schedule is shifted moves its noise levels.
        velocity, conditioning: how its network is called, and what its modulations see.
    """

    name: str
    patch: int
    image_ids: Callable[[int, int, int], Tensor]
    text_ids: Callable[[int, int], Tensor]
    reference_ids: Callable[[int, int, int], Tensor]
    reference_frame: Callable[[int, int, int], Frame]
    whole: bool = False
    once: bool = False
    shift: Callable[[int, int], Curve]
    velocity: Velocity
    conditioning: Callable[[Any, Told], Tensor]

    def pack(self, latent: Tensor) -> Tensor:
        """Latent (B, C, h, w) to image tokens (B, L, C')."""
        return pack(latent, self.patch)

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Image tokens back to the latent of a picture of so many pixels, as `initial_noise` counts them."""
        return unpack(tokens, height, width, self.patch)
