"""Noise levels against the original release, published values, and an evaluation of our own in another form."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from miniflux.errors import InputError
from miniflux.sampling import flux1_schedule, flux2_schedule, flux3_schedule
from miniflux.sampling.schedules import flux1_mu, flux2_mu, shift_sigma

SCHEDULES = {
    "flux1_dev": flux1_schedule,
    "flux1_schnell": lambda steps, tokens: flux1_schedule(steps, tokens, shift=False),
    "flux2": flux2_schedule,
}
CASES = [(20, 1024), (28, 4096), (4, 4096), (50, 9216)]

# image side in pixels, mu of FLUX.1, mu of FLUX.2 at 4, 28 and 50 steps
MU = [
    (512, "0.630000", "2.030690", "1.859177", "1.701956"),
    (768, "0.846667", "2.139227", "1.980954", "1.835871"),
    (1024, "1.150000", "2.291180", "2.151443", "2.023351"),
    (1536, "2.016667", "2.016659", "2.016659", "2.016659"),
    (2048, "3.230000", "3.229986", "3.229986", "3.229986"),
]


def independent(name: str, steps: int, tokens: int) -> np.ndarray:
    """The same curve as s t / (1 + (s - 1) t) with s = e^mu, mu from a fitted line and from blending two lines."""
    t = np.linspace(1, 0, steps + 1)
    if name == "flux1_schnell":
        return t
    if name == "flux1_dev":
        mu = np.polynomial.Polynomial.fit([256, 4096], [0.5, 1.15], 1)(tokens)
    else:
        at_200 = 0.00016927 * tokens + 0.45666666
        at_10 = 0.0000873809524 * tokens + 1.89833333 if tokens <= 4300 else at_200
        mu = at_10 + (steps - 10) / (200 - 10) * (at_200 - at_10)
    s = np.exp(mu)
    return s * t / (1 + (s - 1) * t)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("steps", "tokens"), CASES)
def test_equals_the_release(golden, name: str, steps: int, tokens: int) -> None:
    """The release computes in float32, hence the tolerance."""
    expected = golden("sampling")[f"{name}_{steps}_{tokens}"]
    actual = torch.tensor(SCHEDULES[name](steps, tokens), dtype=torch.float64)
    assert_close(actual, expected.double(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("steps", "tokens"), [*CASES, (1, 16), (3, 4300), (3, 4301), (333, 100)])
def test_equals_an_independent_evaluation(name: str, steps: int, tokens: int) -> None:
    """Nothing is lost to float32 on the way."""
    np.testing.assert_allclose(SCHEDULES[name](steps, tokens), independent(name, steps, tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("side", "flux1", "at_4", "at_28", "at_50"), MU)
def test_mu_to_the_printed_digit(side: int, flux1: str, at_4: str, at_28: str, at_50: str) -> None:
    """Values computed from the peers' formulas by hand."""
    tokens = (side // 16) ** 2
    assert f"{flux1_mu(tokens):.6f}" == flux1
    assert [f"{flux2_mu(steps, tokens):.6f}" for steps in (4, 28, 50)] == [at_4, at_28, at_50]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("flux1_dev", ["1.000000", "0.904531", "0.759511", "0.512844", "0.000000"]),
        ("flux2", ["1.000000", "0.967384", "0.908144", "0.767200", "0.000000"]),
        ("flux1_schnell", ["1.000000", "0.750000", "0.500000", "0.250000", "0.000000"]),
    ],
)
def test_four_steps_at_1024_pixels(name: str, values: list[str]) -> None:
    """The schedule a reader can check with a calculator."""
    assert [f"{sigma:.6f}" for sigma in SCHEDULES[name](4, 4096)] == values


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 300), st.integers(1, 20_000))
def test_shape_of_every_schedule(name: str, steps: int, tokens: int) -> None:
    """steps + 1 floats, strictly falling from exactly 1 to exactly 0."""
    sigmas = SCHEDULES[name](steps, tokens)
    assert len(sigmas) == steps + 1
    assert all(type(sigma) is float for sigma in sigmas)
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert all(a > b for a, b in pairwise(sigmas))


@given(st.floats(0.001, 0.999), st.floats(-3, 3))
def test_shift_moves_the_odds(sigma: float, mu: float) -> None:
    """The shift multiplies the odds sigma / (1 - sigma) by e^mu; 0 and 1 stay, and -mu undoes it."""
    shifted = shift_sigma(mu, sigma)
    assert math.isclose(shifted / (1 - shifted), math.exp(mu) * sigma / (1 - sigma), rel_tol=1e-9)
    assert math.isclose(shift_sigma(-mu, shifted), sigma, rel_tol=1e-9)
    assert (shift_sigma(mu, 0.0), shift_sigma(mu, 1.0)) == (0.0, 1.0)


@pytest.mark.parametrize("steps", [0, -1, 2.0, "4", True, None])
@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_must_be_a_whole_number(name: str, steps: object) -> None:
    """The message names the value."""
    with pytest.raises(InputError, match=f"steps must be a whole number of at least 1, got {steps!r}"):
        SCHEDULES[name](steps, 4096)


def test_levels_of_flux3() -> None:
    """As the pipeline of diffusers gives them for the distilled model, and ends of those for the base."""
    expected = [1, 0.990472, 0.979802, 0.967773, 0.954107, 0.938446, 0.920319, 0.899092, 0.873897]
    expected += [0.843505, 0.806126, 0.759036, 0.697885, 0.615271, 0.497487, 0.316005, 0]
    assert flux3_schedule(16) == pytest.approx(expected, abs=1e-6)
    assert flux3_schedule(50)[1] == pytest.approx(0.997064, abs=1e-6)
    assert flux3_schedule(50)[-2:] == pytest.approx([0.123905, 0], abs=1e-6)
