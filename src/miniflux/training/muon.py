"""Muon: momentum whose every matrix is orthogonalised before it is applied (https://kellerjordan.github.io/posts/muon).

`torch.optim.Muon` does the same, but always computes the orthogonalisation in bfloat16, which takes a hundred times as
long as float32 on CPUs without such instructions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from miniflux.memory.compute import bfloat16_slowness

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: the steepest slope at zero that stays within 0.7 and 1.2
ITERATIONS = 5
MATCH_ADAMW = 0.2  # makes the update's root mean square that of AdamW (arXiv 2502.16982, section 2.2)


def orthogonalised(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest matrix with all singular values about 1, by Newton-Schulz iteration in `dtype`; shape (M, N)."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for matrices only; learning rates as for AdamW."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = torch.bfloat16 if bfloat16_slowness() < 1 else torch.float32

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalised(matrix.grad.lerp(momentum, group["momentum"]), self.dtype)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * MATCH_ADAMW * max(matrix.shape) ** 0.5)
