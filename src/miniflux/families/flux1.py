"""FLUX.1: latents in patches of 2x2, three position axes, T5's tokens with CLIP's summary, a shift by the size."""

from __future__ import annotations

from torch import Tensor

from miniflux.families.family import Family, Frame
from miniflux.sampling.forwards import flux1_conditioning, flux1_velocity
from miniflux.sampling.latents import PATCH, PIXELS_PER_TOKEN, image_ids, text_ids
from miniflux.sampling.schedules import dynamic_shift, flux1_mu


def reference_ids(number: int, rows: int, columns: int) -> Tensor:
    """The first axis tells pictures apart (`prepare_kontext` of the release)."""
    return image_ids(1, rows, columns, number)


def reference_frame(width: int, height: int, count: int) -> Frame:
    """As it is, to the nearest whole tokens. The release brings it to a size that Kontext learned
    (`conditions.kontext_size`)."""
    rounded = to_tokens(width), to_tokens(height)
    return Frame(rounded, rounded)


def to_tokens(side: int) -> int:
    return max(1, round(side / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN


FLUX1 = Family(
    name="flux1",
    patch=PATCH,
    image_ids=image_ids,
    text_ids=text_ids,
    reference_ids=reference_ids,
    reference_frame=reference_frame,
    shift=lambda tokens, steps: dynamic_shift(flux1_mu(tokens)),
    velocity=flux1_velocity,
    conditioning=flux1_conditioning,
)
