"""FLUX.1's autoencoder: its layouts and its sizes. It is never packed: its convolutions decide about every pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miniflux.checkpoints.networks.record import DIFFUSERS, Layout, Network, Row, Shapes, count, row
from miniflux.errors import ConfigError
from miniflux.models.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderSizes


def autoencoder_rows() -> list[Row]:
    """diffusers' AutoencoderKL. Its decoder counts levels from the smallest: `{-i}` is the last level minus i."""
    rows = [
        row(f"{half}.{name}.*", f"{half}.{name}.*")
        for half in ("encoder", "decoder")
        for name in ("conv_in", "conv_out")
    ]
    places = [("encoder.down.{i}", "encoder.down_blocks.{i}"), ("decoder.up.{i}", "decoder.up_blocks.{-i}")]
    blocks = [(f"{ours}.block.{{j}}", f"{theirs}.resnets.{{j}}") for ours, theirs in places]
    for half in ("encoder", "decoder"):
        blocks += [(f"{half}.mid.block_{n + 1}", f"{half}.mid_block.resnets.{n}") for n in (0, 1)]
        ours, theirs = f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0"
        rows.append(row(f"{half}.norm_out.*", f"{half}.conv_norm_out.*"))
        rows.append(row(f"{ours}.norm.*", f"{theirs}.group_norm.*"))
        names = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
        rows += [row(f"{ours}.{a}.*", f"{theirs}.{b}.*", how="1x1") for a, b in names]
    for ours, theirs in blocks:
        rows += [row(f"{ours}.{name}.*", f"{theirs}.{name}.*") for name in ("norm1", "conv1", "norm2", "conv2")]
    for ours, theirs in places:
        rows.append(row(f"{ours}.block.{{j}}.nin_shortcut.*", f"{theirs}.resnets.{{j}}.conv_shortcut.*"))
    rows.append(row("encoder.down.{i}.downsample.conv.*", "encoder.down_blocks.{i}.downsamplers.0.conv.*"))
    rows.append(row("decoder.up.{i}.upsample.conv.*", "decoder.up_blocks.{-i}.upsamplers.0.conv.*"))
    return rows


def autoencoder_sizes(shapes: Shapes, default: AutoencoderSizes) -> dict[str, Any]:
    ch = shapes["encoder.conv_in.weight"][0]
    levels = count(shapes, r"encoder\.down\.(\d+)\.")
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    if any(width % ch for width in widths):
        raise ValueError(f"widths {widths} are not multiples of {ch}")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "ch": ch,
        "out_ch": shapes["decoder.conv_out.weight"][0],
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "z_channels": shapes["decoder.conv_in.weight"][1],
        "num_groups": default.num_groups if ch % default.num_groups == 0 else 1,
    }


def _of_json(content: Mapping[str, Any]) -> AutoencoderConfig:
    if content.get("use_quant_conv") or content.get("use_post_quant_conv"):
        raise ConfigError("an autoencoder with quant convolutions is not FLUX.1's")
    widths = content["block_out_channels"]
    if any(type(width) is not int or width % widths[0] for width in widths):
        raise ConfigError(f"block_out_channels must be multiples of the first, got {widths!r}")
    return AutoencoderConfig(
        in_channels=content["in_channels"],
        ch=widths[0],
        out_ch=content["out_channels"],
        ch_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=content["layers_per_block"],
        z_channels=content["latent_channels"],
        scale_factor=content["scaling_factor"],
        shift_factor=content.get("shift_factor") or 0.0,
        num_groups=content["norm_num_groups"],
    )


def _as_json(config: AutoencoderConfig) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderKL."""
    levels = len(config.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "latent_channels": config.z_channels,
        "block_out_channels": [config.ch * mult for mult in config.ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.num_groups,
        "mid_block_add_attention": True,
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def decoding(config: AutoencoderSizes, pixels: int, itemsize: int) -> int:
    """Bytes at the worst moment of decoding. A convolution of n channels to m takes n + m beside its input and result
    while it works, because oneDNN has both in another order; a level's input stays until it is done."""
    widths, worst = [config.ch * mult for mult in config.ch_mult], 0.0
    for level, width in enumerate(widths):
        before = width if level == len(widths) - 1 else widths[level + 1]
        first = 3 * before + width  # the first block: its input, that normalised, and both copies
        later = before + 4 * width
        doubling = (before + width + 3 * 4 * width) if level else 0  # enlarged fourfold, and both copies of that
        worst = max(worst, max(first, later, doubling) * pixels / 4**level)
    return int(worst * itemsize)


AUTOENCODER = Network(
    part="autoencoder",
    word="autoencoder",
    phrase="an autoencoder (VAE)",
    kind=Autoencoder,
    config=AutoencoderConfig,
    signs=("decoder.conv_in.weight",),
    layouts={DIFFUSERS: Layout(autoencoder_rows(), ("encoder.down_blocks.", "decoder.up_blocks."))},
    levels=lambda config: len(config.ch_mult),
    prefix="vae.",
    folder="vae",
    stem="diffusion_pytorch_model",
    single="ae",
    names=("ae.safetensors", "vae"),
    comfyui=("vae",),
    header="autoencoder_config",
    sizes=autoencoder_sizes,
    of_json=_of_json,
    as_json=_as_json,
    named_there="an AutoencoderKL",
    guessed="the scale of its latents",
    activations=decoding,
)
