"""How a LoRA file meets a model: everything is checked, and nothing changed yet."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniflux.checkpoints.layouts import hidden_size, stacked_rows
from miniflux.checkpoints.quantized import QuantizedLinear, tensor_of
from miniflux.errors import LoraError
from miniflux.lora.adapters import adapters_of, original_weight, originals_of
from miniflux.lora.dialects import NORM_PARAMETER, PartName, split
from miniflux.lora.files import Group, LoraFile, halves_swapped, shape_of, squeezed
from miniflux.lora.layer import Change, Dense, Hadamard, Kronecker, LowRank, Magnitude, changes_of
from miniflux.lora.models import fitting_models
from miniflux.lora.receipt import ModuleReceipt, Receipt

WIDENED = "img_in"  # the layer that control LoRAs give more inputs


@dataclass
class Fitting:
    """A file, compared with the networks it is for: everything checked, nothing changed yet."""

    file: LoraFile
    changes: dict[PartName, list[tuple[str, Change]]]
    replaced: dict[PartName, dict[tuple[str, str], Tensor]]
    groups: list[tuple[Group, Change | None]]
    unmatched: list[str]

    def receipt(self, name: str, found: Mapping[PartName, nn.Module]) -> Receipt:
        modules = [_module_receipt(group, change, found) for group, change in self.groups]
        unknown = {part[0] if (part := split(key)) else key for key in self.file.unmatched}
        expected = len(self.file.groups) + len(unknown)
        return Receipt(name, self.file.source, self.file.dialect, len(modules), expected, self.unmatched, modules)


def fitted(found: Mapping[PartName, nn.Module], file: LoraFile, strict: bool) -> Fitting:
    """Compare a file with networks.

    Raises:
        LoraError: see `attach`.
    """
    plan = Fitting(file, {}, {}, [], list(file.unmatched))
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


def _fit(plan: Fitting, network: nn.Module, group: Group) -> str | None:
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
    if place.swap and not can_swap(tensors):
        return f"{group.module}: the halves of its rows cannot change places in a Kronecker product (LoKr)"
    if place.swap:
        tensors = swapped(tensors)
    expected = (rows[1] - rows[0], width)
    shape = shape_of(tensors) or expected
    plain = group.form == "LoRA" and "magnitude" not in tensors
    widened = place.target == WIDENED and plain and shape[0] == expected[0] and shape[1] > width
    known = (adapter.config.in_channels for adapter in adapters_of(network).values() if adapter.config is not None)
    narrow = place.target == WIDENED and plain and shape in [(expected[0], n) for n in known]
    if shape != expected and not widened and not narrow:
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
        weight = original_weight(network, place.target)
        if weight is None:
            return f"{group.module}: DoRA needs the weight of {place.target}, into which another LoRA is merged"
        if not weight.dtype.is_floating_point:
            return f"{group.module}: DoRA needs the numbers of the weight, which is quantised ({weight.dtype})"
        base = weight[rows[0] : rows[1]].detach().float()
        if width > base.shape[1]:  # a packed weight that a control LoRA has widened
            base = F.pad(base, (0, width - base.shape[1]))
        if base.is_meta and not change.scale.is_meta:  # a model without numbers: its norms are not known
            base = torch.zeros(base.shape)
        change = Magnitude(change, magnitude, base)
    if widened:
        if (WIDENED, "weight") in originals_of(network):
            return f"{group.module}: would widen {WIDENED}, into which another LoRA is merged: unmerge it first"
        if any(isinstance(other, Magnitude) for changes in changes_of(module).values() for other in changes):
            return f"{group.module}: would widen {WIDENED}, whose norms another LoRA (DoRA) depends on: detach it first"
        if isinstance(module, QuantizedLinear):  # which is told the new width, and needs no zeros
            wider = torch.empty(out, shape[1], device="meta")
        else:
            old = cast(Tensor, module.weight)
            wider = torch.zeros(out, shape[1], dtype=old.dtype, device=old.device)
            wider[:, :width] = old.detach()
        plan.replaced.setdefault(place.network, {})[place.target, "weight"] = wider
    plan.changes.setdefault(place.network, []).append((place.target, change))
    plan.groups.append((group, change))
    return None


def _fit_parameter(plan: Fitting, network: nn.Module, module: nn.Module, group: Group) -> str | None:
    """A norm's scale that is replaced, or shifted by a difference."""
    old = tensor_of(module, NORM_PARAMETER)
    if old is None or group.form not in ("replace", "diff"):
        return f"{group.module}: {group.form} tensors do not fit {group.place.target}"
    (tensor,) = group.tensors.values()
    if tensor.shape != old.shape:
        return f"{group.module}: has the shape {list(tensor.shape)}, {group.place.target} wants {list(old.shape)}"
    shifted = group.form == "diff" and not old.is_meta  # without the model's numbers the sum is not known
    new = old.detach() + tensor.to(old.device, old.dtype) if shifted else tensor
    slot = plan.replaced.setdefault(group.place.network, {})
    for adapter in adapters_of(network).values():
        if (group.place.target, NORM_PARAMETER) in adapter.saved:
            return f"{group.module}: {group.place.target} is replaced by LoRA {adapter.name!r} already"
    slot[group.place.target, NORM_PARAMETER] = new
    plan.groups.append((group, None))
    return None


def can_swap(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the halves of the output rows can change places: always, but for an odd number of Kronecker blocks."""
    first = tensors.get("lokr_w1", tensors.get("lokr_w1_a"))
    return first is None or len(first) == 1 or len(first) % 2 == 0


def swapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that run over output rows, with their halves in our order."""
    over_rows = ("up", "bias", "hada_w1_a", "hada_w2_a", "diff")
    swapped = {what: halves_swapped(t) if what in over_rows else t for what, t in tensors.items()}
    if "lokr_w1" in tensors or "lokr_w1_a" in tensors:
        first = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
        second = "lokr_w2" if "lokr_w2" in tensors else "lokr_w2_a"
        rows = second if len(tensors[first]) == 1 else first  # one row: the product's rows are those of the second
        swapped[rows] = halves_swapped(tensors[rows])
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


def _module_receipt(group: Group, change: Change | None, found: Mapping[PartName, nn.Module]) -> ModuleReceipt:
    network = found[group.place.network]
    module = network.get_submodule(group.place.target)
    kind = group.form if change is None else change.kind
    return ModuleReceipt(
        target=("" if group.place.network == "transformer" else f"{group.place.network}:") + group.place.target,
        rows=None if change is None else change.rows,
        kind=kind,
        rank=0 if change is None else change.rank,
        blocks=_diagonal_blocks(change),
        change=change,
        module=module,
        base=partial(original_weight, network, group.place.target),
    )


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
