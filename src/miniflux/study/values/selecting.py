"""What of a value is meant: which steps, texts, heads and tokens, and what is made of it before it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miniflux.checks import plain, shown, whole
from miniflux.errors import InputError
from miniflux.study.values.point import TOKENS, Point, Points

Numbers = int | Iterable[int]
Tokens = str | Numbers
"""`text`, `image`, `reference`, or places along the axis of a point."""
Parts = Sequence[tuple[str, int]]
"""Of what the tokens along an axis are, in order, and how many there are of each."""
Reduce = str | Callable[[Tensor], Tensor]

REDUCTIONS = ("mean", "heads", "norm")
TEXTS = ("positive", "negative", "empty", "skipped", "attended")


@dataclass(frozen=True)
class Selection:
    """What of every value is meant; None is all of it.

    Attributes:
        steps: of a run, from 0.
        texts: the rows of a batch: `positive`, `negative` ...
        heads: numbers from 0.
        tokens: `text`, `image`, `reference` or places; of attention weights, of the queries.
        keys: likewise, of attention weights alone.
    """

    steps: tuple[int, ...] | None = None
    texts: tuple[str, ...] | None = None
    heads: tuple[int, ...] | None = None
    tokens: str | tuple[int, ...] | None = None
    keys: str | tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        points: Points,
        steps: Numbers | None = None,
        texts: str | Iterable[str] | None = None,
        heads: Numbers | None = None,
        tokens: Tokens | None = None,
        keys: Tokens | None = None,
    ) -> Selection:
        """Checked as far as no picture is needed for it.

        Raises:
            InputError: a number or a name that is none, or a point that has no heads, tokens, or keys.
        """
        texts = None if texts is None else (texts,) if isinstance(texts, str) else tuple(texts)
        for text in texts or ():
            if text not in TEXTS:
                raise InputError(f"texts must be of {', '.join(TEXTS)}, got {shown(text)}")
        made = cls(
            None if steps is None else _numbers("steps", steps),
            texts,
            None if heads is None else _numbers("heads", heads),
            None if tokens is None else _tokens("tokens", tokens),
            None if keys is None else _tokens("keys", keys),
        )
        for point in points:
            made._check(point, points.sizes.get(point.network, {}))
        return made

    def _check(self, point: Point, sizes: Mapping[str, int]) -> None:
        if self.heads is not None:
            axis = point.heads_axis
            if axis is None:
                raise InputError(f"{point.name} has no heads: its shape is ({', '.join(point.shape)})")
            number = sizes[point.shape[axis]]
            if max(self.heads) >= number:
                raise InputError(f"heads must be from 0 to {number - 1} at {point.name}, got {max(self.heads)}")
        if self.tokens is not None and not point.tokens:
            raise InputError(f"{point.name} has no tokens: its shape is ({', '.join(point.shape)})")
        if isinstance(self.tokens, str) and self.tokens not in point.tokens:
            raise InputError(f"{point.name} has no {self.tokens} tokens; it has those of {', '.join(point.tokens)}")
        if self.keys is not None and not point.weights:
            raise InputError(f"keys are of attention weights, and {point.name} is none")
        if isinstance(self.keys, str) and self.keys not in point.tokens:
            raise InputError(f"{point.name} has no {self.keys} keys; it has those of {', '.join(point.tokens)}")

    @property
    def whole(self) -> bool:
        """Whether it is all of every value, at the steps and for the texts."""
        return self.heads is None and self.tokens is None and self.keys is None

    def places(self, what: str, name: str, parts: Parts) -> Tensor | None:
        """The places of `tokens` or `keys` along an axis; None for all of them.

        Raises:
            InputError: there is no such token.
        """
        wanted = self.tokens if what == "tokens" else self.keys
        if wanted is None:
            return None
        if isinstance(wanted, str):
            start, found = 0, list[int]()
            for part, count in parts:
                found += range(start, start + count) if part == wanted else ()
                start += count
            if not found:
                raise InputError(f"{name}: there are no {wanted} tokens in this run")
            return torch.tensor(found)
        total = sum(count for _, count in parts)
        if max(wanted) >= total:
            raise InputError(f"{what} must be from 0 to {total - 1} at {name}, got {max(wanted)}")
        return torch.tensor(wanted)

    def sizes(self, point: Point, shape: Sequence[int], parts: Parts, keys: Parts) -> tuple[int, ...]:
        """The shape that is left of one (of a picture, without the axis of the batch)."""
        left = list(shape)
        if self.heads is not None and point.heads_axis is not None:
            left[point.heads_axis - 1] = len(self.heads)
        places = self.places("tokens", point.name, parts) if point.tokens else None
        if places is not None and point.tokens_axis is not None:
            left[point.tokens_axis - 1] = len(places)
        places = self.places("keys", point.name, keys) if point.weights else None
        if places is not None:
            left[-1] = len(places)
        return tuple(left)


def _numbers(name: str, value: Numbers) -> tuple[int, ...]:
    """Whole numbers, each once, in the order given."""
    value = plain(value)
    listed: list[Any] = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    numbers = tuple(dict.fromkeys(whole(name, one, 0) for one in listed))
    if not numbers:
        raise InputError(f"{name} must be at least one number, got none")
    return numbers


def _tokens(name: str, value: Tokens) -> str | tuple[int, ...]:
    if isinstance(value, str):
        if value not in TOKENS:
            raise InputError(f"{name} must be one of {', '.join(TOKENS)}, or places, got {shown(value)}")
        return value
    return _numbers(name, value)


def check_reduce(reduce: Reduce | None, points: Points) -> None:
    """Raises InputError unless it is known, and every point has what it is over."""
    if reduce is None or callable(reduce):
        return
    if reduce not in REDUCTIONS:
        raise InputError(f"reduce must be one of {', '.join(REDUCTIONS)}, or a function, got {shown(reduce)}")
    for point in points:
        if reduce == "heads" and point.heads_axis is None:
            raise InputError(f"reduce='heads' is a mean over heads, and {point.name} has none")
        if reduce == "mean" and not point.tokens:
            raise InputError(f"reduce='mean' is a mean over tokens, and {point.name} has none")


def reduced(value: Tensor, point: Point, reduce: Reduce | None) -> Tensor:
    """What is kept of the value of a picture (without the axis of the batch)."""
    if reduce is None:
        return value
    if callable(reduce):
        made = reduce(value)
        if not isinstance(made, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"reduce must give a tensor, got {shown(made)}")
        return made
    if reduce == "norm":
        return torch.linalg.vector_norm(value, dim=-1, dtype=torch.promote_types(value.dtype, torch.float32))
    axis = point.heads_axis if reduce == "heads" else point.tokens_axis
    assert axis is not None
    return value.mean(axis - 1, dtype=torch.promote_types(value.dtype, torch.float32))
