"""What is attached to a network: the records that adapters leave on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from miniflux.checkpoints.formats.base import WEIGHT, Stored
from miniflux.checkpoints.networks import BY_KIND
from miniflux.checkpoints.quantized import QuantizedLinear, Stack, dense_weight
from miniflux.checks import check_number
from miniflux.errors import InputError, LoraError
from miniflux.lora.dialects import PartName
from miniflux.lora.layer import Change
from miniflux.models.transformer import Transformer
from miniflux.text import TextReader
from miniflux.weights.origin import Stamp


class Parts(Protocol):
    """What a pipeline has that adapters can change."""

    transformer: Transformer
    text: TextReader


Attachable = Parts | nn.Module
Scale = float | Mapping[str, float] | Callable[[str], float]
"""One number for all; or numbers by the beginning of a module's name, 1 for the rest; or a function of the name."""

ADAPTERS = "_lora_adapters"  # attribute of a network: name -> Adapter
ORIGINALS = "_lora_originals"  # attribute of a network: (layer, parameter) -> the original


@dataclass(frozen=True)
class Lost:
    """An original that was not kept: how it was stored, if it was packed."""

    stored: tuple[Stored, ...] = ()


Value = nn.Parameter | list[Stack]
"""A weight or bias: a parameter, or what a packed layer holds."""


@dataclass
class Adapter:
    """What is attached to one network under one name.

    Attributes:
        changes: name of the changed layer and its change, in the order of the file.
        saved: parameters that it replaced: (module, parameter) -> (the old one, the new one).
        config: the network's config before its input was widened, or None.
        scale: as given.
        schedule: a function of the noise level that multiplies the scale, or None.
        merged: whether the changes are in the weights now.
        pack: whether packed layers were to be packed again then.
        files: those it was read from; none if it was given as tensors.
        facts: of its tensors when it was attached, see `lora.standing`.
    """

    name: str
    source: str
    changes: list[tuple[str, Change]] = field(default_factory=list)
    saved: dict[tuple[str, str], tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)
    config: Any = None
    scale: Scale = 1.0
    schedule: Callable[[float], float] | None = None
    merged: bool = False
    pack: bool = False
    files: tuple[Stamp, ...] = ()
    facts: list[Any] = field(default_factory=list[Any], repr=False)

    @property
    def layers(self) -> list[str]:
        """The changed layers, each once."""
        return list(dict.fromkeys(layer for layer, _ in self.changes))


def networks(target: Attachable) -> dict[PartName, nn.Module]:
    """The networks that adapters can change: all three of a pipeline, or the one given.

    Raises:
        InputError: it is neither a pipeline nor a network of ours.
    """
    if not isinstance(target, nn.Module) and hasattr(target, "transformer") and hasattr(target, "text"):
        known = {"transformer": target.transformer, **target.text.networks}
        return {part: known[part] for part in get_args(PartName) if part in known}
    record = BY_KIND.get(type(target)) if isinstance(target, nn.Module) else None
    if record is not None and record.part in get_args(PartName):
        return {cast(PartName, record.part): cast(nn.Module, target)}
    raise InputError(f"a LoRA goes onto a pipeline, a transformer or a text encoder, got {type(target).__name__}")


def adapters_of(network: nn.Module) -> dict[str, Adapter]:
    """What is attached to a network, in the order of attaching."""
    return cast("dict[str, Adapter]", network.__dict__.setdefault(ADAPTERS, {}))


def originals_of(network: nn.Module) -> dict[tuple[str, str], Value | Lost]:
    """The weights and biases that merging has replaced, as they were."""
    return cast("dict[tuple[str, str], Value | Lost]", network.__dict__.setdefault(ORIGINALS, {}))


def following(value: Value, module: nn.Module, parameter: str) -> Value:
    """A weight or bias that was set aside, on the device, and plain ones in the dtype, to which its network has been
    moved since; the very same if it has not."""
    if isinstance(value, list):
        device = cast(QuantizedLinear, module).device
        if value[0][1][WEIGHT].device in (device, torch.device("meta")):
            return value
        return [(stored, {name: part.to(device) for name, part in parts.items()}) for stored, parts in value]
    now = cast("nn.Parameter | None", getattr(module, parameter))
    if now is None or now.is_meta or value.is_meta or (now.device, now.dtype) == (value.device, value.dtype):
        return value
    return nn.Parameter(value.detach().to(now.device, now.dtype), requires_grad=value.requires_grad)


