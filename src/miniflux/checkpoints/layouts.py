"""Names of tensors from one layout into another, both ways, and the shapes of a file under a network's own names.

The native layout of a network is the identity: module names are the official keys. Every other layout is a list of
rows (our name, their names, how the tensors correspond) in the network's record. Names may hold `{i}` and `{j}` for
numbers; one table serves both directions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from einops import rearrange
from torch import Tensor, nn

from miniflux.checkpoints.networks import BY_KIND, Network
from miniflux.checkpoints.networks.record import (
    ALL_IN_ONE,
    DIFFUSERS,
    MOVED,
    OPENAI,
    ORIGINAL,
    THIRDS,
    How,
    Row,
    Shapes,
)
from miniflux.checkpoints.quantized import packed_layers
from miniflux.errors import CheckpointError

__all__ = ["ALL_IN_ONE", "DIFFUSERS", "MOVED", "OPENAI", "ORIGINAL", "THIRDS", "How", "Row"]


@dataclass(frozen=True)
class Counterpart:
    """What one of our tensors is made of in another layout.

    Attributes:
        head: rows of a head, where they are `pairs`; else 0.
    """

    keys: tuple[str, ...]
    how: How
    head: int = 0


@cache
def _pattern(ours: str) -> re.Pattern[str]:
    text = re.escape(ours).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
    return re.compile(text.replace(r"\*\*", "(?P<tail>.+)").replace(r"\*", r"(?P<tail>[^.]+)"))


def hidden_size(module: nn.Module) -> int:
    """Width of the residual stream of a transformer; 0 for networks whose layouts stack no rows."""
    network = BY_KIND.get(type(module))
    return network.stacked(module.config) if network else 0


def layouts_of(module: nn.Module) -> list[str]:
    """Names of the layouts known for this network, `original` first."""
    network = BY_KIND.get(type(module))
    return [ORIGINAL, *(network.rows if network else ())]


def counterparts(module: nn.Module, layout: str) -> dict[str, Counterpart]:
    """For every tensor of the network: which keys of a file in `layout` it comes from. Packed layers know the keys of
    their parts, which are those of the file that they were made for.

    Raises:
        CheckpointError: the network has no such layout.
    """
    network = BY_KIND.get(type(module))
    tables = network.rows if network else {}
    if layout not in (ORIGINAL, *tables):
        known = ", ".join(layouts_of(module))
        raise CheckpointError(f"{type(module).__name__} has no layout {layout!r}; known: {known}")
    levels, head = (network.levels(module.config), network.paired(module.config)) if network else (0, 0)
    packed = {
        f"{name}.{part}": key for name, layer in packed_layers(module).items() for part, key in layer.origins.items()
    }

    def origin(key: str, tensor: Tensor) -> Counterpart:
        if key in packed:
            return Counterpart((packed[key],), "packed")
        found = Counterpart((key,), "same") if layout == ORIGINAL else _origin(key, tables[layout], levels)
        if found.how == "pairs":
            found = replace(found, head=head) if head else replace(found, how="same")
        return found if tensor.is_floating_point() else replace(found, how="packed")  # a count stays what it is

    return {key: origin(key, tensor) for key, tensor in module.state_dict().items()}


def _origin(key: str, rows: Sequence[Row], levels: int) -> Counterpart:
    for row in rows:
        match = _pattern(row.ours).fullmatch(key)
        if match is None:
            continue
        found = match.groupdict()
        if "i" in found:
            found |= {"-i": str(levels - 1 - int(found["i"])), "i-1": str(int(found["i"]) - 1)}
        return Counterpart(tuple(_filled(name, found) for name in row.theirs), row.how)
    raise AssertionError(f"no row for {key}")


def _filled(name: str, found: Mapping[str, str]) -> str:
    name = re.sub(r"\*\*?", found.get("tail", ""), name)
    return re.sub(r"\{(-?[ij]|i-1)\}", lambda match: found[match[1]], name)


@cache
def _inverse(name: str) -> re.Pattern[str]:
    """A name of theirs as a pattern of keys."""
    text = re.escape(name)
    for field, group in ((r"\{i\}", "i"), (r"\{j\}", "j"), (r"\{\-i\}", "last"), (r"\{i\-1\}", "less")):
        text = text.replace(field, rf"(?P<{group}>\d+)", 1)
    return re.compile(text.replace(r"\*\*", "(?P<tail>.+)").replace(r"\*", r"(?P<tail>[^.]+)"))


def layout_of(network: Network, keys: Collection[str]) -> str:
    """The layout whose marks a file bears."""
    marked = (name for name, layout in network.layouts.items() if any(key.startswith(layout.marks) for key in keys))
    return next(marked, ORIGINAL)


def their_names(network: Network, layout: str, ours: str, levels: int = 0) -> tuple[str, ...]:
    """What one of a network's tensors is made of in a layout."""
    return (ours,) if layout == ORIGINAL else _origin(ours, network.rows[layout], levels).keys


