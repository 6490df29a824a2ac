"""Tiny networks and inputs with random values: every code path, none of the size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from miniflux.models.autoencoder import AutoencoderConfig, Flux2AutoencoderConfig
from miniflux.models.causal_lm import CausalLmConfig
from miniflux.models.clip import ClipTextConfig
from miniflux.models.flux1 import Flux1Config
from miniflux.models.flux2 import Flux2Config
from miniflux.models.flux3 import Flux3Config
from miniflux.models.t5 import T5Config
from miniflux.models.tiny_autoencoder import TinyDecoderConfig
from miniflux.sampling import image_ids, text_ids
from miniflux.testing import randomise

__all__ = [
    "AUTOENCODER",
    "CLIP",
    "FLUX1",
    "FLUX2",
    "FLUX2_AUTOENCODER",
    "FLUX3",
    "LM",
    "T5",
    "TINY",
    "flux1_inputs",
    "randn",
    "randomise",
    "shapes",
]

FLUX1 = Flux1Config(
    in_channels=16,
    out_channels=16,
    vec_in_dim=12,
    context_in_dim=20,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
    guidance_embed=True,
)
AUTOENCODER = AutoencoderConfig(
    in_channels=3,
    ch=8,
    out_ch=3,
    ch_mult=(1, 2, 2),
    num_res_blocks=1,
    z_channels=4,
    scale_factor=0.3611,
    shift_factor=0.1159,
    num_groups=4,
)
CLIP = ClipTextConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=12,
    eos_token_id=49,
)
T5 = T5Config(vocab_size=40, d_model=24, d_kv=5, d_ff=36, num_layers=2, num_heads=3)

TINY = TinyDecoderConfig(z_channels=4, out_ch=3, width=6, blocks=(1, 2, 0))
FLUX2 = Flux2Config(
    in_channels=16,
    out_channels=16,
    context_in_dim=24,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 4, 4, 4),
    guidance_embed=True,
)
FLUX3 = Flux3Config(
    in_channels=16,
    out_channels=16,
    cond_in_channels=12,
    context_in_dim=24,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 4, 4, 4),
    flow_map=True,
)
FLUX2_AUTOENCODER = Flux2AutoencoderConfig(
    in_channels=3, ch=8, out_ch=3, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, num_groups=4, decoder_ch=4
)
LM = CausalLmConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=1e6,
    qk_norm=True,
    tie_word_embeddings=False,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that do not depend on what ran before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux1_inputs(config: Flux1Config, batch: int = 2, rows: int = 3, columns: int = 4, text: int = 5) -> dict[str, Any]:
    """Arguments of `Flux1.forward`, different for every picture of the batch."""
    return {
        "img": randn(batch, rows * columns, config.in_channels, seed=1),
        "img_ids": image_ids(batch, rows, columns),
        "txt": randn(batch, text, config.context_in_dim, seed=2),
        "txt_ids": text_ids(batch, text),
        "timesteps": torch.linspace(0.9, 0.2, batch),
        "y": randn(batch, config.vec_in_dim, seed=3),
        "guidance": torch.linspace(3.5, 1.0, batch),
    }


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """Keys and shapes of a state dict."""
    return {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
