"""Noise levels: how the steps are spread between pure noise (sigma 1) and the picture (sigma 0)."""

from __future__ import annotations

import math

from miniflux.errors import InputError


def shift_sigma(mu: float, sigma: float) -> float:
    """Move a noise level towards 1 by mu: e^mu / (e^mu + 1 / sigma - 1); 0 and 1 stay (arXiv 2403.03206, 5.3.2)."""
    return 0.0 if sigma == 0 else math.exp(mu) / (math.exp(mu) + (1 / sigma - 1))


def flux1_mu(image_tokens: int) -> float:
    """The shift of FLUX.1 dev: the line through (256 tokens, 0.5) and (4096 tokens, 1.15), `flux/sampling.py`.

    Larger pictures keep more of their structure under the same noise, so they need more steps at high noise.
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    return slope * image_tokens + (0.5 - slope * 256)


def flux2_mu(steps: int, image_tokens: int) -> float:
    """The empirical shift of FLUX.2 (`compute_empirical_mu` in `flux2/sampling.py`).

    Two lines in the number of tokens, one measured at 10 steps and one at 200; in between, linear in the steps. Above
    4300 tokens the second line alone.
    """
    mu_200 = 1.6927e-4 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return mu_200
    mu_10 = 8.73809524e-5 * image_tokens + 1.89833333
    slope = (mu_200 - mu_10) / 190
    return slope * steps + mu_200 - 200 * slope


def uniform_sigmas(steps: int) -> list[float]:
    """`steps` + 1 evenly spaced noise levels from 1 to 0.

    Raises:
        InputError: steps is not a whole number of at least 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"steps must be a whole number of at least 1, got {steps!r}")
    return [1 - i / steps for i in range(steps)] + [0.0]


def flux1_schedule(steps: int, image_tokens: int, shift: bool = True) -> list[float]:
    """Noise levels of FLUX.1: `steps` + 1 values, 1.0 ... 0.0.

    Args:
        image_tokens: rows * columns / 256 of the picture in pixels.
        shift: True for dev and its relatives; False for schnell, whose levels are evenly spaced.
    """
    sigmas = uniform_sigmas(steps)
    return [shift_sigma(flux1_mu(image_tokens), s) for s in sigmas] if shift else sigmas


def flux2_schedule(steps: int, image_tokens: int) -> list[float]:
    """Noise levels of FLUX.2: `steps` + 1 values, 1.0 ... 0.0; `image_tokens` as in `flux1_schedule`."""
    sigmas = uniform_sigmas(steps)
    mu = flux2_mu(steps, image_tokens)
    return [shift_sigma(mu, s) for s in sigmas]
