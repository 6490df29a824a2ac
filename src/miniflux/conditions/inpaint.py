"""Inpainting with any model: what a mask leaves out stays as it is, at every noise level and in the end bit for bit.

Outside the mask the latents are, after every step, those of the picture under the same noise; so what is drawn anew
sees what it must fit to (RePaint, arXiv 2201.09865, without its jumps). A grey mask says how much: a pixel of mask 0.4
is let go for the last 0.4 of the steps (differential diffusion, arXiv 2306.00950).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miniflux.conditions.condition import Added, Scene
from miniflux.conditions.img2img import Img2Img, is_digest
from miniflux.conditions.masks import check_mask
from miniflux.pictures import digest_of, from_image
from miniflux.sampling import Schedule, add_noise

NEVER, ALWAYS = -1.0, 2.0  # noise levels that no pixel reaches, and that every pixel is below


@dataclass(frozen=True, eq=False)
class Inpaint(Img2Img):
    """A picture to change, and where.

    Attributes:
        mask: (H, W), from 0 (keep) to 1 (draw anew); or its SHA-256, where only that is known.
    """

    mask: Tensor | str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_digest(self.mask):
            check_mask(self.mask, self.pixels)

    def described(self) -> dict[str, Any]:
        return {**super().described(), "mask": self.mask if isinstance(self.mask, str) else digest_of(self.mask)}

    def added(self, scene: Scene) -> Added:
        assert isinstance(self.mask, Tensor) and not isinstance(self.image, str), "only a hash is known"
        start, mask = scene.encode(self.image), self.mask
        # A place of the latent is let go as far as the pixel under it that is let go most.
        shares = F.adaptive_max_pool2d(mask[None, None], start.shape[-2:])
        begins = let_go(shares, scene.levels)

        def keep(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
            known = start if sigma == 0 else add_noise(start, 0.0, sigma, noise)
            return torch.where((begins <= sigma).to(latents.device), known.to(latents), latents)

        def paste(pixels: Tensor) -> Tensor:
            return torch.where((mask > 0).to(pixels.device), pixels, original.to(pixels))

        if isinstance(self.image, Tensor) and self.image.ndim == 4:  # latents, of which there are no pixels
            return Added(start=start, keep=keep)
        original = self.image if isinstance(self.image, Tensor) else from_image(self.image)
        return Added(start=start, keep=keep, paste=paste)


def let_go(shares: Tensor, levels: Schedule) -> Tensor:
    """The noise level below which each place is drawn: where so large a share of the steps is left; between two levels
    if need be, so that the result changes continuously with the mask."""
    falling = torch.tensor(levels.falling, dtype=torch.float64)
    place = (1 - shares.double()) * levels.steps
    whole = place.floor().clamp(max=levels.steps - 1).long()
    level = torch.lerp(falling[whole], falling[whole + 1], place - whole)
    return level.masked_fill(shares <= 0, NEVER).masked_fill(shares >= 1, ALWAYS)
