"""Attention, looked into: what stands in the place of `attend` of a block while somebody looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from miniflux.errors import InputError
from miniflux.models.attention import Chosen
from miniflux.models.layers import Attend, attention, rotated
from miniflux.sampling import guidance
from miniflux.study.values.point import Point

QUERIES = 2**22  # numbers of a matrix of weights that are computed at a time, about


@dataclass(frozen=True)
class Weights:
    """Attention weights that are not computed yet.

    Attributes:
        q, k: rotated, (B, H, L, D) and (B, H, keys, D).
        mask: (B, 1, 1, keys), false for keys that nobody may look at.
        edited: of a row and a head, what stands in the place of its weights (L, keys).
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    edited: dict[tuple[int, int], Tensor] = field(default_factory=dict[tuple[int, int], Tensor])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:3], self.k.shape[2])

    def of(self, row: int, head: int, queries: Tensor | None, keys: Tensor | None) -> Tensor:
        """softmax(q k' / sqrt(D)) of one head, float32: (queries, keys) of those chosen. The softmax is over all keys.
        Never more than one head at a time is held, nor, but for the result, all of its queries."""
        if (row, head) in self.edited:
            weights = self.edited[row, head]
            weights = weights if queries is None else weights[queries.to(weights.device)]
            return weights if keys is None else weights[:, keys.to(weights.device)]
        q, k = self.q[row, head], self.k[row, head].float()
        q = q if queries is None else q[queries.to(q.device)]
        made: list[Tensor] = []
        for some in q.split(max(1, QUERIES // len(k))):
            scores = some.float() @ k.t() * k.shape[-1] ** -0.5
            if self.mask is not None:
                scores.masked_fill_(~self.mask[row if len(self.mask) > 1 else 0, 0], -torch.inf)
            weights = scores.softmax(dim=-1)
            made.append(weights if keys is None else weights[:, keys.to(weights.device)])
        return made[0] if len(made) == 1 else torch.cat(made)


class Looker(Protocol):
    """Who looks into attention.

    Attributes:
        alters: None if it only looks on.
    """

    @property
    def alters(self) -> str | None: ...

    def attended(self, block: str) -> Mapping[str, Point]:
        """The points that it looks at in the attention of a block, by what they are of."""
        ...

    def tell(self, point: Point, value: Tensor | Weights, keys: int = 0) -> None:
        """A value, and how many keys stand before those of the sequence."""
        ...

    def weigh(self, point: Point, weights: Weights, v: Tensor, heads: Tensor, keys: int) -> None:
        """Attention weights, with the values and with what each head gave (B, H, L, D), which it may write over."""
        ...


class Attending:
    """Tells of queries, keys, values and weights; those who came first are told first, at each of these.

    Args:
        name: of the block.
        inner: what attends.
        taps: who is told.
    """

    def __init__(self, name: str, inner: Attend, taps: Sequence[Looker]) -> None:
        self.name, self.inner, self.taps = name, inner, tuple(taps)
        self.wanted = {which for tap in taps for which in tap.attended(name)}
        if "attn_weights" in self.wanted and not _is_softmax(inner):
            raise InputError(
                f"{name}.attn_weights: a function of the caller's attends, and what weights it has nobody can tell"
            )

        if self._altering({"attn_weights"}) and not _is_softmax(inner, plain=True):
            raise InputError(
                f"{name}.attn_weights: guidance works in attention (NAG), and its weights cannot be changed"
            )

    @classmethod
    def around(cls, attend: Any, name: str, tap: Looker) -> Attending:
        """Those that look into the same attention are one, because they share what is computed for them."""
        if isinstance(attend, Attending):
            return cls(name, attend.inner, (tap, *attend.taps))
        return cls(name, attend, (tap,))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
        kept = k.shape[2] - q.shape[2]  # keys of references that were looked at once
        for which, x in (("q", q), ("k", k), ("v", v)):
            self._tell(which, x, kept)
        weights: Weights | None = None
        if self.wanted & {"q_rope", "k_rope", "attn_weights"}:
            turned = rotated(q, k, v, pe)
            for which, x in zip(("q_rope", "k_rope"), turned, strict=True):
                self._tell(which, x, kept)
            weights = Weights(*turned, mask)
            if self._altering({"q_rope", "k_rope"}):
                (q, k), pe = turned, _unturned(pe)
        x = self.inner(q, k, v, pe, mask)
        heads = x.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
        if weights is not None:
            for tap in self.taps:
                point = tap.attended(self.name).get("attn_weights")
                if point is not None:
                    tap.weigh(point, weights, v, heads, kept)
        self._tell("z", heads, 0)
        return x

    def _tell(self, which: str, x: Tensor, kept: int) -> None:
        for tap in self.taps:
            point = tap.attended(self.name).get(which)
            if point is not None:
                tap.tell(point, x, kept)

    def _altering(self, which: set[str]) -> bool:
        return any(tap.alters is not None and which & tap.attended(self.name).keys() for tap in self.taps)


def _unturned(pe: Tensor) -> Tensor:
    """Rotations by nothing, exactly."""
    still = torch.zeros_like(pe)
    still[..., 0] = 1
    return still


def _is_softmax(attend: Any, plain: bool = False) -> bool:
    """Whether weights are those of the softmax of queries and keys: ours, kernels for it, and, unless it is to be
    plain, NAG, which calls them."""
    ours = attend is attention or isinstance(attend, Chosen)
    return ours or (not plain and getattr(attend, "__module__", "") == guidance.__name__)
