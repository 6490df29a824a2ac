"""How well maps find what they are of, measured on nano: its scenes are known, so a map can be right or wrong.

For every prompt a picture is drawn, the object is found in the picture itself by its colour (nano chooses places within
bounds of its own), and a map of it is compared with that: the intersection over the union, of pixels. What of a map
counts as inside is decided by a threshold that knows nothing of the truth.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from PIL import Image

from miniflux.arguments import MAX_IMAGES
from miniflux.checks import whole
from miniflux.errors import InputError
from miniflux.nano import scenes
from miniflux.nano.recipe.adherence import judge
from miniflux.pipeline import Pipeline
from miniflux.result import Result
from miniflux.sampling.observing import observed
from miniflux.study.mapping.attention import Direction, word_watch
from miniflux.study.mapping.concepts import ConceptWatch, Pieces, Space, read
from miniflux.study.mapping.maps import Array, Maps, blocks_for
from miniflux.study.mapping.words import words_in

BINS = 256  # of the histogram for Otsu's threshold
FORMS = ("map", "contrast")
UNSEEN = 20_011  # a seed of scenes that no other program of the project draws with

Mask = np.ndarray[tuple[int, int], np.dtype[np.bool_]]


def otsu(values: Array) -> float:
    """The threshold that parts numbers into two groups whose means are furthest apart, each weighed by its size (Otsu
    1979, "A threshold selection method from gray-level histograms"); of numbers that are all the same, that one."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low
    counts, edges = np.histogram(values, BINS, (low, high))
    middles, shares = (edges[:-1] + edges[1:]) / 2, counts / counts.sum()
    below, sums = shares.cumsum(), (shares * middles).cumsum()
    between = (sums[-1] * below - sums) ** 2 / np.maximum(below * (1 - below), 1e-12)
    return float(edges[1:][between[:-1].argmax()])


def half(values: Array) -> float:
    """Halfway from the median to the largest number."""
    return float((np.median(values) + values.max()) / 2)


RULES = {"otsu": otsu, "half": half}
"""What of a map counts as inside: all above a threshold, that is found without looking at the truth."""


