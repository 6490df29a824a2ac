"""Adapters into weights and out again.

A merged weight is always made anew from the original one and the adapters that are merged then, in the order of
attaching: nothing is ever subtracted, so unmerging gives back the very numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniflux.checkpoints.formats.base import FLOATS
from miniflux.checkpoints.quantized import QuantizedLinear, Stack, lender_of
from miniflux.errors import LoraError
from miniflux.lora.adapters import (
    Adapter,
    Attachable,
    Lost,
    Value,
    adapters_of,
    following,
    named,
    networks,
    originals_of,
    scale_of,
)
from miniflux.lora.attaching import apply_scale
from miniflux.lora.files import halves_swapped
from miniflux.lora.fitting import WIDENED
from miniflux.lora.layer import Change, changes_of
from miniflux.lora.packing import Rounding, again, check_range, report, rounding, why_not
from miniflux.lora.restoring import restore
from miniflux.models.linear import Linear


def merge(target: Attachable, name: str | None = None, *, keep: bool = True, pack: bool = False) -> int:
    """Write attached adapters into the weights: they then cost nothing to run.

    W + dW is computed in float32, a layer at a time, and rounded once. Packed weights become wide: plain floats in the
    dtype of the network's other parameters (2 bytes a number in bfloat16, where float8 has 1 and nf4 half of one), but
    only the rows that change, such as q of q, k and v that a file keeps apart.

    Args:
        name: one adapter, or all that are attached if None.
        keep: hold on to the original weights, for `unmerge`. Weights that are views of a mapped file cost nothing to
            hold; others cost their size again. Without them, `unmerge` needs the base file.
        pack: pack such weights again, in the format that they were in. They stay as small as they were, but what is
            smaller than the rounding of the format is lost, which is most of an ordinary LoRA: the largest error goes
            to the log, and a warning says how much of the change is left if it is less than 90 %. Where adapters of
            both kinds meet in a layer, it is wide.

    Returns:
        How many bytes of memory the kept originals occupy beside the merged weights, mapped files not counted apart.

    Raises:
        LoraError: nothing of this name is attached, it is merged already, its layer is in memory only while it runs or
            is quantised by another library, lacks the bias that the adapter changes, or is to be packed again in a
            format that cannot hold it; or the sum is beyond the range of the dtype. Nothing is changed then (but
            for a sum beyond the range without `keep`: such adapters count as merged, and `unmerge` mends them).
    """
    chosen = _chosen(target, name)
    for network, names in chosen.items():
        for adapter in names:
            if adapters_of(network)[adapter].merged:
                raise LoraError(f"LoRA {adapter!r} is merged already")
            if adapters_of(network)[adapter].schedule is not None:
                raise LoraError(f"LoRA {adapter!r} has a schedule: end it before merging")
            for layer in adapters_of(network)[adapter].layers:
                _check_mergeable(network, layer, adapter, pack)
    for network, names in chosen.items():
        for adapter in names:
            adapters_of(network)[adapter].pack = pack
    roundings: list[Rounding] = []
    made = (
        (network, layer, _made(network, layer, names, roundings))
        for network, names in chosen.items()
        for layer in _layers(network, names)
    )
    if keep:
        made = list(made)  # all of them before anything is changed; if nothing is kept, each makes room for the next
    for network, names in chosen.items():
        for adapter in names:  # what is in the weights is not computed beside them as well
            _mark(network, adapters_of(network)[adapter], True)
            _keep_replaced(network, adapters_of(network)[adapter])
    kept = 0
    for network, layer, values in made:
        module, originals = network.get_submodule(layer), originals_of(network)
        for parameter in PARAMETERS:
            original = _value(module, parameter)
            if original is not None and (layer, parameter) not in originals:
                originals[layer, parameter] = original if keep else _lost(original)
                kept += _size(original) if keep else 0
            if parameter in values:
                _put(module, parameter, values[parameter])
    report(roundings)
    return kept


def unmerge(
    target: Attachable, name: str | None = None, *, base: str | Path | Mapping[str, Tensor] | None = None
) -> None:
    """Take merged adapters out of the weights: bitwise the originals; the adapters stay attached.

    Args:
        name: one adapter, or all that are merged if None.
        base: the checkpoint to read the originals from, if they were not kept. For packed layers it must hold them in
            the layout and the format that they were loaded in.

    Raises:
        LoraError: nothing of this name is merged, or the originals were not kept and no base is given.
        CheckpointError: the base lacks a weight, or it has another shape or format.
    """
    chosen = _chosen(target, name, merged=True)
    for network, names in chosen.items():
        layers = _layers(network, names)
        lost = {key for key, value in originals_of(network).items() if isinstance(value, Lost) and key[0] in layers}
        if lost and base is None:
            raise LoraError(
                f"{len(lost)} original weights were not kept (merge was called with keep=False): "
                "give the base checkpoint to unmerge from"
            )
        if lost and base is not None:
            restore(network, lost, base)
    for network, names in chosen.items():
        for adapter in names:
            _mark(network, adapters_of(network)[adapter], False)
        for layer in _layers(network, names):
            module, originals, values = network.get_submodule(layer), originals_of(network), _made(network, layer)
            for parameter in PARAMETERS:
                if parameter in values:
                    _put(module, parameter, values[parameter])
                elif (layer, parameter) in originals:
                    original = originals.pop((layer, parameter))
                    assert not isinstance(original, Lost)
                    _put(module, parameter, following(original, module, parameter))


AtScale = tuple[Change, float]
"""A change and its scale."""


def touched(changes: Sequence[AtScale], start: int, end: int) -> bool:
    """Whether any of the changes is one of the weight's rows from `start` to `end`."""
    return any(
        scale != 0 and change.on_weight and change.rows[0] < end and start < change.rows[1] for change, scale in changes
    )


