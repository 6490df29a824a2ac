"""FLUX.1 Redux: what SigLIP sees, as words that the transformer reads (`flux/modules/image_embedders.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from miniflux.models.linear import Linear


@dataclass(frozen=True, kw_only=True)
class ReduxConfig:
    """Widths: of a patch that SigLIP has seen, of a word of T5, and between them."""

    redux_dim: int
    txt_in_features: int
    inner: int


class Redux(nn.Module):
    """Two linears; names as in the release and in diffusers."""

    def __init__(self, config: ReduxConfig) -> None:
        super().__init__()
        self.config = config
        self.redux_up = Linear(config.redux_dim, config.inner)
        self.redux_down = Linear(config.inner, config.txt_in_features)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, redux_dim) -> words (B, N, txt_in_features)."""
        return self.redux_down(F.silu(self.redux_up(patches)))
