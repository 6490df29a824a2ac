"""How large a capture gets, known before a picture is drawn: the run is rehearsed with a network that answers zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from miniflux.errors import InputError
from miniflux.models.flux1 import RunBlock
from miniflux.pipeline import Pipeline
from miniflux.plan import Plan
from miniflux.sampling import Told, Words, denoise
from miniflux.sampling.observing import Call
from miniflux.study.values.point import Point, Points
from miniflux.study.values.selecting import Reduce, Selection, reduced

Lengths = Mapping[str, int]


@dataclass(frozen=True)
class Planned:
    """What a capture will keep.

    Attributes:
        values: how many, of all pictures.
        bytes: all of them.
        largest: bytes of the largest one.
    """

    values: int
    bytes: int
    largest: int

    def __str__(self) -> str:
        return f"{self.values} values, {self.bytes:,} bytes in all, {self.largest:,} the largest"


class _Counting:
    """An observer that notes the calls of the network."""

    alters = None

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def began(self, pictures: Sequence[int]) -> None:
        """There are none."""

    def calling(self, call: Call) -> None:
        self.calls.append(call)

    def wrap(self, run: RunBlock) -> RunBlock:
        return run


def planned(
    pipe: Pipeline,
    points: Points,
    selection: Selection,
    reduce: Reduce | None,
    prompt: str | Iterable[str],
    **asked: Any,
) -> Planned:
    """See `Capture.planned`. Of text encoders and autoencoders it knows nothing.

    Raises:
        InputError: as of `generate`; a point outside of the transformer, whose calls are not planned; a function whose
            result has a size that only numbers decide.
    """
    outside = [point.name for point in points if point.network != "transformer"]
    if outside:
        raise InputError(f"how often {outside[0]} is computed is not known before: plan for the transformer's points")
    plan = Plan.of(pipe.as_it_is(), prompt, **asked)
    calls = _calls(pipe, plan)
    references = sum(condition.tokens(plan.rows, plan.columns) for condition in plan.conditions)
    values = total = most = 0
    for i in range(plan.total):
        text = text_tokens(pipe, plan, plan.prompts[i // plan.images])
        parts = {"text": text, "image": plan.rows * plan.columns, "reference": 0 if plan.once else references}
        sizes = {point.name: _size(pipe, point, points, selection, reduce, parts) for point in points}
        for call in calls:
            if selection.steps is not None and call.step not in selection.steps:
                continue
            texts = [text for text in call.told.texts if selection.texts is None or text in selection.texts]
            for point in points:
                if point.only_with_references and not parts["reference"]:
                    continue
                values += len(texts) * point.times
                total += len(texts) * point.times * sizes[point.name]
                most = max(most, sizes[point.name])
    return Planned(values, total, most)


def largest(
    pipe: Pipeline, points: Points, selection: Selection, reduce: Reduce | None, parts: Lengths
) -> tuple[str, int]:
    """The point with the largest value, and its bytes, where tokens are so many."""
    inside = [point for point in points if point.network == "transformer"]
    known = [point for point in inside if parts["reference"] or not point.only_with_references]
    sizes = [(point.name, _size(pipe, point, points, selection, reduce, parts)) for point in known]
    return max(sizes, key=lambda each: each[1], default=("", 0))


def shape_of(point: Point, sizes: Mapping[str, int], parts: Lengths) -> tuple[int, ...]:
    """The shape of the value of one picture, in numbers."""
    tokens = sum(parts[part] for part in point.tokens)
    shape = [_measured(letters, {**sizes, "keys": tokens}) for letters in point.shape[1:] if letters[0] not in "TLR"]
    if point.tokens_axis is not None:
        shape.insert(point.tokens_axis - 1, tokens)
    return tuple(shape)


def _measured(letters: str, sizes: Mapping[str, int]) -> int:
    """`3*hidden+2*mlp` as a number."""
    terms = (term.split("*") for term in letters.split("+"))
    return sum(prod(int(x) if x.isdigit() else sizes[x] for x in term) for term in terms)


def _size(
    pipe: Pipeline, point: Point, points: Points, selection: Selection, reduce: Reduce | None, parts: Lengths
) -> int:
    """Bytes of what is kept of the value of one picture."""
    along = [(part, parts[part]) for part in point.tokens]
    shape = selection.sizes(point, shape_of(point, points.sizes[point.network], parts), along, along)
    dtype, times = torch.float32 if point.float32 else pipe.dtype, 1
    if point.weights and callable(reduce):
        shape, times = (1, *shape[1:]), shape[0]
    try:
        made = reduced(torch.empty(shape, dtype=dtype, device="meta"), point, reduce)
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f"what reduce makes of {point.name} has a size that only numbers decide: {error}") from error
    return times * made.numel() * made.element_size()


def _calls(pipe: Pipeline, plan: Plan) -> list[Call]:
    """The calls of the network for one picture."""
    counting, config = _Counting(), pipe.transformer.config
    ids = torch.zeros(1, 1, len(config.axes_dim))
    words = Words(torch.zeros(1, 1, config.context_in_dim), ids, torch.zeros(1, getattr(config, "vec_in_dim", 1)))

    def still(model: Any, told: Told, **_: Any) -> Tensor:
        return told.img.new_zeros(*told.img.shape[:2], config.out_channels)

    denoise(
        pipe.transformer,
        img=torch.zeros(1, 1, config.out_channels),
        img_ids=ids,
        txt=words,
        timesteps=plan.levels,
        guidance=plan.guidance,
        method=plan.method,
        guide=plan.guide,
        negative=words,
        empty=words,
        resume=plan.resume,
        stop=plan.stop,
        batched=False,
        velocity=still,
        rng=lambda step, x: torch.zeros_like(x),
        observers=[counting],
    )
    return counting.calls


def text_tokens(pipe: Pipeline, plan: Plan, prompt: str) -> int:
    """How many tokens the transformer gets of a prompt."""
    tokenizer: Any = list(pipe.text.tokenizers.values())[-1]
    if plan.chat is not None:
        read = tokenizer([prompt], plan.t5_length)
        return int(read.mask.sum()) if plan.padding == "trimmed" else read.ids.shape[1]
    assert plan.t5_length is not None
    return min(len(tokenizer.tokens(prompt)), plan.t5_length) if plan.padding == "trimmed" else plan.t5_length