def merged_weight(weight: Tensor, changes: Sequence[AtScale]) -> Tensor:
    """A weight with changes at their scales added: computed in float32, in the weight's dtype."""
    total = weight.detach().to(torch.float32, copy=True)
    base = weight.detach()
    for change, scale in changes:
        start, end = change.rows
        if scale == 0 or not change.on_weight:
            continue
        delta = change.delta(base[start:end].float())
        total[start:end, : delta.shape[1]].add_(delta, alpha=scale)
    return total.to(weight.dtype)


def merged_bias(bias: Tensor, changes: Sequence[AtScale]) -> Tensor:
    """The same for a bias."""
    total = bias.detach().to(torch.float32, copy=True)
    for change, scale in changes:
        if scale != 0 and change.bias is not None:
            total[change.rows[0] : change.rows[1]] += scale * change.bias.float()
    return total.to(bias.dtype)


def _chosen(target: Attachable, name: str | None, merged: bool = False) -> dict[nn.Module, list[str]]:
    if name is not None:
        found = {network: [adapter.name] for network, adapter in named(target, name)}
        if merged and not all(adapters_of(n)[name].merged for n in found):
            raise LoraError(f"LoRA {name!r} is not merged")
        return found
    chosen = {
        network: [adapter.name for adapter in adapters_of(network).values() if adapter.merged == merged]
        for network in networks(target).values()
    }
    chosen = {network: names for network, names in chosen.items() if names}
    if not chosen:
        raise LoraError("no LoRA is merged" if merged else "no LoRA is attached that is not merged already")
    return chosen


PARAMETERS = ("weight", "bias")


def _layers(network: nn.Module, names: Sequence[str]) -> list[str]:
    """The layers that these adapters change, each once."""
    return list(dict.fromkeys(layer for name in names for layer in adapters_of(network)[name].layers))


def _value(module: nn.Module, parameter: str) -> Value | None:
    if parameter == "weight" and isinstance(module, QuantizedLinear):
        return module.stacks()
    return cast("nn.Parameter | None", getattr(module, parameter))


def _put(module: nn.Module, parameter: str, value: Value) -> None:
    if isinstance(value, list):
        cast(QuantizedLinear, module).hold(value)
    else:
        setattr(module, parameter, value)


def _size(value: Value) -> int:
    tensors = [part for _, parts in value for part in parts.values()] if isinstance(value, list) else [value]
    return sum(tensor.nbytes for tensor in tensors)


def _lost(value: Value) -> Lost:
    return Lost(tuple(stored for stored, _ in value) if isinstance(value, list) else ())


def _check_mergeable(network: nn.Module, layer: str, adapter: str, pack: bool) -> None:
    module = network.get_submodule(layer)
    if lender_of(module) is not None:
        raise LoraError(f"{layer} is in memory only while it runs: a LoRA can be attached to it, not merged")
    if isinstance(module, QuantizedLinear):
        if pack:
            _check_packable(network, layer, adapter)
    elif not (weight := cast(Tensor, module.weight)).dtype.is_floating_point or type(module) not in (Linear, nn.Linear):
        raise LoraError(f"{layer} is quantised ({type(module).__name__}): a LoRA can be attached to it, not merged")
    elif weight.dtype.itemsize == 1:
        warnings.warn(f"{layer} is {weight.dtype}: most of a LoRA is smaller than its rounding", stacklevel=3)
    for change in changes_of(module)[adapter]:
        if change.bias is not None and cast("Tensor | None", module.bias) is None:
            raise LoraError(f"{layer} has no bias, but LoRA {adapter!r} changes it: it cannot be merged")


