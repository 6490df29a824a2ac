"""Pictures of maps: laid over the picture they are of, in grids of steps and blocks, and as animations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from miniflux.checks import check_number, shown, whole
from miniflux.disk import write_beside
from miniflux.errors import InputError, OutputError
from miniflux.study.mapping.maps import Array, Maps

By = Literal["step", "block", "both"]
Scale = Literal["each", "all"]
"""What the darkest and the brightest colour stand for: the least and most of each map, or of all that are shown
together. With `each`, a map that is nearly the same everywhere looks as lively as one that is not."""

HEAT = ((0.0, (8, 6, 30)), (0.25, (84, 20, 109)), (0.5, (183, 55, 84)), (0.75, (245, 125, 40)), (1.0, (252, 250, 170)))
TOP = 0.99  # this share of a map's places is shaded, the rest all brightest: one outlier would leave the others dark
CELL, GAP, LABEL = 128, 6, 16  # pixels of a grid: the longer side of a cell, between cells, of the text under one
KINDS = {".gif": "GIF", ".webp": "WEBP"}


def spread(values: Array, low: float | None = None, high: float | None = None) -> Array:
    """A map from 0 to 1.

    Args:
        low, high: what becomes 0 and 1; None for the least, and for what 99 % of the places are at most. What is beyond
            is 0 or 1 as well. A map that is the same everywhere is 0.
    """
    there = values[~np.isnan(values)]
    if not there.size:
        return np.zeros_like(values)
    low = float(there.min()) if low is None else low
    high = max(float(np.quantile(there, TOP)), low) if high is None else high
    if high <= low:
        return np.zeros_like(values)
    return np.clip((np.nan_to_num(values, nan=low) - low) / (high - low), 0, 1).astype(np.float32)


def coloured(values: Array) -> Image.Image:
    """A map from 0 to 1 in colours, from night to noon."""
    places, colours = [at for at, _ in HEAT], np.array([colour for _, colour in HEAT], np.float32)
    channels = [np.interp(values, places, colours[:, i]) for i in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def overlay(
    image: Image.Image,
    values: Array,
    *,
    opacity: float = 0.6,
    canvas: tuple[int, int] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Image.Image:
    """A map over the picture, in grey.

    Args:
        image: the picture.
        values: the map (rows, columns).
        opacity: of the map, 0 to 1.
        canvas: width and height of what the map covers, if the picture is only the middle of that.
        low, high: see `spread`.

    Raises:
        InputError: the opacity is out of its range.
    """
    check_number("opacity", opacity, 0, 1)
    large = Image.fromarray(spread(values, low, high)).resize(canvas or image.size, Image.Resampling.BICUBIC)
    heat = coloured(np.clip(np.asarray(large), 0, 1))
    if heat.size != image.size:
        left, top = ((has - seen) // 2 for has, seen in zip(heat.size, image.size, strict=True))
        heat = heat.crop((left, top, left + image.width, top + image.height))
    return Image.blend(image.convert("L").convert("RGB"), heat, opacity)


def map_picture(maps: Maps, name: str, image: Image.Image | None = None, opacity: float = 0.6) -> Image.Image:
    """The mean map of a name over the picture; `image`: the reference, for maps that lie on one."""
    return overlay(_under(maps, image), maps[name], opacity=opacity, canvas=maps.canvas)


def words_picture(maps: Maps, image: Image.Image | None = None, scale: Scale = "each") -> Image.Image:
    """The picture, and beside it the map of every name."""
    image = _under(maps, image)
    means = [maps[name] for name in maps.names]
    cells = [image, *_overlays(maps, image, means, scale)]
    return sheet(cells, ["picture", *maps.names], len(cells))


def grid(
    maps: Maps,
    name: str,
    by: By = "block",
    *,
    columns: int | None = None,
    scale: Scale = "each",
    image: Image.Image | None = None,
) -> Image.Image:
    """The map of a name for every step, for every block, or for both: a row for each block, a column for each step.

    Args:
        columns: of the sheet; None for about as many as rows. Not for both.
        scale: see `Scale`.
        image: the reference, for maps that lie on one.

    Raises:
        InputError: an unknown value.
    """
    image = _under(maps, image)
    values, labels = _sorted(maps, name, by)
    if by == "both":
        if columns is not None:
            raise InputError(f"columns {shown(columns)}: a sheet by both has a column for each step")
        columns = len(maps.steps)
    elif columns is None:
        columns = math.ceil(math.sqrt(len(values)))
    return sheet(_overlays(maps, image, values, scale), labels, whole("columns", columns, 1))


def animation(
    maps: Maps,
    name: str,
    path: str | Path,
    by: By = "step",
    *,
    milliseconds: int = 200,
    scale: Scale = "each",
    image: Image.Image | None = None,
) -> Path:
    """The map of a name, step by step or block by block, as a moving picture.

    Args:
        path: ends in .gif or .webp.
        milliseconds: how long each is shown; the last one four times as long.

    Raises:
        InputError: an unknown value.
        OutputError: another ending, or the place cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in KINDS:
        raise OutputError(f"{path}: a moving picture is written as {', '.join(KINDS)}, got the ending {path.suffix!r}")
    if by == "both":
        raise InputError("by must be step or block for a moving picture, got 'both'")
    milliseconds, image = whole("milliseconds", milliseconds, 20, 60_000), _under(maps, image)
    values, labels = _sorted(maps, name, by)
    frames = [
        sheet([frame], [label], 1) for frame, label in zip(_overlays(maps, image, values, scale), labels, strict=True)
    ]
    times = [milliseconds] * (len(frames) - 1) + [4 * milliseconds]
    options = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
    write_beside(path, lambda beside: frames[0].save(beside, KINDS[path.suffix.lower()], **options))
    return path


