"""What a call of `generate` made, and how it is written to a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, PngImagePlugin
from torch import Tensor

from miniflux.checkpoints.saving import write_beside
from miniflux.errors import OutputError
from miniflux.sampling import Moment

SETTINGS_KEY = "miniflux"  # text chunk of a PNG, and what JPEG and WebP keep as the EXIF description
EXIF_DESCRIPTION = 0x010E


@dataclass(frozen=True)
class Result:
    """What a call of `generate` made.

    Attributes:
        images: RGB pictures, in order.
        latents: the final latents (N, C, h, w), float32, on the CPU.
        settings: one dict per picture with all that made it; the values are plain JSON.
        moment: of a single picture, the state after its last step, which `resume` takes; None of several.
    """

    images: list[Image.Image]
    latents: Tensor
    settings: list[dict[str, Any]]
    moment: Moment | None = None

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
        return Result([self.images[i]], self.latents[i : i + 1], [self.settings[i]])

    def save(self, path: str | Path) -> Path:
        """Write the picture, or the grid of several, with the settings inside. Written beside and renamed.

        Args:
            path: ends in .png, .jpg, .jpeg or .webp.

        Raises:
            OutputError: another ending, or the place cannot be written to.
        """
        path = checked_output(path)
        text = json.dumps(self.settings[0] if len(self.settings) == 1 else self.settings)
        options: dict[str, Any]
        if path.suffix.lower() == ".png":
            info = PngImagePlugin.PngInfo()
            info.add_text(SETTINGS_KEY, text)
            options = {"format": "PNG", "pnginfo": info}
        else:
            exif = Image.Exif()
            exif[EXIF_DESCRIPTION] = text
            kind = "WEBP" if path.suffix.lower() == ".webp" else "JPEG"
            options = {"format": kind, "quality": 95, "exif": exif}
        write_beside(path, lambda beside: self.grid().save(beside, **options))
        return path


PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def checked_output(path: str | Path, endings: Sequence[str] = PICTURES) -> Path:
    """The path, if a picture can be written there; asked before the work is done.

    Raises:
        OutputError: unknown ending, no such folder, or no permission.
    """
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise OutputError(f"{path}: a picture is written as {', '.join(endings)}, got the ending {path.suffix!r}")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the folder {path.parent} cannot be written to")
    return path


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) in [-1, 1], clamped, to an 8-bit RGB picture."""
    levels = (127.5 * (pixels.float().clamp(-1, 1) + 1)).round().to(torch.uint8)
    return Image.fromarray(rearrange(levels, "C H W -> H W C").cpu().numpy())


def from_image(image: Image.Image) -> Tensor:
    """A picture of any mode, as RGB pixels (3, H, W) in [-1, 1]; transparency is laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return rearrange(pixels, "H W C -> C H W").float() / 127.5 - 1


def psnr(image: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in dB; infinite if they are equal."""
    error = float(np.mean((np.asarray(image, dtype=np.float64) - np.asarray(other, dtype=np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
