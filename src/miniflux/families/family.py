"""What stands between a network of one family and everything that draws with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from miniflux.sampling.forwards import Told, Velocity
from miniflux.sampling.schedules import Curve


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    Attributes:
        name: what a variant says of itself.
        patch: rows and columns of the latent in one image token.
        pack, unpack: latent (B, C, h, w) to image tokens (B, L, C') and back; `unpack` takes the picture's height and
            width in pixels as `noise` counts them.
        noise: (height, width, seed, channels) -> what a picture starts from, float32 on the CPU.
        image_ids: (batch, rows, columns) -> positions of the image tokens (B, L, A).
        text_ids: (batch, length) -> positions of the text tokens (B, T, A).
        pooled: whether its words have a summary beside the tokens.
        shift: image tokens -> how a model with a schedule that depends on the size moves its noise levels.
        velocity, conditioning: how its network is called, and what its modulations see.
    """

    name: str
    patch: int
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]
    noise: Callable[[int, int, int, int], Tensor]
    image_ids: Callable[[int, int, int], Tensor]
    text_ids: Callable[[int, int], Tensor]
    pooled: bool
    shift: Callable[[int], Curve]
    velocity: Velocity
    conditioning: Callable[[Any, Told], Tensor]
