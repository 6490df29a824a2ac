"""Modules into files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from miniflux.checkpoints.layouts import ORIGINAL, to_layout
from miniflux.errors import OutputError
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
        CheckpointError: the network has no such layout.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise OutputError(f"{path}: a checkpoint is written as .safetensors, got the ending {path.suffix!r}")
    tensors = to_layout(module, module.state_dict(), layout)
    about = {"format": "pt", **({"axes_dim": json.dumps(module.config.axes_dim)} if isinstance(module, Flux1) else {})}
    about.update(metadata or {})
    beside = path.with_name(path.name + ".part")
    try:
        beside.touch()
        permissions = beside.stat().st_mode  # the library makes files that nobody else may read
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside, about)
            beside.chmod(permissions)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
