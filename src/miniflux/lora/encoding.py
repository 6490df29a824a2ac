"""Changes into the names of a dialect: the way back from `planning`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from miniflux.checkpoints.layouts import hidden_size, stacked_rows
from miniflux.checkpoints.saving import checkpoint_path
from miniflux.checkpoints.writing import write_tensors
from miniflux.disk import write_beside
from miniflux.errors import InputError, LoraError
from miniflux.lora.adapters import Attachable, adapters_of, named, networks
from miniflux.lora.dialects import DIALECTS, NORM_PARAMETER, RULES, Dialect, PartName, Place
from miniflux.lora.fitting import WIDENED, Fitting, can_swap, swapped
from miniflux.lora.layer import Change, Dense, Hadamard, Kronecker, LowRank, Magnitude, Rows
from miniflux.models.flux1 import Flux1

# What a dialect can be asked for by, and what it is called in `DIALECTS`.
WRITABLE = {"diffusers": "diffusers", "kohya": "kohya", "comfyui": "ComfyUI", "xlabs": "XLabs"}

# How each writes its tensors; what is not listed cannot be said in it.
ENDINGS: dict[str, dict[str, str]] = {
    "diffusers": {
        "down": ".lora_A.weight",
        "up": ".lora_B.weight",
        "bias": ".lora_B.bias",
        "magnitude": ".lora_magnitude_vector.weight",
        "replace": ".weight",
    },
    "kohya": {
        "down": ".lora_down.weight",
        "up": ".lora_up.weight",
        "alpha": ".alpha",
        "bias": ".diff_b",
        "magnitude": ".dora_scale",
        "diff": ".diff",
        "replace": ".set_weight",
        **{name: f".{name}" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
        **{f"lokr_w{n}{part}": f".lokr_w{n}{part}" for n in (1, 2) for part in ("", "_a", "_b")},
    },
    "xlabs": {"down": ".down.weight", "up": ".up.weight"},
}
ENDINGS["comfyui"] = {**ENDINGS["kohya"], "replace": f".{NORM_PARAMETER}.set_weight"}


@dataclass
class Contents:
    """What a LoRA file says, apart from how it names it.

    Attributes:
        changes: (network, layer) -> its changes.
        replaced: (network, module) -> the norm scale that takes the place of the model's.
    """

    changes: dict[tuple[PartName, str], list[Change]] = field(default_factory=dict)
    replaced: dict[tuple[PartName, str], Tensor] = field(default_factory=dict)

    def add(self, network: PartName, layer: str, change: Change) -> None:
        self.changes.setdefault((network, layer), []).append(change)

    @classmethod
    def of_plan(cls, plan: Fitting) -> Contents:
        contents = cls()
        for network, changes in plan.changes.items():
            for layer, change in changes:
                contents.add(network, layer, change)
        for network, tensors in plan.replaced.items():
            for (module, _), tensor in tensors.items():
                if module != WIDENED:
                    contents.replaced[network, module] = tensor
        return contents

    @classmethod
    def of_adapter(cls, target: Attachable, name: str) -> Contents:
        contents = cls()
        named(target, name)
        for kind, network in networks(target).items():
            adapter = adapters_of(network).get(name)
            if adapter is None:
                continue
            for layer, change in adapter.changes:
                contents.add(kind, layer, change)
            for (module, _), (_, new) in adapter.saved.items():
                if module != WIDENED:
                    contents.replaced[kind, module] = new.detach()
        return contents


def save(target: Attachable, name: str, path: str | Path, dialect: str = "diffusers") -> int:
    """Write an attached LoRA to a file. Its present scale is not part of it.

    Args:
        dialect: diffusers, kohya, comfyui or xlabs.

    Returns:
        The number of tensors written.

    Raises:
        LoraError: nothing of this name is attached, or it holds something that this dialect cannot say exactly.
        InputError: an unknown dialect.
        OutputError: the path cannot be written.
    """
    path = checkpoint_path(path)
    return write(encode(Contents.of_adapter(target, name), dialect, networks(target)), path)


def write(tensors: Mapping[str, Tensor], path: Path) -> int:
    """Write the tensors of a LoRA beside `path`, and rename."""
    write_beside(path, lambda beside: write_tensors(beside, tensors, {"format": "pt"}))
    return len(tensors)


def encode(contents: Contents, dialect: str, found: Mapping[PartName, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a file in the names of a dialect.

    Args:
        found: the networks that the changes are for; the meta device is enough.

    Raises:
        InputError: an unknown dialect.
        LoraError: it cannot say something exactly; all such modules are listed.
    """
    if dialect not in WRITABLE:
        raise InputError(f"unknown dialect {dialect!r} to write; known: {', '.join(WRITABLE)}")
    tensors: dict[str, Tensor] = {}
    refused: list[str] = []
    for (kind, layer), changes in contents.changes.items():
        try:
            slots = _slots(dialect, kind, layer, found[kind])
            _check_covered(changes, slots, dialect)
            for name, rows, swap in slots:
                parts = [part for change in changes if (part := _cut(change, rows)) is not None]
                if parts:
                    said = _said(_combined(parts, rows), ENDINGS[dialect], dialect)
                    if swap and not can_swap(said):
                        raise _Inexact("the halves of its rows cannot change places in a Kronecker product (LoKr)")
                    for what, tensor in (swapped(said) if swap else said).items():
                        tensors[name + ENDINGS[dialect][what]] = tensor.detach().cpu()
        except _Inexact as reason:
            refused.append(f"{layer}: {reason}")
    for (kind, module), tensor in contents.replaced.items():
        name = _name(dialect, Place(kind, module), found[kind])
        if name is None or "replace" not in ENDINGS[dialect]:
            refused.append(f"{module}: {dialect} files cannot replace a norm")
        else:
            tensors[name + ENDINGS[dialect]["replace"]] = tensor.cpu()
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise LoraError("\n".join([f"cannot be written exactly as {dialect}: {refused[0]}{more}", *refused[1:]]))
    return tensors


