"""Pictures to look at, as FLUX.1 Kontext has them: tokens behind those that are drawn, told apart by their positions.

The release (`prepare_kontext` in `flux/sampling.py`) brings a picture to the nearest of seventeen sizes that the model
learned (`kontext_size`), without regard to its shape; here it keeps its own size, to whole tokens, unless one is given.
"""

from __future__ import annotations

import logging
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from miniflux.checks import shown, whole
from miniflux.conditions.condition import Added, Picture, Scene
from miniflux.conditions.img2img import check_pixels
from miniflux.errors import InputError
from miniflux.families import Family
from miniflux.families.family import Box, Frame
from miniflux.families.flux1 import FLUX1
from miniflux.models.transformer import TransformerConfig
from miniflux.pictures import digest_of, from_image, on_white, open_picture
from miniflux.sampling import Schedule
from miniflux.sampling.latents import PIXELS_PER_TOKEN
from miniflux.variants import KONTEXT_SIZES

MAX_INDEX = 1000
MAX_SIDE = 8192  # of `size`, in pixels
LANCZOS = Image.Resampling.LANCZOS

log = logging.getLogger(__name__)


def kontext_size(width: int, height: int) -> tuple[int, int]:
    """Width and height, of those that Kontext learned, whose shape is nearest; of two, the narrower."""
    return min(KONTEXT_SIZES, key=lambda size: (abs(width / height - size[0] / size[1]), size))


def _checked(size: Any) -> tuple[int, int]:
    """A size as two whole numbers; errors as of `Reference`."""
    if not isinstance(size, list | tuple) or len(size) != 2:  # pyright: ignore[reportUnknownArgumentType]
        raise InputError(f"the size of a reference must be (width, height), got {shown(size)}")
    width, height = (whole("a side of a reference", side, 1, MAX_SIDE) for side in size)  # pyright: ignore
    return width, height


def in_frame(picture: Image.Image, frame: Frame) -> Image.Image:
    """A picture as a frame shows it."""
    picture = picture if picture.size == frame.resized else picture.resize(frame.resized, LANCZOS)
    if frame.canvas == frame.resized:
        return picture
    if frame.inside is None:  # the middle of it
        across, down = ((has - seen) // 2 for seen, has in zip(frame.canvas, frame.resized, strict=True))
        return picture.crop((across, down, across + frame.canvas[0], down + frame.canvas[1]))
    pixels, (left, top, right, bottom) = np.asarray(picture), frame.inside
    around = (top, frame.canvas[1] - bottom), (left, frame.canvas[0] - right), (0, 0)
    mode = "reflect" if min(picture.size) > PIXELS_PER_TOKEN else "symmetric"
    return Image.fromarray(np.pad(pixels, around, mode=mode))


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture that the network sees beside the one it draws.

    Attributes:
        picture: a path or a Pillow picture; or pixels (3, H, W) in [-1, 1].
        size: (width, height) to bring it to, see `kontext_size`, rounded to whole tokens of 16; None for what models of
            its family see: FLUX.1 its own size, FLUX.2 the middle of it (up to 2024^2 pixels, of several 1024^2 each),
            FLUX.3 all of it, mirrored around itself up to whole tokens (up to 2048^2 pixels; of several the middle).
        index: tells several apart; 0 is the picture that is drawn.
        once: whether it is looked at once, and what it says kept for all steps (FLUX.2 klein KV), or at every step;
            None for what the model was trained for.
        crop: whether the picture that is drawn is cut back to this one, where it was mirrored around itself up to whole
            tokens (FLUX.3, of a single one); None: where no other size is asked for, as in the release.

    Raises:
        InputError: it is no picture, pixels are not from -1 to 1, or a number is out of its range.
    """

    picture: Picture | str
    size: tuple[int, int] | None = None
    index: int = 1
    once: bool | None = None
    crop: bool | None = None
    _digest: str = field(init=False, repr=False)  # of the picture as it was given
    _inside: Box | None = field(init=False, repr=False, default=None)  # of what is shown, the picture, if that is less

    def __post_init__(self) -> None:
        whole("the index of a reference", self.index, 1, MAX_INDEX)
        for name, value in (("once", self.once), ("crop", self.crop)):
            if not (value is None or isinstance(value, bool)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError(f"{name} must be True, False or None, got {shown(value)}")
        if self.size is not None:
            object.__setattr__(self, "size", _checked(self.size))
        picture = self.picture
        if not isinstance(picture, Tensor):
            picture = on_white(open_picture(picture))
        else:
            check_pixels("reference pixels", picture)
            if any(side % PIXELS_PER_TOKEN for side in picture.shape[1:]):
                raise InputError(
                    f"reference pixels must have sides that are multiples of {PIXELS_PER_TOKEN}, got a tensor "
                    f"{tuple(picture.shape)}"
                )
            if self.size is not None:
                raise InputError(f"size {self.size} is for pictures, and pixels were given: they keep their own")
        object.__setattr__(self, "picture", picture)
        object.__setattr__(self, "_digest", digest_of(picture))

    def framed(self, family: Family, count: int) -> Reference:
        """The same, at the size at which models of a family see it beside so many references (itself among them).

        Raises:
            InputError: they never see a picture of this size.
        """
        if not isinstance(self.picture, Image.Image):
            return self
        if self.size is not None:
            frame = FLUX1.reference_frame(*self.size, count)
        else:
            frame = family.reference_frame(*self.picture.size, count)
        given = self.picture.size if self.size is None else self.size
        if frame.canvas != given:
            log.warning("a reference of %dx%d is seen at %dx%d: sides in whole tokens of 16", *given, *frame.canvas)
        framed = copy(self)
        object.__setattr__(framed, "picture", in_frame(self.picture, frame))
        object.__setattr__(framed, "_inside", frame.inside)
        return framed

    @property
    def inside(self) -> Box | None:
        """Where the picture is on its canvas, once it is framed: left, top, right, bottom in pixels; None if it fills
        it."""
        return self._inside

    def cropping(self) -> Reference:
        """The same, to which the picture is cut back."""
        made = copy(self)
        object.__setattr__(made, "crop", True)
        return made

    @property
    def shown_at(self) -> tuple[int, int]:
        """Width and height in pixels, which a picture has as well if nothing else is asked for, as in the releases."""
        picture = self.picture
        assert not isinstance(picture, str)
        return (picture.shape[2], picture.shape[1]) if isinstance(picture, Tensor) else picture.size

    def check(self, family: Family, config: TransformerConfig) -> None:
        """Every network has room in its sequence; one that was not trained to look there draws what it likes."""
        more = config.in_channels - config.out_channels
        if more:
            raise InputError(
                f"this network reads {more} channels beside the noisy picture, and tokens of references have none: "
                "leave the reference out, or draw with a model, or a LoRA, without such channels"
            )

    def levels(self, levels: Schedule) -> Schedule:
        return levels

    def described(self) -> dict[str, Any]:
        about = {"picture": self._digest, "index": self.index}
        about |= {name: value for name in ("once", "crop") if (value := getattr(self, name)) is not None}
        return about | ({} if self.size is None else {"size": list(self.size)})

    def tokens(self, rows: int, columns: int) -> int:
        width, height = self.shown_at
        return (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)

    def added(self, scene: Scene) -> Added:
        assert not isinstance(self.picture, str)
        pixels = self.picture if isinstance(self.picture, Tensor) else from_image(self.picture)
        tokens = scene.family.pack(scene.encode(pixels))
        rows, columns = (side // PIXELS_PER_TOKEN for side in pixels.shape[1:])
        return Added(tokens=tokens, ids=scene.family.reference_ids(self.index, rows, columns))
