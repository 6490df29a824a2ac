"""Looking inside: a picture of the history is drawn once more, what its words and patches look at is kept, and shown.

Two kinds of numbers are kept, both of attention from image tokens to all there is: for every word a map of each step
and block; and what each patch looks at, the mean over all that was seen. This module is imported when somebody looks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from miniflux.apps.ui import form
from miniflux.apps.ui.recording import Recording
from miniflux.apps.ui.routes import as_url
from miniflux.apps.ui.site import Site
from miniflux.checks import check_number, shown, whole
from miniflux.errors import InputError
from miniflux.pipeline import Pipeline
from miniflux.result import Result
from miniflux.sampling.observing import Call, observed
from miniflux.service import Entry, Job
from miniflux.service.queue import Step
from miniflux.settings import Request
from miniflux.study.mapping.attention import AttentionWatch
from miniflux.study.mapping.maps import Array, Gathering, Layout, Maps, blocks_for
from miniflux.study.mapping.overlays import overlay
from miniflux.study.mapping.words import Word, find, words_in

MAP_BYTES = 2**27  # of the maps of words in one recording: where all steps would take more, only every so many is kept
PATCHES = 4096  # of a picture, at most, for which it is kept what each of them looks at: 64 MiB
LARGE, SMALL = 512, 96  # pixels of the longer side of what is shown
THE_PICTURE, THE_REFERENCES, THE_REST = "the picture", "the references", "everything else"


def look(site: Site, session: str, entry: Entry) -> Job:
    """Put into line that a picture of the history is drawn once more; what is seen then is kept for the session.

    Raises:
        InputError: it is the sheet of a grid, or its prompt has no words; or as of `Site.submit`.
    """
    if entry.title.startswith("grid: "):
        raise InputError("a grid is several pictures: draw the one to look into by itself")
    if not words_in(entry.request.prompt):
        raise InputError("the prompt of this picture has no words that could be looked for in it")
    seen: list[Recording] = []

    def draw(request: Request, step: Step) -> Result:
        with site.models.use(request) as pipe:  # the one that draws, whoever else loads what meanwhile
            eye = Eye(pipe, request.prompt)
            with observed(eye):
                result = site.models.draw(request, step)
        seen.append(eye.recording(entry, result))
        return result

    def deliver(job: Job, which: int, result: Result) -> None:
        site.keep_recording(session, seen.pop())

    return site.submit(
        session, [entry.request], f"Looking inside: {form.caption(entry.request)}", deliver=deliver, draw=draw
    )


class Shares(Gathering):
    """Gathers the maps of the first `words` names by step and block, and of all names a mean.

    Attributes:
        words: how many names are words; set before the first call of the network.
        steps: how many the run has.
    """

    words = steps = 0

    def __init__(self, blocks: tuple[str, ...]) -> None:
        super().__init__(blocks, None)
        self.total, self.count = torch.zeros(()), 0

    def fit(self, call: Call, places: int) -> None:
        """Choose steps so that the maps take no more memory than they may; to be called before the first of them.

        Raises:
            InputError: those of one step are too large.
        """
        each, left = 4 * self.words * len(self.blocks) * places, call.steps - call.step
        most = MAP_BYTES // each
        if not most:
            raise InputError(
                f"the maps of {self.words} words in {len(self.blocks)} blocks and {places} patches take {each} bytes a "
                f"step, and {MAP_BYTES} are the most that is kept: look into a smaller picture or a shorter prompt"
            )
        self.steps = left
        self.wanted = list(range(call.step, call.steps, math.ceil(left / most)))

    def add(self, step: int, block: str, values: Tensor) -> None:
        super().add(step, block, values[: self.words])
        self.total = self.total + values[:, 0].flatten(1).float().cpu()
        self.count += 1


class Eye(AttentionWatch):
    """Sees what every patch looks at: at each word, at each patch, at the references.

    Raises:
        InputError: the prompt has no word that is read.
    """

    def __init__(self, pipe: Pipeline, prompt: str) -> None:
        self.found: list[Word] = []
        self.unread: list[str] = []
        self.references = 0
        for name in words_in(prompt):
            try:
                self.found += find(pipe.text, prompt, [name])
            except InputError:
                self.unread.append(name)
        if not self.found:
            raise InputError(f"no word of the prompt has a token of its own: {', '.join(self.unread)}")
        names = [word.name for word in self.found]
        super().__init__(
            pipe, "attention of patches", names, self._groups, on=0, looking=False, blocks=None, steps=None, heads=None
        )
        self.shares = self.gathered = Shares(blocks_for(pipe.transformer.config, None))
        self.shares.words = len(names)

    def calling(self, call: Call) -> None:
        if not self.shares.steps:
            self.shares.fit(call, Layout.of(call.told).grid(0).size)
        super().calling(call)

    def _groups(self, layout: Layout) -> list[list[int]]:
        """Tokens of words, of patches, of each reference; none of a word that is cut off."""
        words: list[list[int]] = []
        for word in self.found:
            try:
                words.append(word.places(layout.text))
            except InputError:
                words.append([])
                if word.name not in self.unread:
                    self.unread.append(word.name)
        self.references = len(layout.grids) - 1
        own: list[int] = layout.tokens(0).tolist()
        patches = [[place] for place in own] if len(own) <= PATCHES else [own]
        return [*words, *patches, *(layout.tokens(i).tolist() for i in range(1, len(layout.grids)))]

    def recording(self, entry: Entry, result: Result) -> Recording:
        """All that was seen, once the picture is drawn.

        Raises:
            InputError: nothing was: a step cache left out all blocks; or no word is read.
        """
        maps = self.maps(result)
        cut = [maps.names.index(name) for name in self.unread if name in maps.names]
        kept = [i for i in range(len(maps.names)) if i not in cut]
        if not kept:
            raise InputError("no word of the prompt is read: all are behind the end of what the model reads")
        shares = np.delete((self.shares.total / self.shares.count).numpy(), cut, axis=0)
        maps = Maps(
            maps.kind,
            tuple(maps.names[i] for i in kept),
            maps.steps,
            maps.blocks,
            (),
            maps.values[kept] if cut else maps.values,
            result,
            maps.canvas,
        )
        return Recording(
            entry.id,
            form.caption(entry.request),
            maps,
            shares,
            self.references,
            tuple(self.unread),
            self.shares.steps,
        )


def view(recording: Recording, word: Any = None, step: Any = None, block: Any = None, at: Any = None) -> dict[str, Any]:
    """What the page shows of a recording, ready to be shown.

    Args:
        word: whose map; None for the first.
        step, block: of which; None for the mean over all.
        at: (x, y) of a place of the picture, shares of its width and height, whose patch is shown as well; or None.

    Raises:
        InputError: one of them is not there, or a step cache left out that block in that step.
    """
    maps = recording.maps
    word = maps.names[0] if word is None else word
    steps = None if step is None else [whole("a step", step, 0)]
    blocks = None if block is None else [str(block)]
    over = Painter(maps)
    mean = maps.of(str(word), steps=steps, blocks=blocks)
    by_step, by_block = maps.by_step(str(word), blocks), maps.by_block(str(word), steps)
    return {
        "id": recording.id,
        "caption": recording.caption,
        "about": recording.about(),
        "words": list(maps.names),
        "word": word,
        "step": step,
        "block": block,
        "map": over.url(mean),
        "steps": [
            {"name": name, "label": f"step {name}", "map": over.url(one, SMALL)}
            for name, one in zip(maps.steps, by_step, strict=True)
        ],
        "blocks": [
            {"name": name, "label": _short(name), "map": over.url(one, SMALL)}
            for name, one in zip(maps.blocks, by_block, strict=True)
        ],
        "patch": None if at is None else _patch(recording, over, at),
    }


def _patch(recording: Recording, over: Painter, at: Any) -> dict[str, Any]:
    """What the patch at a place looks at: a map, if the picture is not too large, and words by their shares."""
    maps, (rows, columns) = recording.maps, recording.grid
    if not isinstance(at, list | tuple) or len(at) != 2:
        raise InputError(f"a place of the picture must be (x, y), got {shown(at)}")
    places: list[int] = []
    box: list[float] = []
    for name, share, pixels, whole_side, count in zip(
        "xy", at, maps.image.size, maps.canvas, (columns, rows), strict=True
    ):
        share, margin = check_number(name, share, 0, 1), (whole_side - pixels) // 2
        place = min(count - 1, int((margin + share * pixels) / whole_side * count))
        places.append(place)
        box += [(place * whole_side / count - margin) / pixels, whole_side / count / pixels]
    left, width, top, height = box
    column, row = places
    seen, count = recording.shares[:, row * columns + column], len(maps.names)
    picture, references = np.split(seen[count:], [len(seen) - count - recording.references])
    found = sorted(zip(maps.names, seen[:count].tolist(), strict=True), key=lambda one: -one[1])
    rest = [(THE_PICTURE, float(picture.sum()))]
    if recording.references:
        rest.append((THE_REFERENCES, float(references.sum())))
    rest.append((THE_REST, max(0.0, 1.0 - float(seen.sum()))))
    known = len(picture) == rows * columns
    frame = (left, top, left + width, top + height)
    return {
        "row": row,
        "column": column,
        "box": [left, top, width, height],
        "map": over.url(picture.reshape(rows, columns), frame=frame) if known else None,
        "words": found,
        "rest": rest,
    }


class Painter:
    """Lays maps over the picture, in the sizes that are shown."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps
        self._sized: dict[int, tuple[Image.Image, tuple[int, int]]] = {}

    def url(self, values: Array, side: int = LARGE, frame: tuple[float, float, float, float] | None = None) -> str:
        """A map (rows, columns) over the picture, as an address that holds it.

        Args:
            side: pixels of the longer side.
            frame: left, top, right, bottom of what is framed, in shares of width and height.
        """
        image, canvas = self._at(side)
        laid = overlay(image, values, canvas=canvas)
        if frame is not None:
            corners = [share * pixels for share, pixels in zip(frame, (*laid.size, *laid.size), strict=True)]
            ImageDraw.Draw(laid).rectangle(corners, outline="white", width=3)
        found = as_url(laid)
        assert found is not None
        return found

    def _at(self, side: int) -> tuple[Image.Image, tuple[int, int]]:
        """The picture, its longer side so many pixels, and what maps cover, as much larger than it as ever."""
        if side not in self._sized:
            image = self.maps.image.convert("RGB")
            factor = side / max(image.size)
            width, height = (max(1, round(pixels * factor)) for pixels in image.size)
            across, down = self.maps.canvas
            canvas = max(width, round(across * factor)), max(height, round(down * factor))
            if self.maps.canvas == image.size:
                canvas = width, height
            self._sized[side] = image.resize((width, height), Image.Resampling.BICUBIC), canvas
        return self._sized[side]


def _short(block: str) -> str:
    """`double_blocks.3` -> `double 3`."""
    kind, _, number = block.rpartition(".")
    return f"{kind.removesuffix('_blocks')} {number}"