def own_shapes(network: Network, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes of a file under the network's own names, in whatever layout they are; what no row knows is left out.

    Args:
        shapes: of the file; packed weights by the shapes that they unpack to.
    """
    layout = layout_of(network, shapes)
    return renamed(() if layout == ORIGINAL else network.layouts[layout].rows, shapes)


def renamed(rows: Sequence[Row], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes under a network's own names, from those that the rows of a layout know; without rows, as they are."""
    if not rows:
        return dict(shapes)
    names = [(_inverse(name), row) for row in rows for name in row.theirs]
    matched: list[tuple[Row, dict[str, str], tuple[int, ...]]] = []
    for key, shape in shapes.items():
        found = next(((row, match) for pattern, row in names if (match := pattern.fullmatch(key))), None)
        if found is not None:
            matched.append((found[0], found[1].groupdict(), shape))
    levels = max((int(found["last"]) + 1 for _, found, _ in matched if "last" in found), default=0)
    made: dict[str, tuple[int, ...]] = {}
    for row, found, shape in matched:
        if "last" in found:
            found["i"] = str(levels - 1 - int(found["last"]))
        if "less" in found:
            found["i"] = str(int(found["less"]) + 1)
        ours = _filled(row.ours, found)
        if row.how == "rows" and shape:
            shape = (made.get(ours, (0,))[0] + shape[0], *shape[1:])
        elif row.how in THIRDS and shape:
            shape = (shape[0] // 3, *shape[1:])
        elif row.how == "1x1" and len(shape) == 2:
            shape = (*shape, 1, 1)
        made[ours] = shape
        if row.how in THIRDS:  # one of theirs is three of ours
            others = [other for other in rows if other.theirs == row.theirs]
            made |= {_filled(other.ours, found): shape for other in others}
    return made


def detect(module: nn.Module, keys: Collection[str]) -> str:
    """The layout that explains most of a file's keys."""
    present = set(keys)

    def explained(layout: str) -> int:
        return sum(key in present for origin in counterparts(module, layout).values() for key in origin.keys)

    return max(layouts_of(module), key=explained)


def stacked_rows(count: int, total: int, hidden: int) -> list[int]:
    """Heights of `count` tensors that are stacked to `total` rows: all but the last are `hidden` high."""
    return [hidden] * (count - 1) + [total - hidden * (count - 1)]


def their_shape_fits(shapes: Sequence[tuple[int, ...]], how: How, target: tuple[int, ...], hidden: int) -> bool:
    """Whether tensors of these shapes make one of shape `target`."""
    if how in THIRDS:
        return bool(target) and shapes[0] == (3 * target[0], *target[1:])
    if how == "rows":
        return list(shapes) == [(rows, *target[1:]) for rows in stacked_rows(len(shapes), target[0], hidden)]
    if how == "1x1":  # some files keep the convolution's two trailing axes
        return shapes[0] == target or (*shapes[0], 1, 1) == target
    return shapes[0] == target


def to_ours(parts: Sequence[Tensor], origin: Counterpart, target: tuple[int, ...]) -> Tensor:
    """Their tensors -> ours. A view wherever possible."""
    how = origin.how
    if how == "rows":
        return torch.cat(list(parts))
    if how in THIRDS:
        return parts[0].chunk(3)[THIRDS[how]]
    if how == "swap halves":
        return torch.cat(parts[0].chunk(2)[::-1])
    if how == "pairs":
        return rearrange(parts[0], "(H D two) ... -> (H two D) ...", two=2, D=origin.head // 2)
    return parts[0].view(target)


def to_theirs(tensor: Tensor, origin: Counterpart, hidden: int) -> list[Tensor]:
    """Ours -> their tensors."""
    how = origin.how
    if how == "rows":
        return list(tensor.split(stacked_rows(len(origin.keys), tensor.shape[0], hidden)))
    if how == "swap halves":
        return [torch.cat(tensor.chunk(2)[::-1])]
    if how == "pairs":
        return [rearrange(tensor, "(H two D) ... -> (H D two) ...", two=2, D=origin.head // 2)]
    if how == "1x1" and tensor.ndim == 4:
        return [tensor[:, :, 0, 0]]
    return [tensor]


def from_layout(module: nn.Module, tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Rename and reshape a complete set of tensors of `layout` into the network's own; the input is left alone."""
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    plan = counterparts(module, layout)
    return {key: to_ours([tensors[k] for k in o.keys], o, shapes[key]) for key, o in plan.items()}


def to_layout(module: nn.Module, tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The inverse of `from_layout`."""
    result: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for key, origin in counterparts(module, layout).items():
        if origin.how in THIRDS:
            thirds.setdefault(origin.keys[0], {})[THIRDS[origin.how]] = tensors[key]
            continue
        parts = to_theirs(tensors[key], origin, hidden_size(module))
        result.update(zip(origin.keys, parts, strict=True))
    return result | {key: torch.cat([rows[n] for n in sorted(rows)]) for key, rows in thirds.items()}
