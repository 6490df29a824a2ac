"""Previews: latents as small pictures, by one linear map from their channels to red, green and blue, or by a tiny
decoder."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor

from miniflux.errors import InputError
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.tiny_autoencoder import TinyDecoder

Table = tuple[tuple[float, float, float], ...]
"""Red, green and blue per latent channel, and as the last row what is added."""


def rgb(latent: Tensor, table: Table) -> Tensor:
    """Latents (B, C, h, w) -> pixels (B, 3, h, w), about [-1, 1]."""
    weight = torch.tensor(table, dtype=torch.float32, device=latent.device)
    return torch.einsum("bchw,cr->brhw", latent.float(), weight[:-1]) + weight[-1][:, None, None]


def decode(latent: Tensor, table: Table, tiny: TinyDecoder | None, decoder: str | None = None) -> Tensor:
    """Latents (B, C, h, w) -> pixels (B, 3, H, W) of any size, about [-1, 1].

    Args:
        decoder: `tiny`, `table`, or None for the first of the two that there is.

    Raises:
        InputError: another decoder, or there is none of that kind.
    """
    there = {"tiny": tiny is not None, "table": bool(table)}
    if decoder not in (None, *there):
        raise InputError(f"unknown preview decoder {decoder!r}; known: {', '.join(there)}")
    decoder = decoder or next((name for name, found in there.items() if found), "table")
    if not there[decoder]:
        ways = {
            "tiny": "its file (for FLUX.1 taef1_decoder.safetensors) goes beside the others",
            "table": "sampling.previews.fit makes one",
        }
        raise InputError(f"this model has no preview {decoder}: {ways[decoder]}")
    return rgb(latent, table) if tiny is None or decoder == "table" else tiny(latent)


@torch.inference_mode()
def fit(autoencoder: Autoencoder, pixels: Tensor) -> Table:
    """The map from latents to pictures (B, 3, H, W) in [-1, 1], shrunk to their size, of least squared error."""
    latent = autoencoder.encode(pixels)
    scale = autoencoder.config.downscale
    small = reduce(pixels, "B C (h y) (w x) -> (B h w) C", "mean", y=scale, x=scale)
    channels = rearrange(latent, "B C h w -> (B h w) C")
    ones = torch.ones(len(channels), 1)
    solution = torch.linalg.lstsq(torch.cat((channels, ones), dim=1).double(), small.double()).solution
    return tuple((r, g, b) for r, g, b in solution.tolist())
