"""FLUX.1: the rectified-flow transformer (MMDiT) that predicts a velocity for every image token.

Architecture: double-stream blocks (image and text keep their own weights and meet in attention), then single-stream
blocks over the joined sequence. Sources: `flux/model.py` and `flux/modules/layers.py` of the original release;
MMDiT: arXiv 2403.03206, section 4; parallel attention and MLP: arXiv 2302.05442, section 2.1.
Letters in shapes: B batch, L tokens, T text tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miniflux.errors import ConfigError
from miniflux.models.layers import (
    Attend,
    DoubleStream,
    LastLayer,
    MLPEmbedder,
    Modulation,
    QKNorm,
    SelfAttention,
    ShiftedNorm,
    SingleStream,
    TanhGELU,
    attention,
    checked_axes,
    key_mask,
    rope_rotations,
    timestep_embedding,
)
from miniflux.models.linear import Linear

TIME_FEATURES = 256  # sinusoidal features of the time and of the guidance, in every release

RunBlock = Callable[[str, nn.Module, tuple[Tensor, ...], tuple[Any, ...]], tuple[Tensor, ...]]
"""What runs a block: (its name, the block, its streams, the rest of its arguments) -> the new streams. The streams are
(img, txt) for a double block and (txt and img joined,) for a single one."""


def run_block(name: str, block: nn.Module, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Just run it. Step caches and skip-layer guidance put their own function in this place."""
    out = block(*streams, *context)
    return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True, kw_only=True)
class Flux1Config:
    """Sizes of a FLUX.1 transformer; field names as in `flux/model.py` (FluxParams).

    Attributes:
        in_channels: channels of an image token: 64 for text-to-image; 384 for Fill; 128 for Canny and Depth.
        out_channels: channels of the predicted velocity.
        vec_in_dim: width of the pooled text embedding (CLIP).
        context_in_dim: width of the text tokens (T5).
        hidden_size, num_heads: width of the residual stream; head size is their ratio.
        mlp_ratio: width of the MLPs over the hidden size.
        depth, depth_single_blocks: number of double- and single-stream blocks.
        axes_dim: rotary channels of each position axis (image index, row, column); even, they sum to the head size.
        theta: base of the rotary frequencies.
        qkv_bias: bias in the qkv linears of the double blocks.
        guidance_embed: whether the guidance strength is an input (dev) or not (schnell).
    """

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: Sequence[int]
    mlp_ratio: float = 4.0
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool

    def __post_init__(self) -> None:
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


def _mlp(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(Linear(dim, hidden), TanhGELU(), Linear(hidden, dim))


class DoubleStreamBlock(DoubleStream):
    """Image and text tokens with separate weights and one joint attention."""

    def __init__(self, config: Flux1Config) -> None:
        super().__init__()
        dim, mlp_dim = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.img_mod = Modulation(dim, double=True)
        self.img_norm1 = ShiftedNorm(dim)
        self.img_attn = SelfAttention(dim, config.num_heads, config.qkv_bias)
        self.img_norm2 = ShiftedNorm(dim)
        self.img_mlp = _mlp(dim, mlp_dim)
        self.txt_mod = Modulation(dim, double=True)
        self.txt_norm1 = ShiftedNorm(dim)
        self.txt_attn = SelfAttention(dim, config.num_heads, config.qkv_bias)
        self.txt_norm2 = ShiftedNorm(dim)
        self.txt_mlp = _mlp(dim, mlp_dim)

    def modulated(self, img: Tensor, vec: Tensor) -> Tensor:
        """What the attention of the image tokens begins with."""
        return self.img_norm1(img, self.img_mod(vec)[0])

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        pe: Tensor,
        mask: Tensor | None = None,
        attend: Attend = attention,
    ) -> tuple[Tensor, Tensor]:
        """One block. img (B, L, hidden), txt (B, T, hidden), vec (B, hidden) -> new (img, txt)."""
        return self.meet(img, txt, self.img_mod(vec), self.txt_mod(vec), pe, mask, attend)


