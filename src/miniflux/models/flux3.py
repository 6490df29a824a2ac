"""FLUX.3: text, picture and references first go through blocks of their own, then together through joint ones.

All blocks are of one form, attention and SwiGLU side by side. A part of the sequence has its own modulation, at its own
time: the picture at that of the noise, text and references at 0. A distilled model is told, beside, the time that the
step jumps to (a flow map). Sources: `transformer_flux3.py` and the FLUX.3 keys of `single_file_utils.py` in diffusers.
Letters in shapes: B batch, L image tokens, R reference tokens, T text tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from miniflux.errors import ConfigError
from miniflux.models.flux1 import TIME_FEATURES, RunBlock, run_block
from miniflux.models.layers import (
    Attend,
    LastLayer,
    MLPEmbedder,
    Modulation,
    QKNorm,
    Shift,
    ShiftedNorm,
    SwiGLU,
    attention,
    checked_axes,
    rope_rotations,
    timestep_embedding,
)
from miniflux.models.linear import Linear


@dataclass(frozen=True, kw_only=True)
class Flux3Config:
    """Sizes of a FLUX.3 transformer.

    Attributes:
        in_channels, out_channels: channels of an image token, and of the predicted velocity.
        cond_in_channels: channels of a token of a reference.
        context_in_dim: width of the text tokens: eight layers of the language model side by side.
        hidden_size, num_heads: width of the residual stream; head size is their ratio.
        mlp_ratio: width of the MLPs, after SwiGLU, over the hidden size.
        depth, depth_single_blocks: blocks of each stream, then joint ones.
        axes_dim: rotary channels of each position axis (time, row, column, text); even, they sum to the head size.
        theta: base of the rotary frequencies.
        flow_map: whether the time that a step jumps to is an input (distilled) or not (base).
    """

    in_channels: int
    out_channels: int
    cond_in_channels: int
    context_in_dim: int
    hidden_size: int
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: Sequence[int]
    mlp_ratio: float = 3.0
    theta: int = 10_000
    flow_map: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dim", checked_axes(self.axes_dim, self.hidden_size, self.num_heads))

    @property
    def guidance_embed(self) -> bool:
        """No FLUX.3 has an input for the guidance strength."""
        return False

    @property
    def joined(self) -> bool:
        """Whether text and picture go through all blocks together."""
        return False

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks, in the order in which they run; those of references only where there are any."""
        streams = ("txt_mode_blocks", "content_mode_blocks.image", "content_mode_blocks.image_cond")
        numbers = {**dict.fromkeys(streams, self.depth), "single_blocks": self.depth_single_blocks}
        return [f"{kind}.{i}" for kind, number in numbers.items() for i in range(number)]


