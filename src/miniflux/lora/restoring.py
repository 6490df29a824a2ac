"""Original weights that merging did not keep, out of the base file again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from miniflux.checkpoints.files import TensorSource, open_tensors
from miniflux.checkpoints.formats.base import Stored
from miniflux.checkpoints.formats.reading import GivenTensors, contents_of
from miniflux.checkpoints.formats.scaled import PLAIN
from miniflux.checkpoints.layouts import counterparts, hidden_size, their_shape_fits, to_ours
from miniflux.checkpoints.loading import is_finite
from miniflux.checkpoints.opened import layout_in, part_of
from miniflux.checkpoints.quantized import QuantizedLinear, Stack
from miniflux.errors import CheckpointError
from miniflux.lora.adapters import Lost, Value, originals_of
from miniflux.lora.fitting import WIDENED


def restore(network: nn.Module, lost: set[tuple[str, str]], base: str | Path | Mapping[str, Tensor]) -> None:
    """Read originals back: plain ones from a checkpoint of any layout of this network, packed ones from one in which
    they are stored as they were.

    Raises:
        CheckpointError: the base cannot be read, lacks one of them, or has it in another shape or format, or with
            numbers that are not finite. Nothing is restored then.
    """
    if isinstance(base, Mapping):
        source = base if isinstance(base, TensorSource) else GivenTensors(base)
    else:
        source = open_tensors(base)
    source = part_of(source, type(network))
    layout = layout_in(source, network)
    plan = counterparts(network, layout)
    name = str(source)
    originals = originals_of(network)
    found: dict[tuple[str, str], Value] = {}
    for layer, parameter in sorted(lost):
        key, module, was = f"{layer}.{parameter}", network.get_submodule(layer), originals[layer, parameter]
        assert isinstance(was, Lost)
        if was.stored:
            assert isinstance(module, QuantizedLinear)
            pairs = zip(module.layers, was.stored, strict=True)
            found[layer, parameter] = [_stack(source, theirs, how, module.device) for theirs, how in pairs]
            continue
        now = cast(Tensor, getattr(module, parameter))
        packed = [k for k in plan[key].keys if contents_of(source).of(k)]
        if packed:
            raise CheckpointError(f"{name}: {packed[0]} is quantised: {key} cannot be restored from it")
        absent = [k for k in plan[key].keys if k not in source]
        if absent:
            raise CheckpointError(f"{name}: lacks {absent[0]}, which {key} is to be restored from")
        parts = [source[k] for k in plan[key].keys]
        if layer == WIDENED and parameter == "weight" and parts[0].shape[1] < now.shape[1]:
            parts = [torch.cat([parts[0], parts[0].new_zeros(len(parts[0]), now.shape[1] - parts[0].shape[1])], dim=1)]
        if not their_shape_fits([tuple(p.shape) for p in parts], plan[key].how, tuple(now.shape), hidden_size(network)):
            shapes = " + ".join(str(list(p.shape)) for p in parts)
            raise CheckpointError(f"{name}: has {shapes} for {key}; expected {list(now.shape)}")
        tensor = to_ours(parts, plan[key], tuple(now.shape)).to(now.device, now.dtype, copy=True)  # not of the file
        if not is_finite(tensor):
            raise CheckpointError(f"{name}: {key} is not finite (NaN or infinite)")
        found[layer, parameter] = nn.Parameter(tensor, requires_grad=False)
    originals.update(found)


def stack_of(source: TensorSource, layer: str, stored: Stored) -> Stack:
    """The parts of a packed weight: views of the mapped file, where it is one."""
    return stored, {part: source[f"{layer}.{part}"] for part in stored.parts}


def _stack(source: TensorSource, layer: str, was: Stored, device: torch.device) -> Stack:
    contents, key = contents_of(source), f"{layer}.weight"
    if key not in source:
        raise CheckpointError(f"{source}: lacks {key}, which is to be restored from it")
    entry = source.entries[key]
    same = was.parts["weight"] == (entry.dtype, entry.shape) if was.format is PLAIN else contents.of(key) == was
    if not same:
        here = contents.of(key)
        label = here.format.label if here else str(entry.dtype).removeprefix("torch.")
        why = contents.broken.get(layer) or f"it is {label} of {list(here.shape if here else entry.shape)}"
        raise CheckpointError(
            f"{source}: {key} is not stored as it was when the network was loaded: {why}; "
            f"expected {was.format.label} of {list(was.shape)}, with the same parts"
        )
    _, parts = stack_of(source, layer, was)
    if not all(map(is_finite, parts.values())) or not was.format.sound(was, parts):
        raise CheckpointError(f"{source}: {key} is not finite (NaN or infinite)")
    return was, {part: tensor.to(device) for part, tensor in parts.items()}
