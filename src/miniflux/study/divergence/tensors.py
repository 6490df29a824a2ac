"""The tensors inside of what a module is called with, and of what it returns: by name, and exchanged for others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

Named = dict[str, Tensor]


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested lists, tuples, mappings and dataclasses, and where it is: `mods.0.shift`."""
    if isinstance(value, Tensor):
        yield name, value
        return
    for key, inner in _items(value):
        yield from tensors_in(inner, f"{name}.{key}" if name else key)


def exchanged(value: Any, others: Mapping[str, Tensor], name: str = "") -> Any:
    """The same with other tensors in the places that `others` names."""
    if isinstance(value, Tensor):
        return others.get(name, value)
    inner = {key: exchanged(one, others, f"{name}.{key}" if name else key) for key, one in _items(value)}
    if not inner:
        return value
    if isinstance(value, Mapping):
        return inner
    if isinstance(value, (list, tuple)):
        return type(cast("list[Any]", value))(inner.values())
    return replace(value, **inner)


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), inner) for key, inner in cast("Mapping[Any, Any]", value).items()]
    if isinstance(value, (list, tuple)):
        return [(str(i), inner) for i, inner in enumerate(cast("list[Any]", value))]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return []


def bound(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """What a module is called with, by the names that its class has for it: its own forward may be another one."""
    return _of_self(inspect.signature(type(module).forward)).bind(*args, **kwargs)


def _of_self(signature: inspect.Signature) -> inspect.Signature:
    return signature.replace(parameters=list(signature.parameters.values())[1:])
