"""Values kept while pictures are drawn: `capture`.

    with study.capture(pipe, "double_blocks.*.img_out", steps=[0, 10]) as seen:
        pipe.generate("a red circle")
    seen.get("double_blocks.0.img_out", step=10)      # (L, hidden)

Whoever looks on changes nothing: pictures are the same, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniflux.checks import whole
from miniflux.errors import InputError
from miniflux.pipeline import Pipeline
from miniflux.result import checked_output
from miniflux.sampling.observing import Call
from miniflux.study.values.attending import Weights
from miniflux.study.values.inventory import points as all_points
from miniflux.study.values.kept import Kept, Record
from miniflux.study.values.planning import Planned, largest, planned
from miniflux.study.values.point import Point, Points
from miniflux.study.values.selecting import Numbers, Reduce, Selection, Tokens, check_reduce, reduced
from miniflux.study.values.tapping import Place, Tap, check_steps, lengths

log = logging.getLogger(__name__)

MAX_BYTES = 2**31


class Capture(Tap):
    """Made by `capture`; a context manager that gives what was kept."""

    def __init__(self, pipe: Pipeline, points: Points, selection: Selection, reduce: Reduce | None, kept: Kept) -> None:
        super().__init__(pipe, points)
        self.selection, self.reduce, self.kept = selection, reduce, kept
        self._met = set[str]()

    def planned(self, prompt: str | Iterable[str], **asked: Any) -> Planned:
        """How much would be kept of `pipe.generate(prompt, **asked)`; computed from shapes, without drawing.

        Raises:
            InputError: the call would be refused, or what is asked for does not fit it.
        """
        return planned(self.pipe, self.points, self.selection, self.reduce, prompt, **asked)

    def size(self, prompt: str | Iterable[str], **asked: Any) -> int:
        """The bytes of it."""
        return self.planned(prompt, **asked).bytes

    def __enter__(self) -> Kept:
        super().__enter__()
        return self.kept

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if error is not None:
            self.kept.give_up()
            return
        self.kept.finish()
        needed = [point.name for point in self.points if not point.only_with_references]
        missing = [name for name in needed if name not in self._met]
        if self.run >= 0 and missing:
            log.warning("never computed, so nothing was kept of it: %s", ", ".join(missing[:5]))

    def check(self, call: Call) -> None:
        check_steps(self.selection, call)
        point, size = largest(self.pipe, self.points, self.selection, self.reduce, lengths(call))
        if size > self.kept.max_bytes:
            raise InputError(f"max_bytes {self.kept.max_bytes} is less than one value of {point} takes: {size}")

    def seen(self, value: Tensor | Weights, place: Place) -> None:
        self._met.add(place.point.name)
        chosen = self.selection
        if chosen.steps is not None and place.step not in (*chosen.steps, None):
            return
        queries = chosen.places("tokens", place.point.name, place.parts) if place.point.tokens else None
        for row, (picture, text) in enumerate(place.each):
            if chosen.texts is not None and text is not None and text not in chosen.texts:
                continue
            number = None if place.call is None else place.call.number
            record = Record(place.point.name, place.run, picture, place.step, number, text, place.turn)
            if isinstance(value, Weights):
                keys = chosen.places("keys", place.point.name, place.keys)
                self.kept.add(record, self._weighed(value, place.point, row, queries, keys))
                continue
            part = value[row]
            for axis, index in ((place.point.heads_axis, chosen.heads), (place.point.tokens_axis, queries)):
                if axis is not None and index is not None:
                    part = part.index_select(axis - 1, torch.as_tensor(index, device=part.device))
            self.kept.add(record, reduced(part, place.point, self.reduce))

    def _weighed(self, weights: Weights, point: Point, row: int, queries: Tensor | None, keys: Tensor | None) -> Tensor:
        """Attention weights (H, L, keys), or what is made of them: head by head."""
        heads = range(weights.shape[1]) if self.selection.heads is None else self.selection.heads
        total: Tensor | None = None
        for i, head in enumerate(heads):
            one = weights.of(row, head, queries, keys)
            if self.reduce == "heads":
                total = one if total is None else total.add_(one)
                continue
            made = reduced(one[None], point, self.reduce).to("cpu")
            if total is None:
                total = torch.empty(len(heads) * made.shape[0], *made.shape[1:], dtype=made.dtype)
            total[i * made.shape[0] : (i + 1) * made.shape[0]] = made
        assert total is not None
        return total.div_(len(heads)) if self.reduce == "heads" else total


def capture(
    pipe: Pipeline,
    points: str | Iterable[str],
    steps: Numbers | None = None,
    heads: Numbers | None = None,
    tokens: Tokens | None = None,
    reduce: Reduce | None = None,
    max_bytes: int = MAX_BYTES,
    file: str | Path | None = None,
    *,
    keys: Tokens | None = None,
    texts: str | Iterable[str] | None = None,
) -> Capture:
    """Keep values of the pictures that are drawn in this `with`, by this pipeline and in this thread.

    Args:
        points: names or patterns, see `points`.
        steps: of a run, from 0; None for all. Also img2img counts them from the beginning of the whole schedule.
        heads: None for all.
        tokens: `text`, `image`, `reference`, or places along the axis of a point; of attention weights those that ask.
        reduce: `mean` over tokens, `heads` (the mean over heads), `norm` over channels, or a function of the value of
            one picture. Of attention weights a function is given one head at a time, (1, queries, keys), and what it
            makes of each is put one after the other.
        max_bytes: what is held in memory, beside one value. When more comes all goes into a file.
        file: where to: then it is written from the first value on, as safetensors, and gets its name at the end. None
            for a temporary one, which goes when nobody asks any more.
        keys: of attention weights, as tokens.
        texts: `positive`, `negative` ...; None for all that the network is called for.

    Returns:
        A context manager that gives `Kept`. Its `planned(prompt, ...)` says how large it will be.

    Raises:
        InputError: an unknown point, or a selection that it has not. What only a picture decides (steps, places, a
            bound below one value) is told when the network is about to be called.
        OutputError: the place of the file cannot be written to.
    """
    chosen = all_points(pipe).select(points)
    selection = Selection.of(chosen, steps, texts, heads, tokens, keys)
    check_reduce(reduce, chosen)
    path = None if file is None else checked_output(file, (".safetensors",))
    kept = Kept(whole("max_bytes", max_bytes, 1), path, selection.whole and reduce is None)
    return Capture(pipe, chosen, selection, reduce, kept)
