"""From noise to latents: the loop that follows the velocity field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from miniflux.errors import InputError
from miniflux.models.flux1 import Flux1

StepCallback = Callable[[int, Tensor], None]
"""Called after each step with the number of steps done (1, 2, ...) and the latents (B, L, C)."""


def euler_step(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Follow the velocity v in a straight line from sigma to sigma_next."""
    return x + (sigma_next - sigma) * v


@torch.inference_mode()
def denoise(
    model: Flux1,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    vec: Tensor,
    timesteps: Sequence[float],
    guidance: float | None = 4.0,
    img_cond: Tensor | None = None,
    img_cond_seq: Tensor | None = None,
    img_cond_seq_ids: Tensor | None = None,
    txt_mask: Tensor | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrate the flow from the first to the last of `timesteps` with Euler's method.

    Argument names as in `flux/sampling.py` of the original release.

    Args:
        img: noise (B, L, C), packed.
        img_ids, txt, txt_ids, vec, txt_mask: see `Flux1.forward` (vec is its y).
        timesteps: noise levels, 1.0 ... 0.0.
        guidance: strength given to models with a guidance input; the others ignore it.
        img_cond: tokens (B, L, C') appended on the channels of every step (Fill, Canny, Depth).
        img_cond_seq, img_cond_seq_ids: tokens (B, L', C) appended to the sequence of every step (Kontext).
        callback: called after every step; it may raise to stop the run.

    Returns:
        (B, L, C), of float32 at least: rounding the sum of many small steps to bfloat16 would cost visible detail.

    Raises:
        InputError: of img_cond_seq and img_cond_seq_ids only one is given.
        ConfigError: the model has a guidance input and guidance is None.
    """
    if (img_cond_seq is None) != (img_cond_seq_ids is None):
        raise InputError("img_cond_seq and img_cond_seq_ids belong together: got only one of them")
    dtype, batch = img.dtype, img.shape[0]
    x = img.float()
    guidance_vec = None if guidance is None else torch.full((batch,), guidance, device=img.device, dtype=dtype)
    ids = img_ids if img_cond_seq_ids is None else torch.cat((img_ids, img_cond_seq_ids), dim=1)
    for step, (sigma, sigma_next) in enumerate(pairwise(timesteps), start=1):
        tokens = x.to(dtype)
        if img_cond is not None:
            tokens = torch.cat((tokens, img_cond), dim=-1)
        if img_cond_seq is not None:
            tokens = torch.cat((tokens, img_cond_seq), dim=1)
        sigma_vec = torch.full((batch,), sigma, device=img.device, dtype=dtype)
        v = model(tokens, ids, txt, txt_ids, sigma_vec, vec, guidance_vec, txt_mask)[:, : x.shape[1]]
        x = euler_step(x, v.float(), sigma, sigma_next)
        if callback is not None:
            callback(step, x)
    return x
