"""Sheets of what nano draws, for documents: `python -m miniflux.nano.recipe.sheets FOLDER`."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import miniflux
from miniflux.conditions import Control, ControlNet, Reference
from miniflux.conditions.making import canny
from miniflux.conditions.masks import feathered, outpainted
from miniflux.nano import scenes
from miniflux.nano.recipe import edits
from miniflux.nano.recipe.edges import aside
from miniflux.nano.recipe.realism import PROMPTS as LIT_PROMPTS

GAP = 4  # white pixels between pictures
SEED = 2026
SIZES = ((64, 64), (96, 96), (192, 64), (96, 160), (192, 128), (192, 192))
INSTRUCTIONS = ("make it a star", "make it white", "move it to the left", "remove it")
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
SIZED_PROMPTS = ("a large yellow star on a purple background", "a red square on a white background",
                 "a green ring left of a white heart on a black background")  # fmt: skip


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in rows; columns are as wide as their widest one, rows as high as their highest."""
    widths = [max(row[i].width for row in rows) for i in range(len(rows[0]))]
    heights = [max(picture.height for picture in row) for row in rows]
    whole = sum(widths) + GAP * (len(widths) - 1), sum(heights) + GAP * (len(heights) - 1)
    made = Image.new("RGB", whole, "white")
    for j, row in enumerate(rows):
        for i, picture in enumerate(row):
            made.paste(picture, (sum(widths[:i]) + GAP * i, sum(heights[:j]) + GAP * j))
    return made


def conditions_sheet() -> Image.Image:
    """What steers nano-dev, a row each: a picture to change and three strengths; a hard mask, what is drawn in it, and
    in a soft one; a picture enlarged, its mask, and what two seeds draw there."""
    pipe = miniflux.load("nano")
    first = pipe.generate("a large red circle on a blue background", seed=3).images[0]
    words = "a large yellow star on a blue background"
    changed = [pipe.generate(words, seed=5, image=first, strength=x).images[0] for x in (0.6, 0.75, 0.9)]
    spot = torch.zeros(128, 128)
    spot[20:108, 20:108] = 1
    inside = [pipe.generate(words, seed=5, image=first, mask=m).images[0] for m in (spot, feathered(spot, 24))]
    wide, border = outpainted(first, right=64)
    told = "a large red circle on a blue background"
    outside = [pipe.generate(told, seed=seed, image=wide, mask=border).images[0] for seed in (2, 3)]
    return sheet([[first, *changed], [first, grey(spot), *inside], [wide, grey(border), *outside]])


def editing_sheet() -> Image.Image:
    """A row of nano-fill: a picture, its hole, and what three sentences make of it; three rows of nano-kontext: a
    picture, and what the instructions make of it."""
    fill, kontext = miniflux.load("nano-fill"), miniflux.load("nano-kontext")
    rng, rows = random.Random(SEED), list[list[Image.Image]]()
    scene = scenes.two_objects(rng)
    before = scenes.render(scene, 128, 128)
    hole = edits.around(scene.shapes[0], 128, 128, rng)
    told = ("a white heart", "a red circle", edits.described(replace(scene, shapes=scene.shapes[1:])))
    mask = torch.from_numpy(hole)
    filled = [fill.generate(words, seed=SEED, image=before, mask=mask).images[0] for words in told]
    rows.append([before, grey(mask), *filled])
    for _ in range(3):
        scene = scenes.one_object(rng)
        before = scenes.render(scene, 128, 128)
        steered = [Reference(before)]
        rows.append([before, *(kontext.generate(one, seed=SEED, conditions=steered).images[0] for one in INSTRUCTIONS)])
    return sheet(rows)


def successors_sheet() -> Image.Image:
    """Two rows of nano2 and two of nano3: four captions, then two references and what the words make of them."""
    rows: list[list[Image.Image]] = []
    for name in ("nano2", "nano3"):
        pipe, rng = miniflux.load(name), random.Random(SEED)
        for kind in (scenes.one_object, scenes.two_objects):
            drawn = pipe.generate([kind(rng, held_out=i == 2).caption for i in range(4)], seed=SEED).images
            blend = edits.blend(rng)
            two = [scenes.render(one, 128, 128) for one in (blend.first, blend.second)]
            seen = [Reference(one, index=i + 1) for i, one in enumerate(two)]
            made = pipe.generate(blend.words, seed=SEED, conditions=seen).images[0]
            rows.append([*drawn, *two, made])
    return sheet(rows)


def edges_sheet() -> Image.Image:
    """Three rows, a scene each: the scene, its edges, what nano-dev draws from its words alone, with the ControlNet,
    and with the Canny LoRA."""
    plain, steered = miniflux.load("nano"), miniflux.load("nano")
    miniflux.lora.attach(steered, "canny")
    net, rng, rows = miniflux.conditions.load("canny"), random.Random(SEED), list[list[Image.Image]]()
    for _ in range(3):
        scene = aside(rng)
        shown = scenes.render(scene, 128, 128)
        edges = canny(shown)
        ways = ((plain, []), (plain, [ControlNet(net, edges)]), (steered, [Control(edges)]))
        rows.append([shown, edges, *(p.generate(scene.caption, seed=SEED, conditions=c).images[0] for p, c in ways)])
    return sheet(rows)


def grey(mask: torch.Tensor) -> Image.Image:
    """A mask (H, W) as a picture."""
    return Image.fromarray((mask * 255).byte().numpy()).convert("RGB")


def main() -> None:
    folder = Path(sys.argv[1])
    conditions_sheet().save(folder / "conditions.png")
    editing_sheet().save(folder / "nano-editing.png")
    edges_sheet().save(folder / "nano-edges.png")
    successors_sheet().save(folder / "nano-successors.png")
    pipe = miniflux.load("nano")
    rng = random.Random(SEED)
    wanted = [(scenes.two_objects if i % 2 else scenes.one_object)(rng, held_out=i % 3 == 0) for i in range(40)]
    drawn = pipe.generate([scene.caption for scene in wanted], seed=SEED).images
    sheet([drawn[i : i + 10] for i in range(0, 40, 10)]).save(folder / "nano.png")
    columns = [pipe.generate(SIZED_PROMPTS, seed=9, width=width, height=height).images for width, height in SIZES]
    sheet(list(zip(*columns, strict=True))).save(folder / "nano-sizes.png")
    columns = []
    for scale in SCALES:
        miniflux.lora.attach(pipe, "realism", scale, name="light")
        columns.append(pipe.generate(LIT_PROMPTS, seed=7).images)
        miniflux.lora.detach(pipe, "light")
    sheet(list(zip(*columns, strict=True))).save(folder / "realism.png")


if __name__ == "__main__":
    main()
