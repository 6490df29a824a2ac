"""The config of a network from what lies beside its weights: a `config.json`, else the header of its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from miniflux.checkpoints.jsonfiles import json_file
from miniflux.checkpoints.networks import BY_CONFIG
from miniflux.checkpoints.opened import Opened
from miniflux.checkpoints.sizes import checked, stated
from miniflux.errors import CheckpointError, ConfigError
from miniflux.models.autoencoder import AutoencoderConfig
from miniflux.models.clip import ClipTextConfig
from miniflux.models.t5 import T5Config

Config = TypeVar("Config", AutoencoderConfig, ClipTextConfig, T5Config)


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
