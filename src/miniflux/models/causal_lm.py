"""The decoder-only language models that read prompts for FLUX.2 and FLUX.3, and rewrite them: one class by config.

Qwen3 (klein), the language model of Qwen3-VL (FLUX.3), that of Mistral-Small (dev): RMSNorm before attention and MLP,
grouped queries (arXiv 2305.13245), rotary positions in halves (arXiv 2104.09864), SwiGLU (arXiv 2002.05202); Qwen3
normalises queries and keys. Source: `modeling_qwen3.py` and `modeling_mistral.py` of transformers.
Letters in shapes: B batch, T tokens, H heads, G heads of keys and values, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from miniflux.errors import ConfigError, InputError
from miniflux.models.linear import Linear, linear


@dataclass(frozen=True, kw_only=True)
class CausalLmConfig:
    """Sizes of a language model; field names as in the published `config.json`.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size, intermediate_size: width of the residual stream, and of the MLPs.
        num_attention_heads, num_key_value_heads: of queries, and of keys and values.
        head_dim: channels of a head.
        rms_norm_eps: beside the mean of squares.
        rope_theta: base of the rotary frequencies.
        qk_norm: whether queries and keys are normalised (Qwen3) or not (Mistral).
        tie_word_embeddings: whether the embedding is the output layer too.
        layers_read: how many of its layers are there, where it is read and writes nothing; then there is neither the
            last norm nor an output layer. None for all of it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float
    qk_norm: bool
    tie_word_embeddings: bool
    layers_read: int | None = None

    def __post_init__(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} must be even")
        if self.layers_read is not None and not 1 <= self.layers_read < self.num_hidden_layers:
            raise ConfigError(f"layers_read {self.layers_read} must be from 1 to {self.num_hidden_layers - 1}, or None")

    @property
    def depth(self) -> int:
        """Layers that are there."""
        return self.layers_read or self.num_hidden_layers


@dataclass
class KeyValues:
    """Keys and values of the tokens that a model has read, one pair (B, G, T, D) for each layer: for generating."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    @property
    def length(self) -> int:
        """Tokens that were read."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def extended(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer with those of more tokens behind them; they are kept."""
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            before = self.layers[layer]
            self.layers[layer] = torch.cat((before[0], k), dim=2), torch.cat((before[1], v), dim=2)
        return self.layers[layer]


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last axis, the statistic in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Channel i and channel i + D / 2 of `x` (B, H, T, D) turned together by `angles` (B, 1, T, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class CausalAttention(nn.Module):
    """Attention to what stands before."""

    def __init__(self, config: CausalLmConfig) -> None:
        super().__init__()
        dim, head = config.hidden_size, config.head_dim
        self.head = head
        self.q_proj = Linear(dim, config.num_attention_heads * head, bias=False)
        self.k_proj = Linear(dim, config.num_key_value_heads * head, bias=False)
        self.v_proj = Linear(dim, config.num_key_value_heads * head, bias=False)
        self.o_proj = Linear(config.num_attention_heads * head, dim, bias=False)
        self.q_norm, self.k_norm = (
            RmsNorm(head, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, cache: KeyValues | None, layer: int) -> Tensor:
        """x (B, T, hidden); mask (B, 1, T, tokens read and T), true for keys that may be looked at -> new x."""
        q, k, v = (
            rearrange(one(x), "B T (H D) -> B H T D", D=self.head) for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(self.q_norm(q), angles), rotated(self.k_norm(k), angles)
        if cache is not None:
            k, v = cache.extended(layer, k, v)
        attn = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(rearrange(attn, "B H T D -> B T (H D)"))


class GatedMlp(nn.Module):
    """SwiGLU with three linears of their own."""

    def __init__(self, config: CausalLmConfig) -> None:
        super().__init__()
        dim, width = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(dim, width, bias=False)
        self.up_proj = Linear(dim, width, bias=False)
        self.down_proj = Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then MLP, each behind a norm and beside a way around it."""

    def __init__(self, config: CausalLmConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = CausalAttention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(config)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, cache: KeyValues | None, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, and the norm behind them."""

    def __init__(self, config: CausalLmConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.depth))
        if config.layers_read is None:
            self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class CausalLm(nn.Module):
    """A language model. Its `state_dict()` has exactly the keys of the published files of Qwen3 and Mistral."""

    def __init__(self, config: CausalLmConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings and config.layers_read is None:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        """Where it computes, in every memory mode: that of a parameter which stays."""
        return self.model.layers[0].get_parameter("input_layernorm.weight").device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        layers: Sequence[int] | None = None,
        cache: KeyValues | None = None,
    ) -> tuple[Tensor, ...]:
        """Hidden states; layers after the last one that is asked for are neither computed nor read.

        Args:
            input_ids: (B, T).
            attention_mask: (B, tokens read and T), true or 1 for tokens that may be looked at; None for all.
            position_ids: (B, T); None to count on from the tokens read.
            layers: after how many layers; 0 is the embedding, that after all is normalised. None for the last one.
            cache: what was read before; it is extended.

        Returns:
            One (B, T, hidden) for each of `layers`. A token that may look at nothing, as padding on the left, sees 0.

        Raises:
            InputError: a layer that the model has not.
        """
        depth, normalised = self.config.depth, self.config.num_hidden_layers
        wanted = (depth,) if layers is None else tuple(layers)
        if not wanted or not all(0 <= layer <= depth for layer in wanted):
            raise InputError(f"layers must be numbers from 0 to {depth}, got {wanted}")
        read = 0 if cache is None else cache.length
        tokens = torch.arange(read, read + input_ids.shape[1], device=input_ids.device)
        positions = tokens[None] if position_ids is None else position_ids
        mask = tokens[:, None] >= torch.arange(len(tokens) + read, device=input_ids.device)
        mask = mask[None, None] if attention_mask is None else mask[None, None] & attention_mask.bool()[:, None, None]
        angles = self._angles(positions)
        x = self.model.embed_tokens(input_ids)
        found = {0: x}
        for i, layer in enumerate(self.model.layers[: max(wanted)]):
            x = layer(x, angles, mask, cache, i)
            if i + 1 in wanted:
                found[i + 1] = self.model.norm(x) if i + 1 == normalised else x
        return tuple(found[layer] for layer in wanted)

    def _angles(self, positions: Tensor) -> Tensor:
        """Rotary angles (B, 1, T, D / 2), computed in float64."""
        head = self.config.head_dim
        exponents = torch.arange(0, head, 2, dtype=torch.float64) / head
        angles = positions.double().cpu()[:, None, :, None] * self.config.rope_theta**-exponents
        return angles.float().to(positions.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the next token, (..., vocab_size), from hidden states after the last layer."""
        if self.config.tie_word_embeddings:
            return linear(hidden, self.model.embed_tokens.weight)
        return self.lm_head(hidden)  # called, not read: its weight may be packed
