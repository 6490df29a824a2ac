"""The flow-matching objective: at a random noise level, predict the velocity from picture to noise."""

from __future__ import annotations

import torch
from torch import Tensor

from miniflux.memory.compute import bfloat16_slowness


def mixed_precision() -> torch.autocast:
    """bfloat16 matrix products on float32 weights where this CPU is faster at them; elsewhere all in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_slowness() < 1)


def logit_normal_sigmas(batch: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Noise levels (B,) in (0, 1): sigmoid of a normal variable (arXiv 2403.03206, section 3.1)."""
    return torch.sigmoid(mean + std * torch.randn(batch))


def mix(x0: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise, for tokens (B, L, C) and noise levels (B,)."""
    s = sigmas[:, None, None]
    return (1 - s) * x0 + s * noise
