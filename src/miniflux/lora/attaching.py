"""Adapters on and off a network: strict, with a receipt, and nothing changed when something is wrong."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from miniflux.checkpoints.finding import BUNDLED
from miniflux.checkpoints.layouts import hidden_size, stacked_rows
from miniflux.errors import InputError, LoraError
from miniflux.lora.dialects import NORM_PARAMETER, Network
from miniflux.lora.files import Group, LoraFile, halves_swapped, read, shape_of, squeezed
from miniflux.lora.layer import (
    Change,
    Dense,
    Hadamard,
    Kronecker,
    LowRank,
    Magnitude,
    add_changes,
    changes_of,
    remove_changes,
)
from miniflux.lora.models import fitting_models
from miniflux.lora.receipt import ModuleReceipt, Receipt
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.pipeline import Pipeline

log = logging.getLogger(__name__)

Target = Pipeline | nn.Module
Scale = float | Mapping[str, float] | Callable[[str], float]
"""One number for all; or numbers by the beginning of a module's name, 1 for the rest; or a function of the name."""

ADAPTERS = "_lora_adapters"  # attribute of a network: name -> Adapter
WIDENED = "img_in"  # the layer that control LoRAs give more inputs
BUNDLED_LORAS = BUNDLED / "loras"


@dataclass
class Adapter:
    """What is attached to one network under one name.

    Attributes:
        layers: names of the changed layers.
        saved: parameters that it replaced: (module, parameter) -> (the old one, the new one).
        config: the network's config before its input was widened, or None.
        scale: as given.
        schedule: a function of the noise level that multiplies the scale, or None.
        merged: whether the changes are in the weights now.
    """

    name: str
    source: str
    layers: list[str]
    saved: dict[tuple[str, str], tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)
    config: Any = None
    scale: Scale = 1.0
    schedule: Callable[[float], float] | None = None
    merged: bool = False


def networks(target: Target) -> dict[Network, nn.Module]:
    """The networks that adapters can change: all three of a pipeline, or the one given.

    Raises:
        InputError: it is neither a pipeline nor a network of ours.
    """
    if isinstance(target, Pipeline):
        return {"transformer": target.transformer, "clip": target.text.clip, "t5": target.text.t5}
    kinds: tuple[tuple[type[nn.Module], Network], ...] = (
        (Flux1, "transformer"),
        (ClipTextEncoder, "clip"),
        (T5Encoder, "t5"),
    )
    for kind, network in kinds:
        if isinstance(target, kind):
            return {network: target}
    raise InputError(f"a LoRA goes onto a pipeline, a transformer or a text encoder, got {type(target).__name__}")


def adapters_of(network: nn.Module) -> dict[str, Adapter]:
    """What is attached to a network, in the order of attaching."""
    return cast("dict[str, Adapter]", network.__dict__.setdefault(ADAPTERS, {}))


def attached(target: Target) -> dict[str, Scale]:
    """Names and scales of the adapters of a pipeline or network."""
    return {
        adapter.name: adapter.scale
        for network in networks(target).values()
        for adapter in adapters_of(network).values()
    }


def resolved(path_or_tensors: str | Path | Mapping[str, Tensor]) -> Path | Mapping[str, Tensor]:
    """A path, or the file of a bundled LoRA of this name.

    Raises:
        LoraError: there is neither.
    """
    if isinstance(path_or_tensors, Mapping):
        return path_or_tensors
    path = Path(path_or_tensors)
    bundled = BUNDLED_LORAS / f"{path_or_tensors}.safetensors"
    if not path.exists() and bundled.is_file():
        return bundled
    if not path.exists():
        names = ", ".join(sorted(file.stem for file in BUNDLED_LORAS.glob("*.safetensors"))) or "none"
        raise LoraError(f"{path}: no such file, and no bundled LoRA of this name (bundled: {names})")
    return path


