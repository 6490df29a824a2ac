"""FLUX.1: latents in patches of 2x2, three position axes, T5's tokens with CLIP's summary, a shift by the size."""

from __future__ import annotations

from miniflux.families.family import Family
from miniflux.sampling.forwards import flux1_conditioning, flux1_velocity
from miniflux.sampling.latents import PATCH, image_ids, initial_noise, pack, text_ids, unpack
from miniflux.sampling.schedules import dynamic_shift, flux1_mu

FLUX1 = Family(
    name="flux1",
    patch=PATCH,
    pack=pack,
    unpack=unpack,
    noise=initial_noise,
    image_ids=image_ids,
    text_ids=text_ids,
    pooled=True,
    shift=lambda tokens: dynamic_shift(flux1_mu(tokens)),
    velocity=flux1_velocity,
    conditioning=flux1_conditioning,
)
