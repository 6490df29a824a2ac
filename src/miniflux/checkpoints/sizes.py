"""The sizes of networks, read from the shapes in their files.

What shapes do not tell (numbers of heads, of groups, the scale of latents) comes from a config that the caller knows,
or from the header, where `save` writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

from torch import nn

from miniflux.checkpoints.files import Entry
from miniflux.checkpoints.jsonfiles import json_of
from miniflux.errors import CheckpointError, ConfigError
from miniflux.models.autoencoder import AutoencoderConfig
from miniflux.models.clip import ClipTextConfig
from miniflux.models.t5 import T5Config

Entries = Mapping[str, Entry]
Config = TypeVar("Config", AutoencoderConfig, ClipTextConfig, T5Config)

# Under which name the header of a file tells the config of a network.
HEADER = {AutoencoderConfig: "autoencoder_config", ClipTextConfig: "clip_config", T5Config: "t5_config"}


def in_header(network: nn.Module) -> dict[str, str]:
    """What the header of a network's file says of its config: all of it, or of a FLUX.1 transformer `axes_dim`."""
    config: Any = getattr(network, "config", None)
    if type(config) in HEADER:
        return {HEADER[type(config)]: json.dumps(asdict(config))}
    return {"axes_dim": json.dumps(config.axes_dim)} if hasattr(config, "axes_dim") else {}


def config_in(entries: Entries, metadata: Mapping[str, str], default: Config) -> Config:
    """The config of an autoencoder or text encoder: from the header of its file, else its sizes from the shapes in the
    file and the rest from `default`.

    Args:
        entries: of the file, in any layout; packed weights by the shapes that they unpack to.

    Raises:
        CheckpointError: the shapes are of no such network, or the header is malformed.
    """
    kind = type(default)
    if HEADER[kind] in metadata:
        return stated(metadata, default)
    shapes = {key: tuple(entry.shape) for key, entry in entries.items()}
    try:
        return READERS[kind](shapes, default)
    except (KeyError, IndexError, ArithmeticError, StopIteration, ValueError) as error:
        raise CheckpointError(f"no sizes of a {kind.__name__.removesuffix('Config')}: {error}") from error


def stated(metadata: Mapping[str, str], default: Config) -> Config:
    """The config of an autoencoder or text encoder that the header of its file tells; else `default`.

    Raises:
        CheckpointError: the header is malformed.
    """
    if HEADER[type(default)] not in metadata:
        return default
    try:
        content = json_of(metadata[HEADER[type(default)]].encode(), "it")
        known = {field.name for field in fields(default)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise ConfigError(f"unknown field {unknown[0]!r}")
        content = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        return checked(replace(default, **content))
    except (TypeError, AttributeError, ArithmeticError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{HEADER[type(default)]} in the header: not a {type(default).__name__}: {error}"
        ) from error


def checked(config: Any) -> Any:
    """The config, if its numbers are of the kind that its class declares.

    Raises:
        ConfigError: they are not.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "int" and (type(value) is not int or value < (0 if field.name.endswith("_id") else 1)):
            raise ConfigError(f"{field.name} must be a whole number of at least 1, got {value!r}")
        if field.type == "float" and type(value) not in (int, float):
            raise ConfigError(f"{field.name} must be a number, got {value!r}")
    return config


Shapes = Mapping[str, tuple[int, ...]]


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers stand in the place of the group."""
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def _autoencoder(shapes: Shapes, default: AutoencoderConfig) -> AutoencoderConfig:
    level, block = (
        ("down", "block") if any(key.startswith("encoder.down.") for key in shapes) else ("down_blocks", "resnets")
    )
    ch = shapes["encoder.conv_in.weight"][0]
    levels = _count(shapes, rf"encoder\.{level}\.(\d+)\.")
    widths = [shapes[f"encoder.{level}.{i}.{block}.0.conv1.weight"][0] for i in range(levels)]
    if any(width % ch for width in widths):
        raise ValueError(f"widths {widths} are not multiples of {ch}")
    groups = default.num_groups if ch % default.num_groups == 0 else 1
    return replace(
        default,
        in_channels=shapes["encoder.conv_in.weight"][1],
        ch=ch,
        out_ch=shapes["decoder.conv_out.weight"][0],
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=_count(shapes, rf"encoder\.{level}\.0\.{block}\.(\d+)\."),
        z_channels=shapes["decoder.conv_in.weight"][1],
        num_groups=groups,
    )


def _clip(shapes: Shapes, default: ClipTextConfig) -> ClipTextConfig:
    openai = "ln_final.weight" in shapes
    prefix = "text_model." if "text_model.final_layer_norm.weight" in shapes else ""
    tokens, positions, mlp, block = (
        ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc", "transformer.resblocks")
        if openai
        else (
            f"{prefix}embeddings.token_embedding.weight",
            f"{prefix}embeddings.position_embedding.weight",
            f"{prefix}encoder.layers.0.mlp.fc1",
            f"{prefix}encoder.layers",
        )
    )
    vocabulary, hidden = shapes[tokens]
    same = hidden == default.hidden_size
    return replace(
        default,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=shapes[f"{mlp}.weight"][0],
        num_hidden_layers=_count(shapes, rf"{re.escape(block)}\.(\d+)\."),
        num_attention_heads=default.num_attention_heads if same else 1,
        max_position_embeddings=shapes[positions][0],
        eos_token_id=default.eos_token_id if vocabulary == default.vocab_size else vocabulary - 1,
    )


def _t5(shapes: Shapes, default: T5Config) -> T5Config:
    llama = "token_embd.weight" in shapes
    embedding = next(k for k in ("shared.weight", "encoder.embed_tokens.weight", "token_embd.weight") if k in shapes)
    attention, mlp, bias = (
        ("enc.blk.0.attn_q", "enc.blk.0.ffn_gate", "enc.blk.0.attn_rel_b")
        if llama
        else (
            "encoder.block.0.layer.0.SelfAttention.q",
            "encoder.block.0.layer.1.DenseReluDense.wi_0",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        )
    )
    vocabulary, width = shapes[embedding]
    buckets, heads = shapes[f"{bias}.weight"]
    return replace(
        default,
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shapes[f"{attention}.weight"][0] // heads,
        d_ff=shapes[f"{mlp}.weight"][0],
        num_layers=_count(shapes, r"enc\.blk\.(\d+)\." if llama else r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


READERS: dict[type[Any], Any] = {AutoencoderConfig: _autoencoder, ClipTextConfig: _clip, T5Config: _t5}