class SingleStreamBlock(SingleStream):
    """Text and image as one sequence; attention and MLP side by side, in two linears."""

    def __init__(self, config: Flux1Config) -> None:
        super().__init__()
        dim, mlp_dim = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.num_heads = config.num_heads
        self.linear1 = Linear(dim, dim * 3 + mlp_dim)  # qkv and the first MLP layer
        self.linear2 = Linear(dim + mlp_dim, dim)  # attention projection and the second MLP layer
        self.norm = QKNorm(dim // config.num_heads)
        self.pre_norm = ShiftedNorm(dim)
        self.mlp_act = TanhGELU()
        self.modulation = Modulation(dim, double=False)
        self.split = (3 * dim, mlp_dim)

    def forward(
        self, x: Tensor, vec: Tensor, pe: Tensor, mask: Tensor | None = None, attend: Attend = attention
    ) -> Tensor:
        """One block. x (B, T + L, hidden), vec (B, hidden) -> new x."""
        (mod,) = self.modulation(vec)
        return self.mix(x, mod, pe, mask, attend)


class Flux1Trunk(nn.Module):
    """What the transformer and its ControlNets have in common: inputs, conditioning, blocks."""

    def __init__(self, config: Flux1Config) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.img_in = Linear(config.in_channels, dim)
        self.time_in = MLPEmbedder(TIME_FEATURES, dim)
        self.vector_in = MLPEmbedder(config.vec_in_dim, dim)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_FEATURES, dim)
        self.txt_in = Linear(config.context_in_dim, dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single_blocks))

    def conditioning(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The vector that all modulations see (B, hidden): time, guidance and pooled text; arguments as of `forward`.

        Raises:
            ConfigError: the model has a guidance input and guidance is None.
        """
        vec = self.time_in(timestep_embedding(timesteps, TIME_FEATURES).to(dtype))
        if self.config.guidance_embed:
            if guidance is None:
                raise ConfigError("this model has a guidance input: guidance must be a tensor of shape (B,), got None")
            vec = vec + self.guidance_in(timestep_embedding(guidance, TIME_FEATURES).to(dtype))
        return vec + self.vector_in(y)

    def context(
        self, vec: Tensor, txt_ids: Tensor, img_ids: Tensor, txt_mask: Tensor | None, attend: Attend = attention
    ) -> tuple[Tensor, Tensor, Tensor | None, Attend]:
        """What every block is given beside its streams: the conditioning vector, rotations, mask, attention."""
        pe = rope_rotations(torch.cat((txt_ids, img_ids), dim=1), self.config.axes_dim, self.config.theta)
        return vec, pe, key_mask(txt_mask, img_ids), attend


class Flux1(Flux1Trunk):
    """The FLUX.1 transformer. `Flux1(config).state_dict()` has exactly the keys of the published single files."""

    def __init__(self, config: Flux1Config) -> None:
        super().__init__(config)
        self.final_layer = LastLayer(config.hidden_size, config.out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        txt_mask: Tensor | None = None,
        run: RunBlock = run_block,
        attend: Attend = attention,
    ) -> Tensor:
        """Predict the velocity v = noise - picture of every image token.

        Args:
            img: packed latents (B, L, in_channels).
            img_ids: their positions (B, L, 3): image index, row, column.
            txt: text embeddings (B, T, context_in_dim).
            txt_ids: their positions (B, T, 3), all zero in FLUX.1.
            timesteps: noise level sigma in [0, 1], (B,); 1 is pure noise.
            y: pooled text embedding (B, vec_in_dim).
            guidance: guidance strength (B,). Models without `guidance_in` (schnell) do not read it, as in the release;
                the pipeline is where a guidance that has no effect is refused.
            txt_mask: (B, T), true or 1 for real tokens, false or 0 for padding nobody may look at. None: all tokens
                count, as released.
            run: called in place of every block, by those who want to skip one or look at it.
            attend: called in place of `attention` in every block.

        Returns:
            (B, L, out_channels)

        Raises:
            ConfigError: the model has a guidance input and guidance is None.
        """
        vec = self.conditioning(timesteps, y, guidance, img.dtype)
        img, txt = self.img_in(img), self.txt_in(txt)
        context = self.context(vec, txt_ids, img_ids, txt_mask, attend)
        for i, block in enumerate(self.double_blocks):
            img, txt = run(f"double_blocks.{i}", block, (img, txt), context)
        x = torch.cat((txt, img), dim=1)
        for i, block in enumerate(self.single_blocks):
            (x,) = run(f"single_blocks.{i}", block, (x,), context)
        return self.final_layer(x[:, txt.shape[1] :], vec)