@dataclass(frozen=True)
class Parts:
    """The modulation of a sequence made of parts: of each, how many tokens it has and its `Shift`."""

    lengths: tuple[int, ...]
    shifts: tuple[Shift, ...]

    def shifted(self, norm: ShiftedNorm, x: Tensor) -> Tensor:
        """Norm, shift and scale `x` (B, tokens, hidden)."""
        return joined([norm(part, shift) for part, shift in zip(self.of(x), self.shifts, strict=True)])

    def added(self, x: Tensor, change: Tensor) -> Tensor:
        """x + gate * change, each (B, tokens, hidden)."""
        parts = zip(self.of(x), self.of(change), self.shifts, strict=True)
        return joined([shift.added(part, its) for part, its, shift in parts])

    def of(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of `x` (B, tokens, hidden)."""
        return x.split(self.lengths, dim=1)


class StreamBlock(nn.Module):
    """Attention and MLP computed from the same modulated input, each with linears of its own."""

    def __init__(self, config: Flux3Config) -> None:
        super().__init__()
        dim, mlp = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.num_heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim, bias=False) for _ in range(3))
        self.norm = QKNorm(dim // config.num_heads)
        self.attn_out = Linear(dim, dim, bias=False)
        self.mlp_in = Linear(dim, 2 * mlp, bias=False)  # both halves of SwiGLU
        self.mlp_act = SwiGLU()
        self.mlp_out = Linear(mlp, dim, bias=False)
        self.pre_norm = ShiftedNorm(dim)

    def forward(self, x: Tensor, parts: Parts, pe: Tensor, attend: Attend = attention) -> Tensor:
        """One block. x (B, tokens, hidden) -> new x."""
        h = parts.shifted(self.pre_norm, x)
        q, k, v = (
            rearrange(linear(h), "B L (H D) -> B H L D", H=self.num_heads)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Norm and rotation are both in float32, with one rounding after them.
        attn = attend(self.norm.query_norm(q.float()), self.norm.key_norm(k.float()), v, pe, None)
        return parts.added(x, self.attn_out(attn) + self.mlp_out(self.mlp_act(self.mlp_in(h))))


class Flux3(nn.Module):
    """The FLUX.3 transformer. `Flux3(config).state_dict()` has exactly the keys of the published single files."""

    def __init__(self, config: Flux3Config) -> None:
        super().__init__()
        self.config = config
        dim, kinds = config.hidden_size, ("image", "image_cond", "txt")
        channels = {"image": config.in_channels, "image_cond": config.cond_in_channels}
        self.emb_in = nn.ModuleDict({kind: Linear(width, dim, bias=False) for kind, width in channels.items()})
        self.txt_in = Linear(config.context_in_dim, dim, bias=False)
        self.time_in = MLPEmbedder(TIME_FEATURES, dim, bias=False)
        if config.flow_map:
            self.ref_time_in = MLPEmbedder(TIME_FEATURES, dim, bias=False)
        self.early_stream_modulations, self.single_stream_modulations = (
            nn.ModuleDict({kind: Modulation(dim, double=False, bias=False) for kind in kinds}) for _ in range(2)
        )
        self.content_mode_blocks = nn.ModuleDict({kind: _blocks(config, config.depth) for kind in channels})
        self.txt_mode_blocks = _blocks(config, config.depth)
        self.single_blocks = _blocks(config, config.depth_single_blocks)
        self.final_layer = nn.ModuleDict({"image": LastLayer(dim, config.out_channels, bias=False)})

    def conditioning(self, timesteps: Tensor, target: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The vectors that modulations see (B, hidden): of the picture, and of text and references.

        Raises:
            ConfigError: the time that is jumped to is missing (distilled models), or given to a model without an input
                for it.
        """
        if (target is None) == self.config.flow_map:
            wanted = "a tensor of shape (B,)" if self.config.flow_map else "None: this model has no input for it"
            raise ConfigError(f"target must be {wanted}, got {target}")
        times = timesteps.to(dtype)  # rounded before the embedding, as in the release
        now, still = (self.time_in(timestep_embedding(t, TIME_FEATURES)) for t in (times, torch.zeros_like(times)))
        if target is None:
            return now, still
        jump = self.ref_time_in(timestep_embedding(target.to(dtype), TIME_FEATURES))
        return now + jump, still + jump

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        cond: Tensor | None = None,
        cond_ids: Tensor | None = None,
        target: Tensor | None = None,
        run: RunBlock = run_block,
        attend: Attend = attention,
    ) -> Tensor:
        """Predict the velocity v = noise - picture of every image token.

        Args:
            img: normalised latents (B, L, in_channels).
            img_ids: their positions (B, L, 4): 0, half the row, half the column, 0.
            txt: text embeddings (B, T, context_in_dim).
            txt_ids: their positions (B, T, 4): 0, 0, 0, place in the text.
            timesteps: noise level sigma in [0, 1], (B,); 1 is pure noise.
            cond: latents of all references (B, R, cond_in_channels); None for none.
            cond_ids: their positions (B, R, 4), the last axis -1 for the first of them, -2 for the second ...
            target: the noise level that the step jumps to, (B,), of distilled models and of no others.
            run: called in place of every block, by those who want to skip one or look at it.
            attend: called in place of `attention` in every block.

        Returns:
            (B, L, out_channels)

        Raises:
            ConfigError: `target` is missing or has no effect, or one of `cond` and `cond_ids` is given alone.
        """
        if (cond is None) != (cond_ids is None):
            raise ConfigError("references are given as cond and cond_ids, both or neither")
        now, still = self.conditioning(timesteps, target, img.dtype)
        streams = {"txt": (self.txt_in(txt), txt_ids, still), "image": (self.emb_in["image"](img), img_ids, now)}
        if cond is not None and cond_ids is not None:
            streams["image_cond"] = (self.emb_in["image_cond"](cond), cond_ids, still)

        seen: list[Tensor] = []
        rotations: list[Tensor] = []
        for kind, (x, ids, vec) in streams.items():
            pe = rope_rotations(ids, self.config.axes_dim, self.config.theta)
            parts = Parts((x.shape[1],), tuple(self.early_stream_modulations[kind](vec)))
            where = "txt_mode_blocks" if kind == "txt" else f"content_mode_blocks.{kind}"
            for i, block in enumerate(self.get_submodule(where).children()):
                (x,) = run(f"{where}.{i}", block, (x,), (parts, pe, attend))
            seen.append(x)
            rotations.append(pe)

        shifts = [self.single_stream_modulations[kind](vec)[0] for kind, (_, _, vec) in streams.items()]
        parts = Parts(tuple(x.shape[1] for x in seen), tuple(shifts))
        x, pe = torch.cat(seen, dim=1), torch.cat(rotations, dim=2)
        for i, block in enumerate(self.single_blocks):
            (x,) = run(f"single_blocks.{i}", block, (x,), (parts, pe, attend))
        return self.final_layer["image"](x[:, txt.shape[1] : txt.shape[1] + img.shape[1]], now)


def joined(parts: list[Tensor]) -> Tensor:
    """Parts (B, tokens, hidden) one after the other; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _blocks(config: Flux3Config, count: int) -> nn.ModuleList:
    return nn.ModuleList(StreamBlock(config) for _ in range(count))
