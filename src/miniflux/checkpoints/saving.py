"""Modules into files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from miniflux.checkpoints.configs import in_header
from miniflux.checkpoints.files import TensorSource
from miniflux.checkpoints.folders import GGUF, SAFETENSORS
from miniflux.checkpoints.layouts import ALL_IN_ONE, ORIGINAL, counterparts, to_layout
from miniflux.checkpoints.networks import BY_KIND
from miniflux.checkpoints.opened import layout_in, part_of
from miniflux.checkpoints.quantized import packed_layers
from miniflux.checkpoints.writing import write_tensors
from miniflux.disk import write_beside
from miniflux.errors import CheckpointError, InputError, OutputError


def save(
    module: nn.Module, path: str | Path, *, layout: str = ORIGINAL, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a network to one safetensors file, in its own dtypes. Written beside and renamed: never half a file.

    Args:
        path: ends in `.safetensors`.
        layout: `original` (the keys of the published single files) or another one of the network's layouts.
        metadata: strings for the header, beside what is written anyway: what shapes cannot tell (`configs.in_header`).

    Raises:
        OutputError: the path has another ending or cannot be written.
        CheckpointError: the network has no such layout, or holds packed weights.
        InputError: metadata that are not strings.
    """
    path = checkpoint_path(path)
    _refuse_packed(module, path)
    tensors = to_layout(module, module.state_dict(), layout)
    _write(path, tensors, in_header(module), metadata)


class Networks(Protocol):
    """What has the networks of a pipeline: `Pipeline`, or the same parts in other hands."""

    @property
    def transformer(self) -> nn.Module: ...
    @property
    def autoencoder(self) -> nn.Module: ...
    @property
    def text(self) -> Any: ...


def save_all_in_one(pipe: Networks, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write all four networks of a pipeline to one file, each behind the prefix of ComfyUI's all-in-one files.

    Tensors have the dtypes of the files that the pipeline was loaded from, though it may compute in wider ones, as long
    as those hold every number: what was trained or merged since is not rounded. A dtype that `load` was asked for
    stays.
    `miniflux.load` reads it back; tokenizers are not in it. Arguments and errors are those of `save`.
    """
    path = checkpoint_path(path)
    tensors: dict[str, Tensor] = {}
    about: dict[str, str] = {}
    networks = {"transformer": pipe.transformer, "autoencoder": pipe.autoencoder, **pipe.text.networks}
    for part, network in networks.items():
        if not BY_KIND[type(network)].prefix:
            raise OutputError(f"{path}: all-in-one files have no place for a {BY_KIND[type(network)].word}")
        _refuse_packed(network, path)
        dtypes = _stored(getattr(pipe, "origin", None), part, network)
        state = {key: _narrowed(tensor, dtypes.get(key)) for key, tensor in network.state_dict().items()}
        tensors |= to_layout(network, state, ALL_IN_ONE)
        about |= in_header(network)
    _write(path, tensors, about, metadata)


def _stored(origin: Any, part: str, network: nn.Module) -> dict[str, torch.dtype]:
    """In which dtype each tensor of a network lies in the files it was loaded from; empty if there are none, they have
    changed, or a dtype was asked for."""
    if origin is None or origin.dtype is not None:
        return {}
    stamps = [stamp for name, stamp in origin.files if name == part]
    paths = [Path(stamp.path) for stamp in stamps if stamp.path.lower().endswith((*SAFETENSORS, *GGUF))]
    try:
        if not paths or any((stamp.size, stamp.modified) != _now(stamp.path) for stamp in stamps):
            return {}
        source = part_of(TensorSource(paths), type(network))
    except (CheckpointError, OSError):  # gone since
        return {}
    table = counterparts(network, layout_in(source, network))
    kinds = {
        key: {source.entries[name].dtype for name in one.keys if name in source.entries} for key, one in table.items()
    }
    return {key: dtypes.pop() for key, dtypes in kinds.items() if len(dtypes) == 1}


def _now(path: str) -> tuple[int, int]:
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


def _narrowed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in a narrower dtype, if that holds all of its numbers."""
    if dtype is None or not dtype.is_floating_point or dtype.itemsize >= tensor.dtype.itemsize:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _refuse_packed(network: nn.Module, path: Path) -> None:
    if packed_layers(network):
        raise CheckpointError(f"{path}: a network with packed weights is not saved; convert the file that they are in")
    if any(tensor.is_meta for tensor in network.state_dict().values()):
        raise CheckpointError(
            f"{path}: the weights of {type(network).__name__} are not in memory, but come when they are needed; "
            "load with memory='resident' to save them, or convert the files"
        )


def _write(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], metadata: Mapping[str, str] | None
) -> None:
    for key, value in (metadata or {}).items():
        if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"metadata of a file are strings, got {value!r} for {key!r}")
    everything = {"format": "pt", **about, **(metadata or {})}
    write_beside(path, lambda beside: write_tensors(beside, tensors, everything))


def checkpoint_path(path: str | Path) -> Path:
    """The path of a file of tensors to be written.

    Raises:
        OutputError: it does not end in `.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise OutputError(f"{path}: a checkpoint is written as .safetensors, got the ending {path.suffix!r}")
    return path
