"""The text tower of CLIP: FLUX.1 takes one summary vector per prompt from it.

Paper: arXiv 2103.00020, section 2.4. Keys and numbers: `model.safetensors` and `config.json` of
openai/clip-vit-large-patch14 in the Hugging Face layout, as in the `text_encoder` folder of FLUX.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from miniflux.errors import ConfigError, InputError
from miniflux.models.linear import Linear

LEGACY_EOS = 2  # `eos_token_id` in old config files, whose tokenizers never used it


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the cheap GELU the OpenAI weights were trained with (arXiv 1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class LayerSizes(Protocol):
    """What a layer needs to know; a vision tower's layers are the same (`models/vision.py`)."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


def check_layers(config: LayerSizes) -> None:
    """Raises ConfigError unless heads divide the width, and the activation is known."""
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise ConfigError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    if config.hidden_act not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {config.hidden_act!r} is not one of {sorted(ACTIVATIONS)}")


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """Sizes of a CLIP text tower; field names as in the published `config.json` (its `text_config`, if it has one).

    `eos_token_id` is the token whose position gives the pooled vector. The value 2 of old files means the largest id
    in the prompt, which is the end token of their vocabularies.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        check_layers(self)


class ClipEmbeddings(nn.Module):
    """Token plus learned position."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class ClipAttention(nn.Module):
    """Multi-head attention; causal over words, over all patches of a picture."""

    def __init__(self, config: LayerSizes, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = config.num_attention_heads, causal
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(proj(x), "B L (H D) -> B H L D", H=self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        attn = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(rearrange(attn, "B H L D -> B L (H D)"))


class ClipMLP(nn.Module):
    def __init__(self, config: LayerSizes) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ClipLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: LayerSizes, causal: bool) -> None:
        super().__init__()
        self.self_attn = ClipAttention(config, causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ClipMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEncoder(nn.Module):
    def __init__(self, config: LayerSizes, causal: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config, causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ClipTextTransformer(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(config)
        self.encoder = ClipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


class ClipTextEncoder(nn.Module):
    """CLIP's text tower. Its `state_dict()` has exactly the keys of the published file (`text_model.` first)."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = ClipTextTransformer(config)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, L), L at most `max_position_embeddings` -> (last hidden (B, L, hidden), pooled (B, hidden)).

        The pooled vector is the normalised hidden state at the first end-of-text token, without CLIP's projection:
        what FLUX.1 was trained on. Padding repeats the end token, which the causal mask hides from the first one.

        Raises:
            InputError: more tokens than there are learned positions.
        """
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise InputError(f"{length} tokens are too many: this CLIP model has {limit} positions")
        hidden = self.text_model(input_ids)
        eos = self.config.eos_token_id
        is_end = input_ids == (input_ids.amax(dim=1, keepdim=True) if eos == LEGACY_EOS else eos)
        end = is_end.int().argmax(dim=1)
        return hidden, hidden[torch.arange(len(hidden), device=hidden.device), end]
