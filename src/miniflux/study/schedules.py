"""Schedules side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from miniflux.arguments import MAX_SIDE
from miniflux.checks import whole
from miniflux.result import checked_output
from miniflux.sampling import Schedule, schedule
from miniflux.sampling.latents import PIXELS_PER_TOKEN
from miniflux.sampling.schedules import SPACINGS, dynamic_shift, flux1_mu, static_shift
from miniflux.study import plotting

__all__ = ["SPACINGS", "plot", "schedules"]


def schedules(names: Sequence[str], steps: int, width: int, height: int, shift: float | None = None) -> list[Schedule]:
    """The named schedules for a picture of that size, shifted as FLUX.1 dev does, or by a static shift.

    Raises:
        InputError: an unknown name, or a number out of its range.
    """
    for name, side in (("width", width), ("height", height)):
        whole(name, side, PIXELS_PER_TOKEN, MAX_SIDE)
    tokens = (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
    curve = dynamic_shift(flux1_mu(tokens)) if shift is None else static_shift(shift)
    return [schedule(name, steps, curve) for name in names]


def plot(made: Sequence[Schedule], path: str | Path) -> Path:
    """Noise level against the share of the steps done, one line each; returns the path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the place cannot be written to.
    """
    path = checked_output(path, plotting.KINDS)
    figure, ax = plotting.axes("Noise levels", "share of the steps done", "sigma")
    for levels in made:
        shares = [i / levels.steps for i in range(len(levels))]
        ax.plot(shares, list(levels), marker="o", markersize=3, label=levels.name)
    ax.legend()
    return plotting.save(figure, path)
