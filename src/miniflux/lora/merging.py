"""Adapters into weights and out again.

A merged weight is always made anew from the original one and the adapters that are merged then, in the order of
attaching: nothing is ever subtracted, so unmerging gives back the very numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from miniflux.checkpoints.files import TensorSource, open_tensors
from miniflux.checkpoints.formats.reading import GivenTensors, contents_of
from miniflux.checkpoints.layouts import detect, hidden_size, origins, their_shape_fits, to_ours
from miniflux.checkpoints.quantized import QuantizedLinear, lender_of
from miniflux.errors import CheckpointError, LoraError
from miniflux.lora.adapters import Adapter, Target, adapters_of, named, networks, originals_of, scale_of
from miniflux.lora.attaching import apply_scale
from miniflux.lora.layer import Change, changes_of
from miniflux.lora.planning import WIDENED


def merge(target: Target, name: str | None = None, *, keep: bool = True) -> int:
    """Write attached adapters into the weights: they then cost nothing to run.

    Args:
        name: one adapter, or all that are attached if None.
        keep: hold on to the original weights, for `unmerge`. Weights that are views of a mapped file cost nothing to
            hold; others cost their size again. Without them, `unmerge` needs the base file.

    Returns:
        How many bytes of memory the kept originals occupy beside the merged weights, mapped files not counted apart.

    Raises:
        LoraError: nothing of this name is attached, it is merged already, a weight is quantised, or its layer lacks the
            bias that the adapter changes. Nothing is changed then.
    """
    chosen = _chosen(target, name)
    for network, names in chosen.items():
        for adapter in names:
            if adapters_of(network)[adapter].merged:
                raise LoraError(f"LoRA {adapter!r} is merged already")
            if adapters_of(network)[adapter].schedule is not None:
                raise LoraError(f"LoRA {adapter!r} has a schedule: end it before merging")
            for layer in adapters_of(network)[adapter].layers:
                _check_mergeable(network, layer, adapter)
    kept = 0
    for network, names in chosen.items():
        originals = originals_of(network)
        layers = [layer for adapter in names for layer in adapters_of(network)[adapter].layers]
        for layer in dict.fromkeys(layers):
            module = network.get_submodule(layer)
            for parameter in ("weight", "bias"):
                value = cast("nn.Parameter | None", getattr(module, parameter))
                if value is not None and (layer, parameter) not in originals:
                    originals[layer, parameter] = value if keep else None
                    kept += value.numel() * value.element_size() if keep else 0
        for adapter in names:
            adapters_of(network)[adapter].merged = True
        for layer in dict.fromkeys(layers):
            _rewrite(network, layer, names)
        for adapter in names:  # what is in the weights is not computed beside them as well
            apply_scale(network, adapters_of(network)[adapter], 0.0)
            _keep_replaced(network, adapters_of(network)[adapter])
    return kept


def unmerge(target: Target, name: str | None = None, *, base: str | Path | Mapping[str, Tensor] | None = None) -> None:
    """Take merged adapters out of the weights: bitwise the originals; the adapters stay attached.

    Args:
        name: one adapter, or all that are merged if None.
        base: the checkpoint to read the originals from, if they were not kept.

    Raises:
        LoraError: nothing of this name is merged, or the originals were not kept and no base is given.
        CheckpointError: the base lacks a weight, or it has another shape.
    """
    chosen = _chosen(target, name, merged=True)
    for network, names in chosen.items():
        layers = {layer for adapter in names for layer in adapters_of(network)[adapter].layers}
        lost = {key for key, value in originals_of(network).items() if value is None and key[0] in layers}
        if lost and base is None:
            raise LoraError(
                f"{len(lost)} original weights were not kept (merge was called with keep=False): "
                "give the base checkpoint to unmerge from"
            )
        if lost and base is not None:
            _restore(network, lost, base)
    for network, names in chosen.items():
        layers = dict.fromkeys(layer for adapter in names for layer in adapters_of(network)[adapter].layers)
        for adapter in names:
            adapters_of(network)[adapter].merged = False
        for layer in layers:
            _rewrite(network, layer, names)
        for adapter in names:
            apply_scale(network, adapters_of(network)[adapter])


def merged_weight(weight: Tensor, changes: Sequence[tuple[Change, float]]) -> Tensor:
    """A weight with changes at their scales added: computed in float32, in the weight's dtype."""
    total = weight.detach().to(torch.float32, copy=True)
    base = weight.detach()
    for change, scale in changes:
        start, end = change.rows
        if change.kind == "diff" and getattr(change, "difference", None) is None:
            continue
        delta = change.delta(base[start:end].float())
        total[start:end, : delta.shape[1]] += scale * delta
    return total.to(weight.dtype)


