"""Files into modules: strict, without a copy where the layout is the network's own."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miniflux.checkpoints.files import Entry, TensorSource, fresh, open_tensors
from miniflux.checkpoints.formats.base import FLOATS, Kind, Stored
from miniflux.checkpoints.formats.reading import SIDES, Contents, GivenTensors, contents_of, foreign_packing, parts_of
from miniflux.checkpoints.formats.scaled import METADATA, PLAIN
from miniflux.checkpoints.layouts import (
    ALL_IN_ONE,
    MOVED,
    ORIGINAL,
    THIRDS,
    Counterpart,
    counterparts,
    hidden_size,
    their_shape_fits,
    to_ours,
)
from miniflux.checkpoints.networks import BY_KIND
from miniflux.checkpoints.opened import PartSource, layout_in, part_of
from miniflux.checkpoints.quantized import QuantizedLinear, packed_layers
from miniflux.checkpoints.report import LoadReport, not_needed
from miniflux.errors import CheckpointError

log = logging.getLogger(__name__)
Module = TypeVar("Module", bound=nn.Module)


class _Undrawn(TorchFunctionMode):
    """Leaves out what fills a new module with random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(func, "__name__", "") in ("kaiming_uniform_", "uniform_", "normal_", "fill_", "zero_"):
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def bare(kind: Callable[[Any], Module], config: Any) -> Module:
    """A network on the meta device: names, shapes and dtypes. First weights, which have no numbers there, are not
    drawn: torch imports its compiler for that, which takes longer than all the rest (1.2 s)."""
    with torch.device("meta"), _Undrawn():
        return kind(config)


@dataclass(frozen=True)
class Filling:
    """How a file fills a network.

    Attributes:
        layout: the naming of the file.
        layers: packed layers, on the meta device, that are to take the place of the network's linears of these names.
        counterparts: where each tensor of the network comes from, with those layers in place.
        kinds: dtype and shape of each; the dtype counts for parts of packed weights alone.
    """

    layout: str
    layers: dict[str, QuantizedLinear]
    counterparts: dict[str, Counterpart]
    kinds: dict[str, Kind]


def filling_for(module: nn.Module, source: TensorSource, layout: str | None = None) -> Filling:
    """Compare names and decide which layers stay packed; nothing is changed, and of the file only headers and the small
    texts that describe packed weights are read."""
    contents = contents_of(source)
    if layout == ALL_IN_ONE and isinstance(source, PartSource):  # whose names are without the prefix
        layout = ORIGINAL
    layout = layout or layout_in(source, module)
    plan = Filling(layout, {}, counterparts(module, layout), {})
    plan.kinds.update({key: (t.dtype, tuple(t.shape)) for key, t in module.state_dict().items()})
    for name, linear in module.named_modules():
        if not isinstance(linear, nn.Linear) or not contents.stored:
            continue
        origin, stored = plan.counterparts[f"{name}.weight"], dict[str, Stored]()
        for key in origin.keys:
            how, entry = contents.of(key), contents.entries.get(key)
            if how is None and entry is not None and entry.dtype in FLOATS and key.endswith(".weight"):
                how = PLAIN.read({"weight": (entry.dtype, entry.shape)}, source.__getitem__)
            if how is not None:
                stored[key.removesuffix(".weight")] = how
        packed = any(key in contents.stored for key in stored)
        shapes, target = [how.shape for how in stored.values()], tuple(linear.weight.shape)
        complete = len(stored) == len(origin.keys) and their_shape_fits(shapes, origin.how, target, hidden_size(module))
        if packed and complete:
            bias = f"{name}.bias" in plan.kinds
            layer = QuantizedLinear(
                target[0], target[1], bias, stored, swapped=origin.how == "swap halves", paired=origin.head
            )
            plan.layers[name] = layer
            del plan.counterparts[f"{name}.weight"], plan.kinds[f"{name}.weight"]
            for part, key in layer.origins.items():
                plan.counterparts[f"{name}.{part}"] = Counterpart((key,), "packed")
                tensor = layer.get_buffer(part)
                plan.kinds[f"{name}.{part}"] = (tensor.dtype, tuple(tensor.shape))
    return plan


def take_packed_layers(module: nn.Module, source: TensorSource, layout: str | None = None) -> str:
    """Put packed layers, still on the meta device, in the place of all linears whose weights a file keeps packed.
    `counterparts(module, layout)` then names the file's tensors for every key of the state dict, packed parts included,
    and `fetch` reads each of them.

    Args:
        layout: name of the file's key layout; None to recognise it.

    Returns:
        The layout.
    """
    plan = filling_for(module, source, layout)
    for name, layer in plan.layers.items():
        _put(module, name, layer)
    return plan.layout


def _put(module: nn.Module, name: str, layer: QuantizedLinear) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer.train(module.training))


def compare(module: nn.Module, source: Mapping[str, Tensor], layout: str | None = None) -> LoadReport:
    """Compare the tensors of a file with those a network needs, by name and shape; no weights are read. Of a file that
    holds several networks, those of this network."""
    source = part_of(source if isinstance(source, TensorSource) else GivenTensors(source), type(module))
    return _report(module, source, filling_for(module, source, layout))