def attach(
    target: Target,
    path_or_tensors: str | Path | Mapping[str, Tensor],
    scale: Scale = 1.0,
    name: str | None = None,
    *,
    strict: bool = True,
) -> Receipt:
    """Add a LoRA to a pipeline, or to a single network. Weights and outputs of the base are not touched.

    Args:
        path_or_tensors: a safetensors file of any dialect, a folder with one, the name of a bundled LoRA, or its tensors.
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
    _check_scale(scale)
    plan = planned(found, read(where), strict)
    for layers in plan.changes.values():
        for layer, _ in layers:
            scale_of(scale, layer)
    for kind, network in found.items():
        adapter = Adapter(name, plan.file.source, [])
        by_layer: dict[str, list[Change]] = {}
        for layer, change in plan.changes.get(kind, []):
            by_layer.setdefault(layer, []).append(change)
        for (module, parameter), tensor in plan.replaced.get(kind, {}).items():
            _replace(network, adapter, module, parameter, tensor)
        for layer, changes in by_layer.items():
            module = network.get_submodule(layer)
            device = cast(Tensor, module.weight).device
            add_changes(module, name, [change.to(device) for change in changes])
            adapter.layers.append(layer)
        if adapter.layers or adapter.saved:
            adapters_of(network)[name] = adapter
    set_scale(target, name, scale)
    return plan.receipt(name, found)


def checked_name(name: str) -> str:
    """The name, if it can be one.

    Raises:
        InputError: it is empty or no string.
    """
    if not isinstance(name, str) or not name:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"the name of a LoRA must be a string of at least one character, got {name!r}")
    return name


def detach(target: Target, name: str) -> None:
    """Take a LoRA off: the network is bitwise what it was before.

    Raises:
        LoraError: nothing of this name is attached; or it is merged, and must be unmerged first.
    """
    for network, adapter in _named(target, name):
        if adapter.merged:
            raise LoraError(f"LoRA {name!r} is merged into the weights: unmerge it before detaching")
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
    _forget_prompts(target)


def set_scale(target: Target, name: str, scale: Scale) -> None:
    """Change the strength of an attached LoRA; nothing is loaded, copied or compiled.

    Replaced parameters (the norms of a control LoRA) are all or nothing: they count unless every scale is 0.

    Raises:
        LoraError: nothing of this name is attached, or it is merged.
        InputError: a scale is not a finite number, or a beginning of a name in a dict fits no module of the LoRA.
    """
    found = _named(target, name)
    _check_scale(scale)
    layers = [layer for _, adapter in found for layer in adapter.layers]
    if isinstance(scale, Mapping):
        idle = [start for start in scale if not any(layer.startswith(start) for layer in layers)]
        if idle:
            raise InputError(f"no module that LoRA {name!r} changes begins with {idle[0]!r}")
    for network, adapter in found:
        if adapter.merged:
            raise LoraError(f"LoRA {name!r} is merged into the weights: unmerge it before changing its scale")
        _apply_scale(network, adapter, scale, 1.0)
        adapter.scale = scale
    _forget_prompts(target)


def set_schedule(target: Target, name: str, schedule: Callable[[float], float] | None) -> None:
    """Let the strength of a LoRA depend on the noise level while a picture is drawn.

    Args:
        schedule: from the noise level, 1 (pure noise) to 0, to what the scale is multiplied by; None ends it.

    Raises:
        LoraError: nothing of this name is attached to the transformer.
    """
    network = networks(target).get("transformer")
    adapter = None if network is None else adapters_of(network).get(checked_name(name))
    if network is None or adapter is None:
        raise LoraError(f"no LoRA named {name!r} is attached to a transformer")
    _watch(network, adapter, schedule)
    if schedule is None:
        _apply_scale(network, adapter, adapter.scale, 1.0)


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
    value = float(scale(layer))
    if not math.isfinite(value):
        raise InputError(f"the scale of {layer} must be a finite number, got {value!r}")
    return value


def _check_scale(scale: Scale) -> None:
    values = list(scale.values()) if isinstance(scale, Mapping) else [] if callable(scale) else [scale]
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not number or not math.isfinite(value):
            raise InputError(f"the scale of a LoRA must be a finite number, got {value!r}")


def _apply_scale(network: nn.Module, adapter: Adapter, scale: Scale, times: float) -> None:
    tensors: list[Tensor] = []
    values: list[float] = []
    for layer in adapter.layers:
        value = scale_of(scale, layer)
        for change in changes_of(network.get_submodule(layer))[adapter.name]:
            change.active = value * times != 0
            tensors.append(change.scale)
            values.append(value * times)
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.fill_(value)
    on = not values or any(values) if not isinstance(scale, (int, float)) else scale * times != 0
    for (module, parameter), (old, new) in adapter.saved.items():
        if module != WIDENED:  # the zero columns of a widened input change nothing
            _put(network, module, parameter, new if on else old)


def _watch(network: nn.Module, adapter: Adapter, schedule: Callable[[float], float] | None) -> None:
    handle = network.__dict__.pop(f"_lora_schedule_{adapter.name}", None)
    if handle is not None:
        handle.remove()
    adapter.schedule = schedule
    if schedule is None:
        return

    def before(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        timesteps = options["timesteps"] if "timesteps" in options else inputs[4]
        _apply_scale(network, adapter, adapter.scale, schedule(float(timesteps[0])))

    network.__dict__[f"_lora_schedule_{adapter.name}"] = network.register_forward_pre_hook(before, with_kwargs=True)


def _named(target: Target, name: str) -> list[tuple[nn.Module, Adapter]]:
    name = checked_name(name)
    found = [(n, adapters_of(n)[name]) for n in networks(target).values() if name in adapters_of(n)]
    if not found:
        names = ", ".join(attached(target)) or "none"
        raise LoraError(f"no LoRA named {name!r} is attached; attached: {names}")
    return found


def _forget_prompts(target: Target) -> None:
    if isinstance(target, Pipeline):
        target.text.clear()


def _put(network: nn.Module, module: str, parameter: str, value: nn.Parameter) -> None:
    owner = network.get_submodule(module)
    setattr(owner, parameter, value)
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape


def _replace(network: nn.Module, adapter: Adapter, module: str, parameter: str, tensor: Tensor) -> None:
    old = cast(nn.Parameter, network.get_submodule(module).get_parameter(parameter))
    new = nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False)
    adapter.saved[module, parameter] = (old, new)
    _put(network, module, parameter, new)
    if module == WIDENED and isinstance(network, Flux1):
        adapter.config, network.config = network.config, replace(network.config, in_channels=tensor.shape[1])


# How a file meets a model


@dataclass
class Plan:
    """A file, compared with the networks it is for: everything checked, nothing changed yet."""

    file: LoraFile
    changes: dict[Network, list[tuple[str, Change]]]
    replaced: dict[Network, dict[tuple[str, str], Tensor]]
    groups: list[tuple[Group, Change | None]]
    unmatched: list[str]

    def receipt(self, name: str, found: Mapping[Network, nn.Module]) -> Receipt:
        modules = [_module_receipt(name, group, change, found) for group, change in self.groups]
        expected = len(self.file.groups) + len({key.rpartition(".")[0] for key in self.file.unmatched})
        return Receipt(name, self.file.source, self.file.dialect, len(modules), expected, self.unmatched, modules)


def planned(found: Mapping[Network, nn.Module], file: LoraFile, strict: bool) -> Plan:
    """Compare a file with networks.

    Raises:
        LoraError: see `attach`.
    """
    plan = Plan(file, {}, {}, [], list(file.unmatched))
    problems: list[str] = []
    for group in file.groups:
        network = found.get(group.place.network)
        if network is None:
            problems.append(f"{group.module} is for the {group.place.network} network, which was not given")
            plan.unmatched += group.keys.values()
            continue
        problem = _fit(plan, network, group)
        if problem is not None:
            problems.append(problem)
            plan.unmatched += group.keys.values()
    if problems or file.unmatched:
        total = sum(len(group.keys) for group in file.groups) + len(file.unmatched)
        reasons = problems + [f"{key} means nothing in the dialect {file.dialect}" for key in file.unmatched]
        said = f"{file.source}: {len(plan.unmatched)} of its {total} tensors find no use: {reasons[0]}"
        more = "" if len(reasons) == 1 else f" (and {len(reasons) - 1} more)"
        guess = fitting_models(file.groups, found) if problems else ""
        if strict or not plan.groups:
            raise LoraError("\n".join([f"{said}{more}{guess}", *(f"  {reason}" for reason in reasons[1:])]))
        warnings.warn(f"{said}{more}{guess}; the rest is used", stacklevel=3)
    if all(_is_nothing(change) for _, change in plan.groups):
        raise LoraError(f"{file.source}: all of its {len(plan.groups)} changes are zero: it would do nothing")
    return plan


def _is_nothing(change: Change | None) -> bool:
    if change is None or any(buffer.is_meta for buffer in change.buffers()):
        return False
    norm = change.norm()
    return norm == 0 and (change.bias is None or not bool(change.bias.any()))


def _fit(plan: Plan, network: nn.Module, group: Group) -> str | None:
    """Make the change of one group and note it in the plan; or say why it does not fit."""
    place = group.place
    try:
        module = network.get_submodule(place.target)
    except AttributeError:
        return f"{group.module}: this model has no {place.target}{_blocks(network, place.target)}"
    if group.form == "replace" or not hasattr(module, "in_features"):
        return _fit_parameter(plan, network, module, group)
    out, width = cast(int, module.out_features), cast(int, module.in_features)
    heights = stacked_rows(place.parts, out, hidden_size(network))
    rows = (sum(heights[: place.first]), sum(heights[: place.last]))
    tensors = {what: squeezed(tensor) for what, tensor in group.tensors.items()}
    if place.swap:
        tensors = _swapped(tensors)
    expected = (rows[1] - rows[0], width)
    shape = shape_of(tensors) or expected
    widened = place.target == WIDENED and group.form == "LoRA" and shape[0] == expected[0] and shape[1] > width
    if shape != expected and not widened:
        return f"{group.module}: its change is {shape[0]}x{shape[1]}, {place.target} wants {expected[0]}x{expected[1]}"
    bias = tensors.get("bias")
    if bias is not None and tuple(bias.shape) != (expected[0],):
        return f"{group.module}: its bias has the shape {list(bias.shape)}, expected [{expected[0]}]"
    change = _change(group, tensors, rows)
    if "magnitude" in tensors:
        magnitude = tensors["magnitude"]
        shapes = ((expected[0],), (expected[0], 1), (1, width))
        if tuple(magnitude.shape) not in shapes:
            return (
                f"{group.module}: its DoRA magnitude has the shape {list(magnitude.shape)}, expected "
                f"[{expected[0]}, 1] or [1, {width}]"
            )
        weight = cast(Tensor, module.weight)
        if not weight.dtype.is_floating_point:
            return f"{group.module}: DoRA needs the numbers of the weight, which is quantised ({weight.dtype})"
        base = weight[rows[0] : rows[1]].detach().float()
        if change.scale.is_meta != base.is_meta:
            base = base.to(change.scale.device)
        change = Magnitude(change, magnitude, base)
    if widened:
        old = cast(Tensor, module.weight)
        wider = torch.zeros(out, shape[1], dtype=old.dtype, device=old.device)
        wider[:, :width] = old.detach()
        plan.replaced.setdefault(place.network, {})[place.target, "weight"] = wider
    plan.changes.setdefault(place.network, []).append((place.target, change))
    plan.groups.append((group, change))
    return None


def _fit_parameter(plan: Plan, network: nn.Module, module: nn.Module, group: Group) -> str | None:
    """A norm's scale that is replaced, or shifted by a difference."""
    old = getattr(module, NORM_PARAMETER, None)
    if not isinstance(old, Tensor) or group.form not in ("replace", "diff"):
        return f"{group.module}: {group.form} tensors do not fit {group.place.target}"
    (tensor,) = group.tensors.values()
    if tensor.shape != old.shape:
        return f"{group.module}: has the shape {list(tensor.shape)}, {group.place.target} wants {list(old.shape)}"
    new = tensor if group.form == "replace" else old.detach() + tensor.to(old.device, old.dtype)
    slot = plan.replaced.setdefault(group.place.network, {})
    for adapter in adapters_of(network).values():
        if (group.place.target, NORM_PARAMETER) in adapter.saved:
            return f"{group.module}: {group.place.target} is replaced by LoRA {adapter.name!r} already"
    slot[group.place.target, NORM_PARAMETER] = new
    plan.groups.append((group, None))
    return None


