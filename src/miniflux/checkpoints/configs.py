"""The config of a network, from its file: the `config.json` beside it, its header, the shapes of its tensors.

What shapes do not tell (numbers of heads, of groups, the scale of latents) comes from a config that the caller knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from miniflux.checkpoints.by_name import found_by_name
from miniflux.checkpoints.files import Entry
from miniflux.checkpoints.formats.reading import foreign_packing
from miniflux.checkpoints.layouts import layout_of, own_shapes, their_names
from miniflux.checkpoints.networks import BY_CONFIG, BY_KIND, TRANSFORMERS, Network
from miniflux.checkpoints.networks.flux1 import FLUX1
from miniflux.checkpoints.opened import Opened
from miniflux.errors import CheckpointError, ConfigError
from miniflux.models.autoencoder import AutoencoderConfig, Flux2AutoencoderConfig
from miniflux.models.causal_lm import CausalLmConfig
from miniflux.models.clip import ClipTextConfig
from miniflux.models.t5 import T5Config
from miniflux.models.transformer import TransformerConfig
from miniflux.strictjson import json_file, json_of
from miniflux.variants import VARIANTS

Config = TypeVar("Config", AutoencoderConfig, Flux2AutoencoderConfig, ClipTextConfig, T5Config, CausalLmConfig)
Entries = Mapping[str, Entry]


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


def config_beside(path: Path, default: Config, opened: Opened) -> Config:
    """A network's config from the `config.json` beside its weights, else from the header of its file; `default` where
    neither is there.

    Raises:
        CheckpointError: it is of another network.
    """
    record = BY_CONFIG[type(default)]
    content = json_object(path / "config.json") if path.is_dir() else {}
    content = content.get("text_config") or content
    if not content:
        return stated(opened.source(path).metadata, default)
    assert record.of_json is not None
    try:
        return checked(record.of_json(content))
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, ConfigError) as error:
        raise CheckpointError(f"{path / 'config.json'}: not {record.named_there}: {error}") from error


def transformer_config(
    record: Network,
    entries: Entries,
    metadata: Mapping[str, str],
    axes_dim: tuple[int, ...] | None = None,
    *,
    to_run: bool = True,
) -> Any:
    """The config of a transformer, from the shapes in its file (any layout).

    Rotary axes cannot be read from tensors: by head size, those of the released models are known.

    Args:
        record: of the transformer that it should be.
        entries: of the file; packed weights by the shapes that they unpack to (`Contents.entries`).
        metadata: of the file's header; `axes_dim` there (a JSON list) settles what shapes cannot tell.
        axes_dim: rotary axes, if the caller knows them.
        to_run: False where only names and shapes matter: unknown rotary axes are then one axis.

    Raises:
        CheckpointError: the file holds no such transformer, or its rotary axes are unknown.
    """
    called = f"{record.title} {record.word}"
    others = found_by_name(entries)
    if others:
        raise CheckpointError(f"no {called}, but {others[0].name}")
    if not any(sign in entries for sign in record.signs):
        raise CheckpointError(f"no {called}: neither {' nor '.join(record.signs)} is there")
    shapes = own_shapes(record, {key: tuple(entry.shape) for key, entry in entries.items()})
    layout = layout_of(record, entries)
    names = {key: their_names(record, layout, key)[0] for key in record.telling}
    absent = [name for key, name in names.items() if key not in shapes]
    if absent:
        why = foreign_packing(entries) or f"{', '.join(absent)} missing"
        raise CheckpointError(f"an incomplete {called}: {why}")
    shape = {key: shapes[key] for key in names}
    odd = [
        f"{names[key]} {list(s)}" for key, s in shape.items() if len(s) != (1 if key == record.head else 2) or 0 in s
    ]
    if odd:
        raise CheckpointError(f"no {called}: the shape of {', '.join(odd)}")
    head = shape[record.head][0]
    released = {sum(c.axes_dim): tuple(c.axes_dim) for v in VARIANTS.values() if (c := record.of(v)) is not None}
    axes = axes_dim or axes_in(metadata) or released.get(head) or (None if to_run else (head,))
    if axes is None:
        known = f"; known are those of heads of {', '.join(map(str, sorted(released)))}" if released else ""
        raise CheckpointError(f"a {called} with heads of {head} channels: its rotary axes are not in the file{known}")
    try:
        assert record.sizes is not None
        return record.config(**record.sizes(shapes, None), axes_dim=axes)
    except ConfigError as error:
        raise CheckpointError(f"no {called}: {error}") from error


def transformer_in(entries: Entries) -> Network:
    """Which transformer the tensors of a file are of, by the keys that only one has; FLUX.1's, if none is there."""
    found = (record for record in TRANSFORMERS if any(sign in entries for sign in record.signs))
    return next(found, FLUX1)


def config_of_transformer(
    entries: Entries, metadata: Mapping[str, str], axes_dim: tuple[int, ...] | None = None, *, to_run: bool = True
) -> TransformerConfig:
    """The config of whichever transformer it is; arguments and errors as of `transformer_config`."""
    return transformer_config(transformer_in(entries), entries, metadata, axes_dim, to_run=to_run)


def axes_in(metadata: Mapping[str, str]) -> tuple[int, ...] | None:
    """Rotary axes from a file's header, if they are there."""
    if "axes_dim" not in metadata:
        return None
    axes = json_of(metadata["axes_dim"].encode(), "axes_dim in the header")
    return _checked_axes(axes, "axes_dim in the header")


def axes_beside(folder: Path) -> tuple[int, ...] | None:
    """Rotary axes as the `config.json` of a transformer's folder in diffusers' layout tells them, if it is there.

    Raises:
        CheckpointError: it tells something else.
    """
    if not (folder / "config.json").is_file():
        return None
    about = json_file(folder / "config.json")
    if not isinstance(about, dict):
        raise CheckpointError(f"{folder / 'config.json'}: expected a JSON object")
    axes = about.get("axes_dims_rope")
    return None if axes is None else _checked_axes(axes, f"{folder / 'config.json'}: axes_dims_rope")


def _checked_axes(axes: Any, what: str) -> tuple[int, ...]:
    if not isinstance(axes, list) or not axes or any(type(dim) is not int for dim in axes):
        raise CheckpointError(f"{what} must be a JSON list of numbers, got {axes!r:.80}")
    return tuple(axes)


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
    default = _told(record, metadata, default)
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
    record = BY_CONFIG[type(default)]
    header = record.header
    if header not in metadata:
        return _told(record, metadata, default)
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


def _told(record: Network, metadata: Mapping[str, str], default: Config) -> Config:
    """A config with what the header of a file tells of it in others' words."""
    try:
        told = record.told(metadata)
        return checked(replace(default, **told)) if told else default
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"the header: not a {type(default).__name__}: {error}") from error


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
