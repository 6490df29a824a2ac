"""Attention maps: how much pixels look at a word, words at pixels, and pixels at pixels, in double and single blocks.

    maps = attention_maps(pipe, "a red circle on a blue background", ["circle"], seed=3)
    maps["circle"]                                  # (rows, columns)

A map is a part of softmax(q k^T / sqrt(D)), over all keys there are: the text, the picture and its references. That
matrix is never whole: it is computed in float32 beside the attention of the network, for a few queries at a time, and
only what a map needs is kept. Letters in shapes: H heads, L tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from miniflux.checks import several, shown, whole
from miniflux.errors import InputError
from miniflux.models.compiling import is_compiled
from miniflux.models.flux1 import RunBlock
from miniflux.models.layers import Attend, rotated
from miniflux.pipeline import Pipeline
from miniflux.sampling.observing import Call, observed
from miniflux.study.mapping.maps import Gathering, Layout, Maps, blocks_for
from miniflux.study.mapping.words import find

Direction = Literal["image_to_text", "text_to_image"]
"""Who looks at whom: rows of the softmax are those of the first, columns of the second.

image_to_text: of all that a pixel looks at, the share that this word has (summed over its tokens).
text_to_image: of all that this word looks at, the share that a pixel has (the mean over its tokens).
"""

PatchDirection = Literal["from_patch", "to_patch"]
"""from_patch: what a patch looks at; to_patch: who looks at it."""

MOST = 2**22  # numbers of the matrix that there are at once, of float32: 16 MB


@dataclass(frozen=True)
class Groups:
    """Tokens in groups.

    Attributes:
        index: places of the tokens in the sequence; group: the group of each.
        count: how many groups there are.
    """

    index: Tensor
    group: Tensor
    count: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]]) -> Groups:
        """Of lists of places."""
        index = torch.tensor([place for group in groups for place in group])
        return cls(index, torch.tensor([i for i, group in enumerate(groups) for _ in group]), len(groups))

    @classmethod
    def each(cls, index: Tensor) -> Groups:
        """Every token by itself."""
        return cls(index, torch.arange(len(index)), len(index))

    def on(self, device: torch.device) -> Groups:
        return Groups(self.index.to(device), self.group.to(device), self.count)


def attention_between(
    q: Tensor,
    k: Tensor,
    queries: Groups,
    keys: Groups,
    mask: Tensor | None = None,
    heads: Sequence[int] | None = None,
    most: int = MOST,
) -> Tensor:
    """Rows and columns of softmax(q k^T / sqrt(D)), the mean over the queries of a group and the sum over its keys.

    Args:
        q, k: (H, L, D), rotated; there may be fewer queries than keys, which are then those of the last places.
        queries, keys: their places among the queries, and among the keys.
        mask: (L,) booleans, False for keys nobody looks at.
        heads: which are kept apart; None for the mean over all.
        most: numbers of the matrix that may be there at once; a row is the least.

    Returns:
        (heads or 1, groups of queries, groups of keys), float32.
    """
    queries, keys = queries.on(q.device), keys.on(q.device)
    sizes = torch.bincount(queries.group, minlength=queries.count).float()
    chosen, rows = list(range(len(q)) if heads is None else heads), max(1, most // k.shape[1])
    found = torch.zeros(len(chosen), queries.count, keys.count, device=q.device)
    several = max(1, rows // len(queries.index))  # heads whose rows all are there at once; of one head, maybe not all
    for first in range(0, len(chosen), several):
        some = chosen[first : first + several]
        into, towards = found[first : first + several], k[some].float().transpose(1, 2)
        for start in range(0, len(queries.index), rows):
            part = slice(start, start + rows)
            scores = q[some][:, queries.index[part]].float() @ towards * q.shape[-1] ** -0.5
            if mask is not None:
                scores.masked_fill_(~mask, -torch.inf)
            weights = scores.softmax(dim=-1)[..., keys.index]
            summed = weights.new_zeros(*weights.shape[:2], keys.count).index_add_(2, keys.group, weights)
            into.index_add_(1, queries.group[part], summed)
    found /= sizes[:, None]
    return found.mean(dim=0, keepdim=True) if heads is None else found


class AttentionWatch:
    """Sees the attention of a run, and keeps maps of it; for `sampling.observing.observed`, beside others.

    Args:
        spots: of a layout, the places of the tokens of each name.
        on: what the maps lie on: 0 the picture, 1 the first reference ...
        looking: whether the names look and the places of the map are looked at, or the other way round.
    """

    alters: str | None = None

    def __init__(
        self,
        pipe: Pipeline,
        kind: str,
        names: Sequence[str],
        spots: Callable[[Layout], list[list[int]]],
        *,
        on: int,
        looking: bool,
        blocks: Sequence[str] | None,
        steps: Sequence[int] | None,
        heads: Sequence[int] | None,
        most: int = MOST,
    ) -> None:
        config, unit = pipe.transformer.config, pipe.autoencoder.config.unit
        check_inside(pipe)
        self.gathered = Gathering(blocks_for(config, blocks), steps)
        self.kind, self.names, self.unit, self.most = kind, tuple(names), unit, most
        self.heads = None if heads is None else [whole("a head", head, 0, config.num_heads - 1) for head in heads]
        if self.heads is not None and not self.heads:
            raise InputError("heads must be a list of at least one number, got an empty one; None for the mean of all")
        self.spots, self.on, self.looking = spots, whole("on", on, 0), looking
        self.step: int | None = None
        self.row = 0

    def began(self, pictures: Sequence[int]) -> None:
        only_one(pictures)

    def calling(self, call: Call) -> None:
        self.step = call.step if self.gathered.wants(call) else None
        if self.step is None:
            return
        self.row = call.told.texts.index("positive")
        layout = Layout.of(call.told)
        self.layout, self.grid = layout, layout.grid(self.on)
        names, places = Groups.of(self.spots(layout)), Groups.each(layout.tokens(self.on))
        self.queries, self.keys = (names, places) if self.looking else (places, names)

    def wrap(self, run: RunBlock) -> RunBlock:
        def beside(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
            if self.step is None or name not in self.gathered.blocks:
                return run(name, block, streams, context)
            return run(name, block, streams, (*context[:-1], self._seeing(name, context[-1])))

        return beside

    def _seeing(self, name: str, attend: Attend) -> Attend:
        def see(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
            self._see(name, q, k, v, pe, mask)
            return attend(q, k, v, pe, mask)

        return see

    def _see(self, name: str, q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None) -> None:
        row = slice(self.row, self.row + 1)
        q, k = rotated(q[row], k[row], v[row], pe[row] if len(pe) > 1 else pe)
        seen = None if mask is None else mask[self.row if len(mask) > 1 else 0, 0, 0]
        before = k.shape[2] - q.shape[2]  # keys of references that are looked at once stand in front
        keys = Groups(self.keys.index + before, self.keys.group, self.keys.count)
        weights = attention_between(q[0], k[0], self.queries, keys, seen, self.heads, self.most)
        weights = weights if self.looking else weights.transpose(1, 2)
        assert self.step is not None
        self.gathered.add(self.step, name, weights.transpose(0, 1).unflatten(-1, (self.grid.rows, self.grid.columns)))

    def maps(self, result: Any) -> Maps:
        """All that was seen, once the picture is drawn; errors as of `Gathering.values`."""
        seen, canvas = self.gathered, (self.grid.columns * self.unit, self.grid.rows * self.unit)
        heads, values = tuple(self.heads or ()), seen.values()
        return Maps(self.kind, self.names, tuple(seen.ran), seen.blocks, heads, values, result, canvas, self.on)


def check_inside(pipe: Pipeline) -> None:
    """Raises InputError if blocks are compiled: they have no inside."""
    if is_compiled(pipe.transformer):
        raise InputError("compiled blocks have no inside that could be looked at: load the model without compile")


def only_one(pictures: Sequence[int]) -> None:
    """Raises InputError unless it is the first picture of a call, alone."""
    if list(pictures) != [0]:
        raise InputError("maps are of one picture at a time: draw each in a call of its own, with its own seed")


def word_watch(
    pipe: Pipeline,
    prompt: str,
    words: Sequence[str],
    *,
    direction: Direction = "image_to_text",
    on: int = 0,
    blocks: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> AttentionWatch:
    """What `attention_maps` sees with, for several kinds of maps of one run; arguments and errors as there."""
    if direction not in get_args(Direction):
        raise InputError(f"direction must be one of {', '.join(get_args(Direction))}, got {shown(direction)}")
    found = find(pipe.text, one_prompt(prompt), words)
    return AttentionWatch(
        pipe,
        f"attention, {direction}",
        [word.name for word in found],
        lambda layout: [word.places(layout.text) for word in found],
        on=on,
        looking=direction == "text_to_image",
        blocks=blocks,
        steps=steps,
        heads=heads,
    )


def one_prompt(prompt: Any) -> str:
    """Raises InputError unless it is one text."""
    if not isinstance(prompt, str):
        raise InputError(f"maps are of one picture at a time: the prompt must be one text, got {shown(prompt)}")
    return prompt


def attention_maps(
    pipe: Pipeline,
    prompt: str,
    words: Sequence[str],
    *,
    direction: Direction = "image_to_text",
    on: int = 0,
    blocks: Sequence[str] | None = None,
    at_steps: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    **asked: Any,
) -> Maps:
    """Draw a picture, and see where words of its prompt are in it. The picture is the same, bit for bit.

    Args:
        words: see `words.find`: each as it stands in the prompt; of two "red" the second is "red:2".
        direction: who looks at whom, see `Direction`.
        on: what the maps lie on: 0 the picture, 1 the first reference ...
        blocks: names of blocks or of kinds of them, see `blocks_for`; None for all in which text and picture meet.
        at_steps: which steps count, from 0; None for all.
        heads: which are kept apart; None to keep the mean over all. Memory: 4 bytes for every word, step, block, head
            and image token.
        asked: all else, as of `Pipeline.generate`, for one picture.

    Returns:
        (N words, S, K, H or 1, rows, columns); the sum over all words and pixels that are looked at is 1.

    Raises:
        InputError: a word is not in the prompt or was cut off, there is no such block, step, head or reference, more
            than one picture is asked for, a step cache left out all of the blocks, or as of `generate`.
    """
    check_single(asked)
    watch = word_watch(pipe, prompt, words, direction=direction, on=on, blocks=blocks, steps=at_steps, heads=heads)
    with observed(watch):
        result = pipe.generate(prompt, **asked)
    return watch.maps(result)


def patch_maps(
    pipe: Pipeline,
    prompt: str,
    patches: Sequence[tuple[int, int]],
    *,
    of: int = 0,
    on: int = 0,
    direction: PatchDirection = "from_patch",
    blocks: Sequence[str] | None = None,
    at_steps: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    **asked: Any,
) -> Maps:
    """Draw a picture, and see what patches of it look at, in itself or in a reference, or who looks at them.

    Args:
        patches: (row, column) of image tokens, of 16 x 16 pixels each. The maps are named so: "3,4".
        of: what they are patches of: 0 the picture, 1 the first reference ...
        on: what the maps lie on, likewise.
        direction: see `PatchDirection`.
        blocks, at_steps, heads, asked: as of `attention_maps`.

    Raises:
        InputError: a patch lies outside, or as of `attention_maps`.
    """
    check_single(asked)
    if direction not in get_args(PatchDirection):
        raise InputError(f"direction must be one of {', '.join(get_args(PatchDirection))}, got {shown(direction)}")
    if isinstance(patches, str) or not len(patches):
        raise InputError(f"patches must be a list of at least one (row, column), got {shown(patches)}")
    chosen = [several("a patch", patch, "row, column") for patch in patches]
    of = whole("of", of, 0)

    def spots(layout: Layout) -> list[list[int]]:
        grid = layout.grid(of)
        for row, column in chosen:
            whole("the row of a patch", row, 0, grid.rows - 1)
            whole("the column of a patch", column, 0, grid.columns - 1)
        return [[layout.text + grid.start + row * grid.columns + column] for row, column in chosen]

    watch = AttentionWatch(
        pipe,
        f"attention, {direction}",
        [f"{row},{column}" for row, column in chosen],
        spots,
        on=on,
        looking=direction == "from_patch",
        blocks=blocks,
        steps=at_steps,
        heads=heads,
    )
    with observed(watch):
        result = pipe.generate(one_prompt(prompt), **asked)
    return watch.maps(result)


def check_single(asked: dict[str, Any]) -> None:
    """Raises InputError if more than one picture is asked for."""
    if asked.get("images", 1) != 1:
        raise InputError(f"maps are of one picture at a time, got images={shown(asked['images'])}")
