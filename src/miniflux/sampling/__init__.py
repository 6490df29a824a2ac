"""Sampling as pure functions of sigma, the noise level: schedules, the latents, the denoising loop.

The flow runs along straight lines, x_sigma = (1 - sigma) * picture + sigma * noise, and the network predicts the
velocity v = noise - picture (rectified flow, arXiv 2209.03003 and 2403.03206).
"""

from miniflux.sampling.denoising import denoise, euler_step
from miniflux.sampling.latents import image_ids, initial_noise, pack, text_ids, unpack
from miniflux.sampling.schedules import Schedule, custom_schedule, flux1_schedule, flux2_schedule, schedule

__all__ = [
    "Schedule",
    "custom_schedule",
    "denoise",
    "euler_step",
    "flux1_schedule",
    "flux2_schedule",
    "image_ids",
    "initial_noise",
    "pack",
    "schedule",
    "text_ids",
    "unpack",
]
