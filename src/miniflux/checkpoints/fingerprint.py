"""Facts of a network in memory, cheap enough to take before every picture, to see whether anything has changed.

Versions of tensors are not enough: `p.data.mul_(2)` does not count them up. So the numbers are looked at as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from miniflux.checkpoints.quantized import LENDER

WHOLE = 64 * 2**20  # bytes: of networks up to here every number counts; of larger ones `SAMPLES` words of each tensor
SAMPLES, SAMPLES_OF_WHOLE = 4096, 64
WORD, SMALL = 8, 4096  # bytes; tensors of so few are hashed

Facts = dict[str, dict[str, Any]]
"""Of every module, by name: what it is, and each of its tensors and attributes."""

MODULE, HOOKS = "(module)", "(forward hooks)"  # no names of attributes
OURS = "miniflux."  # what the functions of our own hooks come from; a LoRA is told by `lora.adapters`
INTERNAL = frozenset(
    (
        *("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_non_persistent_buffers_set"),
        *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
        *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_state_dict_hooks"),
        *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "training", "_lender"),
        "_is_torch_compile",
    )
)
"""Attributes of a module that do not decide what it computes, or are looked at one by one. No network here computes
otherwise in training."""


SIMPLE = {type(None), bool, int, float, str, bytes, torch.dtype, torch.device}


class Same:
    """An object that is equal only to itself."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    __hash__ = None  # pyright: ignore


def total_bytes(networks: Sequence[nn.Module]) -> int:
    """Of all numbers of networks; streamed ones are counted too."""
    return sum(tensor.nbytes for network in networks for tensor in [*network.parameters(), *network.buffers()])