def sheet(cells: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """Pictures of one size row by row, each with a line of text under it."""
    width, height = cells[0].size
    factor = CELL / max(width, height)
    across, down = max(1, round(width * factor)), max(1, round(height * factor))
    columns = min(columns, len(cells))
    rows = math.ceil(len(cells) / columns)
    whole_sheet = Image.new("RGB", (columns * (across + GAP) + GAP, rows * (down + LABEL + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(whole_sheet), ImageFont.load_default(11)
    for i, (cell, label) in enumerate(zip(cells, labels, strict=True)):
        left, top = GAP + i % columns * (across + GAP), GAP + i // columns * (down + LABEL + GAP)
        whole_sheet.paste(cell.resize((across, down), Image.Resampling.BICUBIC), (left, top))
        while len(label) > 4 and font.getlength(label) > across:
            label = f"{label.rstrip('.')[:-1]}..."
        draw.text((left, top + down + 2), label, fill="black", font=font)
    return whole_sheet


def _under(maps: Maps, image: Image.Image | None) -> Image.Image:
    if image is None and maps.on:
        raise InputError(f"these maps lie on reference {maps.on}: give it as image=")
    return maps.image if image is None else image.convert("RGB")


def _sorted(maps: Maps, name: str, by: By) -> tuple[list[Array], list[str]]:
    """Maps in the order of a sheet, and what stands under them."""
    steps, blocks = [f"step {step}" for step in maps.steps], [_short(block) for block in maps.blocks]
    if by == "step":
        return list(maps.by_step(name)), steps
    if by == "block":
        return list(maps.by_block(name)), blocks
    if by != "both":
        raise InputError(f"by must be one of {', '.join(get_args(By))}, got {shown(by)}")
    each = [maps.by_step(name, blocks=[block]) for block in maps.blocks]
    return [one for row in each for one in row], [f"{block}, {step}" for block in blocks for step in steps]


def _short(block: str) -> str:
    """`double_blocks.3` -> `double 3`."""
    kind, _, number = block.rpartition(".")
    return f"{kind.removesuffix('_blocks')} {number}"


def _overlays(maps: Maps, image: Image.Image, values: Sequence[Array], scale: Scale) -> list[Image.Image]:
    if scale not in get_args(Scale):
        raise InputError(f"scale must be one of {', '.join(get_args(Scale))}, got {shown(scale)}")
    low = high = None
    if scale == "all":
        there = np.concatenate([one[~np.isnan(one)] for one in values])
        if there.size:
            low, high = float(there.min()), float(np.quantile(there, TOP))
    return [overlay(image, one, canvas=maps.canvas, low=low, high=high) for one in values]
