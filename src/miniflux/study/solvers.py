"""How fast each solver comes near the exact solution, measured on a model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from torch import Tensor

from miniflux.arguments import MAX_IMAGES, MAX_STEPS
from miniflux.checks import whole
from miniflux.errors import InputError
from miniflux.nano import scenes
from miniflux.pipeline import Pipeline
from miniflux.result import checked_output
from miniflux.sampling import SOLVERS, solver
from miniflux.study import plotting

REFERENCE = ("rk4", 250)  # solver and steps: 1000 calls


@dataclass(frozen=True)
class Error:
    """The median relative L2 error of a solver's latents, for a number of calls of the network."""

    solver: str
    calls: int
    error: float


def captions(count: int, seed: int = 5) -> list[str]:
    """Scenes that nano draws, one and two objects by turns."""
    rng = random.Random(seed)
    return [(scenes.two_objects if i % 2 else scenes.one_object)(rng).caption for i in range(count)]


def distance(latents: Tensor, reference: Tensor) -> float:
    """Median over pictures (N, C, h, w) of the relative L2 distance."""
    gaps = (latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    return float(gaps.median())


def check(calls: Sequence[int], prompts: int) -> None:
    """Raises InputError unless there are prompts, and numbers of calls to compare."""
    whole("prompts", prompts, 1, MAX_IMAGES)
    if not calls:
        raise InputError("calls must be at least one number, got none")
    for count in calls:
        whole("calls", count, 1, MAX_STEPS)


def measure(pipe: Pipeline, calls: Sequence[int], prompts: int, names: Sequence[str] | None = None) -> list[Error]:
    """Every deterministic solver (or the named ones) at about these numbers of calls, against a reference of 1000.

    Raises:
        InputError: no prompts, or a number of calls below 1.
    """
    check(calls, prompts)
    texts = captions(prompts)
    reference = pipe.generate(texts, solver=REFERENCE[0], steps=REFERENCE[1]).latents
    errors: list[Error] = []
    for name in names or [name for name, method in SOLVERS.items() if not method.noisy]:
        method = solver(name)
        for steps in sorted({max(1, count // method.calls) for count in calls}):
            result = pipe.generate(texts, solver=name, steps=steps)
            errors.append(
                Error(name, method.model_calls(result.settings[0]["sigmas"]), distance(result.latents, reference))
            )
    return errors


def observed_order(errors: Sequence[Error]) -> float:
    """How fast the error falls with the number of calls: the median slope between neighbours, on logarithmic axes."""
    ordered = sorted(errors, key=lambda error: error.calls)
    slopes = [math.log(a.error / b.error) / math.log(b.calls / a.calls) for a, b in pairwise(ordered)]
    return median(slopes)


def table(errors: Sequence[Error]) -> str:
    """The errors as text, a solver per row; in brackets the order that its start leaves."""
    lines = [f"{'solver':<14} {'order':>7} {'observed':>8}   calls: relative L2 error of the latents"]
    for name in dict.fromkeys(error.solver for error in errors):
        mine = [error for error in errors if error.solver == name]
        order = f"{observed_order(mine):8.2f}" if len(mine) > 1 else f"{'-':>8}"
        row = "   ".join(f"{error.calls:3d}: {error.error:.5f}" for error in mine)
        method = solver(name)
        theory = f"{method.order}" if method.start_order is None else f"{method.order} ({method.start_order})"
        lines.append(f"{name:<14} {theory:>7} {order}   {row}")
    return "\n".join(lines)


def plot(errors: Sequence[Error], path: str | Path) -> Path:
    """Error against calls, a line per solver, on logarithmic axes; returns the path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the place cannot be written to.
    """
    path = checked_output(path, plotting.KINDS)
    figure, ax = plotting.axes(
        "Distance to the exact solution", "calls of the network", "relative L2 error of the latents"
    )
    for name in dict.fromkeys(error.solver for error in errors):
        mine = [error for error in errors if error.solver == name]
        ax.loglog([e.calls for e in mine], [e.error for e in mine], marker="o", markersize=3, label=name)
    ax.legend(fontsize="small", ncols=2)
    return plotting.save(figure, path)
