"""Modules into files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from miniflux.checkpoints.files import write_tensors
from miniflux.checkpoints.layouts import ORIGINAL, to_layout
from miniflux.checkpoints.quantized import packed_layers
from miniflux.errors import CheckpointError, InputError, OutputError
from miniflux.models.flux1 import Flux1


def save(
    module: nn.Module, path: str | Path, *, layout: str = ORIGINAL, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a network to one safetensors file, in its own dtypes. Written beside and renamed: never half a file.

    Args:
        path: ends in `.safetensors`.
        layout: `original` (the keys of the published single files) or another one of the network's layouts.
        metadata: strings for the header, beside what is written anyway: `axes_dim`, which shapes cannot tell.

    Raises:
        OutputError: the path has another ending or cannot be written.
        CheckpointError: the network has no such layout, or holds packed weights.
        InputError: metadata that are not strings.
    """
    path = checkpoint_path(path)
    if packed_layers(module):
        raise CheckpointError(f"{path}: a network with packed weights is not saved; convert the file that they are in")
    tensors = to_layout(module, module.state_dict(), layout)
    about = {"format": "pt", **({"axes_dim": json.dumps(module.config.axes_dim)} if isinstance(module, Flux1) else {})}
    for key, value in (metadata or {}).items():
        if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"metadata of a file are strings, got {value!r} for {key!r}")
        about[key] = value
    write_beside(path, lambda beside: write_tensors(beside, tensors, about))


def checkpoint_path(path: str | Path) -> Path:
    """The path of a file of tensors to be written.

    Raises:
        OutputError: it does not end in `.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise OutputError(f"{path}: a checkpoint is written as .safetensors, got the ending {path.suffix!r}")
    return path


def write_beside(path: Path, write: Callable[[Path], None]) -> None:
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
