"""The geometry of paths: distances, angles, how straight one is. Sums are made in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from miniflux.errors import InputError


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|; infinite where b is zero and a is not."""
    gap, size = float((a.double() - b.double()).norm()), float(b.double().norm())
    return gap / size if size else (math.inf if gap else 0.0)


def angle(a: Tensor, b: Tensor) -> float | None:
    """Between two directions, 0 to 180 degrees; None where one is zero.

    2 atan2(|u - w|, |u + w|) of the unit vectors u and w (W. Kahan, "How futile are mindless assessments of roundoff",
    2006, section 12): exact also for small angles, where the arc cosine loses half of the digits.
    """
    a, b = a.double(), b.double()
    if not bool(a.any()) or not bool(b.any()):
        return None
    u, w = a / a.norm(), b / b.norm()
    return math.degrees(2 * math.atan2(float((u - w).norm()), float((u + w).norm())))


def turns(velocities: Tensor) -> list[float | None]:
    """Curvature, as angles between consecutive velocities (S, ...): S - 1 of them, in degrees."""
    return [angle(before, after) for before, after in pairwise(velocities)]


def straightness(latents: Tensor, sigmas: Sequence[float]) -> float:
    """How far a path is from a straight line: 0 is one, walked at an even pace.

    S(Z) = integral over t of |(Z_1 - Z_0) - dZ_t/dt|^2 (arXiv 2209.03003, section 2), here of one path, with its chords
    for dZ/dt, and over |Z_1 - Z_0|^2 so that it has no unit:

        sum_k h_k |d_k / h_k - d / h|^2 / (h |d / h|^2)    h_k = sigma_k - sigma_k+1,  d_k = x_k - x_k+1

    with h and d from the first to the last. The length of the path is at most sqrt(1 + S) times the chord.

    Args:
        latents: (S + 1, ...).
        sigmas: their noise levels, falling.

    Raises:
        InputError: not as many noise levels as latents, fewer than two, some that do not fall, or a path that ends
            where it began.
    """
    if len(latents) != len(sigmas) or len(sigmas) < 2 or any(b >= a for a, b in pairwise(sigmas)):
        raise InputError(f"a path has falling noise levels, one for each of its latents, got {len(latents)} latents at "
                         f"{[round(sigma, 4) for sigma in sigmas]}")  # fmt: skip
    x = latents.double()
    whole, span = x[0] - x[-1], sigmas[0] - sigmas[-1]
    pace = whole / span
    if not bool(pace.any()):
        raise InputError("the path ends where it began: it has no direction to be straight in")
    bent = torch.zeros((), dtype=torch.float64)
    for k, (a, b) in enumerate(pairwise(sigmas)):
        bent += (a - b) * ((x[k] - x[k + 1]) / (a - b) - pace).square().sum()
    return float(bent / (span * pace.square().sum()))


def length(latents: Tensor) -> float:
    """Of the way through these points (S + 1, ...), over the distance between its ends; at least 1."""
    x = latents.double()
    return sum(float((b - a).norm()) for a, b in pairwise(x)) / float((x[-1] - x[0]).norm())


def spread(total: int, most: int) -> list[int]:
    """Indices of at most so many of `total`, evenly, the first and the last among them."""
    count = min(total, most)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]
