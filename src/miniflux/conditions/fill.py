"""FLUX.1 Fill: the picture with a hole, and the mask, as channels beside the noise (`prepare_fill` of the release)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from miniflux.conditions.condition import Added, Scene
from miniflux.conditions.inpaint import Inpaint
from miniflux.errors import InputError
from miniflux.families import Family
from miniflux.models.transformer import TransformerConfig
from miniflux.pictures import from_image


def fill_channels(family: Family, config: TransformerConfig, downscale: int) -> int:
    """What a Fill network reads beside the noisy picture: another picture, and every pixel of the mask."""
    return config.out_channels + (family.patch * downscale) ** 2


@dataclass(frozen=True, eq=False)
class Fill(Inpaint):
    """A picture and where it is drawn anew, for a network that was trained to see both. The hole is grey; a grey mask
    is told as it is, as in the release."""

    def check(self, family: Family, config: TransformerConfig) -> None:
        if isinstance(self.image, Tensor) and self.image.ndim == 4:
            raise InputError("a Fill model sees the pixels of the picture, and latents were given")
        if config.in_channels <= 2 * config.out_channels:
            raise InputError(
                "Fill is for Fill models, and this network reads no mask: give Inpaint, or image= and mask="
            )

    def added(self, scene: Scene) -> Added:
        assert isinstance(self.mask, Tensor) and not isinstance(self.image, str), "only a hash is known"
        pixels, mask = self.image if isinstance(self.image, Tensor) else from_image(self.image), self.mask
        seen = scene.encode(pixels * (1 - mask))
        side = mask.shape[-1] // seen.shape[-1]
        folded = rearrange(mask[None, None], "B C (h py) (w px) -> B (C py px) h w", py=side, px=side)
        channels = torch.cat((scene.family.pack(seen), scene.family.pack(folded)), dim=-1)

        def paste(drawn: Tensor) -> Tensor:
            return torch.where((mask > 0).to(drawn.device), drawn, pixels.to(drawn))

        return Added(start=scene.encode(pixels) if self.strength < 1 else None, channels=channels, paste=paste)
