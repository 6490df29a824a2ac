"""FLUX.2: patchified latents, four position axes (time, row, column, place in the text), an empirical shift.

Source: `flux2/sampling.py` of the original release.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from miniflux.errors import InputError
from miniflux.families.family import Family, Frame
from miniflux.sampling.forwards import flux2_conditioning, flux2_velocity
from miniflux.sampling.latents import PIXELS_PER_TOKEN as TOKEN
from miniflux.sampling.latents import image_ids as rows_and_columns
from miniflux.sampling.schedules import dynamic_shift, flux2_mu

LARGEST_ALONE, LARGEST = 2024**2, 1024**2  # pixels of a single reference, and of each of several
SHORTEST, NARROWEST = 64, 8  # side in pixels, and how much longer the other may be
BETWEEN = 10  # on the axis of time, from one picture to the next


def image_ids(batch: int, rows: int, columns: int, time: int = 0) -> Tensor:
    """(time, row, column, 0), as (B, rows * columns, 4)."""
    ids = rows_and_columns(batch, rows, columns, time)
    return torch.cat((ids, torch.zeros_like(ids[..., :1])), dim=-1)


def text_ids(batch: int, length: int) -> Tensor:
    """(0, 0, 0, place), as (B, length, 4)."""
    ids = torch.zeros(batch, length, 4)
    ids[..., 3] = torch.arange(length)
    return ids


def reference_ids(number: int, rows: int, columns: int) -> Tensor:
    """Of the first at time 10, of the second at 20 ..."""
    return image_ids(1, rows, columns, BETWEEN * number)


def reference_frame(width: int, height: int, count: int) -> Frame:
    """Made smaller where it is too large, then the middle of it in whole tokens (`flux2/sampling.py`,
    `prep_img_and_cap`)."""
    if min(width, height) < SHORTEST or max(width, height) > NARROWEST * min(width, height):
        raise InputError(
            f"a reference of {width}x{height}: FLUX.2 sees pictures with sides of at least {SHORTEST} pixels, of which "
            f"one is at most {NARROWEST} times the other"
        )
    return cropped(width, height, LARGEST_ALONE if count == 1 else LARGEST)


def cropped(width: int, height: int, largest: int) -> Frame:
    """The middle, in whole tokens, of a picture that has at most so many pixels."""
    scale = min(1.0, math.sqrt(largest / (width * height)))
    resized = (int(width * scale), int(height * scale)) if scale < 1 else (width, height)
    return Frame(resized, (resized[0] // TOKEN * TOKEN, resized[1] // TOKEN * TOKEN))


FLUX2 = Family(
    name="flux2",
    patch=1,
    image_ids=image_ids,
    text_ids=text_ids,
    reference_ids=reference_ids,
    reference_frame=reference_frame,
    once=True,
    shift=lambda tokens, steps: dynamic_shift(flux2_mu(steps, tokens)),
    velocity=flux2_velocity,
    conditioning=flux2_conditioning,
)
