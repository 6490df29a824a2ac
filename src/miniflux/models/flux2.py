"""FLUX.2: the transformer of FLUX.1 without biases, with modulations that all blocks of a kind share, and SwiGLU.

Sources: `flux2/model.py` of the original release (black-forest-labs/flux2). No pooled text; positions have four axes
(time, row, column, place in the text); the models without `guidance_in` (klein) were distilled or take two passes.
Letters in shapes: B batch, L image tokens, T text tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from miniflux.errors import ConfigError
from miniflux.models.flux1 import TIME_FEATURES, RunBlock, run_block
from miniflux.models.layers import (
    Attend,
    DoubleStream,
    LastLayer,
    MLPEmbedder,
    Modulation,
    QKNorm,
    SelfAttention,
    Shift,
    ShiftedNorm,
    SingleStream,
    SwiGLU,
    attention,
    checked_axes,
    key_mask,
    rope_rotations,
    timestep_embedding,
)
from miniflux.models.linear import Linear


@dataclass(frozen=True, kw_only=True)
class Flux2Config:
    """Sizes of a FLUX.2 transformer; field names as in `flux2/model.py` (Flux2Params).

    Attributes:
        in_channels: channels of an image token: 32 of the latent, 2x2 patchified.
        out_channels: channels of the predicted velocity; 0 for as many.
        context_in_dim: width of the text tokens: three layers of the language model side by side.
        hidden_size, num_heads: width of the residual stream; head size is their ratio.
        mlp_ratio: width of the MLPs, after SwiGLU, over the hidden size.
        depth, depth_single_blocks: number of double- and single-stream blocks.
        axes_dim: rotary channels of each position axis (time, row, column, text); even, they sum to the head size.
        theta: base of the rotary frequencies.
        guidance_embed: whether the guidance strength is an input (dev) or not (klein).
    """

    in_channels: int
    out_channels: int = 0
    context_in_dim: int
    hidden_size: int
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: Sequence[int]
    mlp_ratio: float = 3.0
    theta: int = 2000
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "out_channels", self.out_channels or self.in_channels)
        object.__setattr__(self, "axes_dim", checked_axes(self.axes_dim, self.hidden_size, self.num_heads))

    @property
    def joined(self) -> bool:
        """Whether text and picture go through all blocks together."""
        return True

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks, in the order in which they run."""
        numbers = {"double": self.depth, "single": self.depth_single_blocks}
        return [f"{kind}_blocks.{i}" for kind, number in numbers.items() for i in range(number)]

    @property
    def mlp_dim(self) -> int:
        """Width of the MLPs after SwiGLU."""
        return int(self.hidden_size * self.mlp_ratio)


