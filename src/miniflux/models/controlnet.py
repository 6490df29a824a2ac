"""ControlNets of FLUX.1: a few of its blocks see a control picture, and say what is added to the big network's tokens.

Sources: `FluxControlNetModel` (InstantX, Shakker Labs; diffusers' layout), `src/flux/controlnet.py` of XLabs-AI/x-flux;
arXiv 2302.05543. Letters in shapes: B batch, L image tokens, T text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from miniflux.errors import ConfigError
from miniflux.models.flux1 import Attend, Flux1Config, Flux1Trunk
from miniflux.models.layers import attention
from miniflux.models.linear import Linear

HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)  # of the convolutions that XLabs' control picture goes through
PATCH = 2


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(Flux1Config):
    """Sizes of a ControlNet: those of its blocks, and of what it is given beside the noisy picture.

    Attributes:
        control_channels: of a control token: the latents of the control picture, or what the convolutions make of it.
        modes: rows of the table of kinds of control (Union); 0 without one.
        hint_channels: of the convolutions over the pixels of the control picture (XLabs); 0 if it is seen as latents.
    """

    control_channels: int
    modes: int = 0
    hint_channels: int = 0


class ControlNet(Flux1Trunk):
    """A ControlNet. Its own names are those of XLabs; `controlnet_single_blocks` and `controlnet_mode_embedder`, which
    they have not, those of diffusers."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        dim, hint = config.hidden_size, config.hint_channels
        self.controlnet_blocks = nn.ModuleList(Linear(dim, dim) for _ in range(config.depth))
        self.controlnet_single_blocks = nn.ModuleList(Linear(dim, dim) for _ in range(config.depth_single_blocks))
        self.pos_embed_input = Linear(config.control_channels, dim)
        if config.modes:
            self.controlnet_mode_embedder = nn.Embedding(config.modes, dim)
        if hint:
            layers: list[nn.Module] = []
            for i, stride in enumerate(HINT_STRIDES):
                layers += [nn.Conv2d(hint if i else 3, hint, 3, padding=1, stride=stride), nn.SiLU()]
            self.input_hint_block = nn.Sequential(*layers[:-1])

    def control_tokens(self, control: Tensor) -> Tensor:
        """Tokens (B, L, control_channels): as they are, or of pixels (B, 3, H, W) in [-1, 1], for XLabs' networks."""
        if not self.config.hint_channels:
            return control
        seen = self.input_hint_block(control)
        return rearrange(seen, "B C (h py) (w px) -> B (h w) (C py px)", py=PATCH, px=PATCH)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        control: Tensor,
        guidance: Tensor | None = None,
        txt_mask: Tensor | None = None,
        mode: int | None = None,
        attend: Attend = attention,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What is to be added to the image tokens of the transformer, one tensor (B, L, hidden) for each block here.

        Args:
            control: tokens (B, L, control_channels), see `control_tokens`.
            mode: the kind of control, a row of the table, for networks that have one.
            The others are those of `Flux1.forward`.

        Returns:
            For its double blocks and for its single blocks.

        Raises:
            ConfigError: a kind of control is missing, or given to a network without a table; or guidance is missing.
        """
        if (mode is None) != (not self.config.modes):
            kinds = f"a mode from 0 to {self.config.modes - 1}" if self.config.modes else "no mode"
            raise ConfigError(f"this ControlNet takes {kinds}, got {mode}")
        vec = self.conditioning(timesteps, y, guidance, img.dtype)
        img, txt = self.img_in(img) + self.pos_embed_input(control), self.txt_in(txt)
        if mode is not None:  # a word more, at the front
            kind = self.controlnet_mode_embedder.weight[mode].expand(len(txt), 1, -1).to(txt)
            txt, txt_ids = torch.cat((kind, txt), dim=1), torch.cat((txt_ids[:, :1], txt_ids), dim=1)
            txt_mask = None if txt_mask is None else torch.cat((torch.ones_like(txt_mask[:, :1]), txt_mask), dim=1)
        context = self.context(vec, txt_ids, img_ids, txt_mask, attend)
        double: list[Tensor] = []
        for block, out in zip(self.double_blocks, self.controlnet_blocks, strict=True):
            img, txt = block(img, txt, *context)
            double.append(out(img))
        x, single = torch.cat((txt, img), dim=1), list[Tensor]()
        for block, out in zip(self.single_blocks, self.controlnet_single_blocks, strict=True):
            x = block(x, *context)
            single.append(out(x[:, txt.shape[1] :]))
        return double, single
