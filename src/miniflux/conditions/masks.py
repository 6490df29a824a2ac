"""Masks and pictures as inpainting wants them: grown, feathered; pictures enlarged, or a part of one at full size.

Pure functions on what `generate` takes as `image` and `mask`; a mask is (H, W), 0 (keep) to 1 (draw anew).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniflux.checks import check_number, shown, whole
from miniflux.errors import InputError
from miniflux.pictures import on_white, open_picture
from miniflux.sampling.latents import PIXELS_PER_TOKEN

MAX_GROWTH = 1024  # pixels
MAX_SIDE = 8192  # pixels of an enlarged picture
HARD = 0.5  # where a mask is cut off that is to have no greys


def check_mask(mask: object, size: tuple[int, int] | None = None) -> None:
    """Raises InputError unless it is a tensor (H, W) of numbers from 0 to 1, of (width, height) if that is given."""
    if not isinstance(mask, Tensor):
        raise InputError(
            f"a mask must be a tensor (H, W) from 0 to 1, as `mask_for` of `arguments` makes, got {shown(mask)}"
        )
    if mask.ndim != 2 or not mask.is_floating_point() or not bool(((mask >= 0) & (mask <= 1)).all()):
        raise InputError(f"a mask must be (H, W) of numbers from 0 to 1, got {tuple(mask.shape)} of {mask.dtype}")
    given = (mask.shape[1], mask.shape[0])
    if size is not None and given != size:
        raise InputError(f"the mask is {given[0]}x{given[1]}, the image {size[0]}x{size[1]}: make them equal")


def grown(mask: Tensor, pixels: int) -> Tensor:
    """A mask that reaches so many pixels further in every direction (of a disc); below 0, less far.

    Raises:
        InputError: not a whole number from -1024 to 1024.
    """
    check_mask(mask)
    whole("the growth of a mask", pixels, -MAX_GROWTH, MAX_GROWTH)
    if pixels < 0:
        return 1 - grown(1 - mask, -pixels)
    found = mask[None, None]
    reach = torch.arange(-pixels, pixels + 1)
    # A disc is made of horizontal runs: the largest of each row of it, then of all rows.
    padded = F.pad(found, (0, 0, pixels, pixels))
    best = found
    for dy in reach.tolist():
        dx = int((pixels**2 - dy**2) ** 0.5)
        rows = padded[:, :, pixels + dy : pixels + dy + mask.shape[0]]
        best = torch.maximum(best, F.max_pool2d(rows, (1, 2 * dx + 1), stride=1, padding=(0, dx)))
    return best[0, 0]


def feathered(mask: Tensor, pixels: float) -> Tensor:
    """A mask with a soft edge: what lay inside stays 1, and falls to 0 within about so many pixels outside (half of
    that is added, then blurred by a Gaussian of a sixth of it).

    Raises:
        InputError: below 0 or above 1024.
    """
    check_mask(mask)
    check_number("the feather of a mask", pixels, 0, MAX_GROWTH)
    if pixels == 0:
        return mask
    sigma, reach = pixels / 6, max(1, round(pixels / 2))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).float()
    x = grown(mask, reach)[None, None]
    for shape in ((1, 1, 1, -1), (1, 1, -1, 1)):
        sides = (reach, reach, 0, 0) if shape[3] == -1 else (0, 0, reach, reach)
        x = F.conv2d(F.pad(x, sides, mode="replicate"), kernel.view(shape))
    return torch.maximum(x[0, 0].clamp(0, 1), mask)


def hardened(mask: Tensor, threshold: float = HARD) -> Tensor:
    """A mask without greys, as diffusers rounds it: 1 from the threshold on.

    Raises:
        InputError: the threshold is not from 0 to 1.
    """
    check_mask(mask)
    return (mask >= check_number("the threshold of a mask", threshold, 0, 1)).float()


def outpainted(
    picture: Image.Image | str, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Tensor]:
    """A picture enlarged by so many pixels on each side, and the mask of what is to be drawn there.

    The new parts show the outermost pixels, smeared outwards: a place to start from for models that were not trained to
    fill; others never see it.

    Raises:
        InputError: nothing is added, a number is no whole one from 0, or the result's sides are no multiples of 16.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, pixels in sides.items():
        whole(f"outpaint {name}", pixels, 0, MAX_SIDE)
    if not any(sides.values()):
        raise InputError("outpaint adds pixels on a side: all of left, top, right and bottom are 0")
    old = on_white(open_picture(picture))
    size = (old.width + left + right, old.height + top + bottom)
    if max(size) > MAX_SIDE:
        raise InputError(f"the enlarged picture would be {size[0]}x{size[1]}; sides of at most {MAX_SIDE} are drawn")
    if any(side % PIXELS_PER_TOKEN for side in size):
        more = " and ".join(
            f"{-side % PIXELS_PER_TOKEN} more pixels {where}"
            for side, where in zip(size, ("on the left or right", "at the top or bottom"), strict=True)
            if side % PIXELS_PER_TOKEN
        )
        raise InputError(f"the enlarged picture would be {size[0]}x{size[1]}, no multiples of 16: add {more}")
    pixels = np.pad(np.asarray(old), ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = torch.ones(size[1], size[0])
    mask[top : top + old.height, left : left + old.width] = 0
    return Image.fromarray(pixels), mask


@dataclass(frozen=True, eq=False)
class Closeup:
    """A masked part of a picture, to be drawn at the size that the model is good at, and pasted back:

        part = Closeup(photo, mask, size=(1024, 1024))
        drawn = pipe.generate(prompt, image=part.picture, mask=part.mask).images[0]
        photo = part.pasted(drawn)

    Attributes:
        image: the whole picture: a path or a Pillow picture.
        where: the mask (H, W) of it, 0 to 1.
        margin: pixels around the masked part that are seen, too.
        size: (width, height) to draw at, multiples of 16.

    Raises:
        InputError: the mask has another size than the picture or is black, a number is out of its range, or `size` is
            not of multiples of 16.
    """

    image: Image.Image | str
    where: Tensor
    margin: int = 32
    size: tuple[int, int] = (1024, 1024)

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", on_white(open_picture(self.image)))
        assert isinstance(self.image, Image.Image)
        check_mask(self.where, self.image.size)
        whole("the margin", self.margin, 0)
        if not bool(self.where.any()):
            raise InputError("the mask is black everywhere: there is nothing to look at closely")
        if any(side % PIXELS_PER_TOKEN or side <= 0 for side in self.size):
            raise InputError(f"size must be multiples of {PIXELS_PER_TOKEN}, got {shown(self.size)}")

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the part: the masked pixels with their margin, widened to the shape of `size` as
        far as the picture reaches."""
        assert isinstance(self.image, Image.Image)
        rows, columns = (torch.nonzero(self.where.amax(dim)).flatten() for dim in (1, 0))
        spans: list[tuple[int, int]] = []
        for found, limit in ((columns, self.image.width), (rows, self.image.height)):
            spans.append((max(0, int(found[0]) - self.margin), min(limit, int(found[-1]) + 1 + self.margin)))
        (left, right), (top, bottom) = spans
        scale = max((right - left) / self.size[0], (bottom - top) / self.size[1])
        left, right = _widened(left, right, round(scale * self.size[0]), self.image.width)
        top, bottom = _widened(top, bottom, round(scale * self.size[1]), self.image.height)
        return left, top, right, bottom

    @property
    def picture(self) -> Image.Image:
        """The part, at the size it is drawn at."""
        assert isinstance(self.image, Image.Image)
        return self.image.crop(self.box).resize(self.size, Image.Resampling.LANCZOS)

    @property
    def mask(self) -> Tensor:
        """Its mask, likewise."""
        left, top, right, bottom = self.box
        part = self.where[top:bottom, left:right][None, None]
        return F.interpolate(part, (self.size[1], self.size[0]), mode="bilinear", antialias=True)[0, 0].clamp(0, 1)

    def pasted(self, drawn: Image.Image) -> Image.Image:
        """The whole picture with what was drawn in its place: blended as the mask says; where that is 0, the same bytes
        as before."""
        assert isinstance(self.image, Image.Image)
        left, top, right, bottom = self.box
        part = drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        alpha = Image.fromarray((self.where[top:bottom, left:right] * 255).round().byte().numpy())
        result = self.image.copy()
        result.paste(part, (left, top), alpha)
        return result


def _widened(first: int, last: int, length: int, limit: int) -> tuple[int, int]:
    """A span of this length around another one, moved inside of 0 to `limit`; no longer than that."""
    length = min(max(length, last - first), limit)
    first = min(max(0, (first + last - length) // 2), limit - length)
    return first, first + length