def inside(values: Array, width: int, height: int, rule: str = "half") -> Mask:
    """What of a map (rows, columns) is inside, in pixels (height, width); the map is enlarged first, bicubic."""
    large = np.asarray(Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
    return large > RULES[rule](large)


def iou(found: Mask, true: Mask) -> float:
    """Intersection over union, 0 to 1."""
    return float((found & true).sum() / max(1, (found | true).sum()))


def where(image: Image.Image, scene: scenes.Scene, number: int = 0) -> Mask:
    """The pixels of an object of a scene (height, width): those that are nearer to its colour than to any other of the
    scene. Colours are known, places are not."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    names = [shape.colour for shape in scene.shapes] + [scene.background]
    colours = np.array([scenes.PALETTE[name] for name in names], np.float32)
    return np.linalg.norm(pixels[:, :, None] - colours, axis=-1).argmin(axis=-1) == number


def unseen(count: int, seed: int = UNSEEN) -> list[scenes.Scene]:
    """Scenes with one and with two objects by turns."""
    rng = random.Random(seed)
    return [(scenes.two_objects if i % 2 else scenes.one_object)(rng) for i in range(count)]


@dataclass(frozen=True)
class Candidate:
    """A way to make a map of the first object of a scene.

    Attributes:
        watch: `image_to_text`, `text_to_image`, `output` or `query_key`.
        said: what it is a map of: `circle`, `red circle`, or as a concept `a red circle`.
        form: the map itself, or its contrast to that of the background (concepts alone).
        blocks: `double_blocks`, `single_blocks`, `all blocks`, or a block's name.
        steps: `all steps` or `last quarter`.
    """

    watch: str
    said: str
    form: str
    blocks: str
    steps: str

    def __str__(self) -> str:
        contrast = ", against the background" if self.form == "contrast" else ""
        return f"{self.watch}, {self.said!r}{contrast}, {self.blocks}, {self.steps}"

    def make(self, seen: Seen) -> Array:
        """The map (rows, columns)."""
        maps, name = seen[self.watch, self.said]
        blocks = [name for name in maps.blocks if self.blocks in ("all blocks", name, name.rpartition(".")[0])]
        steps = maps.steps if self.steps == "all steps" else maps.steps[-max(1, len(maps.steps) // 4) :]
        return (maps.contrast if self.form == "contrast" else maps.of)(name, steps=steps, blocks=blocks)


Seen = dict[tuple[str, str], tuple[Maps, str]]
"""By what watched and what was said: maps, and the name of the object's among them."""


def candidates(pipe: Pipeline) -> list[Candidate]:
    """All that are measured: attention in both directions, concepts in both spaces, in kinds of blocks and in the last
    block, over all steps and over the last quarter of them."""
    names = blocks_for(pipe.transformer.config, None)
    kinds = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    blocks = [*kinds, *(["all blocks"] if len(kinds) > 1 else []), names[-1]]
    words = [(way, said, "map") for way in get_args(Direction) for said in ("circle", "red circle")]
    concepts = [
        (space, said, form) for space in get_args(Space) for said in ("circle", "a red circle") for form in FORMS
    ]
    return [
        Candidate(*what, where, when)
        for what in (*words, *concepts)
        for where in blocks
        for when in ("all steps", "last quarter")
    ]


@dataclass(frozen=True)
class Score:
    """How well a candidate finds objects: the mean IoU over all pictures, with each of `RULES`."""

    candidate: Candidate
    means: dict[str, float]

    @property
    def best(self) -> float:
        return max(self.means.values())


@dataclass(frozen=True)
class Scores:
    """What was measured.

    Attributes:
        pictures: how many there are; `right` of them show what was asked for, and the others count as well.
        perfect: mean IoU of the truth itself, brought to one number for every token, and back.
        each: of every candidate, the best first.
    """

    pictures: int
    right: int
    perfect: dict[str, float]
    each: tuple[Score, ...]

    def __str__(self) -> str:
        def row(means: dict[str, float], name: object) -> str:
            return "  ".join([*(f"{means[rule]:.3f}" for rule in RULES), str(name)])

        lines = [
            f"{self.pictures} pictures, {self.right} as asked",
            "  ".join([*(f"{rule:5}" for rule in RULES), "map"]),
        ]
        return "\n".join([*lines, row(self.perfect, "a perfect map"), *(row(s.means, s.candidate) for s in self.each)])


def measure(pipe: Pipeline, count: int = 100, chosen: Sequence[Candidate] | None = None, **asked: Any) -> Scores:
    """Score candidates on unseen scenes, by the map of the first object.

    Args:
        count: how many pictures; picture i is drawn with seed i.
        chosen: which candidates; None for all of `candidates`.
        asked: width and height of the pictures, in pixels; the model's own unless given.

    Raises:
        InputError: there is no picture or no candidate.
    """
    whole("prompts", count, 1, MAX_IMAGES)
    chosen = candidates(pipe) if chosen is None else chosen
    if not chosen:
        raise InputError("chosen must be at least one candidate, got none")
    sums = np.zeros((len(chosen), len(RULES)))
    perfect, right = np.zeros(len(RULES)), 0
    for i, scene in enumerate(unseen(count)):
        result, seen = _seen(pipe, scene, chosen, seed=i, **asked)
        image = result.images[0]
        right += judge(image, scene).all
        true = where(image, scene)
        rows, columns = next(iter(seen.values()))[0].values.shape[-2:]
        tokens = np.asarray(Image.fromarray(true.astype(np.float32)).resize((columns, rows), Image.Resampling.BOX))
        for j, rule in enumerate(RULES):
            perfect[j] += iou(inside(tokens, *image.size, rule), true)
            for n, one in enumerate(chosen):
                sums[n, j] += iou(inside(one.make(seen), *image.size, rule), true)
    scores = [
        Score(one, dict(zip(RULES, map(float, row), strict=True)))
        for one, row in zip(chosen, sums / count, strict=True)
    ]
    ordered = tuple(sorted(scores, key=lambda score: -score.best))
    return Scores(count, right, dict(zip(RULES, map(float, perfect / count), strict=True)), ordered)


def _seen(pipe: Pipeline, scene: scenes.Scene, chosen: Sequence[Candidate], **asked: Any) -> tuple[Result, Seen]:
    """A scene drawn, with all maps of its first object that are needed, of one run."""
    first, caption = scene.shapes[0], scene.caption
    kind = next(word for word in words_in(caption) if word.partition(":")[0] == first.kind)
    words = [kind, f"{first.colour} {first.kind}"]
    said: dict[str, tuple[list[str], Pieces]] = {
        "circle": ([first.kind, "background"], "one"),
        "a red circle": ([f"a {first.colour} {first.kind}", f"a {scene.background} background"], "all"),
    }
    needed = {one.watch for one in chosen}, {one.said for one in chosen if one.watch in get_args(Space)}
    ways = [way for way in get_args(Direction) if way in needed[0]]
    attention = {way: word_watch(pipe, caption, words, direction=way) for way in ways}
    read_ones = {name: read(pipe, *these) for name, these in said.items() if name in needed[1]}
    concepts = {name: ConceptWatch(pipe, these, spaces=get_args(Space)) for name, these in read_ones.items()}
    with ExitStack() as stack:
        for watch in (*attention.values(), *concepts.values()):
            stack.enter_context(observed(watch))
        result = pipe.generate(caption, **asked)
    seen: Seen = {}
    for way, watch in attention.items():
        maps = watch.maps(result)
        seen |= {(way, name): (maps, word) for name, word in zip(("circle", "red circle"), words, strict=True)}
    for name, watch in concepts.items():
        seen |= {(space, name): (watch.maps(result, space), said[name][0][0]) for space in get_args(Space)}
    return result, seen