def _swapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that run over output rows, with their halves in our order."""
    over_rows = ("up", "bias", "hada_w1_a", "hada_w2_a", "lokr_w1_a", "diff")
    swapped = {what: halves_swapped(t) if what in over_rows else t for what, t in tensors.items()}
    if "lokr_w1" in swapped:
        swapped["lokr_w1"] = halves_swapped(swapped["lokr_w1"])
    magnitude = swapped.get("magnitude")
    if magnitude is not None and (magnitude.ndim == 1 or magnitude.shape[1] == 1):
        swapped["magnitude"] = halves_swapped(magnitude)
    return swapped


def _change(group: Group, tensors: Mapping[str, Tensor], rows: tuple[int, int]) -> Change:
    bias = tensors.get("bias")
    if group.form == "LoRA":
        return LowRank(tensors["down"], tensors["up"], rows, group.factor, bias)
    if group.form == "LoHa":
        a1, b1, a2, b2 = (tensors[f"hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        return Hadamard(a1, b1, a2, b2, rows, group.factor, bias)
    if group.form == "LoKr":
        w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"]
        w2 = tensors["lokr_w2"] if "lokr_w2" in tensors else tensors["lokr_w2_a"]
        return Kronecker(w1, w2, rows, group.factor, bias, w1_b=tensors.get("lokr_w1_b"), w2_b=tensors.get("lokr_w2_b"))
    return Dense(tensors.get("diff"), rows, bias)


def _blocks(network: nn.Module, target: str) -> str:
    """If the name would do with another block number: how many blocks there are."""
    root, _, rest = target.partition(".")
    blocks = getattr(network, root, None)
    number = rest.partition(".")[0]
    if isinstance(blocks, nn.ModuleList) and number.isdigit() and int(number) >= len(blocks):
        return f": it has {len(blocks)} {root.replace('_', ' ')}, counted from 0"
    return ""


def _module_receipt(
    name: str, group: Group, change: Change | None, found: Mapping[Network, nn.Module]
) -> ModuleReceipt:
    network = found[group.place.network]
    module = network.get_submodule(group.place.target)
    kind = group.form if change is None else change.kind
    return ModuleReceipt(
        target=group.place.target if group.place.network == "transformer" else f"{group.place.network}:{group.place.target}",
        rows=None if change is None else change.rows,
        kind=kind,
        rank=0 if change is None else change.rank,
        blocks=_diagonal_blocks(change),
        change=change,
        module=module,
    )  # fmt: skip


def _diagonal_blocks(change: Change | None) -> int:
    """How many separate LoRAs a block-diagonal `up` holds (kohya's split_qkv: q, k, v, mlp); 1 for an ordinary one."""
    if not isinstance(change, LowRank) or change.up.is_meta:
        return 1
    used = change.up != 0
    for parts in (4, 3):
        if change.rank % parts == 0:
            rank = change.rank // parts
            columns = [used[:, i * rank : (i + 1) * rank].any(dim=1) for i in range(parts)]
            overlap = torch.stack(columns).sum(dim=0).max()
            ends = [int(c.nonzero().max()) if c.any() else -1 for c in columns]
            if overlap <= 1 and all(e >= 0 for e in ends) and ends == sorted(ends):
                return parts
    return 1


def count_kinds(receipt: Receipt) -> dict[str, int]:
    """How many modules of each kind a receipt lists."""
    return dict(Counter(module.kind for module in receipt.modules))