class BlockSizes(Protocol):
    """What a double block is told of sizes, by the config of the transformer or of a ControlNet."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...


def _mlp(config: BlockSizes) -> nn.Sequential:
    dim, mlp = config.hidden_size, config.mlp_dim
    return nn.Sequential(Linear(dim, 2 * mlp, bias=False), SwiGLU(), Linear(mlp, dim, bias=False))


class DoubleStreamBlock(DoubleStream):
    """Image and text tokens with separate weights and one joint attention."""

    def __init__(self, config: BlockSizes) -> None:
        super().__init__()
        dim = config.hidden_size
        self.img_norm1 = ShiftedNorm(dim)
        self.img_attn = SelfAttention(dim, config.num_heads, qkv_bias=False, bias=False)
        self.img_norm2 = ShiftedNorm(dim)
        self.img_mlp = _mlp(config)
        self.txt_norm1 = ShiftedNorm(dim)
        self.txt_attn = SelfAttention(dim, config.num_heads, qkv_bias=False, bias=False)
        self.txt_norm2 = ShiftedNorm(dim)
        self.txt_mlp = _mlp(config)

    def modulated(self, img: Tensor, img_mods: list[Shift]) -> Tensor:
        """What the attention of the image tokens begins with."""
        return self.img_norm1(img, img_mods[0])

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_mods: list[Shift],
        txt_mods: list[Shift],
        pe: Tensor,
        mask: Tensor | None = None,
        attend: Attend = attention,
    ) -> tuple[Tensor, Tensor]:
        """One block. img (B, L, hidden), txt (B, T, hidden); the shifts of attention and MLP -> new (img, txt)."""
        return self.meet(img, txt, img_mods, txt_mods, pe, mask, attend)


class SingleStreamBlock(SingleStream):
    """Text and image as one sequence; attention and SwiGLU side by side, in two linears."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        dim, mlp = config.hidden_size, config.mlp_dim
        self.num_heads = config.num_heads
        self.linear1 = Linear(dim, 3 * dim + 2 * mlp, bias=False)  # qkv, and both halves of SwiGLU
        self.linear2 = Linear(dim + mlp, dim, bias=False)  # attention projection and the second MLP layer
        self.norm = QKNorm(dim // config.num_heads)
        self.pre_norm = ShiftedNorm(dim)
        self.mlp_act = SwiGLU()
        self.split = (3 * dim, 2 * mlp)

    def forward(
        self, x: Tensor, mod: Shift, pe: Tensor, mask: Tensor | None = None, attend: Attend = attention
    ) -> Tensor:
        """One block. x (B, T + L, hidden) -> new x."""
        return self.mix(x, mod, pe, mask, attend)


class Flux2(nn.Module):
    """The FLUX.2 transformer. `Flux2(config).state_dict()` has exactly the keys of the published single files."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.img_in = Linear(config.in_channels, dim, bias=False)
        self.time_in = MLPEmbedder(TIME_FEATURES, dim, bias=False)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_FEATURES, dim, bias=False)
        self.txt_in = Linear(config.context_in_dim, dim, bias=False)
        self.double_stream_modulation_img = Modulation(dim, double=True, bias=False)
        self.double_stream_modulation_txt = Modulation(dim, double=True, bias=False)
        self.single_stream_modulation = Modulation(dim, double=False, bias=False)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(dim, config.out_channels, bias=False)

    def conditioning(self, timesteps: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The vector that all modulations see (B, hidden): time and guidance; arguments as of `forward`.

        Raises:
            ConfigError: the model has a guidance input and guidance is None.
        """
        vec = self.time_in(timestep_embedding(timesteps, TIME_FEATURES).to(dtype))
        if not self.config.guidance_embed:
            return vec
        if guidance is None:
            raise ConfigError("this model has a guidance input: guidance must be a tensor of shape (B,), got None")
        return vec + self.guidance_in(timestep_embedding(guidance, TIME_FEATURES).to(dtype))

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        guidance: Tensor | None = None,
        txt_mask: Tensor | None = None,
        run: RunBlock = run_block,
        attend: Attend = attention,
    ) -> Tensor:
        """Predict the velocity v = noise - picture of every image token.

        Args:
            img: normalised latents (B, L, in_channels); those of references behind those of the picture.
            img_ids: their positions (B, L, 4): time (0 for the picture, 10, 20 ... for references), row, column, 0.
            txt: text embeddings (B, T, context_in_dim).
            txt_ids: their positions (B, T, 4): 0, 0, 0, place in the text.
            timesteps: noise level sigma in [0, 1], (B,); 1 is pure noise.
            guidance: guidance strength (B,). Models without `guidance_in` (klein) do not read it, as in the release.
            txt_mask: (B, T), true or 1 for tokens that may be looked at; None: all tokens count, as released.
            run: called in place of every block, by those who want to skip one or look at it.
            attend: called in place of `attention` in every block.

        Returns:
            (B, L, out_channels)

        Raises:
            ConfigError: the model has a guidance input and guidance is None.
        """
        vec = self.conditioning(timesteps, guidance, img.dtype)
        img_mods, txt_mods = self.double_stream_modulation_img(vec), self.double_stream_modulation_txt(vec)
        (single_mod,) = self.single_stream_modulation(vec)
        img, txt = self.img_in(img), self.txt_in(txt)
        pe = rope_rotations(torch.cat((txt_ids, img_ids), dim=1), self.config.axes_dim, self.config.theta)
        mask = key_mask(txt_mask, img_ids)
        for i, block in enumerate(self.double_blocks):
            img, txt = run(f"double_blocks.{i}", block, (img, txt), (img_mods, txt_mods, pe, mask, attend))
        x = torch.cat((txt, img), dim=1)
        for i, block in enumerate(self.single_blocks):
            (x,) = run(f"single_blocks.{i}", block, (x,), (single_mod, pe, mask, attend))
        return self.final_layer(x[:, txt.shape[1] :], vec)
