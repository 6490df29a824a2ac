"""Latents on their way in and out of the transformer: noise from a seed, packing into tokens, position ids.

A token of FLUX.1 is a 2x2 patch of the latent; latents of FLUX.2 and FLUX.3 are patchified already, and a token is one
place of them. Source: `flux/sampling.py` of the original release.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor

from miniflux.checks import whole
from miniflux.errors import InputError

PATCH = 2  # latent rows and columns per token of FLUX.1
PIXELS_PER_TOKEN = 16  # 8 pixels per latent row in the autoencoder, times the patch
MAX_SEED = 2**64 - 1  # what torch's generator takes


def initial_noise(height: int, width: int, seed: int, channels: int = 16, patch: int = PATCH) -> Tensor:
    """The noise a picture starts from: standard normal, on the CPU, in float32.

    Always drawn on the CPU from one generator per picture, so a seed means the same picture on every device and in
    every batch. torch's CPU generator reads the low 32 bits of a seed: seeds 2^32 apart draw the same noise.

    Args:
        height, width: of the picture in pixels; rounded up to whole tokens of 16.
        seed: 0 ... 2^64 - 1.
        channels, patch: of the latent, and its rows and columns per token.

    Returns:
        (1, channels, patch * ceil(height / 16), patch * ceil(width / 16))

    Raises:
        InputError: the seed is not a whole number in its range, or the picture has no pixels.
    """
    seed = whole("seed", seed, 0, MAX_SEED)
    if height < 1 or width < 1:
        raise InputError(f"height and width must be at least 1, got {height}x{width}")
    rows, columns = (patch * math.ceil(side / PIXELS_PER_TOKEN) for side in (height, width))
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, channels, rows, columns, generator=generator, dtype=torch.float32)


def slerp(a: Tensor, b: Tensor, amount: float) -> Tensor:
    """From a (amount 0) to b (amount 1) along the great circle between them: the norm stays what noise should have."""
    cosine = float((a.double() * b.double()).sum() / (a.double().norm() * b.double().norm()))
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return torch.lerp(a, b, amount)
    return (math.sin((1 - amount) * angle) * a + math.sin(amount * angle) * b) / math.sin(angle)


def pack(latent: Tensor, patch: int = PATCH) -> Tensor:
    """(B, C, h, w) -> tokens (B, h / patch * w / patch, C * patch^2), row by row.

    Raises:
        InputError: h or w is no multiple of `patch`.
    """
    height, width = latent.shape[-2:]
    if height % patch or width % patch:
        raise InputError(f"a latent of {height}x{width} has no whole patches: both sides must be even")
    return rearrange(latent, "B C (h ph) (w pw) -> B (h w) (C ph pw)", ph=patch, pw=patch)


def unpack(tokens: Tensor, height: int, width: int, patch: int = PATCH) -> Tensor:
    """Tokens (B, L, C * patch^2) of a picture of height x width pixels -> latent (B, C, h, w); the inverse of `pack`.

    Raises:
        InputError: the number of tokens does not fit the size, or their channels are not whole patches.
    """
    rows, columns = math.ceil(height / PIXELS_PER_TOKEN), math.ceil(width / PIXELS_PER_TOKEN)
    if tokens.shape[1] != rows * columns:
        raise InputError(f"{tokens.shape[1]} tokens do not fill {height}x{width} pixels, which needs {rows * columns}")
    if tokens.shape[2] % patch**2:
        raise InputError(f"{tokens.shape[2]} channels are no whole patches: expected a multiple of {patch**2}")
    return rearrange(tokens, "B (h w) (C ph pw) -> B C (h ph) (w pw)", h=rows, ph=patch, pw=patch)


def image_ids(batch: int, rows: int, columns: int, index: int = 0) -> Tensor:
    """Positions (B, rows * columns, 3) of image tokens: (index, row, column); index tells several pictures apart."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0] = index
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return repeat(ids, "h w A -> B (h w) A", B=batch)


def text_ids(batch: int, length: int) -> Tensor:
    """Positions (B, length, 3) of text tokens: all zero, because T5 has already put the order into the embeddings."""
    return torch.zeros(batch, length, 3)