def original_weight(network: nn.Module, layer: str) -> Tensor | None:
    """The weight of a layer in numbers, without what is merged into it; None if that was not kept, or there is none."""
    module, kept = network.get_submodule(layer), originals_of(network).get((layer, "weight"))
    if kept is None or isinstance(kept, Lost):
        return None if kept else dense_weight(module)
    kept = following(kept, module, "weight")
    return cast(QuantizedLinear, module).dense(stacks=kept) if isinstance(kept, list) else kept


def attached(target: Attachable) -> dict[str, Scale]:
    """Names and scales of the adapters of a pipeline or network."""
    return {
        adapter.name: adapter.scale
        for network in networks(target).values()
        for adapter in adapters_of(network).values()
    }


def files_of(target: Attachable) -> dict[str, tuple[Stamp, ...]]:
    """The files of everything that is attached, by its name; in the order of attaching."""
    return {
        adapter.name: adapter.files
        for network in networks(target).values()
        for adapter in adapters_of(network).values()
    }


def described(target: Attachable) -> list[dict[str, Any]]:
    """What is attached, in plain JSON, for the settings of a picture."""
    found: dict[str, dict[str, Any]] = {}
    for network in networks(target).values():
        for adapter in adapters_of(network).values():
            about = found.setdefault(adapter.name, {"name": adapter.name, "source": adapter.source})
            scale = told_scale(adapter.scale, adapter.layers)
            about["scale"] = {**about.get("scale", {}), **scale} if callable(adapter.scale) else scale
            about["scheduled"] = about.get("scheduled", False) or adapter.schedule is not None
            if adapter.merged:
                about["merged"] = True
    return list(found.values())


def told_scale(scale: Scale, layers: Sequence[str]) -> Any:
    """A scale in plain JSON: of a function what it says for each layer."""
    if callable(scale):
        return {layer: scale_of(scale, layer) for layer in layers}
    return dict(scale) if isinstance(scale, Mapping) else scale


def checked_name(name: str) -> str:
    """The name, if it can be one.

    Raises:
        InputError: it is empty or no string.
    """
    if not isinstance(name, str) or not name:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"the name of a LoRA must be a string of at least one character, got {name!r}")
    return name


def named(target: Attachable, name: str) -> list[tuple[nn.Module, Adapter]]:
    name = checked_name(name)
    found = [(n, adapters_of(n)[name]) for n in networks(target).values() if name in adapters_of(n)]
    if not found:
        names = ", ".join(attached(target)) or "none"
        raise LoraError(f"no LoRA named {name!r} is attached; attached: {names}")
    return found


def scale_of(scale: Scale, layer: str) -> float:
    """The strength that a scale states for one layer; the longest beginning of a name wins.

    Raises:
        InputError: a function returned something that is not finite.
    """
    if isinstance(scale, Mapping):
        fitting = [start for start in scale if layer.startswith(start)]
        return float(scale[max(fitting, key=len)]) if fitting else 1.0
    if not callable(scale):
        return float(scale)
    return float(check_number(f"the scale of {layer}", scale(layer), -math.inf))


def checked_scale(scale: Scale, layers: Sequence[str], name: str) -> Scale:
    """A scale in Python's own numbers, if it means something for a LoRA that changes `layers`.

    Raises:
        InputError: a scale is not a finite number, or a beginning of a name in a dict fits no layer.
    """
    what = "the scale of a LoRA"
    if isinstance(scale, Mapping):
        scale = {start: check_number(what, value, -math.inf) for start, value in scale.items()}
        idle = [start for start in scale if not any(layer.startswith(start) for layer in layers)]
        if idle:
            raise InputError(f"no module that LoRA {name!r} changes begins with {idle[0]!r}")
    elif not callable(scale):
        scale = check_number(what, scale, -math.inf)
    for layer in layers:
        scale_of(scale, layer)
    return scale
