"""Ways to spread the steps, against diffusers, closed forms and the properties every schedule must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniflux.errors import InputError
from miniflux.sampling import custom_schedule, flux1_schedule, schedule
from miniflux.sampling.schedules import (
    OPTIMAL_STEPS,
    SPACINGS,
    beta_quantile,
    dynamic_shift,
    flux1_mu,
    static_shift,
    unshifted,
)

CURVES = [unshifted, dynamic_shift(1.15), static_shift(3.0)]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
def test_levels_fall_from_one_to_zero(spacing: str, curve, steps: int) -> None:
    found = schedule(spacing, steps, curve)
    start = {"ddim-uniform": 0.0, "optimal-steps": 0.99, "flow-dpmpp": 0.998}.get(
        spacing, 0.999
    )  # which stop short of the top
    assert found[-1] == 0 and start < found[0] <= 1
    assert abs(found.steps - steps) <= (1 if spacing in ("ddim-uniform", "beta-comfyui") else 0)


@pytest.mark.parametrize("spacing", SPACINGS)
@given(shift=st.floats(1e-3, 1e3), steps=st.integers(1, 50))
def test_no_shift_rounds_a_level_above_one(spacing: str, shift: float, steps: int) -> None:
    """0.02 and others once did, and the schedule was refused."""
    assert max(schedule(spacing, steps, static_shift(shift))) <= 1


def test_the_top_is_one_for_shifts_that_round_up() -> None:
    assert schedule("beta", 10, static_shift(0.020668109911469727))[0] == 1.0


@pytest.mark.parametrize("steps", [1, 4, 10, 14, 20])
def test_optimal_steps_interpolates_its_table(steps: int) -> None:
    """As ComfyUI: the table at its own 11 levels, log-linear in between, the last level replaced by 0."""
    expected = np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 11), np.log(OPTIMAL_STEPS)))
    assert list(schedule("optimal-steps", steps))[:-1] == pytest.approx(expected[:-1].tolist(), abs=1e-12)
    assert OPTIMAL_STEPS[1] == 0.9886 and OPTIMAL_STEPS[-2] == 0.2808


@given(st.integers(1, 60), st.integers(1, 10_000))
def test_uniform_is_the_release(steps: int, tokens: int) -> None:
    assert list(schedule("uniform", steps, dynamic_shift(flux1_mu(tokens)))) == flux1_schedule(steps, tokens)
    assert list(schedule("uniform", steps)) == flux1_schedule(steps, tokens, shift=False)


@given(st.floats(0.05, 20), st.floats(0, 1))
def test_both_shifts_are_one_curve(shift: float, t: float) -> None:
    assert static_shift(shift)(t) == pytest.approx(dynamic_shift(math.log(shift))(t), abs=1e-12)


@pytest.mark.parametrize(
    ("spacing", "options"),
    [("uniform", {}), ("karras", {"use_karras_sigmas": True}), ("exponential", {"use_exponential_sigmas": True})],
)
@pytest.mark.parametrize("steps", [2, 4, 28])
@pytest.mark.parametrize("mu", [0.3, 1.15])
def test_against_diffusers(spacing: str, options: dict[str, bool], steps: int, mu: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    assert list(schedule(spacing, steps, dynamic_shift(mu))) == pytest.approx(theirs.sigmas.tolist(), abs=3e-7)


def test_terminal_and_static_shift_against_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    theirs.set_timesteps(sigmas=np.linspace(1, 0.1, 10), mu=0.9)
    ours = schedule("uniform", 10, dynamic_shift(0.9), terminal=0.02)
    assert list(ours) == pytest.approx(theirs.sigmas.tolist(), abs=3e-7)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    assert list(schedule("uniform", 10, static_shift(3.0))) == pytest.approx(theirs.sigmas.tolist(), abs=3e-7)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0])
def test_beta_quantiles(p: float) -> None:
    """Closed forms: the arcsine law, and powers; and symmetry for the parameters that are used."""
    assert beta_quantile(p, 0.5, 0.5) == pytest.approx(math.sin(math.pi * p / 2) ** 2, abs=1e-12)
    assert beta_quantile(p, 1, 3) == pytest.approx(1 - (1 - p) ** (1 / 3), abs=1e-12)
    assert beta_quantile(p, 2.5, 1) == pytest.approx(p ** (1 / 2.5), abs=1e-12)
    assert beta_quantile(p, 0.6, 0.6) == pytest.approx(1 - beta_quantile(1 - p, 0.6, 0.6), abs=1e-9)


def test_a_schedule_prints_itself() -> None:
    text = str(schedule("uniform", 4, dynamic_shift(1.15)))
    assert all(number in text for number in ("1.00000", "0.90453", "0.75951", "0.51284", "0.00000"))


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], "at least two"),
        ([1.0, 0.5, 0.5, 0.0], "noise level 2 is 0.5, not below"),
        ([1.0, float("nan"), 0.0], "noise level 1 is nan"),
        ([1.5, 0.0], "noise level 0 is 1.5"),
        ([0.5, 0.7], "not below"),
        ([1.0, -0.1], "noise level 1 is -0.1"),
    ],
)
def test_bad_levels_are_refused(sigmas: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        custom_schedule(sigmas)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="unknown schedule 'nope'; known: uniform, flow-euler"):
        schedule("nope", 4)
    with pytest.raises(InputError, match="steps must be"):
        schedule("karras", 0)
    with pytest.raises(InputError, match="shift must be a positive number, got nan"):
        static_shift(float("nan"))
    with pytest.raises(InputError, match="terminal must be between 0 and 1, got 2"):
        schedule("uniform", 4, terminal=2)
    with pytest.raises(InputError, match="needs one of uniform, flow-euler"):
        schedule("karras", 4, terminal=0.1)
