"""Named points: every value inside the networks of a pipeline that can be looked at and changed.

    print(study.points(pipe))
    study.points(pipe).select("double_blocks.*.img_out")

A name is the path of a module and a suffix that says what of it. A point is where a hook of PyTorch would be, or in
attention, which has no module: the networks are not changed for it, and cost nothing more when nobody looks.
Letters in shapes: B pictures, T text tokens, L image tokens (in FLUX.1 and FLUX.2 those of references behind them),
R reference tokens (FLUX.3), H heads, G heads of keys and values, D head size, h w rows and columns of the latent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Protocol, cast

from torch import Tensor

from miniflux.checks import shown
from miniflux.errors import InputError

TOKENS = ("text", "image", "reference")
"""What tokens can be of; along an axis in the order that a point says."""

View = Callable[[Any], Tensor]
"""From what a module was given (a tuple) or gave to the value at a point, as a view of it."""


@dataclass(frozen=True)
class Point:
    """A value inside a network.

    Attributes:
        name: unique in a pipeline.
        shape: in letters, see above; the first is that of the batch, which a captured value has not.
        what: in a few words.
        network: transformer, autoencoder, or a part of the text side (clip, t5, lm).
        path: the module.
        site: `in` or `out` of the module, or `attention` of the block.
        view: the value, as a view of what is seen there. In attention its name.
        tokens: what the tokens along its axis are of, in order; empty if it has no such axis.
        block: the block of the transformer that it is in; None if it is in none.
        shared: whether what goes into the module goes into others too, which are to see its changes.
        times: how often it is computed in one call of the transformer.
        float32: whether it is that whatever the transformer computes in.
    """

    name: str
    shape: tuple[str, ...]
    what: str
    network: str = field(repr=False)
    path: str = field(repr=False)
    site: str = field(repr=False)
    view: View | str = field(repr=False, compare=False)
    tokens: tuple[str, ...] = field(default=(), repr=False)
    block: str | None = field(default=None, repr=False)
    shared: bool = field(default=False, repr=False)
    times: int = field(default=1, repr=False)
    float32: bool = field(default=False, repr=False)

    @property
    def heads_axis(self) -> int | None:
        """Counted with that of the batch."""
        return next((i for i, letter in enumerate(self.shape) if letter in ("H", "G")), None)

    @property
    def tokens_axis(self) -> int | None:
        """Likewise; of attention weights that of the queries."""
        if not self.tokens:
            return None
        return 1 if self.heads_axis is None else 2

    @property
    def weights(self) -> bool:
        """Whether it is a matrix of attention weights, which nobody holds unless it is asked for."""
        return self.view == "attn_weights"

    @property
    def only_with_references(self) -> bool:
        """Whether it is computed only where there are references."""
        return self.tokens == ("reference",) or "image_cond" in self.path.split(".")


class Networks(Protocol):
    """What a pipeline has for networks."""

    @property
    def transformer(self) -> Any: ...
    @property
    def autoencoder(self) -> Any: ...
    @property
    def text(self) -> Any: ...


class Points(Sequence[Point]):
    """A list of points that can be printed, and chosen from by name.

    Attributes:
        sizes: what of the letters is known without a picture.
    """

    def __init__(self, points: Iterable[Point], sizes: Mapping[str, Mapping[str, int]]) -> None:
        self._points, self.sizes = tuple(points), {name: dict(of) for name, of in sizes.items()}
        self._by_name = {point.name: point for point in self._points}

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, key: Any) -> Any:
        """A point by its number or its name; of a slice, those points."""
        if isinstance(key, str):
            return self.select(key)[0]
        return Points(self._points[key], self.sizes) if isinstance(key, slice) else self._points[key]

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def select(self, patterns: str | Iterable[str]) -> Points:
        """The points of these names, in their own order. In a pattern `*` stands for anything between two dots, `**`
        for anything.

        Raises:
            InputError: a name or a pattern that no point has; the message names the nearest.
        """
        found: set[str] = set()
        given = cast(Any, patterns)
        several = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(cast(Any, given))
        for pattern in several:
            found |= set(matching(pattern, self._by_name))
        if not found:
            raise InputError("points must be at least one name, got none")
        return Points((point for point in self if point.name in found), self.sizes)

    def __str__(self) -> str:
        """A table; blocks that are alike are one row."""
        rows: dict[tuple[str, ...], list[Point]] = {}
        for point in self:
            alike = re.sub(r"(?<=\.)\d+(?=\.)", "#", point.name)
            rows.setdefault((point.network, alike, *point.shape, point.what), []).append(point)
        lines = [("point", "shape", "what")]
        for alike in rows.values():
            lines.append((_folded([p.name for p in alike]), f"({', '.join(alike[0].shape)})", alike[0].what))
        first, second = (max(len(line[i]) for line in lines) for i in range(2))
        text = [f"{name:<{first}}  {shape:<{second}}  {what}" for name, shape, what in lines]
        known = [f"{name}: {', '.join(f'{a} {n}' for a, n in of.items())}" for name, of in self.sizes.items() if of]
        return "\n".join([*text, "", *known, f"{len(self)} points"])

    __repr__ = __str__


def matching(pattern: str, names: Iterable[str], what: str = "point") -> list[str]:
    """Those of the names that a pattern stands for, see `Points.select`.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    if not isinstance(pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"a {what} is given by its name, got {shown(pattern)}")
    names, pieces = list(names), re.findall(r"\*\*|\*|[^*]+", pattern)
    known = {"**": ".*", "*": "[^.]*"}
    compiled = re.compile("".join(known.get(piece) or re.escape(piece) for piece in pieces))
    found = [name for name in names if compiled.fullmatch(name)]
    if not found:
        near = get_close_matches(pattern, names, 3, 0.5)
        raise InputError(f"no {what} {shown(pattern)} in this pipeline{'; near it: ' if near else ''}{', '.join(near)}")
    return found


def _folded(names: Sequence[str]) -> str:
    """Names that differ in numbers as one: `double_blocks.0-3.img_out`."""
    columns = list(zip(*(re.split(r"(?<=\.)(\d+)(?=\.)", name) for name in names), strict=True))
    found: list[str] = []
    for column in columns:
        values = list(dict.fromkeys(column))
        found.append(values[0] if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return "".join(found)


# How the value is seen in what a hook is given.


def whole(x: Any) -> Tensor:
    return cast(Tensor, x)


def of_index(i: int) -> View:
    """One of several, as of the arguments of a module."""
    return lambda x: x[i]


def cut(start: int, stop: int | None) -> View:
    """These channels."""
    return lambda x: x[..., start:stop]


def by_head(heads: int, of: View = whole) -> View:
    """(B, L, H * D) -> (B, H, L, D)."""
    return lambda x: of(x).unflatten(-1, (heads, -1)).transpose(1, 2)