class _Inexact(Exception):
    """A change that a dialect cannot say; the text is the reason."""


def _dialect(name: str, kind: PartName, network: nn.Module) -> Dialect | None:
    """Of those of this name, that of the network's own family, if it has one."""
    same = [d for d in DIALECTS if d.name == WRITABLE[name] and d.network == kind]
    return next((d for d in same if d.kind is type(network)), same[0] if same else None)


def _name(name: str, place: Place, network: nn.Module) -> str | None:
    dialect = _dialect(name, place.network, network)
    return None if dialect is None else dialect.module(place, flux2=not isinstance(network, Flux1))


def _slots(name: str, kind: PartName, layer: str, network: nn.Module) -> list[tuple[str, Rows, bool]]:
    """The modules that a dialect divides a layer into: (name, output rows, whether its halves are swapped)."""
    dialect = _dialect(name, kind, network)
    if dialect is None:
        raise _Inexact(f"{name} files hold no {kind} part")
    out = cast(int, network.get_submodule(layer).out_features)
    shapes = {(r.place.first, r.place.last, r.place.parts, r.place.swap) for r in RULES[dialect.spelling]}
    slots: list[tuple[str, Rows, bool]] = []
    for first, last, parts, swap in sorted(shapes):
        module = _name(name, Place(kind, layer, first, last, parts, swap), network)
        if module is not None:
            heights = stacked_rows(parts, out, hidden_size(network))
            slots.append((module, (sum(heights[:first]), sum(heights[:last])), swap))
    whole = [slot for slot in slots if slot[1] == (0, out)]
    if not slots:
        raise _Inexact(f"{name} has no name for it")
    return whole[:1] or slots


def _check_covered(changes: Sequence[Change], slots: Sequence[tuple[str, Rows, bool]], name: str) -> None:
    top = max(end for _, (_, end), _ in slots)
    for change in changes:
        if change.rows[1] > top:
            raise _Inexact(f"{name} has no name for its rows from {top} on")


def _cut(change: Change, rows: Rows) -> Change | None:
    """The part of a change inside `rows`; None if there is none."""
    start, end = max(change.rows[0], rows[0]), min(change.rows[1], rows[1])
    if start >= end:
        return None
    if (start, end) == change.rows:
        return change
    at = slice(start - change.rows[0], end - change.rows[0])
    bias = None if change.bias is None else change.bias[at]
    if isinstance(change, LowRank):
        return LowRank(change.down, change.up[at], (start, end), change.factor, bias)
    if isinstance(change, Hadamard):
        return Hadamard(change.a1[at], change.b1, change.a2[at], change.b2, (start, end), change.factor, bias)
    if isinstance(change, Dense):
        return Dense(None if change.difference is None else change.difference[at], (start, end), bias)
    if isinstance(change, Magnitude) and not change.by_column:
        inner = _cut(change.inner, (start, end))
        assert inner is not None
        return _with_magnitude(inner, change.magnitude.flatten()[at])
    if isinstance(change, Kronecker):
        raise _Inexact("a Kronecker product (LoKr) over fused rows has no exact parts")
    raise _Inexact("column norms (DoRA) over fused rows have no exact parts")


def _with_magnitude(inner: Change, magnitude: Tensor) -> Magnitude:
    """A DoRA for writing down: the norms of its base are not needed."""
    height = inner.rows[1] - inner.rows[0]
    change = Magnitude(inner, magnitude, torch.zeros(height, 1, device=magnitude.device))
    return change


