"""Adapters on and off a network: strict, with a receipt, and nothing changed when something is wrong."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from miniflux.checkpoints.folders import SAFETENSORS, files_in, path_of
from miniflux.checkpoints.networks import is_transformer
from miniflux.checkpoints.quantized import QuantizedLinear, device_of, lender_of
from miniflux.checks import check_number
from miniflux.errors import LoraError
from miniflux.lora.adapters import (
    ADAPTERS,
    Adapter,
    Attachable,
    Scale,
    adapters_of,
    checked_name,
    checked_scale,
    following,
    named,
    networks,
    scale_of,
)
from miniflux.lora.files import read
from miniflux.lora.fitting import WIDENED, fitted
from miniflux.lora.layer import add_changes, remove_changes, rescale
from miniflux.lora.receipt import Receipt
from miniflux.lora.standing import remember
from miniflux.weights.finding import BUNDLED
from miniflux.weights.origin import stamps

BUNDLED_LORAS = BUNDLED / "loras"


def resolved(path_or_tensors: str | Path | Mapping[str, Tensor]) -> Path | Mapping[str, Tensor]:
    """A path, or the file of a bundled LoRA of this name.

    Raises:
        LoraError: there is neither.
    """
    if isinstance(path_or_tensors, Mapping):
        return path_or_tensors
    path = path_of(path_or_tensors)
    bundled = BUNDLED_LORAS / f"{path_or_tensors}.safetensors"
    if not path.exists() and bundled.is_file():
        return bundled
    if not path.exists():
        names = ", ".join(file.stem for file in files_in(BUNDLED_LORAS, SAFETENSORS)) or "none"
        raise LoraError(f"{path}: no such file, and no bundled LoRA of this name (bundled: {names})")
    return path


def attach(
    target: Attachable,
    path_or_tensors: str | Path | Mapping[str, Tensor],
    scale: Scale = 1.0,
    name: str | None = None,
    *,
    strict: bool = True,
) -> Receipt:
    """Add a LoRA to a pipeline, or to a single network. Weights and outputs of the base are not touched.

    Args:
        path_or_tensors: a safetensors file of any dialect, a folder with one, the name of a bundled
            LoRA, or the tensors themselves.
        scale: strength; one number, or per module, see `Scale`.
        name: to detach it by; the file's stem if None. Names are unique.
        strict: refuse a file if any of its tensors finds no use; False warns, with the number, and uses the rest.

    Returns:
        The receipt: what was done with every tensor.

    Raises:
        CheckpointError: the file cannot be read.
        LoraError: see `miniflux.lora.read`; or the model lacks what the file changes, a width is another model's, all
            changes are zero, or the name is taken. The model is left as it was.
        InputError: a scale that is not a finite number.
    """
    found = networks(target)
    where = resolved(path_or_tensors)
    if name is None:
        name = where.stem if isinstance(where, Path) else "lora"
    name = checked_name(name)
    if any(name in adapters_of(network) for network in found.values()):
        raise LoraError(f"a LoRA named {name!r} is attached already; detach it first, or give this one another name")
    files = tuple(stamps(where)) if isinstance(where, Path) else ()
    plan = fitted(found, read(where, type(found["transformer"]) if "transformer" in found else None), strict)
    scale = checked_scale(scale, [layer for changes in plan.changes.values() for layer, _ in changes], name)
    for kind, network in found.items():
        adapter = Adapter(name, plan.file.source, changes=plan.changes.get(kind, []), files=files)
        for (module, parameter), tensor in plan.replaced.get(kind, {}).items():
            _replace(network, adapter, module, parameter, tensor)
        for layer in adapter.layers:
            module = network.get_submodule(layer)
            device = device_of(module)
            add_changes(module, name, [change.to(device) for at, change in adapter.changes if at == layer])
        if adapter.changes or adapter.saved:
            remember(adapter)
            adapters_of(network)[name] = adapter
    set_scale(target, name, scale)
    return plan.receipt(name, found)


def detach(target: Attachable, name: str) -> None:
    """Take a LoRA off: the network is bitwise what it was before.

    Raises:
        LoraError: nothing of this name is attached; or it is merged, and must be unmerged first.
    """
    found = named(target, name)
    if any(adapter.merged for _, adapter in found):
        raise LoraError(f"LoRA {name!r} is merged into the weights: unmerge it before detaching")
    for network, adapter in found:
        _check_width(network, adapter)
    for network, adapter in found:
        for layer in adapter.layers:
            remove_changes(network.get_submodule(layer), adapter.name)
        for (module, parameter), (old, _) in adapter.saved.items():
            _put(network, module, parameter, old)
        if adapter.config is not None:
            network.config = adapter.config  # pyright: ignore
        _watch(network, adapter, None)
        del adapters_of(network)[adapter.name]
        if not adapters_of(network):
            del network.__dict__[ADAPTERS]
    _forget_prompts(target, found)


def set_scale(target: Attachable, name: str, scale: Scale) -> None:
    """Change the strength of an attached LoRA; nothing is loaded, copied or compiled.

    Replaced parameters (the norms of a control LoRA) are all or nothing: they count unless every scale is 0.

    Raises:
        LoraError: nothing of this name is attached, or it is merged.
        InputError: a scale is not a finite number, or a beginning of a name in a dict fits no module of the LoRA.
    """
    found = named(target, name)
    scale = checked_scale(scale, [layer for _, adapter in found for layer in adapter.layers], name)
    if any(adapter.merged for _, adapter in found):
        raise LoraError(f"LoRA {name!r} is merged into the weights: unmerge it before changing its scale")
    for network, adapter in found:
        adapter.scale = scale
        apply_scale(network, adapter)
    _forget_prompts(target, found)


def set_schedule(target: Attachable, name: str, schedule: Callable[[float], float] | None) -> None:
    """Let the strength of a LoRA depend on the noise level while a picture is drawn.

    Args:
        schedule: from the noise level, 1 (pure noise) to 0, to what the scale is multiplied by; None ends it.

    Raises:
        LoraError: nothing of this name is attached to the transformer, or it is merged.
    """
    network = networks(target).get("transformer")
    adapter = None if network is None else adapters_of(network).get(checked_name(name))
    if network is None or adapter is None:
        raise LoraError(f"no LoRA named {name!r} is attached to a transformer")
    if adapter.merged:
        raise LoraError(f"LoRA {name!r} is merged into the weights: unmerge it before giving it a schedule")
    _watch(network, adapter, schedule)
    apply_scale(network, adapter)


def apply_scale(network: nn.Module, adapter: Adapter, times: float = 1.0) -> None:
    """Give the changes of an adapter its scale, multiplied by `times`."""
    scale = adapter.scale
    values = {layer: times * scale_of(scale, layer) for layer in adapter.layers}
    rescale([change for _, change in adapter.changes], [values[layer] for layer, _ in adapter.changes])
    on = times * scale != 0 if isinstance(scale, (int, float)) else any(values.values())
    for (module, parameter), (old, new) in adapter.saved.items():
        if module != WIDENED:  # the zero columns of a widened input change nothing
            _put(network, module, parameter, new if on else old)


def _check_width(network: nn.Module, adapter: Adapter) -> None:
    """Refuse to narrow an input that others depend on.

    Raises:
        LoraError: another adapter reads the inputs that this one has added, or is merged into their weight.
    """
    old, _ = adapter.saved.get((WIDENED, "weight"), (None, None))
    for other in adapters_of(network).values():
        on_it = [change for layer, change in other.changes if layer == WIDENED and change.on_weight]
        if old is None or other is adapter or not on_it:
            continue
        if other.merged or any(change.inputs is None or change.inputs > old.shape[1] for change in on_it):
            done = "is merged into it: unmerge it first" if other.merged else "reads its new inputs: detach it first"
            raise LoraError(f"LoRA {adapter.name!r} has widened {WIDENED}, and {other.name!r} {done}")


# One per network with a schedule: while its scales are those of one call, another thread's call has to wait.
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


def _watch(network: nn.Module, adapter: Adapter, schedule: Callable[[float], float] | None) -> None:
    for handle in network.__dict__.pop(f"_lora_schedule_{adapter.name}", ()):
        handle.remove()
    adapter.schedule = schedule
    if schedule is None:
        return
    lock, names = _LOCKS.setdefault(network, threading.RLock()), signature(type(network).forward)

    def before(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        timesteps = names.bind_partial(network, *inputs, **options).arguments["timesteps"]
        lock.acquire()  # `after` lets go of it, also if this fails
        factor = schedule(float(timesteps[0]))
        what = f"what the schedule of LoRA {adapter.name!r} returns"
        apply_scale(network, adapter, check_number(what, factor, -math.inf))

    def after(*_: Any) -> None:
        lock.release()

    network.__dict__[f"_lora_schedule_{adapter.name}"] = (
        network.register_forward_pre_hook(before, with_kwargs=True),
        network.register_forward_hook(after, always_call=True),
    )


def _forget_prompts(target: Attachable, changed: Sequence[tuple[nn.Module, Adapter]]) -> None:
    """Embeddings are those of other encoders now, if an adapter of a text encoder has changed."""
    if not isinstance(target, nn.Module) and not all(is_transformer(network) for network, _ in changed):
        target.text.clear()


def _put(network: nn.Module, module: str, parameter: str, value: nn.Parameter) -> None:
    owner = network.get_submodule(module)
    if isinstance(owner, QuantizedLinear):  # whose weight stays; only the width of img_in changes
        owner.in_features = value.shape[1]
        return
    setattr(owner, parameter, value if lender_of(owner) is not None else following(value, owner, parameter))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape


def _replace(network: nn.Module, adapter: Adapter, module: str, parameter: str, tensor: Tensor) -> None:
    owner = network.get_submodule(module)
    if isinstance(owner, QuantizedLinear):
        old = nn.Parameter(torch.empty(owner.out_features, owner.in_features, device="meta"), requires_grad=False)
    else:
        old = owner.get_parameter(parameter)
    lender = lender_of(owner)
    device = old.device if lender is None else lender.device
    new = nn.Parameter(tensor.to(device, old.dtype), requires_grad=False)
    adapter.saved[module, parameter] = (old, new)
    _put(network, module, parameter, new)
    if module == WIDENED and is_transformer(network):
        config: Any = network.config
        adapter.config, network.config = config, replace(config, in_channels=tensor.shape[1])