def facts_of(network: nn.Module, whole: bool, skipped: tuple[str, ...] = ()) -> Facts:
    """Facts of a network: equal to those taken earlier if nothing that decides its outputs has changed.

    Tensors of a network that is looked at as a whole count by dtype, device, shape and numbers. Those of others count
    by identity and version as well, since only samples of their numbers are read. Weights that come and go count by
    what stands in their place while they are away.

    Args:
        whole: whether all numbers are read; see `WHOLE`.
        skipped: beginnings of the names of attributes and children that are none of the network's own.
    """
    if not isinstance(network, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # what somebody has put there
        return {"": {MODULE: Same(network)}}
    facts: Facts = {}
    tensors: list[tuple[dict[str, Any], str, Tensor]] = []
    waiting: list[tuple[str, nn.Module]] = [("", network)]
    while waiting:
        name, module = waiting.pop()
        values = vars(module)
        lender = values.get(LENDER)
        own = facts[name] = {MODULE: (weakref.ref(module), type(module)), HOOKS: _hooks(values)}
        for attribute in values.keys() - INTERNAL:
            value = values[attribute]
            if attribute.startswith(skipped):
                continue
            if type(value) in SIMPLE:
                own[attribute] = value
            elif isinstance(value, Tensor):
                tensors.append((own, attribute, value))
            else:
                own[attribute] = plain(value)
        for attribute, value in (*values["_parameters"].items(), *values["_buffers"].items()):
            if value is None:
                own[attribute] = None
            else:
                at_rest = value if lender is None else lender.at_rest(module, attribute)
                tensors.append((own, attribute, at_rest))
        for child, inner in tuple(values["_modules"].items()):  # another thread may be attaching
            path = f"{name}.{child}" if name else child
            if inner is not None and path not in facts and not child.startswith(skipped):
                waiting.append((path, inner))
    for (own, attribute, _), fact in zip(tensors, tensor_facts([tensor for *_, tensor in tensors], whole), strict=True):
        own[attribute] = fact
    return facts


def is_as(network: nn.Module, then: Facts, whole: bool, skipped: tuple[str, ...] = ()) -> bool:
    """Whether `facts_of` would give the same again: asked for every picture, so nothing is put together that is not
    looked at."""
    if not isinstance(network, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        return False
    seen = 0
    facts: list[Any] = []
    tensors: list[Tensor] = []
    waiting: list[tuple[str, nn.Module]] = [("", network)]
    while waiting:
        name, module = waiting.pop()
        own = then.get(name)
        if own is None or type(module) is not own[MODULE][1] or own[MODULE][0]() is not module:
            return False
        values = vars(module)
        if (values["_forward_hooks"] or values["_forward_pre_hooks"] or own[HOOKS]) and _hooks(values) != own[HOOKS]:
            return False
        lender, left = values.get(LENDER), len(own) - 2
        for attribute in values.keys() - INTERNAL:
            if attribute not in own:
                if attribute.startswith(skipped):
                    continue
                return False
            value, fact, left = values[attribute], own[attribute], left - 1
            if value is fact and type(value) in SIMPLE:
                continue
            if isinstance(value, Tensor):
                facts.append(fact)
                tensors.append(value)
            elif fact != (value if type(value) in SIMPLE else plain(value)):
                return False
        for group in (values["_parameters"], values["_buffers"]):
            for attribute, value in group.items():
                left -= 1
                if value is not None:
                    facts.append(own.get(attribute))
                    tensors.append(value if lender is None else lender.at_rest(module, attribute))
                elif own.get(attribute, own) is not None:
                    return False
        if left:
            return False
        seen += 1
        for child, inner in tuple(values["_modules"].items()):
            if inner is not None and not child.startswith(skipped):
                waiting.append((f"{name}.{child}" if name else child, inner))
        if len(waiting) + seen > len(then):
            return False
    return seen == len(then) and tensor_facts(tensors, whole) == facts


def tensor_facts(tensors: Sequence[Tensor], whole: bool) -> list[Any]:
    """Of each tensor, what changes when it does."""
    facts: list[Any] = []
    for tensor, numbers in zip(tensors, _numbers(tensors, whole), strict=True):
        fact = (tensor.dtype, tensor.device, tensor.shape, numbers)
        if not whole or tensor.is_meta:
            place = None if tensor.is_meta else (tensor.data_ptr(), None if tensor.is_inference() else tensor._version)
            fact = (*fact, id(tensor), place)
        facts.append(fact)
    return facts


def _numbers(tensors: Sequence[Tensor], whole: bool) -> list[Any]:
    """The sum of the words of each tensor, if it is read as a whole, and samples of them, which know their places."""
    found: list[Any] = [None] * len(tensors)
    numbers: np.ndarray[Any, Any]
    elsewhere: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.dtype is torch.float32 and tensor.is_cpu:  # which numpy knows by name: faster
            numbers = (tensor.detach() if tensor.requires_grad else tensor).numpy()
        elif tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
            continue
        else:
            flat = tensor.detach().contiguous().reshape(-1)
            if not flat.is_cpu:
                elsewhere.setdefault(flat.device, []).append((i, flat))
                continue
            numbers = flat.view(torch.uint8).numpy()
        if numbers.nbytes <= SMALL:
            found[i] = hash(numbers.tobytes())
            continue
        numbers = numbers.reshape(-1)
        words = numbers.view(np.uint8 if numbers.nbytes % WORD else np.uint64)
        total = int(np.add.reduce(words)) if whole else 0
        found[i] = total, hash(words[:: _stride(words.size, whole)].tobytes())
    for indexed in elsewhere.values():
        told = numbers_elsewhere([flat for _, flat in indexed], whole)
        for (i, _), fact in zip(indexed, told, strict=True):
            found[i] = fact
    return found


def numbers_elsewhere(flat: Sequence[Tensor], whole: bool) -> list[Any]:
    """The same of flat tensors on a device, which is asked for all of them at once."""
    words = [_words(tensor) for tensor in flat]
    steps = [_stride(len(word), whole) for word in words]
    samples = torch.cat([word[::step] for word, step in zip(words, steps, strict=True)]).cpu().numpy()
    totals = torch.stack([word.sum() for word in words]).tolist() if whole else [0] * len(words)
    ends = list(accumulate(-(-len(word) // step) for word, step in zip(words, steps, strict=True)))
    starts = [0, *ends[:-1]]
    return [(total, hash(samples[start:end].tobytes())) for total, start, end in zip(totals, starts, ends, strict=True)]


def _words(flat: Tensor) -> Tensor:
    """A flat tensor as int64."""
    size = flat.numel() * flat.element_size()
    if size % WORD or flat.data_ptr() % WORD or flat.storage_offset() * flat.element_size() % WORD:
        return flat.view(torch.uint8).to(torch.int64)
    return flat.view(torch.int64)


def _stride(words: int, whole: bool) -> int:
    return max(1, words // (SAMPLES_OF_WHOLE if whole else SAMPLES))


def _hooks(values: Mapping[str, Any]) -> tuple[Same, ...]:
    """The functions that others have hung before or behind a module."""
    if not values["_forward_pre_hooks"] and not values["_forward_hooks"]:
        return ()
    hooks = (*values["_forward_pre_hooks"].values(), *values["_forward_hooks"].values())
    return tuple(Same(hook) for hook in hooks if not str(getattr(hook, "__module__", "")).startswith(OURS))


def plain(value: object) -> Any:
    """A value to compare later: numbers and texts as they are, containers and records by what is in them, all else by
    identity."""
    if type(value) in SIMPLE:
        return value
    if isinstance(value, nn.Module):
        return weakref.ref(value)
    if isinstance(value, Mapping):
        return tuple((key, plain(item)) for key, item in cast("Mapping[Any, Any]", value).items())
    if type(value) is tuple and SIMPLE.issuperset(map(type, cast("tuple[object, ...]", value))):
        return cast("tuple[object, ...]", value)
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in cast("Sequence[Any]", value))
    if is_dataclass(value) and not isinstance(value, type):
        return Same(type(value)), plain(vars(value))
    return Same(value)


def differences(then: Facts, now: Facts) -> list[str]:
    """What differs, in words: `double_blocks.0.img_mlp.0.weight`, `txt_in: a forward hook` ... sorted; of a module that
    is another one only that."""
    found: list[str] = []
    above: str | None = None  # the last module that is another one
    for name in sorted({*then, *now}):
        old, new = then.get(name), now.get(name)
        inside = above is not None and (not above or name.startswith(f"{above}."))
        if inside or old == new:
            continue
        if old is None or new is None or old[MODULE] != new[MODULE]:
            above = name
            found.append(f"{name}: {'another module' if old and new else 'was added' if new else 'was taken out'}")
            continue
        for attribute in sorted({*old, *new}):
            if attribute not in old or attribute not in new or old[attribute] != new[attribute]:
                found.append(f"{name}: a forward hook" if attribute == HOOKS else f"{name}.{attribute}")
    return [line.lstrip(".: ") for line in found]
