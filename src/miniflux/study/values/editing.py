"""Values changed while pictures are drawn: `edit`.

    with study.edit(pipe, {"single_blocks.3.z": study.zero}, heads=[0, 2]):
        pipe.generate("a red circle")

A change is made where the value is computed, and everything behind it sees it. Pictures say in their settings what was
altered. Of several `with` around each other the outer ones come first at every point: a capture inside of an edit sees
what the edit has made, one around it what was there before. LoRAs come before all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miniflux.checks import check_number, shown
from miniflux.errors import InputError
from miniflux.pipeline import Pipeline
from miniflux.sampling.observing import Call
from miniflux.study.values.attending import Weights
from miniflux.study.values.inventory import points as all_points
from miniflux.study.values.kept import Kept
from miniflux.study.values.point import Point, Points, matching
from miniflux.study.values.selecting import Numbers, Selection, Tokens
from miniflux.study.values.tapping import Place, Tap, check_steps

SAID = 100  # characters of a name in the settings


@dataclass(frozen=True)
class At:
    """What a change is told beside the value.

    Attributes:
        point: its name.
        run, step, call, turn: as of `kept.Record`.
        rows: of the value, the number of the picture and the text.
        heads, tokens: numbers of those that are changed; None for all.
    """

    point: str
    run: int
    step: int | None
    call: int | None
    turn: int
    rows: tuple[tuple[int | None, str | None], ...]
    heads: tuple[int, ...] | None
    tokens: tuple[int, ...] | None


Change = Callable[[Tensor, At], Tensor]
"""From the value (rows, ...), with the chosen heads and tokens alone, to what takes its place, of the same shape."""


def zero(value: Tensor, at: At) -> Tensor:
    """Nothing in its place. For heads, at `z`: they are ablated."""
    return torch.zeros_like(value)


def scale(factor: float) -> Change:
    """So many times as much.

    Raises:
        InputError: no finite number.
    """
    factor = check_number("factor", factor, -float("inf"))
    return _named(lambda value, at: value * factor, f"scale({factor:g})")


def replace(by: Tensor | float) -> Change:
    """A number, or a tensor that is expanded to the chosen part of the value."""
    return _named(lambda value, at: _fitting(by, value, at).expand_as(value), "replace")


def add(vector: Tensor, strength: float = 1.0) -> Change:
    """A steering vector on top: strength * vector, expanded to the chosen part of the value.

    Raises:
        InputError: strength is no finite number.
    """
    strength = check_number("strength", strength, -float("inf"))
    return _named(lambda value, at: value + strength * _fitting(vector, value, at), f"add({strength:g})")


def patch(kept: Kept, run: int = 0, picture: int | None = None, text: str | None = None) -> Change:
    """What was captured in another run, at the same point, step and call (activation patching, arXiv 2202.05262).

    Args:
        kept: by a capture without heads, tokens, keys and reduce, of all steps that are changed.
        run, picture, text: of the run that was captured; None for those of the picture that is drawn.

    Raises:
        InputError: it holds parts of values.
    """
    if not kept.whole:
        raise InputError("to patch, capture whole values: without heads, tokens, keys, and reduce")

    def patched(value: Tensor, at: At) -> Tensor:
        found: list[Tensor] = []
        for number, name in at.rows:
            which = {"picture": number if picture is None else picture, "text": name if text is None else text}
            one = kept.get(at.point, run=run, step=at.step, call=at.call, turn=at.turn, **which)
            heads, tokens = at.heads, at.tokens
            if heads is not None:
                one = one[torch.tensor(heads)]
            if tokens is not None:
                axis = value.ndim - 3  # tokens are before the channels
                if max(tokens) >= one.shape[axis]:
                    raise InputError(f"{at.point}: the captured value has {one.shape[axis]} tokens, not {max(tokens)}")
                one = one.index_select(axis, torch.tensor(tokens))
            if one.shape != value.shape[1:]:
                raise InputError(
                    f"{at.point}: the captured value is {tuple(one.shape)}, this one {tuple(value.shape[1:])}: "
                    "both runs must have as many tokens"
                )
            found.append(one)
        return torch.stack(found).to(value)

    return _named(patched, "patch")


def skip(value: Tensor, at: At) -> Tensor:
    """For the name of a block: it leaves its streams as they are."""
    raise AssertionError("blocks are skipped by `Edit`")


class Edit(Tap):
    """Made by `edit`; a context manager."""

    def __init__(
        self, pipe: Pipeline, points: Points, changes: Mapping[str, list[Change]], selection: Selection, alters: str
    ) -> None:
        super().__init__(pipe, points)
        self.changes, self.selection, self.alters = changes, selection, alters
        self._streams: dict[str, Tensor] = {}  # of blocks that are skipped, what came in
        self._met, self._made = set[str](), set[str]()
        self._attention: tuple[Tensor, Tensor] | None = None  # values, and what heads gave, while weights are changed

    def check(self, call: Call) -> None:
        check_steps(self.selection, call)
        self._met = set()
        self._streams = {}

    def called(self, call: Call) -> None:
        """Every point of the transformer must have been there, or the settings would say what was not done."""
        if not self._now(call.step):
            return
        known = [p for p in self.points if p.network == "transformer" and not p.only_with_references]
        missing = [point.name for point in known if point.name not in self._met]
        if missing:
            raise InputError(f"{missing[0]} was left out in step {call.step}, and what is not computed is not edited")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        missing = [p.name for p in self.points if p.name not in self._made and not p.only_with_references]
        if error is None and self.run >= 0 and missing:
            raise InputError(f"{missing[0]} was not altered, though settings say so: it was never computed as asked")

    def _now(self, step: int | None) -> bool:
        return self.selection.steps is None or step is None or step in self.selection.steps

    def seen(self, value: Tensor | Weights, place: Place) -> None:
        self._met.add(place.point.name)
        rows = self._rows(place)
        if not rows:
            return
        self._made.add(place.point.name)
        if isinstance(value, Weights):
            self._reweighed(value, place, rows)
            return
        at, index = self._at(place, rows, value)
        for change in self.changes[place.point.name]:
            if change is skip:
                self._skipped(value, place.point, index)
            else:
                value[index] = self._changed(change, value[index], at)

    def _rows(self, place: Place) -> list[int]:
        """The rows that are changed here."""
        if not self._now(place.step):
            return []
        texts = self.selection.texts
        return [i for i, (_, text) in enumerate(place.each) if texts is None or text is None or text in texts]

    def _at(self, place: Place, rows: list[int], value: Tensor) -> tuple[At, tuple[Tensor, ...]]:
        """What a change is told, and the index of the chosen part."""
        point, heads = place.point, self.selection.heads
        places = self.selection.places("tokens", point.name, place.parts) if point.tokens else None
        chosen = {0: torch.tensor(rows)}
        if heads is not None and point.heads_axis is not None:
            chosen[point.heads_axis] = torch.tensor(heads)
        if places is not None and point.tokens_axis is not None:
            chosen[point.tokens_axis] = places
        axes = [chosen.get(axis, torch.arange(value.shape[axis])) for axis in range(max(chosen) + 1)]
        index = tuple(
            one.to(value.device).reshape(*(1,) * i, -1, *(1,) * (len(axes) - i - 1)) for i, one in enumerate(axes)
        )
        told = tuple(place.each[row] for row in rows)
        tokens = None if places is None else tuple(places.tolist())
        return At(point.name, place.run, place.step, _number(place), place.turn, told, heads, tokens), index

    @staticmethod
    def _changed(change: Change, value: Tensor, at: At) -> Tensor:
        made: Any = change(value, at)
        if not isinstance(made, Tensor) or made.shape != value.shape:
            got = tuple(made.shape) if isinstance(made, Tensor) else shown(made)
            raise InputError(f"a change at {at.point} must give a tensor of {tuple(value.shape)}, got {got}")
        return made.to(value)

    def _skipped(self, value: Tensor, point: Point, index: tuple[Tensor, ...]) -> None:
        """What came into a block is what comes out of it."""
        stream = point.name.removesuffix(point.site)
        if point.site == "in":
            self._streams[stream] = value.clone()
        else:
            value[index] = self._streams.pop(stream)[index]

    def weigh(self, point: Point, weights: Weights, v: Tensor, heads: Tensor, keys: int) -> None:
        self._attention = v, heads
        self.tell(point, weights, keys)
        self._attention = None

    def _reweighed(self, weights: Weights, place: Place, rows: list[int]) -> None:
        """Changed weights meet the values once more: of the heads and queries that are changed, one head at a time."""
        assert self._attention is not None
        v, gave = self._attention
        places = self.selection.places("tokens", place.point.name, place.parts)
        numbers = range(weights.shape[1]) if self.selection.heads is None else self.selection.heads
        tokens = None if places is None else tuple(places.tolist())
        queries = slice(None) if places is None else places.to(v.device)
        for row in rows:
            told = (place.each[row],)
            for head in numbers:
                at = At(place.point.name, place.run, place.step, _number(place), place.turn, told, (head,), tokens)
                full = weights.of(row, head, None, None)
                for change in self.changes[place.point.name]:
                    full[queries] = self._changed(change, full[queries][None, None], at)[0, 0]
                weights.edited[row, head] = full
                gave[row, head, queries] = full[queries].to(v) @ v[row, head]


def edit(
    pipe: Pipeline,
    changes: Mapping[str, Change | Iterable[Change]],
    steps: Numbers | None = None,
    heads: Numbers | None = None,
    tokens: Tokens | None = None,
    *,
    texts: str | Iterable[str] | None = None,
) -> Edit:
    """Change values of the pictures that are drawn in this `with`, by this pipeline and in this thread.

    Args:
        changes: for names or patterns of points, see `points`: `zero`, `scale`, `replace`, `add`, `patch`, any function
            of (value, `At`), or several of them, one after the other. For names of blocks: `skip`.
        steps, heads, tokens, texts: what of every value is changed; as of `capture`. For other parts of other points,
            put another `with` around or inside.

    Raises:
        InputError: an unknown point, or a selection that it has not. While drawing: a step cache would leave blocks
            out; references are looked at once; a step or a place that the run has not; a change that gives another
            shape. Behind it: something was never computed, so not altered.
    """
    every = all_points(pipe)
    found: dict[str, list[Change]] = {}
    said: list[str] = []
    if not changes:
        raise InputError("changes must name at least one point, got none")
    for pattern, given in changes.items():
        several = list(given) if isinstance(given, Iterable) else [given]
        for change in several:
            if not callable(change):
                raise InputError(f"a change is a function, got {shown(change)} for {pattern}")
            for name in _points_of(pipe, every, pattern, change):
                found.setdefault(name, []).append(change)
        said.append(f"{pattern} {'+'.join(getattr(one, '__name__', 'function').strip('<>') for one in several)}")
    chosen = every.select(found)
    selection = Selection.of(chosen, steps, texts, heads, tokens)
    text = f"study.edit: {', '.join(said)}"
    return Edit(pipe, chosen, found, selection, text if len(text) <= SAID else text[: SAID - 3] + "...")


def _points_of(pipe: Pipeline, every: Points, pattern: str, change: Change) -> list[str]:
    """The points that a change is for; to skip a block, its streams."""
    if change is not skip:
        return every.select(pattern).names
    streams = [p for p in every if p.block is not None and p.path == p.block and p.site != "attention"]
    blocks = matching(pattern, dict.fromkeys(p.path for p in streams), "block")
    return [point.name for point in streams if point.path in blocks]


def _number(place: Place) -> int | None:
    return None if place.call is None else place.call.number


def _named(change: Change, name: str) -> Change:
    change.__name__ = name
    return change


def _fitting(by: Any, value: Tensor, at: At) -> Tensor:
    """A number or a tensor, where the value is and as it is."""
    given = torch.as_tensor(by, device=value.device, dtype=value.dtype)
    try:
        given.expand_as(value)
    except RuntimeError:
        raise InputError(
            f"{at.point}: a tensor of {tuple(given.shape)} does not fit the chosen part, {tuple(value.shape)}"
        ) from None
    return given
