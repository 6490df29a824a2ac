"""The encoder of T5 v1.1: FLUX.1 reads the prompt token by token through it.

Paper: arXiv 1910.10683, section 2.1, with the gated GELU of arXiv 2002.05202. Keys and numbers: the published files of
google/t5-v1_1-xxl in the Hugging Face layout, as in the `text_encoder_2` folder of FLUX.1.
No bias anywhere; attention scores are not divided by sqrt(D); positions enter only as a learned bias per distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from miniflux.models.linear import Linear, linear


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder; field names as in the published `config.json`.

    `d_kv` is the size of one head; `num_heads * d_kv` need not equal `d_model`.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


class T5LayerNorm(nn.Module):
    """RMS norm with a weight. Takes the float32 residual stream and returns the dtype of its weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """Which bias each (query, key) pair uses: (L, L) bucket numbers for key position minus query position.

    Half of the buckets are for keys behind the query, half for keys ahead. In each half the first half is exact
    distances, the rest grows logarithmically up to `max_distance`; all beyond share the last bucket.
    """
    positions = torch.arange(length)
    relative = positions[None, :] - positions[:, None]
    half = num_buckets // 2
    distance, exact = relative.abs(), half // 2
    # log(distance / exact) / log(max_distance / exact) in [0, 1] over the logarithmic half; clamp avoids log(0)
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0)


class T5Attention(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.config = config
        self.q = Linear(config.d_model, inner, bias=False)
        self.k = Linear(config.d_model, inner, bias=False)
        self.v = Linear(config.d_model, inner, bias=False)
        self.o = Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def position_bias(self, length: int) -> Tensor:
        """(1, H, L, L), added to the attention scores of every layer; only the first layer owns the table.

        Contiguous, or attention would copy it in every layer."""
        table = self.relative_attention_bias
        buckets = relative_buckets(length, table.num_embeddings, self.config.relative_attention_max_distance)
        return rearrange(table(buckets.to(table.weight.device)), "Q K H -> 1 H Q K").contiguous()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        heads = self.config.num_heads
        q, k, v = (rearrange(proj(x), "B L (H D) -> B H L D", H=heads) for proj in (self.q, self.k, self.v))
        attn = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(rearrange(attn, "B H L D -> B L (H D)"))


class T5LayerSelfAttention(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, has_bias)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class T5GatedMLP(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x), with the tanh form of GELU ("gelu_new" in the published config)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        if h.dtype == torch.float16:  # the sums of this product pass 65504 in the published weights
            wide = h.float()  # a quantised layer computes in the dtype of its input
            return linear(wide, self.wo.weight.float()) if type(self.wo) is Linear else self.wo(wide)
        return self.wo(h)


class T5LayerFF(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = T5GatedMLP(config)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5LayerSelfAttention(config, has_bias), T5LayerFF(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, bias) if isinstance(layer, T5LayerSelfAttention) else layer(x)
        return x


class T5Stack(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(T5Block(config, has_bias=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """T5 v1.1's encoder. Its `state_dict()` has exactly the keys of the published `text_encoder_2` files.

    The residual stream is kept in float32 whatever the weights are: in half precision the published weights
    overflow it (float16) or lose digits in it (bfloat16).
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, L) -> hidden states (B, L, d_model) in the dtype of the weights.

        Args:
            attention_mask: (B, L), true or 1 for real tokens. None: padding is attended to, as FLUX.1 was released.
        """
        first = self.encoder.block[0].layer[0].SelfAttention  # pyright: ignore
        bias = first.position_bias(input_ids.shape[1])
        if attention_mask is not None:
            hidden_keys = attention_mask[:, None, None, :] == 0
            bias = bias.masked_fill(hidden_keys, torch.finfo(bias.dtype).min)
        x = self.shared(input_ids)
        return self.encoder(x.float(), bias).to(x.dtype)
