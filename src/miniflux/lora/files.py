"""LoRA files: tensors and their alphas, grouped by the module they change."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from miniflux.checkpoints.files import TensorSource, open_tensors
from miniflux.checkpoints.folders import path_of
from miniflux.checkpoints.loading import is_finite
from miniflux.errors import LoraError
from miniflux.lora.dialects import SIGNS, Place, recognise, split
from miniflux.lora.stated import Stated, config_beside
from miniflux.lora.strangers import other_kind, refuse_other_files, refuse_other_tensors

Form = Literal["LoRA", "LoHa", "LoKr", "diff", "replace"]

# The tensors of each form: those that must be there, and those that may.
FORMS: dict[Form, tuple[set[str], set[str]]] = {
    "LoRA": ({"down", "up"}, {"alpha", "bias", "magnitude", "reshape"}),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"alpha", "bias", "magnitude"}),
    "LoKr": (
        set(),
        {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha", "bias", "magnitude"},
    ),
    "diff": (set(), {"diff", "bias", "alpha"}),
    "replace": ({"replace"}, set()),
}
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # that an alpha or a shape may be stored in
UP_BIAS = ".lora_B.bias"


@dataclass(frozen=True)
class Group:
    """All tensors of a file that belong to one module.

    Attributes:
        module: what their keys begin with.
        place: where the change goes.
        form: how the change is written.
        tensors: by what they are ("down", "up" ...), without alpha.
        factor: alpha / rank; 1 where the file states none.
        keys: the keys of the file, by what they are.
    """

    module: str
    place: Place
    form: Form
    tensors: dict[str, Tensor]
    factor: float
    keys: dict[str, str]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, understood but not yet compared with a model.

    Attributes:
        source: the path, or "the given tensors".
        dialect: how it names things.
        groups: what it changes.
        unmatched: keys that mean nothing.
    """

    source: str
    dialect: str
    groups: list[Group]
    unmatched: list[str]


def read(path_or_tensors: str | Path | Mapping[str, Tensor], kind: type[nn.Module] | None = None) -> LoraFile:
    """Read a LoRA. Tensors stay views of the mapped file, in its dtype.

    Args:
        kind: the class of the transformer that it is for, if that is known.

    Raises:
        CheckpointError: the file cannot be read.
        LoraError: it is no LoRA but a model, a picture ...; it is of no dialect or of several, one half of a pair is
            missing, ranks disagree, an alpha is zero or not a number, a tensor is not finite.
    """
    metadata: Mapping[str, str] = {}
    config: dict[str, Any] | None = None
    if isinstance(path_or_tensors, Mapping):
        source, name = path_or_tensors, "the given tensors"
        if isinstance(source, TensorSource):
            metadata, name = source.metadata, str(source)
    else:
        path = path_of(path_or_tensors)
        refuse_other_files(path)
        source = open_tensors(path)
        metadata, name = source.metadata, str(path)
        config = config_beside(path if path.is_dir() else path.parent, path)
    if isinstance(source, TensorSource):
        refuse_other_tensors(source, any((part := split(key)) and part[1] in SIGNS for key in source))
    try:
        found = recognise(list(source), kind)
    except LoraError as error:
        raise LoraError(f"{name}: {error}") from error
    stated = Stated(name, metadata, config)
    groups: list[Group] = []
    for module, (place, keys) in sorted(found.groups.items()):
        form = _form(name, module, keys)
        tensors = {what: source[key] for what, key in keys.items() if what != "alpha" or has_rank(keys)}
        for what, key in keys.items():
            if what not in tensors:  # an alpha that does not count
                continue
            whole = what in ("alpha", "reshape") and tensors[what].dtype in WHOLE
            if not tensors[what].is_floating_point() and not whole:
                raise LoraError(f"{name}: {key} has the dtype {_named(tensors[what])}; expected floating-point numbers")
            if not is_finite(tensors[what]):
                raise LoraError(f"{name}: {key} holds numbers that are not finite (NaN or infinite)")
            if not tensors[what].numel():
                raise LoraError(f"{name}: {key} holds no numbers: its shape is {list(tensors[what].shape)}")
        _check_ranks(name, module, form, tensors)
        rank = _rank_of(tensors)
        factor = _factor(name, module, rank, tensors.get("alpha"))
        if factor is None:
            factor = stated.factor(place.network, module, form, rank)
        factor = 1.0 if factor is None else factor
        kept = {what: tensor for what, tensor in tensors.items() if what not in ("alpha", "reshape")}
        if "reshape" in tensors and not tensors["reshape"].is_meta:
            wanted, shape = tensors["reshape"].flatten().tolist(), shape_of(kept)
            if shape is not None and wanted != list(shape):
                raise LoraError(f"{name}: {keys['reshape']} says {wanted}, its change is {shape[0]}x{shape[1]}")
        if factor != 1 and keys.get("bias", "").endswith(UP_BIAS):  # the bias of the up projection: scaled with it
            kept["bias"] = kept["bias"].float() * factor
        groups.append(Group(module, place, form, kept, factor, dict(keys)))
    stated.warn_of_idle_patterns()
    return LoraFile(name, found.dialect, groups, found.unmatched)


