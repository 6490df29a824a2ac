"""How values inside the networks are reached: hooks on modules, for one thread and for as long as somebody looks.

Two things keep it from telling what is not so. A hook counts in an announced call of the transformer alone (networks
are called for other purposes too), and inside of its block alone (step caches call a norm of the first block by
itself). And who looks on leaves `attend` what it was: attention weights are computed beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from miniflux.errors import InputError
from miniflux.models.compiling import is_compiled
from miniflux.models.flux1 import RunBlock
from miniflux.pipeline import Pipeline
from miniflux.sampling.observing import Call, observed, observers
from miniflux.study.values.attending import Attending, Weights
from miniflux.study.values.point import Point, Points
from miniflux.study.values.selecting import Parts, Selection
from miniflux.text.encoding import read_anew


@dataclass(frozen=True)
class Place:
    """Where in a run a value is seen.

    Attributes:
        run: the call of `generate`, from 0, since somebody looks.
        pictures: their numbers; none of what is computed before the first of them.
        call: what the network is called for; None outside of the transformer.
        turn: how often the point was seen before: in this call of the transformer, or by an encoder in this run.
        rows: of a batch.
        parts, keys: what the tokens along its axis are; of attention weights also along that of the keys.
    """

    point: Point
    run: int
    pictures: tuple[int, ...]
    call: Call | None
    turn: int
    rows: int
    parts: Parts
    keys: Parts = ()

    @property
    def step(self) -> int | None:
        return None if self.call is None else self.call.step

    @cached_property
    def each(self) -> list[tuple[int | None, str | None]]:
        """Of every row, the number of its picture and the text."""
        if self.call is None:
            numbers = self.pictures[self.turn : self.turn + 1] or (None,)
            return [(numbers[0], None)] * self.rows
        texts = self.call.told.texts
        return [(picture, text) for text in texts for picture in self.pictures]


def lengths(call: Call) -> dict[str, int]:
    """How many tokens of each kind a call has."""
    told = call.told
    drawn = told.img.shape[1] if told.drawn is None else told.drawn
    return {"text": told.words.txt.shape[1], "image": drawn, "reference": told.img.shape[1] - drawn}


def check_steps(selection: Selection, call: Call) -> None:
    """Raises InputError if a step is meant that the run has not."""
    if selection.steps is not None and max(selection.steps) >= call.steps:
        raise InputError(f"steps must be from 0 to {call.steps - 1} in this run, got {max(selection.steps)}")


class Tap:
    """An observer that is told of values at points. A context manager, for one `with` only; others may be inside of it
    or around it, and are told after it or before it.

    Attributes:
        alters: see `sampling.observing`.
    """

    alters: str | None = None

    def __init__(self, pipe: Pipeline, points: Points) -> None:
        self.pipe, self.points = pipe, points
        self._networks: dict[str, nn.Module] = {
            "transformer": pipe.transformer, "autoencoder": pipe.autoencoder, **pipe.text.networks
        }  # fmt: skip
        self._attended: dict[str, dict[str, Point]] = {}
        self._hooked: dict[tuple[str, str, str], list[Point]] = {}
        for point in points:
            if point.site == "attention":
                assert point.block is not None
                self._attended.setdefault(point.block, {})[str(point.view)] = point
            else:
                self._hooked.setdefault((point.network, point.path, point.site), []).append(point)
        self.run, self.pictures = -1, tuple[int, ...]()
        self.current: Call | None = None
        self._announced: Call | None = None
        self._block: str | None = None
        self._turns: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        self._entered = ExitStack()
        self._used = False

    # What subclasses do.

    def seen(self, value: Tensor | Weights, place: Place) -> None:
        """A value (rows, ...), as a view of that in the network: it will be written over."""
        raise NotImplementedError

    def check(self, call: Call) -> None:
        """Before a call of the transformer."""

    def called(self, call: Call) -> None:
        """Behind it."""

    # As an observer.

    def began(self, pictures: Sequence[int]) -> None:
        if not self.pictures or pictures[0] <= self.pictures[-1]:
            self.run += 1
        self.pictures, self._turns = tuple(pictures), {}
        self._hang()  # behind the hooks of LoRAs that were attached meanwhile

    def calling(self, call: Call) -> None:
        self.check(call)
        self._announced = call

    def wrap(self, run: RunBlock) -> RunBlock:
        def beside(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
            if self.current is None:
                return run(name, block, streams, context)
            if name in self._attended:
                context = (*context[:-1], Attending.around(context[-1], name, self))
            self._block = name
            try:
                return run(name, block, streams, context)
            finally:
                self._block = None

        return beside

    # Hooks.

    def __enter__(self) -> Any:
        if self._used:
            raise InputError("each `with` needs its own: this one was used before")
        inside = [p.name for p in self.points if p.block is not None and (p.path != p.block or p.site == "attention")]
        if inside and is_compiled(self.pipe.transformer):
            raise InputError(f"{inside[0]} is inside of a compiled block, which has no inside: load without compile")
        self._used = True
        with ExitStack() as stack:
            if any(point.network in self.pipe.text.networks for point in self.points):
                stack.enter_context(read_anew())
            stack.callback(self._let_go)
            self._hang()
            stack.enter_context(observed(self, self.pipe.transformer))
            self._entered = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._entered.close()

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.current = self._announced = None

    def _hang(self) -> None:
        """Hooks on all modules that have points, and around the transformer."""
        self._let_go()
        network = self.pipe.transformer
        self._handles += [
            network.register_forward_pre_hook(self._starts),
            network.register_forward_hook(self._ends, always_call=True),
        ]
        for (name, path, site), points in self._hooked.items():
            module = self._networks[name].get_submodule(path)
            if site == "in":
                self._handles.append(module.register_forward_pre_hook(self._in_hook(points)))
            else:
                self._handles.append(module.register_forward_hook(self._out_hook(points)))

    def _starts(self, *_: Any) -> None:
        if self in observers():
            self.current, self._announced, self._block = self._announced, None, None
            if self.current is not None:
                self._turns = {}

    def _ends(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self in observers() and self.current is not None:
            call, self.current = self.current, None
            if output is not None:  # else an error is on its way
                self.called(call)

    def _in_hook(self, points: Sequence[Point]) -> Any:
        shared = all(point.shared for point in points)

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self._counts(points[0]):
                return None
            if self.alters is not None and not shared:  # others may hold what comes in
                first = (x.clone() if isinstance(x, Tensor) else x for x in inputs[:2])
                inputs = (*first, *inputs[2:])
            self._tell(points, inputs)
            return inputs if self.alters is not None and not shared else None

        return hook

    def _out_hook(self, points: Sequence[Point]) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._counts(points[0]):
                self._tell(points, output)

        return hook

    def _counts(self, point: Point) -> bool:
        """Whether what a hook sees now belongs to a picture of this thread."""
        if self not in observers():
            return False
        return point.network != "transformer" or (self.current is not None and self._block == point.block)

    def _tell(self, points: Iterable[Point], raw: Any) -> None:
        for point in points:
            assert callable(point.view)
            self.tell(point, point.view(raw))

    def tell(self, point: Point, value: Tensor | Weights, keys: int = 0) -> None:
        """Somebody has seen a value. `keys`: how many there are before those of the sequence, of kept references."""
        call = self.current if point.network == "transformer" else None
        turn = self._turns[point.name] = self._turns.get(point.name, -1) + 1
        before = call is None and not point.path.startswith("decoder")
        run, pictures = (self.run + 1, ()) if before else (self.run, self.pictures)
        if call is None:
            rows, parts = value.shape[0], [("text", value.shape[point.tokens_axis])] if point.tokens_axis else []
        else:
            known = lengths(call)
            rows, parts = len(call.told.timesteps), [(part, known[part]) for part in point.tokens]
        kept = [("reference", keys)] if keys else []
        along_keys = [*kept, *parts] if point.weights else []
        if point.view in ("k", "v", "k_rope"):
            parts = [*kept, *parts]
        value = value if isinstance(value, Weights) else value[:rows]
        self.seen(value, Place(point, run, pictures, call, turn, rows, parts, along_keys))

    def weigh(self, point: Point, weights: Weights, v: Tensor, heads: Tensor, keys: int) -> None:
        self.tell(point, weights, keys)

    def attended(self, block: str) -> dict[str, Point]:
        """The points in the attention of a block."""
        return self._attended[block]
