"""Every schedule that diffusers has for flows, by the names they have here; and the ones that differ on purpose."""

from __future__ import annotations

import math

import numpy as np
import pytest

from miniflux.sampling import schedule
from miniflux.sampling.schedules import dynamic_shift, static_shift

diffusers = pytest.importorskip("diffusers")

STEPS = [1, 2, 12, 50]
SHIFTS = [0.3, 1.0, 3.0, 7.5]
MUS = [-0.4, 0.5, 1.15, 3.23]
# The flows of these begin at 0.999.
DPMPP = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "SASolverScheduler")
NEVER_ENDING = DPMPP[2:]


def levels(scheduler, *arguments, **options) -> list[float]:
    scheduler.set_timesteps(*arguments, **options)
    return scheduler.sigmas.tolist()


def flow(name: str, **options):
    return getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction", **options)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", DPMPP)
@pytest.mark.parametrize("shift", SHIFTS)
def test_dpmpp(name: str, shift: float, steps: int) -> None:
    """`use_flow_sigmas`, a static `flow_shift`. DEIS and SA-Solver write their last level twice and never reach 0."""
    theirs = levels(flow(name, flow_shift=shift), steps)
    ours = list(schedule("flow-dpmpp", steps, static_shift(shift)))
    assert ours[:-1] == pytest.approx(theirs[:-1], abs=1e-6)
    assert theirs[-1] == (theirs[-2] if name in NEVER_ENDING else 0) and ours[-1] == 0


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("mu", MUS)
def test_dpmpp_dynamic(mu: float, steps: int) -> None:
    """`use_dynamic_shifting`: mu takes the place of the logarithm of the shift."""
    theirs = levels(flow(DPMPP[0], use_dynamic_shifting=True), steps, mu=mu)
    assert list(schedule("flow-dpmpp", steps, dynamic_shift(mu))) == pytest.approx(theirs, abs=1e-6)


def unipc(**options):
    return flow("UniPCMultistepScheduler", **options)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_unipc(shift: float, steps: int) -> None:
    theirs = levels(unipc(flow_shift=shift), steps)
    assert list(schedule("flow-unipc", steps, static_shift(shift))) == pytest.approx(theirs, abs=1e-7)


@pytest.mark.parametrize("steps", STEPS[1:])
@pytest.mark.parametrize("mu", MUS)
def test_unipc_dynamic(mu: float, steps: int) -> None:
    """Also with a terminal level, and with levels of the user's own, which it shifts as `uniform` does."""
    curve = dynamic_shift(mu)
    theirs = levels(unipc(use_dynamic_shifting=True), steps, mu=mu)
    assert list(schedule("flow-unipc", steps, curve)) == pytest.approx(theirs, abs=1e-7)
    theirs = levels(unipc(use_dynamic_shifting=True, shift_terminal=0.02), steps, mu=mu)
    assert list(schedule("flow-unipc", steps, curve, terminal=0.02)) == pytest.approx(theirs, abs=1e-6)
    theirs = levels(unipc(use_dynamic_shifting=True), sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    assert list(schedule("uniform", steps, curve))[1:] == pytest.approx(theirs[1:], abs=1e-7)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("mu", MUS)
def test_euler_without_levels(mu: float, steps: int) -> None:
    """What the flow Euler of diffusers does when it is given a number of steps alone: down to 1/1000."""
    theirs = levels(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), steps, mu=mu)
    assert list(schedule("flow-euler", steps, dynamic_shift(mu))) == pytest.approx(theirs, abs=3e-7)
    theirs = levels(diffusers.FlowMatchEulerDiscreteScheduler(), steps)
    assert list(schedule("flow-euler", steps)) == pytest.approx(theirs, abs=3e-7)


@pytest.mark.parametrize("steps", STEPS)
def test_heun_without_levels(steps: int) -> None:
    """It holds every level but the first and the last twice, and knows no dynamic shift."""
    theirs = levels(diffusers.FlowMatchHeunDiscreteScheduler(), steps)
    once = [theirs[0], *theirs[1:-1:2], theirs[-1]]
    assert list(schedule("flow-euler", steps)) == pytest.approx(once, abs=3e-7)


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_theirs_shifts_twice(kind: str) -> None:
    """A static shift is applied when their scheduler is made, to the levels that it then shifts again: the lowest of
    them is shift^2 and not shift times as high as it was. Ours is shifted once."""
    shift, steps = 3.0, 20
    theirs = levels(getattr(diffusers, kind)(shift=shift), steps)
    lowest = theirs[-2]
    twice = static_shift(shift)(static_shift(shift)(1 / 1000))
    assert lowest == pytest.approx(twice, abs=3e-7)
    ours = schedule("flow-euler", steps, static_shift(shift))
    assert ours[-2] == pytest.approx(static_shift(shift)(1 / 1000), abs=1e-12) and lowest > 2.9 * ours[-2]


def test_theirs_remembers_mu() -> None:
    """Their DPM-Solver writes mu into its own settings: the next run without one has the shift of the run before."""
    scheduler = flow(DPMPP[0], use_dynamic_shifting=True)
    before = levels(scheduler, 10)
    levels(scheduler, 10, mu=1.15)
    assert levels(scheduler, 10) != pytest.approx(before, abs=1e-3)


def test_theirs_mixes_two_kinds_of_noise_level() -> None:
    """With exponential or beta spacing, their UniPC takes levels of the other kind of diffusion (noise over signal, up
    to about 150) for flows; of ours none is above 1."""
    for option in ("use_exponential_sigmas", "use_beta_sigmas"):
        if option == "use_beta_sigmas":
            pytest.importorskip("scipy")
        assert max(levels(unipc(**{option: True}), 10)) > 100
    assert all(math.isfinite(sigma) and sigma <= 1 for sigma in schedule("exponential", 10))
