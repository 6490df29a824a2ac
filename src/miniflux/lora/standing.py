"""What of a network adapters have taken over, and whether the adapters are what their files said: for whoever looks for
changes in memory that are not ours."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from miniflux.checkpoints.fingerprint import WHOLE, plain, tensor_facts
from miniflux.checkpoints.quantized import QuantizedLinear
from miniflux.lora.adapters import Adapter, Attachable, Lost, adapters_of, networks, originals_of, scale_of
from miniflux.lora.fitting import WIDENED
from miniflux.lora.layer import CHANGES, Magnitude

HUNG = (CHANGES, "_lora")
"""What attributes and children that adapters hang on a module begin with."""
Taken = dict[str, dict[str, Tensor | None]]
"""module -> attribute -> the original tensor; None where that is not at hand, or the attribute is no tensor."""


def taken_over(network: nn.Module) -> Taken:
    """What adapters have exchanged for now, with what was there before."""
    taken: Taken = {}
    for (layer, parameter), value in list(originals_of(network).items()):
        own, module = taken.setdefault(layer, {}), network.get_submodule(layer)
        if parameter != "weight" or not isinstance(module, QuantizedLinear):
            own[parameter] = None if isinstance(value, (Lost, list)) else value
            continue
        own.update(dict.fromkeys(("stored", "origins", "_names", "packed_features", *module.origins)))
        if isinstance(value, list):
            for i, (stored, parts) in enumerate(value):
                names = module.buffers_of(i, stored, len(value))
                own.update({name: parts[part] for part, name in names.items()})
    for adapter in list(adapters_of(network).values()):
        for (name, parameter), (old, _) in adapter.saved.items():
            own = taken.setdefault(name, {})
            if name == WIDENED:
                own.update(in_features=None, out_features=None)
            if not isinstance(network.get_submodule(name), QuantizedLinear):
                own.setdefault(parameter, old)
        if adapter.config is not None:
            taken.setdefault("", {})["config"] = None
    return taken


def remember(adapter: Adapter) -> None:
    """Note what an adapter is, now that it is attached."""
    adapter.facts = _facts(adapter)


def changed_adapters(target: Attachable) -> list[str]:
    """Names of the adapters from files whose numbers, or strength, are not what they were when they were attached."""
    found = [
        adapter.name
        for network in networks(target).values()
        for adapter in list(adapters_of(network).values())
        if adapter.files and (adapter.facts != _facts(adapter) or not _at_scale(network, adapter))
    ]
    return list(dict.fromkeys(found))


def _facts(adapter: Adapter) -> list[Any]:
    tensors: list[Tensor] = []
    facts: list[Any] = []
    for layer, change in adapter.changes:
        parts = (change, change.inner) if isinstance(change, Magnitude) else (change,)
        for part in parts:
            tensors += [tensor for name, tensor in part.named_buffers(recurse=False) if name != "scale"]
            facts.append((layer, type(part), part.rows, part.factor, "forward" in vars(part), len(part._forward_hooks)))  # pyright: ignore[reportPrivateUsage]
    for old, new in adapter.saved.values():
        tensors.append(new)
        facts.append(weakref.ref(old))
    whole = sum(tensor.nbytes for tensor in tensors) <= WHOLE
    return [plain(facts), tensor_facts(tensors, whole)]


def _at_scale(network: nn.Module, adapter: Adapter) -> bool:
    """Whether the changes hang on their layers with the strength that the adapter states; with a schedule it varies."""
    for layer, change in adapter.changes:
        hanging = getattr(network.get_submodule(layer), CHANGES, None)
        if hanging is None or all(change is not other for changes in hanging.values() for other in changes):
            return False
    if adapter.schedule is not None or not adapter.changes:
        return True
    stated = [0.0 if adapter.merged else scale_of(adapter.scale, layer) for layer, _ in adapter.changes]
    now = torch.stack([change.scale for _, change in adapter.changes]).tolist()
    active = [change.active for _, change in adapter.changes]
    return now == torch.tensor(stated, dtype=torch.float32).tolist() and active == [scale != 0 for scale in stated]