def _combined(parts: Sequence[Change], rows: Rows) -> Change:
    """Several changes of slices of `rows` as one change of all of them."""
    if len(parts) == 1 and parts[0].rows == rows:
        return parts[0]
    if all(isinstance(part, Magnitude) and not part.by_column for part in parts):
        ordered = sorted(cast("list[Magnitude]", list(parts)), key=lambda part: part.rows)
        if [row for part in ordered for row in range(*part.rows)] != list(range(*rows)):
            raise _Inexact("DoRA changes only some of the fused rows")
        inner = _combined([part.inner for part in ordered], rows)
        return _with_magnitude(inner, torch.cat([part.magnitude.flatten() for part in ordered]))
    bias = _assembled([(p.rows, p.bias) for p in parts if p.bias is not None], rows, ())
    if all(isinstance(part, Dense) for part in parts):
        pieces = [(p.rows, p.difference) for p in cast("list[Dense]", list(parts)) if p.difference is not None]
        return Dense(_assembled(pieces, rows, pieces[0][1].shape[1:] if pieces else ()), rows, bias)
    pairs = [_pair(part) for part in parts if not (isinstance(part, Dense) and part.difference is None)]
    owners = [part for part in parts if not (isinstance(part, Dense) and part.difference is None)]
    factors = {part.factor for part in owners}
    fold = len(factors) > 1  # different alphas: into the numbers
    dtype = torch.float32 if fold else pairs[0][1].dtype
    down = torch.cat([d.to(dtype) for d, _ in pairs])
    up = torch.zeros(rows[1] - rows[0], down.shape[0], dtype=dtype, device=down.device)
    column = 0
    for part, (_, piece) in zip(owners, pairs, strict=True):
        start, end = part.rows[0] - rows[0], part.rows[1] - rows[0]
        up[start:end, column : column + piece.shape[1]] = piece.to(dtype) * (part.factor if fold else 1.0)
        column += piece.shape[1]
    return LowRank(down, up, rows, 1.0 if fold else factors.pop(), bias)


def _pair(change: Change) -> tuple[Tensor, Tensor]:
    """(down, up) of a change that is of low rank, whatever its form."""
    if isinstance(change, LowRank):
        return change.down, change.up
    if isinstance(change, Hadamard):
        return change.factors(torch.float32)
    if isinstance(change, Kronecker):
        raise _Inexact("a Kronecker product (LoKr) over some of the fused rows has no exact whole")
    raise _Inexact(f"{change.kind} cannot be joined with other changes of the same layer")


def _assembled(pieces: Sequence[tuple[Rows, Tensor]], rows: Rows, width: Sequence[int]) -> Tensor | None:
    """Pieces of rows in one tensor, zero elsewhere; None if there are none."""
    if not pieces:
        return None
    first = pieces[0][1]
    whole = torch.zeros(rows[1] - rows[0], *width, dtype=first.dtype, device=first.device)
    for (start, end), tensor in pieces:
        whole[start - rows[0] : end - rows[0]] += tensor
    return whole


def _said(change: Change, endings: Mapping[str, str], name: str) -> dict[str, Tensor]:
    """The tensors of a change, by what they are; in a form that the dialect has."""
    if isinstance(change, Magnitude):
        if change.by_column and "alpha" not in endings:
            raise _Inexact(f"{name} has no DoRA by columns")
        said = _said(change.inner, endings, name)
        shape = (-1,) if "alpha" not in endings else (1, -1) if change.by_column else (-1, 1)
        said["magnitude"] = change.magnitude.reshape(shape)
    else:
        said = _form(change, endings, name)
    missing = sorted(what for what in said if what not in endings)
    if missing:
        raise _Inexact(f"{name} has no place for its {missing[0]}")
    return said


def _form(change: Change, endings: Mapping[str, str], name: str) -> dict[str, Tensor]:
    bias = {} if change.bias is None else {"bias": change.bias}
    if isinstance(change, Dense):
        return {**({} if change.difference is None else {"diff": change.difference}), **bias}
    if isinstance(change, Kronecker):
        if "lokr_w1" not in endings:
            raise _Inexact(f"{name} has no Kronecker products (LoKr)")
        first = {"lokr_w1": change.w1} if change.w1_b is None else {"lokr_w1_a": change.w1, "lokr_w1_b": change.w1_b}
        second = {"lokr_w2": change.w2} if change.w2_b is None else {"lokr_w2_a": change.w2, "lokr_w2_b": change.w2_b}
        if not change.rank and change.factor != 1:  # beside whole factors alpha does not count
            first["lokr_w1"] = change.w1.float() * change.factor
        alpha = torch.tensor(change.factor * change.rank if change.rank else 1.0, dtype=torch.float32)
        return {**first, **second, "alpha": alpha, **bias}
    if isinstance(change, Hadamard) and "hada_w1_a" in endings:
        alpha = torch.tensor(change.factor * change.rank, dtype=torch.float32)
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        return dict(zip(names, (change.a1, change.b1, change.a2, change.b2), strict=True)) | {"alpha": alpha} | bias
    down, up = _pair(change)
    if "alpha" in endings:
        alpha = torch.tensor(change.factor * down.shape[0], dtype=torch.float32)
        return {"down": down, "up": up, "alpha": alpha, **bias}
    return {"down": down, "up": up if change.factor == 1 else up.float() * change.factor, **bias}
