"""The `config.json` of each network: read beside its weights, and written as diffusers and transformers want it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from miniflux.checkpoints.files import open_tensors
from miniflux.checkpoints.jsonfiles import json_file
from miniflux.checkpoints.sizes import checked, stated
from miniflux.errors import CheckpointError, ConfigError
from miniflux.models.autoencoder import AutoencoderConfig
from miniflux.models.clip import ClipTextConfig
from miniflux.models.flux1 import Flux1Config
from miniflux.models.t5 import T5Config

Config = TypeVar("Config", ClipTextConfig, T5Config)


def json_object(path: Path) -> dict[str, Any]:
    """The content of a config file; empty if there is none.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object.
    """
    if not path.is_file():
        return {}
    content = json_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def text_config(path: Path, kind: type[Config], default: Config) -> Config:
    """A text encoder's config from the `config.json` beside its weights, else from the header of its file; `default`
    where neither is there.

    Raises:
        CheckpointError: it is of another network.
    """
    content = json_object(path / "config.json") if path.is_dir() else {}
    content = content.get("text_config") or content
    if not content:
        return stated(_header(path), default)
    try:
        if kind is T5Config and content.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
            raise ConfigError(f"feed_forward_proj {content['feed_forward_proj']!r} is not gated-gelu")
        known = {field.name for field in fields(kind)}
        return checked(kind(**{key: value for key, value in content.items() if key in known}))
    except (TypeError, AttributeError, ArithmeticError, ConfigError) as error:
        raise CheckpointError(f"{path / 'config.json'}: not a {kind.__name__}: {error}") from error


def _header(path: Path) -> Mapping[str, str]:
    """The metadata in the header of a file, or of the files of a folder."""
    return open_tensors(path).metadata


def autoencoder_config(path: Path, default: AutoencoderConfig) -> AutoencoderConfig:
    """The autoencoder's config from diffusers' `config.json`, else from the header of its file; `default` where neither
    is there.

    Raises:
        CheckpointError: it is of another network.
    """
    content = json_object(path / "config.json") if path.is_dir() else {}
    if not content:
        return stated(_header(path), default)
    if content.get("use_quant_conv") or content.get("use_post_quant_conv"):
        raise CheckpointError(f"{path / 'config.json'}: an autoencoder with quant convolutions is not FLUX.1's")
    try:
        widths = content["block_out_channels"]
        if any(type(width) is not int or width % widths[0] for width in widths):
            raise ConfigError(f"block_out_channels must be multiples of the first, got {widths!r}")
        return checked(
            AutoencoderConfig(
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
        )
    except (KeyError, TypeError, IndexError, ArithmeticError, ConfigError) as error:
        raise CheckpointError(f"{path / 'config.json'}: not an AutoencoderKL: {error}") from error


def as_diffusers(config: Flux1Config | AutoencoderConfig | ClipTextConfig | T5Config) -> dict[str, Any]:
    """What diffusers (of the transformer and the autoencoder) and transformers (of the text encoders) want to know: the
    arguments of FluxTransformer2DModel and AutoencoderKL, the fields of CLIPTextConfig and T5Config."""
    if isinstance(config, Flux1Config):
        return {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "num_layers": config.depth,
            "num_single_layers": config.depth_single_blocks,
            "attention_head_dim": config.hidden_size // config.num_heads,
            "num_attention_heads": config.num_heads,
            "joint_attention_dim": config.context_in_dim,
            "pooled_projection_dim": config.vec_in_dim,
            "guidance_embeds": config.guidance_embed,
            "axes_dims_rope": list(config.axes_dim),
        }
    if isinstance(config, AutoencoderConfig):
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
    if isinstance(config, ClipTextConfig):
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **asdict(config)}
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **asdict(config),
        "num_decoder_layers": config.num_layers,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
