"""Judging edits: does a picture show what the words ask for, and is it the same everywhere else?

`python -m miniflux.nano.recipe.edited fill|kontext [FILE]`. Looks at pixels alone, as `adherence` does: whether the
scene is there, and how far the pixels beside all objects are from those of the picture that was given (PSNR).
"""

from __future__ import annotations

import argparse
import logging
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import miniflux
from miniflux.checkpoints import load_into, open_tensors
from miniflux.conditions import Reference
from miniflux.conditions.masks import grown
from miniflux.models.flux1 import Flux1
from miniflux.nano import scenes
from miniflux.nano.recipe import edits
from miniflux.nano.recipe.adherence import judge
from miniflux.nano.recipe.export import Nano
from miniflux.pipeline import Pipeline

log = logging.getLogger(__name__)

KEPT = 35.0  # dB outside of objects: less is seen as another picture
AROUND = 6  # pixels around an object that belong to it
SIZE = (128, 128)
LARGER = 1.12  # ratio of areas' square roots from which a shape counts as larger


@dataclass(frozen=True)
class Outcome:
    """What became of one edit.

    Attributes:
        right: the scene that was asked for is there.
        kept: PSNR outside of the objects, in dB; infinite where nothing is compared.
    """

    right: bool
    kept: float

    @property
    def good(self) -> bool:
        return self.right and self.kept >= KEPT


def apart(a: Image.Image, b: Image.Image, objects: np.ndarray) -> float:
    """PSNR of two pictures outside of a mask."""
    x, y = (np.asarray(one, float)[~objects] for one in (a, b))
    error = float(np.mean((x - y) ** 2)) if x.size else 0.0
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def covered(*shown: scenes.Scene) -> np.ndarray:
    """Where the objects of scenes are, with a margin."""
    whole = np.zeros(SIZE[::-1], np.float32)
    for scene in shown:
        for shape in scene.shapes:
            whole = np.maximum(whole, np.asarray(scenes.mask(shape, *SIZE), np.float32) / 255)
    return grown(torch.from_numpy(whole), AROUND).numpy() > 0


def _area(image: Image.Image, scene: scenes.Scene) -> float:
    """Pixels that differ from the background."""
    pixels = np.asarray(image, float) - np.asarray(scenes.PALETTE[scene.background], float)
    return float((np.linalg.norm(pixels, axis=-1) > 60).sum())


def judged(edit: edits.Edit, before: Image.Image, drawn: Image.Image) -> Outcome:
    """One instruction."""
    right = judge(drawn, edit.after).all
    if edit.kind == "resize":
        ratio = math.sqrt(_area(drawn, edit.after) / max(1.0, _area(before, edit.before)))
        wanted = edit.after.shapes[0].radius > edit.before.shapes[0].radius
        right = right and (ratio > LARGER if wanted else ratio < 1 / LARGER)
    if edit.kind == "background":
        return Outcome(right, math.inf)
    return Outcome(right, apart(before, drawn, covered(edit.before, edit.after)))


def kontext(pipe: Pipeline, count: int, seed: int, kind: str | None = None) -> list[tuple[edits.Edit, Outcome]]:
    """Instructions that training may have seen, on pictures that it has not."""
    rng, told = random.Random(seed), list[tuple[edits.Edit, Outcome]]()
    for i in range(count):
        edit = edits.edit(rng, kind or list(edits.KINDS)[i % len(edits.KINDS)], held_out=i % 4 == 0)
        before = scenes.render(edit.before, *SIZE)
        steered = [Reference(before)]
        drawn = pipe.generate(edit.words, conditions=steered, seed=i, width=SIZE[0], height=SIZE[1]).images[0]
        told.append((edit, judged(edit, before, drawn)))
    return told


def fill(pipe: Pipeline, count: int, seed: int) -> list[tuple[edits.Hole, Outcome]]:
    """Shapes that are hidden and drawn anew as the words say: another one, or none."""
    rng, told = random.Random(seed), list[tuple[edits.Hole, Outcome]]()
    for i in range(count):
        chosen = ("recolour", "replace", "remove")[i % 3]
        edit = edits.edit(rng, chosen, held_out=chosen != "remove" and i % 2 == 0)
        old = next(shape for shape in edit.before.shapes if shape not in edit.after.shapes)
        new = next((shape for shape in edit.after.shapes if shape not in edit.before.shapes), None)
        hidden = edits.around(old, *SIZE, rng)
        words = f"a {new.colour} {new.kind}" if new else edits.described(edit.after)
        before = scenes.render(edit.before, *SIZE)
        drawn = pipe.generate(words, seed=i, image=before, mask=torch.from_numpy(hidden)).images[0]
        whole = edits.Hole(edit.after, words, hidden)
        told.append((whole, Outcome(judge(drawn, edit.after).all, apart(before, drawn, hidden > 0))))
    return told


def opened(file: Path) -> Pipeline:
    """nano-dev with the transformer of a file, of either kind."""
    pipe = Nano.load()
    channels = open_tensors(file).entries["img_in.weight"].shape[1]
    network = Flux1(replace(pipe.transformer.config, in_channels=channels)).eval().requires_grad_(False)
    load_into(network, file, dtype=torch.float32)
    return Pipeline(pipe.pipe.variant, network, pipe.autoencoder, pipe.text)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="miniflux.nano.recipe.edited", description=__doc__)
    arguments.add_argument("goal", choices=["fill", "kontext"])
    arguments.add_argument("file", type=Path, nargs="?")
    arguments.add_argument("--count", type=int, default=240)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = arguments.parse_args()
    pipe = miniflux.load(f"nano-{options.goal}") if options.file is None else opened(options.file)
    if options.goal == "fill":
        outcomes = [("fill", outcome) for _, outcome in fill(pipe, options.count, 5)]
    else:
        outcomes = [(edit.kind, outcome) for edit, outcome in kontext(pipe, options.count, 5)]
    made, good, right = Counter[str](), Counter[str](), Counter[str]()
    for kind, outcome in outcomes:
        made[kind] += 1
        good[kind] += outcome.good
        right[kind] += outcome.right
    for kind, count in made.items():
        log.info("%-12s %5.1f %% as asked, %5.1f %% and the rest kept",
                 kind, 100 * right[kind] / count, 100 * good[kind] / count)  # fmt: skip
    kept = sorted(outcome.kept for _, outcome in outcomes if math.isfinite(outcome.kept))
    if kept:
        log.info("%s", f"kept outside of objects: median {kept[len(kept) // 2]:.1f} dB, worst {kept[0]:.1f} dB")
    log.info("%s", f"all {good.total() / made.total():.1%} of {made.total()}")


if __name__ == "__main__":
    main()
