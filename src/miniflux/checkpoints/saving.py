"""Modules into files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from miniflux.checkpoints.files import write_tensors
from miniflux.checkpoints.layouts import ALL_IN_ONE, ORIGINAL, to_layout
from miniflux.checkpoints.quantized import packed_layers
from miniflux.checkpoints.sizes import in_header
from miniflux.errors import CheckpointError, InputError, OutputError


def save(
    module: nn.Module, path: str | Path, *, layout: str = ORIGINAL, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a network to one safetensors file, in its own dtypes. Written beside and renamed: never half a file.

    Args:
        path: ends in `.safetensors`.
        layout: `original` (the keys of the published single files) or another one of the network's layouts.
        metadata: strings for the header, beside what is written anyway: what shapes cannot tell (`sizes.in_header`).

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

    `miniflux.load` reads it back; tokenizers are not in it. Arguments and errors are those of `save`.
    """
    path = checkpoint_path(path)
    tensors: dict[str, Tensor] = {}
    about: dict[str, str] = {}
    for network in (pipe.transformer, pipe.autoencoder, pipe.text.clip, pipe.text.t5):
        _refuse_packed(network, path)
        tensors |= to_layout(network, network.state_dict(), ALL_IN_ONE)
        about |= in_header(network)
    _write(path, tensors, about, metadata)


def _refuse_packed(network: nn.Module, path: Path) -> None:
    if packed_layers(network):
        raise CheckpointError(f"{path}: a network with packed weights is not saved; convert the file that they are in")


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


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it: there is never half a file, and what was there stays.

    Raises:
        OutputError: the place cannot be written to.
    """
    beside = path.with_name(path.name + ".part")
    try:
        try:
            write(beside)
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
