"""Random numbers, each from its own seed: the noise a picture starts from, and what stochastic solvers add on the way.

Everything is drawn on the CPU from generators made for the purpose, so that a picture does not depend on the device, on
its neighbours in a batch, or on what was drawn before.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from miniflux.checks import finite, several, shown, whole
from miniflux.errors import InputError
from miniflux.sampling.latents import MAX_SEED, PATCH, initial_noise, slerp
from miniflux.sampling.solvers import StepNoise


def step_noise(seeds: Sequence[int]) -> StepNoise:
    """Noise for the steps of stochastic solvers, one seed per row of the batch.

    The result is called with (step, x) and gives standard normal numbers in the shape, dtype and device of x. Row i
    depends on `seeds[i]` and the step alone: the generator's seed is a hash of the two.

    Raises:
        InputError: a seed is not a whole number in its range.
    """
    seeds = [whole("seed", seed, 0, MAX_SEED) for seed in seeds]

    def draw(step: int, x: Tensor) -> Tensor:
        if len(seeds) != len(x):
            raise InputError(f"{len(seeds)} seeds for a batch of {len(x)}")
        rows = []
        for seed in seeds:
            digest = hashlib.blake2b(struct.pack("<QQ", seed, step), digest_size=4).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
            rows.append(torch.randn(x.shape[1:], generator=generator, dtype=torch.float32))
        return torch.stack(rows).to(x)

    return draw


def varied_noise(
    height: int, width: int, seed: int, variation: tuple[int, float], channels: int = 16, patch: int = PATCH
) -> Tensor:
    """`initial_noise` of a seed, turned towards that of another.

    Args:
        variation: (the other seed, how far: 0 is the first noise, 1 the other).

    Raises:
        InputError: as `initial_noise`, or the amount is not from 0 to 1.
    """
    other, amount = several("variation", variation, "seed, amount")
    if not finite(amount) or not 0 <= amount <= 1:
        raise InputError(f"the amount of variation must be a number from 0 to 1, got {shown(amount)}")
    first = initial_noise(height, width, seed, channels, patch)
    if amount == 0:
        return first
    second = initial_noise(height, width, other, channels, patch)
    return second if amount == 1 else slerp(first, second, amount)