def merged_bias(bias: Tensor, changes: Sequence[tuple[Change, float]]) -> Tensor:
    """The same for a bias."""
    total = bias.detach().to(torch.float32, copy=True)
    for change, scale in changes:
        if change.bias is not None:
            total[change.rows[0] : change.rows[1]] += scale * change.bias.float()
    return total.to(bias.dtype)


def _chosen(target: Target, name: str | None, merged: bool = False) -> dict[nn.Module, list[str]]:
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


def _check_mergeable(network: nn.Module, layer: str, adapter: str) -> None:
    module = network.get_submodule(layer)
    if lender_of(module) is not None:
        raise LoraError(f"{layer} is in memory only while it runs: a LoRA can be attached to it, not merged")
    if isinstance(module, QuantizedLinear):
        kinds = ", ".join(dict.fromkeys(stored.format.label for stored in module.stored))
        raise LoraError(f"{layer} is quantised ({kinds}): a LoRA can be attached to it, not merged")
    weight = cast(Tensor, module.weight)
    if not weight.dtype.is_floating_point or type(module) is not nn.Linear:
        raise LoraError(f"{layer} is quantised ({type(module).__name__}): a LoRA can be attached to it, not merged")
    if weight.dtype.itemsize == 1:
        warnings.warn(f"{layer} is {weight.dtype}: most of a LoRA is smaller than its rounding", stacklevel=3)
    for change in changes_of(module)[adapter]:
        if change.bias is not None and cast("Tensor | None", module.bias) is None:
            raise LoraError(f"{layer} has no bias, but LoRA {adapter!r} changes it: it cannot be merged")


def _rewrite(network: nn.Module, layer: str, names: Sequence[str]) -> None:
    """Make the parameters of a layer anew from the originals and what is merged now."""
    module, originals = network.get_submodule(layer), originals_of(network)
    on_layer = changes_of(module)
    merged = [
        (change, scale_of(adapter.scale, layer))
        for adapter in adapters_of(network).values()
        if adapter.merged and adapter.name in on_layer
        for change in on_layer[adapter.name]
    ]
    made = (("weight", merged_weight), ("bias", merged_bias))
    for parameter, combine in made:
        if (layer, parameter) not in originals:
            continue
        original = originals[layer, parameter]
        if not merged:
            assert original is not None
            setattr(module, parameter, original)
            del originals[layer, parameter]
        elif parameter == "weight" or any(change.bias is not None for change, _ in merged):
            if original is None:  # not kept: what is there now is all there is; only the new ones are added
                source = cast(Tensor, getattr(module, parameter))
                fresh = [
                    (change, scale_of(adapters_of(network)[name].scale, layer))
                    for name in names
                    for change in on_layer.get(name, [])
                ]
                value = combine(source, fresh)
            else:
                value = combine(original, merged)
            setattr(module, parameter, nn.Parameter(value, requires_grad=False))


def _keep_replaced(network: nn.Module, adapter: Adapter) -> None:
    """Parameters that an adapter exchanged stay exchanged while it is merged, unless its scale is 0."""
    if any(scale_of(adapter.scale, layer) != 0 for layer in adapter.layers) or not adapter.layers:
        for (module, parameter), (_, new) in adapter.saved.items():
            if module != WIDENED:  # whose new weight is merged into
                setattr(network.get_submodule(module), parameter, new)


def _restore(network: nn.Module, lost: set[tuple[str, str]], base: str | Path | Mapping[str, Tensor]) -> None:
    """Read originals back from a checkpoint of any layout of this network."""
    if isinstance(base, TensorSource):
        source = base
    else:
        source = GivenTensors(base) if isinstance(base, Mapping) else open_tensors(base)
    layout = detect(network, source)
    plan = origins(network, layout)
    name = str(source)
    originals = originals_of(network)
    found: dict[tuple[str, str], nn.Parameter] = {}
    for layer, parameter in sorted(lost):
        key, now = f"{layer}.{parameter}", cast(Tensor, getattr(network.get_submodule(layer), parameter))
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
        tensor = to_ours(parts, plan[key].how, tuple(now.shape)).to(now.device, now.dtype)
        found[layer, parameter] = nn.Parameter(tensor, requires_grad=False)
    originals.update(found)
