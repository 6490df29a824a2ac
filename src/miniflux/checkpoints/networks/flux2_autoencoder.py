"""FLUX.2's and FLUX.3's autoencoder: its layouts and its sizes. Never packed, like that of FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from miniflux.checkpoints.networks.autoencoder import autoencoder_rows, autoencoder_sizes, decoding
from miniflux.checkpoints.networks.record import DIFFUSERS, Layout, Network, Shapes, row
from miniflux.errors import ConfigError
from miniflux.models.autoencoder import FOLD, Flux2Autoencoder, Flux2AutoencoderConfig

# diffusers' AutoencoderKLFlux2.
ROWS = [
    *autoencoder_rows(),
    row("encoder.quant_conv.*", "quant_conv.*"),
    row("decoder.post_quant_conv.*", "post_quant_conv.*"),
    row("bn.*", "bn.*"),
]


def _sizes(shapes: Shapes, default: Flux2AutoencoderConfig) -> dict[str, Any]:
    found = autoencoder_sizes(shapes, default)
    widest = shapes["decoder.conv_in.weight"][0] // found["ch_mult"][-1]
    return {**found, "decoder_ch": None if widest == found["ch"] else widest}


def _of_json(content: Mapping[str, Any]) -> Flux2AutoencoderConfig:
    if not (content.get("use_quant_conv", True) and content.get("use_post_quant_conv", True)):
        raise ConfigError("an autoencoder without quant convolutions is not FLUX.2's")
    widths, narrow = content["block_out_channels"], content.get("decoder_block_out_channels")
    for given in (widths, narrow or widths):
        if any(type(width) is not int or width % given[0] for width in given):
            raise ConfigError(f"block_out_channels must be multiples of the first, got {given!r}")
    if tuple(content.get("patch_size", (FOLD, FOLD))) != (FOLD, FOLD):
        raise ConfigError(f"patch_size {content['patch_size']!r}; FLUX.2's is {[FOLD, FOLD]}")
    return Flux2AutoencoderConfig(
        in_channels=content["in_channels"],
        ch=widths[0],
        out_ch=content["out_channels"],
        ch_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=content["layers_per_block"],
        z_channels=content["latent_channels"],
        num_groups=content["norm_num_groups"],
        decoder_ch=None if narrow is None or narrow[0] == widths[0] else narrow[0],
    )


def _as_json(config: Flux2AutoencoderConfig) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderKLFlux2."""
    levels, narrow = len(config.ch_mult), config.decoder_ch
    return {
        "_class_name": "AutoencoderKLFlux2",
        "act_fn": "silu",
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "latent_channels": config.z_channels,
        "block_out_channels": [config.ch * mult for mult in config.ch_mult],
        **({} if narrow is None else {"decoder_block_out_channels": [narrow * mult for mult in config.ch_mult]}),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.num_groups,
        "mid_block_add_attention": True,
        "force_upcast": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "batch_norm_eps": 1e-4,
        "batch_norm_momentum": 0.1,
        "patch_size": [FOLD, FOLD],
    }


def _activations(config: Flux2AutoencoderConfig, pixels: int, itemsize: int) -> int:
    return decoding(replace(config, ch=config.decoder_ch or config.ch), pixels, itemsize)


FLUX2_AUTOENCODER = Network(
    part="autoencoder",
    word="autoencoder",
    phrase="an autoencoder (VAE) of FLUX.2",
    kind=Flux2Autoencoder,
    config=Flux2AutoencoderConfig,
    signs=("bn.running_mean",),
    layouts={DIFFUSERS: Layout(ROWS, ("encoder.down_blocks.", "decoder.up_blocks."))},
    levels=lambda config: len(config.ch_mult),
    prefix="vae.",
    folder="vae",
    stem="diffusion_pytorch_model",
    single="flux2-vae",
    names=("flux2-vae.safetensors", "ae.safetensors", "vae"),
    comfyui=("vae",),
    header="flux2_autoencoder_config",
    sizes=_sizes,
    of_json=_of_json,
    as_json=_as_json,
    named_there="an AutoencoderKLFlux2",
    activations=_activations,
)