def _check_packable(network: nn.Module, layer: str, name: str) -> None:
    module, adapter = cast(QuantizedLinear, network.get_submodule(layer)), adapters_of(network)[name]
    original = originals_of(network).get((layer, "weight"))
    stacks = original if isinstance(original, list) else module.stacks()
    changes = [(change, scale_of(adapter.scale, layer)) for change in changes_of(module)[name]]
    for (stored, _), (start, end) in zip(stacks, _bounds(module, stacks), strict=True):
        if touched(changes, start, end) and (why := why_not(stored, module.in_features)):
            raise LoraError(
                f"{layer} cannot be packed again: {why}; attach the LoRA without merging, merge with pack=False, "
                "or convert the base to another format"
            )


def _bounds(module: QuantizedLinear, stacks: Sequence[Stack]) -> list[tuple[int, int]]:
    """The rows of each stack; all of them where the halves change places."""
    ends = [0, *accumulate(stored.shape[0] for stored, _ in stacks)]
    return [(0, ends[-1])] if module.swapped else list(pairwise(ends))


def _made(
    network: nn.Module, layer: str, names: Sequence[str] = (), roundings: list[Rounding] | None = None
) -> dict[str, Value]:
    """The parameters of a layer, made anew from the originals and all that is merged, `names` as if they were; without
    those that nothing changes. Where the original was not kept, what is there now is all there is: `names` are added.
    """
    module, originals = network.get_submodule(layer), originals_of(network)
    on_layer, values = changes_of(module), dict[str, Value]()
    for parameter in PARAMETERS:
        source = originals.get((layer, parameter), _value(module, parameter))
        if lost := isinstance(source, Lost):
            source = _value(module, parameter)
        elif source is not None:
            source = following(source, module, parameter)
        adapters = [
            adapter
            for adapter in adapters_of(network).values()
            if adapter.name in on_layer and (adapter.name in names or (adapter.merged and not lost))
        ]
        changes = [(change, scale_of(a.scale, layer)) for a in adapters for change in on_layer[a.name]]
        if parameter == "bias":
            changed = any(scale != 0 and change.bias is not None for change, scale in changes)
        else:
            changed = touched(changes, 0, cast(int, module.out_features))
        if source is None or not changed:
            continue
        if isinstance(source, list):
            dtype = next((p.dtype for p in network.parameters() if p.dtype in FLOATS), torch.bfloat16)
            pack = None if all(adapter.pack for adapter in adapters) else dtype
            values[parameter] = _merged_stacks(layer, cast(QuantizedLinear, module), source, changes, pack, roundings)
            continue
        merged = (merged_weight if parameter == "weight" else merged_bias)(source, changes)
        check_range(f"{layer}.{parameter}", merged)
        values[parameter] = nn.Parameter(merged, requires_grad=False)
    return values


def _merged_stacks(
    layer: str,
    module: QuantizedLinear,
    stacks: list[Stack],
    changes: Sequence[AtScale],
    dtype: torch.dtype | None,
    roundings: list[Rounding] | None,
) -> list[Stack]:
    """A packed weight with changes: the stacks that they touch wide in `dtype`, or packed again if it is None."""
    before = module.dense(stacks=stacks)
    if module.in_features > before.shape[1]:  # a control LoRA has widened the layer
        before = F.pad(before, (0, module.in_features - before.shape[1]))
    after = merged_weight(before, changes)
    if module.swapped:
        before, after = halves_swapped(before), halves_swapped(after)
    made: list[Stack] = []
    for stack, (start, end) in zip(stacks, _bounds(module, stacks), strict=True):
        if not touched(changes, start, end):
            made.append(stack)
            continue
        made.append(again(layer, stack[0], after[start:end], dtype))
        if dtype is None and roundings is not None:
            roundings.append(rounding(layer, before[start:end], after[start:end], made[-1]))
    return made


def _mark(network: nn.Module, adapter: Adapter, merged: bool) -> None:
    """Note whether an adapter is in the weights; what is, is not computed beside them."""
    adapter.merged = merged
    apply_scale(network, adapter, 0.0 if merged else 1.0)
    for layer, change in adapter.changes:
        change.merged = scale_of(adapter.scale, layer) if merged else 0.0


def _keep_replaced(network: nn.Module, adapter: Adapter) -> None:
    """Parameters that an adapter exchanged stay exchanged while it is merged, unless its scale is 0."""
    if any(scale_of(adapter.scale, layer) != 0 for layer in adapter.layers) or not adapter.layers:
        for (module, parameter), (_, new) in adapter.saved.items():
            if module != WIDENED:  # whose new weight is merged into
                setattr(network.get_submodule(module), parameter, new)