def _report(module: nn.Module, source: TensorSource, plan: Filling) -> LoadReport:
    entries, contents, record = source.entries, contents_of(source), BY_KIND.get(type(module))
    report = LoadReport(str(source), _layout_name(module, source, plan.layout))
    report.dtypes = dict(Counter(str(entry.dtype).removeprefix("torch.") for entry in entries.values()))
    report.packed = dict(Counter(stored.format.label for stored in contents.stored.values()))
    for key, origin in plan.counterparts.items():
        absent = [name for name in origin.keys if name not in entries]
        report.missing += [key if plan.layout == "original" else f"{key} (here: {name})" for name in absent]
        if absent:
            continue
        report.used += origin.keys
        if origin.how == "packed":
            entry = entries[origin.keys[0]]
            if (entry.dtype, entry.shape) != plan.kinds[key]:
                report.misshapen.append(f"{key}: {_kind(entry)} in the file, {_kind(plan.kinds[key])} expected")
            continue
        damaged = [name for name in origin.keys if _is_damaged(module, key, name, contents, entries)]
        report.damaged += [f"{key}: {contents.broken[name.removesuffix('.weight')]}" for name in damaged]
        if damaged:
            continue
        for name in origin.keys:  # packed, but no linear's: unpacked when it is loaded
            if (how := contents.of(name)) is not None:
                report.used += [f"{name.removesuffix('weight')}{part}" for part in (*how.parts, *how.read)[1:]]
        theirs = [contents.entries[name].shape for name in origin.keys]
        if not their_shape_fits(theirs, origin.how, plan.kinds[key][1], hidden_size(module)):
            given = " + ".join(str(list(shape)) for shape in theirs)
            report.misshapen.append(f"{key}: {given} in the file, {list(plan.kinds[key][1])} expected")
        kinds = {entries[n].dtype for n in origin.keys if contents.of(n) is None}
        report.not_floating += [f"{key}: {_kind(kind)}" for kind in kinds if not kind.is_floating_point]
    for layer in {**packed_layers(module), **plan.layers}.values():
        for name, stored in zip(layer.layers, layer.stored, strict=True):
            report.used += [f"{name}.{part}" for part in stored.read]
    if foreign := foreign_packing(entries):
        report.damaged.insert(0, foreign)
    if METADATA in contents.broken:
        report.damaged.append(contents.broken[METADATA])
    used = set(report.used)
    used |= {f"{layer}.{side}" for layer in contents.broken for side in SIDES}  # said already
    for key in entries:
        if key not in used:
            why = contents.redundant.get(key)
            if record is not None:
                why = why or record.why_redundant(key) or record.beyond(getattr(module, "config", None), key)
            if why:
                report.redundant[key] = why
            else:
                report.unused.append(key)
    if isinstance(source, PartSource):
        report.unused += source.strays
        report.redundant |= source.redundant
    return report


def _layout_name(module: nn.Module, source: TensorSource, layout: str) -> str:
    """What people call the layout of a network within a file."""
    behind = source.prefix if isinstance(source, PartSource) else ""
    return ALL_IN_ONE if layout == ORIGINAL and behind and behind == BY_KIND[type(module)].prefix else layout


def _kind(kind: Entry | Kind | torch.dtype) -> str:
    if isinstance(kind, torch.dtype):
        return str(kind).removeprefix("torch.")
    dtype, shape = (kind.dtype, kind.shape) if isinstance(kind, Entry) else kind
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _is_damaged(module: nn.Module, key: str, name: str, contents: Contents, entries: Mapping[str, Entry]) -> bool:
    """Whether a weight cannot be unpacked. Float8 embeddings and norms need no scale, unlike linears."""
    if name.removesuffix(".weight") not in contents.broken or not name.endswith(".weight"):
        return False
    linear = isinstance(module.get_submodule(key.rpartition(".")[0]), nn.Linear | QuantizedLinear)
    return linear or not entries[name].dtype.is_floating_point


