"""The ControlNet of FLUX.2 dev: a few double blocks beside its own, which see a picture and a part to be completed.

Source: `videox_fun/models/flux2_transformer2d_control.py` of aigc-apps/VideoX-Fun, for the weights that alibaba-pai
publishes as FLUX.2-dev-Fun-Controlnet-Union. It embeds nothing but the control tokens: image and text tokens,
modulations and positions are those that the transformer's own blocks are given.
Letters in shapes: B batch, L image tokens, T text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from miniflux.models.flux2 import DoubleStreamBlock
from miniflux.models.layers import Attend, Shift, attention
from miniflux.models.linear import Linear

EVERY = 2  # what block n says is added after the transformer's double block 2n


@dataclass(frozen=True, kw_only=True)
class Flux2ControlNetConfig:
    """Sizes of such a ControlNet, named as in `Flux2Config`; all but `depth` are the transformer's.

    Attributes:
        control_channels: of a control token: the latents of the control picture, four places of a mask, the latents of
            the picture that is completed.
        depth: its own blocks.
    """

    control_channels: int
    hidden_size: int
    num_heads: int
    depth: int
    mlp_ratio: float = 3.0

    @property
    def blocks(self) -> list[str]:
        """Names of its blocks, in the order in which they run."""
        return [f"control_transformer_blocks.{i}" for i in range(self.depth)]

    @property
    def mlp_dim(self) -> int:
        """Width of the MLPs after SwiGLU."""
        return int(self.hidden_size * self.mlp_ratio)


class ControlBlock(DoubleStreamBlock):
    """A double block of FLUX.2, and what becomes of its image tokens."""

    def __init__(self, config: Flux2ControlNetConfig, first: bool) -> None:
        super().__init__(config)
        if first:
            self.before_proj = Linear(config.hidden_size, config.hidden_size)
        self.after_proj = Linear(config.hidden_size, config.hidden_size)


class Flux2ControlNet(nn.Module):
    """A ControlNet of FLUX.2. Inside its blocks names are those of `Flux2`; the published file has diffusers'."""

    def __init__(self, config: Flux2ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        self.control_img_in = Linear(config.control_channels, config.hidden_size)
        self.control_transformer_blocks = nn.ModuleList(ControlBlock(config, first=i == 0) for i in range(config.depth))

    def forward(
        self,
        control: Tensor,
        img: Tensor,
        txt: Tensor,
        img_mods: list[Shift],
        txt_mods: list[Shift],
        pe: Tensor,
        mask: Tensor | None = None,
        attend: Attend = attention,
    ) -> list[Tensor]:
        """What is to be added to the image tokens after every `EVERY`-th double block, from the first on.

        Args:
            control: tokens (B, L, control_channels), zeros for those of references.
            img, txt: the tokens (B, L, hidden), (B, T, hidden) that the transformer's first block is given; the others
                are given to it with them, see `DoubleStreamBlock.forward`.

        Returns:
            One tensor (B, L, hidden) for each block here.
        """
        blocks = [cast(ControlBlock, block) for block in self.control_transformer_blocks]
        seen, hints = blocks[0].before_proj(self.control_img_in(control)) + img, list[Tensor]()
        for block in blocks:
            seen, txt = block(seen, txt, img_mods, txt_mods, pe, mask, attend)
            hints.append(block.after_proj(seen))
        return hints
