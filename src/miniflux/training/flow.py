"""The flow-matching objective: at a random noise level, predict the velocity from picture to noise."""

from __future__ import annotations

import torch
from torch import Tensor


def logit_normal_sigmas(batch: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Noise levels (B,) in (0, 1): sigmoid of a normal variable (arXiv 2403.03206, section 3.1)."""
    return torch.sigmoid(mean + std * torch.randn(batch))


def mix(x0: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise, for tokens (B, L, C) and noise levels (B,)."""
    s = sigmas[:, None, None]
    return (1 - s) * x0 + s * noise
