"""Runs: where they begin, their steps, and how a run that begins in the middle of a step stays continuous."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from miniflux.sampling.latents import slerp
from miniflux.sampling.schedules import Schedule
from miniflux.sampling.solvers import Solver, State, StepNoise, data, euler, solver


def start(sigmas: Sequence[float]) -> State:
    """Where a run through these noise levels, a list or a `Schedule`, begins."""
    if isinstance(sigmas, Schedule):
        return State(steps=sigmas.steps, skipped=sigmas.skipped, share=sigmas.share, begun=sigmas.begun)
    return State(steps=len(sigmas) - 1)


def advance(
    method: Solver,
    x: Tensor,
    v: Tensor,
    sigma: float,
    sigma_next: float,
    state: State,
    rng: StepNoise | None = None,
) -> tuple[Tensor, State]:
    """`method.step`, made continuous in where the first step begins (`schedules.from_strength`).

    Where a first step is shortened to nothing, the run must become the one that begins with the next step, though that
    one draws less noise and remembers less. So of a first step of which a `share` is left:

    - its fresh noise is a turn from the noise that is there to the noise that the whole step would leave, by the share;
    - in the steps that remember it, the result is the mean of two: with that memory, weight share^2, and without it.
      Both are made of one prediction, so this costs no call of the network. Squared, because slopes over a step of no
      width grow as 1 / share where a guide begins or ends;
    - if the whole step begins at 1, what is remembered is told as from there, since lambda falls to -inf on the way.

    Whole steps are those of `method.step`, bit for bit.
    """
    x_next, after = method.step(x, v, sigma, sigma_next, state, rng)
    if state.share == 1 or after.ask is not None:
        return x_next, after
    if state.twin is not None:
        other, twin = method.step(x, v, sigma, sigma_next, state.twin, rng)
        weight = state.share**2
        x_next = torch.lerp(other, x_next, weight)
        if len(twin.past) < len(after.past):
            return x_next, replace(after, twin=twin)
        kept = tuple(torch.lerp(a, b, weight) for a, b in zip(twin.kept, after.kept, strict=True))
        return x_next, replace(after, twin=None, share=1.0, kept=kept)
    if method.noisy and sigma_next > 0:
        picture = data(x, v, sigma)
        calm, fresh = (
            (y - (1 - sigma_next) * picture) / sigma_next for y in (euler(x, v, sigma, sigma_next)[0], x_next)
        )
        turned = [slerp(a, b, state.share) for a, b in zip(calm, fresh, strict=True)]
        x_next = (1 - sigma_next) * picture + sigma_next * torch.stack(turned)
    if not after.past:
        return x_next, replace(after, share=1.0)
    twin = State(steps=after.steps and after.steps - 1, skipped=after.skipped + 1)
    if state.begun == 1:
        picture = data(x, v, sigma)
        kept = tuple((x_next - (1 - sigma_next) * picture) / sigma_next for _ in after.kept) if sigma_next > 0 else ()
        after = replace(after, past=tuple((1.0, prediction) for _, prediction in after.past), kept=kept)
    return x_next, replace(after, twin=twin)


def integrate(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    method: Solver | str = "euler",
    rng: StepNoise | None = None,
    state: State | None = None,
) -> Tensor:
    """Follow any velocity (latents, noise level) -> v through noise levels. For networks there is `denoise`."""
    method = solver(method) if isinstance(method, str) else method
    state = start(sigmas) if state is None else state
    for sigma, sigma_next in pairwise(sigmas):
        x, state = advance(method, x, velocity(x, sigma), sigma, sigma_next, state, rng)
        while state.ask is not None:
            x, state = advance(method, x, velocity(x, state.ask), sigma, sigma_next, state, rng)
    return x