def load_into(
    module: nn.Module,
    path_or_tensors: str | Path | Mapping[str, Tensor],
    *,
    layout: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LoadReport:
    """Fill a network, usually built on the meta device, from a file, a folder with shards, or a dict of tensors. A file
    that holds several networks, or this one behind a prefix, will do.

    Tensors are assigned, not copied: on the CPU in the file's own layout and dtype they stay views of the mapped file.
    Peak memory is the size of the result plus one tensor. Linears whose weights are stored packed are replaced by a
    `QuantizedLinear`: their bytes stay as they are, whatever `dtype` is.

    Args:
        layout: name of the key layout; None to recognise it.
        device, dtype: where the tensors go and what they become; None leaves them on the CPU, in the file's dtype
            (float32 for what is packed or float8, and no weight of a linear).

    Returns:
        The report; every tensor was used.

    Raises:
        CheckpointError: a file cannot be read, or any tensor is missing, unused, misshapen, damaged or not finite. The
            error's text is the report: a summary line, then every key. The module is left as it was.
    """
    if isinstance(path_or_tensors, Mapping):
        source = path_or_tensors if isinstance(path_or_tensors, TensorSource) else GivenTensors(path_or_tensors)
    else:
        source = open_tensors(path_or_tensors)
    source = part_of(source, type(module))
    plan = filling_for(module, source, layout)
    report = _report(module, source, plan)
    if report.problems:
        raise CheckpointError(str(report))
    loaded: dict[str, Tensor] = {}
    for key, origin in plan.counterparts.items():
        tensor = fetch(source, origin, plan.kinds[key][1], dtype)
        if origin.how != "packed":
            tensor = tensor.to(torch.float32 if dtype is None and tensor.dtype.itemsize == 1 else dtype)
        if not is_finite(tensor):  # checked in its new dtype, because float16 may overflow
            report.bad.append(key)
        loaded[key] = tensor.to(device)
    report.bad += unsound({**packed_layers(module), **plan.layers}, loaded)
    if report.bad:
        raise CheckpointError(str(report))
    for name, layer in plan.layers.items():
        _put(module, name, layer)
    module.load_state_dict(loaded, assign=True)
    for key, why in not_needed(report.redundant):
        log.info("%s: not needed: %s (%s)", report.source, key, why)
    return report


def fetch(
    source: TensorSource,
    origin: Counterpart,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One of a network's tensors.

    Without `out` a view of the mapped file where possible; where bytes must move anyway, they are read into fresh
    memory, so that the pages of the file do not count twice. Packed weights are unpacked, unless the origin is a part
    of one.

    Args:
        origin: what it is made of, from `counterparts`.
        shape: of the result.
        dtype: what the caller is going to convert it to; None if it will stay in the file's dtype.
        out: contiguous memory of this shape, in any floating dtype (that of the file, for parts of packed weights), to
            read into.
    """
    if out is not None:
        _fill(source, origin, out)
        return out
    stored = [contents_of(source).of(key) if origin.how != "packed" else None for key in origin.keys]
    entries = [source.entries[key] for key in origin.keys]
    if any(stored):
        made = torch.empty(shape, dtype=dtype or torch.float32, device=source[origin.keys[0]].device)
        _fill(source, origin, made)
        return made
    if isinstance(source, GivenTensors):
        return to_ours([source[key] for key in origin.keys], origin, shape)
    if origin.how == "rows":
        kinds = {entry.dtype for entry in entries}
        stacked = fresh(shape, kinds.pop() if len(kinds) == 1 else torch.float32)
        _fill(source, origin, stacked)
        return stacked
    (key,), (entry,) = origin.keys, entries
    if origin.how == "packed" or (origin.how not in MOVED and dtype in (None, entry.dtype)):
        return to_ours([source[key]], origin, shape)
    moved = fresh(entry.shape, entry.dtype)
    source.read(key, moved)
    return to_ours([moved], origin, shape)


def _fill(source: TensorSource, origin: Counterpart, out: Tensor) -> None:
    """Read a tensor into memory of its shape."""
    if origin.how == "rows":
        heights = [contents_of(source).entries[key].shape[0] for key in origin.keys]
        for key, part in zip(origin.keys, out.split(heights), strict=True):
            _fill(source, Counterpart((key,), "same"), part)
        return
    (key,) = origin.keys
    first = THIRDS.get(origin.how, 0) * out.numel()
    stored = contents_of(source).of(key) if origin.how != "packed" else None
    if stored is not None:
        stored.unpack(parts_of(source, key.removesuffix(".weight"), stored), out.view(stored.shape))
    elif isinstance(source, GivenTensors):
        out.copy_(source[key].reshape(-1)[first : first + out.numel()].view(out.shape))
    elif source.entries[key].dtype == out.dtype and out.device.type == "cpu":
        source.read(key, out, first)
    else:  # not from the mapped file, whose pages would stay in memory
        moved = fresh(out.shape, source.entries[key].dtype)
        source.read(key, moved, first)
        out.copy_(moved)
    if origin.how in MOVED:
        out.copy_(to_ours([out], origin, tuple(out.shape)))


def unsound(layers: Mapping[str, QuantizedLinear], tensors: Mapping[str, Tensor]) -> list[str]:
    """Which of these packed layers have scales that make no numbers.

    Args:
        layers: by name.
        tensors: of the network that they are in, by key.
    """
    bad: list[str] = []
    for name, layer in layers.items():
        for i, stored in enumerate(layer.stored):
            parts = {part: tensors[f"{name}.{buffer}"] for part, buffer in layer.names(i).items()}
            if not stored.format.sound(stored, parts):
                bad.append(f"{name}.{layer.names(i)['weight']} (its {stored.format.label} scales)")
    return bad


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: one pass at memory speed, because minimum and maximum carry NaN along."""
    if tensor.is_meta or tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no minimum; without its sign, what is not finite is largest
        largest = torch.tensor(torch.finfo(tensor.dtype).max).to(tensor.dtype).view(torch.uint8)
        return int((tensor.view(torch.uint8) & 127).max()) <= int(largest)
    return all(bool(torch.isfinite(bound)) for bound in tensor.aminmax())
