"""The sizes of networks, read from the shapes in their files.

What shapes do not tell (numbers of heads, of groups, the scale of latents) comes from a config that the caller knows,
or from the header, where `save` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar, cast

from torch import nn

from miniflux.checkpoints.files import Entry
from miniflux.checkpoints.layouts import own_shapes
from miniflux.checkpoints.networks import BY_CONFIG, BY_KIND
from miniflux.errors import CheckpointError, ConfigError
from miniflux.models.autoencoder import AutoencoderConfig
from miniflux.models.clip import ClipTextConfig
from miniflux.models.t5 import T5Config
from miniflux.strictjson import json_of

Entries = Mapping[str, Entry]
Config = TypeVar("Config", AutoencoderConfig, ClipTextConfig, T5Config)


def in_header(network: nn.Module) -> dict[str, str]:
    """What the header of a network's file says of its config: all of it, or of a FLUX.1 transformer `axes_dim`."""
    record, config = BY_KIND.get(type(network)), getattr(network, "config", None)
    if record is None or not record.header:
        return {}
    told: Any = getattr(config, record.header, None) if hasattr(config, record.header) else asdict(cast(Any, config))
    return {record.header: json.dumps(told)}


def config_in(entries: Entries, metadata: Mapping[str, str], default: Config) -> Config:
    """The config of an autoencoder or text encoder: from the header of its file, else its sizes from the shapes in the
    file and the rest from `default`.

    Args:
        entries: of the file, in any layout; packed weights by the shapes that they unpack to.

    Raises:
        CheckpointError: the shapes are of no such network, or the header is malformed.
    """
    record = BY_CONFIG[type(default)]
    if record.header in metadata:
        return stated(metadata, default)
    assert record.sizes is not None
    try:
        shapes = own_shapes(record, {key: tuple(entry.shape) for key, entry in entries.items()})
        return replace(default, **record.sizes(shapes, default))
    except (KeyError, IndexError, ArithmeticError, StopIteration, ValueError) as error:
        raise CheckpointError(f"no sizes of a {type(default).__name__.removesuffix('Config')}: {error}") from error


def stated(metadata: Mapping[str, str], default: Config) -> Config:
    """The config of an autoencoder or text encoder that the header of its file tells; else `default`.

    Raises:
        CheckpointError: the header is malformed.
    """
    header = BY_CONFIG[type(default)].header
    if header not in metadata:
        return default
    try:
        content = json_of(metadata[header].encode(), "it")
        known = {field.name for field in fields(default)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise ConfigError(f"unknown field {unknown[0]!r}")
        content = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        return checked(replace(default, **content))
    except (TypeError, AttributeError, ArithmeticError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{header} in the header: not a {type(default).__name__}: {error}") from error


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
