"""Sampling as pure functions of sigma, the noise level: schedules, solvers, guidance, latents, the denoising loop.

The flow runs along straight lines, x_sigma = (1 - sigma) * picture + sigma * noise, and the network predicts the
velocity v = noise - picture (rectified flow, arXiv 2209.03003 and 2403.03206).
"""

from miniflux.sampling import previews
from miniflux.sampling.caches import CACHES, Bill, cache
from miniflux.sampling.denoising import Moment, Words, Wrap, add_noise, denoise
from miniflux.sampling.forwards import Told
from miniflux.sampling.guidance import GUIDES, guide
from miniflux.sampling.latents import image_ids, initial_noise, pack, text_ids, unpack
from miniflux.sampling.noise import step_noise, varied_noise
from miniflux.sampling.running import integrate
from miniflux.sampling.schedules import (
    Schedule,
    custom_schedule,
    flux1_schedule,
    flux2_schedule,
    flux3_schedule,
    from_strength,
    schedule,
    with_restarts,
)
from miniflux.sampling.solvers import SOLVERS, Solver, State, solver

__all__ = [
    "CACHES",
    "GUIDES",
    "SOLVERS",
    "Bill",
    "Moment",
    "Schedule",
    "Solver",
    "State",
    "Told",
    "Words",
    "Wrap",
    "add_noise",
    "cache",
    "custom_schedule",
    "denoise",
    "flux1_schedule",
    "flux2_schedule",
    "flux3_schedule",
    "from_strength",
    "guide",
    "image_ids",
    "initial_noise",
    "integrate",
    "pack",
    "previews",
    "schedule",
    "solver",
    "step_noise",
    "text_ids",
    "unpack",
    "varied_noise",
    "with_restarts",
]