def _named(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _form(name: str, module: str, keys: Mapping[str, str]) -> Form:
    """The form that a module's tensors are of.

    Raises:
        LoraError: they are of several, or incomplete.
    """
    present = set(keys)
    own: dict[Form, set[str]] = {
        "LoRA": {"down", "up"},
        "LoHa": FORMS["LoHa"][0],
        "LoKr": {what for what in FORMS["LoKr"][1] if what.startswith("lokr")},
        "replace": {"replace"},
        "diff": {"diff"},
    }
    forms: list[Form] = [form for form, marks in own.items() if marks & present]
    if not forms and present - {"alpha"} == {"bias"}:
        forms = ["diff"]
    if len(forms) != 1:
        what = " and ".join(forms) if forms else f"only {', '.join(sorted(present))}"
        raise LoraError(f"{name}: {module} has {what}; expected the tensors of one kind of change")
    form = forms[0]
    needed, allowed = FORMS[form]
    missing = sorted(needed - present)
    if form == "LoKr":
        missing = [
            f"lokr_w{n} (or both of lokr_w{n}_a and lokr_w{n}_b)"
            for n in (1, 2)
            if f"lokr_w{n}" not in present and not {f"lokr_w{n}_a", f"lokr_w{n}_b"} <= present
        ]
    if missing:
        halves = ", ".join(keys[what] for what in sorted(present & own[form]))
        raise LoraError(f"{name}: {module} has {halves} but lacks its {' and '.join(missing)}")
    extra = sorted(present - needed - allowed)
    if extra:
        raise LoraError(f"{name}: {keys[extra[0]]} cannot stand beside the {form} tensors of {module}")
    return form


def _check_ranks(name: str, module: str, form: Form, tensors: Mapping[str, Tensor]) -> None:
    pairs = {
        "LoRA": [("down", "up")],
        "LoHa": [("hada_w1_b", "hada_w1_a"), ("hada_w2_b", "hada_w2_a")],
        "LoKr": [(f"lokr_w{n}_b", f"lokr_w{n}_a") for n in (1, 2) if f"lokr_w{n}_b" in tensors],
    }.get(form, [])
    for what, tensor in tensors.items():
        wanted = 2 if what in ("down", "up") or what.startswith(("hada", "lokr")) else None
        if wanted is not None and tensor.ndim != wanted and not (tensor.ndim == 4 and tensor.shape[2:] == (1, 1)):
            raise LoraError(f"{name}: the {what} of {module} has the shape {list(tensor.shape)}; expected a matrix")
    for down, up in pairs:
        rank, other = tensors[down].shape[0], tensors[up].shape[1]
        if rank != other:
            raise LoraError(
                f"{name}: the ranks of {module} disagree: {down} {list(tensors[down].shape)} says {rank}, "
                f"{up} {list(tensors[up].shape)} says {other}"
            )


RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")


def has_rank(present: Collection[str]) -> bool:
    """Whether the tensors of a module have a rank. Where they have none (whole factors of a Kronecker product, whole
    differences), alpha does not count, as in LyCORIS, which writes one all the same: whatever stands there."""
    return any(what in present for what in RANKED)


def _rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """The rank that alpha is divided by; None where alpha does not count."""
    return next((tensors[what].shape[0] for what in RANKED if what in tensors), None)


def _factor(name: str, module: str, rank: int | None, alpha: Tensor | None) -> float | None:
    """alpha / rank; None where the tensors do not say.

    Raises:
        LoraError: alpha is zero, or not a single number.
    """
    if alpha is not None and alpha.numel() != 1:
        raise LoraError(f"{name}: the alpha of {module} has the shape {list(alpha.shape)}; expected one number")
    if alpha is None or alpha.is_meta or rank is None:
        return None
    value = float(alpha)
    if value == 0:
        raise LoraError(f"{name}: the alpha of {module} is 0: the change would do nothing")
    return value / rank


def squeezed(tensor: Tensor) -> Tensor:
    """A matrix; some writers keep the two trailing axes of a 1x1 convolution."""
    return tensor.flatten(1) if tensor.ndim == 4 else tensor


def halves_swapped(tensor: Tensor) -> Tensor:
    """Upper and lower half of the rows change places."""
    return torch.cat(tensor.chunk(2)[::-1])


def shape_of(tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """(rows, columns) of the change that the tensors of a module make; (0, 0) if they contradict each other; None
    if they only concern its bias."""
    if "up" in tensors:
        return tensors["up"].shape[0], tensors["down"].shape[1]
    if "hada_w1_a" in tensors:
        shapes = {(tensors[f"hada_w{n}_a"].shape[0], tensors[f"hada_w{n}_b"].shape[1]) for n in (1, 2)}
        return shapes.pop() if len(shapes) == 1 else (0, 0)
    if "diff" in tensors:
        shape = tensors["diff"].shape
        return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)
    if not any(what.startswith("lokr") for what in tensors):
        return None
    (rows1, columns1), (rows2, columns2) = (_half(tensors, n) for n in (1, 2))
    return rows1 * rows2, columns1 * columns2


def _half(tensors: Mapping[str, Tensor], n: int) -> tuple[int, int]:
    if f"lokr_w{n}" in tensors:
        return tensors[f"lokr_w{n}"].shape[0], tensors[f"lokr_w{n}"].shape[1]
    return tensors[f"lokr_w{n}_a"].shape[0], tensors[f"lokr_w{n}_b"].shape[1]


def is_lora(source: TensorSource) -> bool:
    """Whether a file has tensors that only LoRA files have."""
    return any((part := split(key)) and part[1] in SIGNS for key in source.entries)


def what_is(source: TensorSource) -> str | None:
    """What tensors are, in a few words, whether they are a LoRA, a network or something of another family; None if
    that is not known."""
    lora = is_lora(source)
    return other_kind(source, lora) or ("a LoRA, which changes a model and is none" if lora else None)
