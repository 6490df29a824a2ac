"""What a call of `generate` made, and how it is written to a file."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from miniflux.checks import shown
from miniflux.disk import write_beside
from miniflux.errors import OutputError
from miniflux.sampling import Moment
from miniflux.settings.texts import options_for
from miniflux.weights.origin import Stamp, belongs, hashed


@dataclass(frozen=True, repr=False, eq=False)  # tensors and pictures have no single answer to ==
class Result:
    """What a call of `generate` made.

    Attributes:
        images: RGB pictures, in order.
        latents: the final latents (N, C, h, w), float32, on the CPU.
        settings: one dict per picture with all that made it; the values are plain JSON.
        moment: of a single picture, the state after its last step, which `resume` takes; None of several, and of one
            that came from the result cache.
        files: what it was made from, and of which part.
        keys: of the pictures in the result cache; empty if they are not kept there.
    """

    images: list[Image.Image]
    latents: Tensor
    settings: list[dict[str, Any]]
    moment: Moment | None = None
    files: tuple[tuple[str, Stamp], ...] = ()
    keys: tuple[str, ...] = ()

    def __repr__(self) -> str:
        size, seeds = "x".join(map(str, self.images[0].size)), [about["seed"] for about in self.settings]
        count = "1 picture" if len(self.images) == 1 else f"{len(self.images)} pictures"
        span = f"seed {seeds[0]}" if len(set(seeds)) == 1 else f"seeds {min(seeds)} to {max(seeds)}"
        return f"<Result: {count} of {size}, {self.settings[0]['model']}, {span}>"

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the picture, or the grid of several."""
        data = io.BytesIO()
        self.grid().save(data, "PNG", compress_level=1)
        return data.getvalue()

    @property
    def cached(self) -> bool:
        """Whether all pictures came from the result cache."""
        return all(about.get("cached", False) for about in self.settings)

    def hash_files(self) -> None:
        """Add the SHA-256 of every file to the settings, as `save` does; computed once per file, about 1 s per GB."""
        told = hashed(self.files)
        for about in self.settings:
            about["files"] = [file for file in told if belongs(file["part"], about)]

    def grid(self) -> Image.Image:
        """All pictures on one sheet, row by row, about as many columns as rows; a single picture is itself."""
        if len(self.images) == 1:
            return self.images[0]
        width, height = self.images[0].size
        columns = math.ceil(math.sqrt(len(self.images)))
        sheet = Image.new("RGB", (columns * width, math.ceil(len(self.images) / columns) * height), "white")
        for i, image in enumerate(self.images):
            sheet.paste(image, (i % columns * width, i // columns * height))
        return sheet

    def single(self, i: int) -> Result:
        """Picture i as a result of its own."""
        return Result([self.images[i]], self.latents[i : i + 1], [self.settings[i]], files=self.files)

    def save(self, path: str | Path, metadata: bool = True) -> Path:
        """Write the picture, or the grid of several, with the settings inside. Written beside and renamed.

        Args:
            path: ends in .png, .jpg, .jpeg or .webp.
            metadata: False to leave the settings out.

        Raises:
            OutputError: another ending, the place cannot be written to, or settings of too many bytes.
        """
        path = checked_output(path)
        if metadata:
            self.hash_files()
        save_picture(self.grid(), path, self.settings if metadata else None)
        return path


def joined(results: Sequence[Result]) -> Result:
    """Results of single pictures as one, so that they can be written on one sheet."""
    if len(results) == 1:
        return results[0]
    sizes = {result.latents.shape for result in results}
    latents = torch.cat([result.latents for result in results]) if len(sizes) == 1 else results[0].latents
    settings = [about for result in results for about in result.settings]
    return Result([image for result in results for image in result.images], latents, settings, files=results[0].files)


def save_picture(picture: Image.Image, path: Path, settings: Sequence[dict[str, Any]] | None) -> None:
    """Write a picture with the settings of all that is on it, or none."""
    options = {} if settings is None else options_for(path, list(settings))

    kind = FORMATS[path.suffix.lower()]
    # A picture of 1024x1024 takes 0.07 s at level 1 and 0.37 s at zlib's own 6, which saves an eighth of the bytes.
    options |= {"compress_level": 1} if kind == "PNG" else {"quality": QUALITY}

    data = io.BytesIO()  # Pillow does not notice a file that takes only a part of what it writes
    picture.save(data, format=kind, **options)
    write_beside(path, lambda beside: beside.write_bytes(data.getvalue()))


QUALITY = 95  # of JPEG and WebP, 0 to 100
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def checked_output(path: str | Path, endings: Sequence[str] = tuple(FORMATS)) -> Path:
    """The path, if a picture can be written there; asked before the work is done.

    Raises:
        OutputError: unknown ending, a name that cannot be one, no such folder, or no permission.
    """
    if not str(path):
        raise OutputError("the name of a picture to be written is empty")
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise OutputError(f"{path}: a picture is written as {', '.join(endings)}, got the ending {path.suffix!r}")
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise OutputError(
            f"{shown(str(path))}: cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from None
    if path.is_dir():
        raise OutputError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the folder {path.parent} cannot be written to")
    return path


def labelled(images: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """Pictures row by row on a white sheet, the names of the columns above and of the rows at the left."""
    width, height = max(image.width for image in images), max(image.height for image in images)
    font = ImageFont.load_default(max(12, min(width, height) // 16))
    line = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 16
    left = max(int(font.getlength(row)) + line // 2 for row in rows) if any(rows) else 0
    gap = 4
    size = left + len(columns) * (width + gap), line + gap + len(rows) * (height + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(columns):
        draw.text((left + i * (width + gap) + width // 2, 0), name, "black", font, anchor="ma")
    for j, name in enumerate(rows):
        draw.text((line // 4, line + gap + j * (height + gap) + height // 2), name, "black", font, anchor="lm")
    for k, image in enumerate(images):
        j, i = divmod(k, len(columns))
        sheet.paste(image, (left + i * (width + gap), line + gap + j * (height + gap)))
    return sheet


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) in [-1, 1], clamped, to an 8-bit RGB picture."""
    levels = (127.5 * (pixels.float().clamp(-1, 1) + 1)).round().to(torch.uint8)
    return Image.fromarray(rearrange(levels, "C H W -> H W C").cpu().numpy())


def psnr(image: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in dB; infinite if they are equal."""
    error = float(np.mean((np.asarray(image, dtype=np.float64) - np.asarray(other, dtype=np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
