"""Solvers on flows whose paths are known in closed form, and what holds for every one of them.

The first flow leads from normal noise to pictures of a normal distribution. It is linear in x, which raises the order
of some methods, so there is a second one that is not.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from miniflux.errors import InputError
from miniflux.models.flux1 import Flux1
from miniflux.sampling import SOLVERS, Solver, State, denoise, integrate, solver, step_noise
from miniflux.sampling.solvers import data, log_snr, unipc
from tests.tiny import FLUX1, flux1_inputs, randn, randomise

DOUBLE = torch.float64
MEAN, VARIANCE = 0.7, 0.3  # of the pictures
DETERMINISTIC = [name for name, method in SOLVERS.items() if not method.noisy]
NOISY = [*(name for name, method in SOLVERS.items() if method.noisy), "ddim:1", "ddim:0.4", "euler-ancestral:0.4"]
RENOISE = ["lcm", "stochastic"]  # made for networks that predict the end of the path, not the mean of all ends


def spread(sigma: float) -> float:
    """Standard deviation of the latents at a noise level."""
    return math.sqrt((1 - sigma) ** 2 * VARIANCE + sigma**2)


def velocity(x: Tensor, sigma: float) -> Tensor:
    """Expectation of noise - picture, given x."""
    rest = x - (1 - sigma) * MEAN
    picture = MEAN + (1 - sigma) * VARIANCE / spread(sigma) ** 2 * rest
    return sigma / spread(sigma) ** 2 * rest - picture


def follow(x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Where the path through x leads: (x - mean) / spread stays the same."""
    return (1 - sigma_next) * MEAN + (x - (1 - sigma) * MEAN) * spread(sigma_next) / spread(sigma)


CONSTANTS = torch.tensor([0.8, 1.3, 2.1, -2.5], dtype=DOUBLE)


def curved(x: Tensor, sigma: float) -> Tensor:
    """Has the paths 1 / (sigma^2 + constant)."""
    return -2 * sigma * x**2


STARTS = torch.linspace(-2, 2, 9, dtype=DOUBLE)
FLOWS = {
    "normal": (velocity, lambda sigma: follow(STARTS, 0.9, sigma)),
    "curved": (curved, lambda sigma: 1 / (sigma**2 + CONSTANTS)),
}

# How much of the past each solver looks at.
PAST = {"ipndm": 3, "dpmpp-2m": 1, "dpmpp-3m": 2, "res-multistep": 1, "unipc-1": 1, "unipc": 2, "unipc-2": 2}
PAST |= {"unipc-3": 3}
EVEN_IN_SIGMA = ["euler", "ddim", "heun", "midpoint", "rk4", "ipndm"]  # the others step evenly in lambda


def inner_levels(name: str, steps: int, before: int) -> list[float]:
    """From 0.9 to 0.1, with so many levels before that."""
    places = [i / steps for i in range(-before, steps + 1)]
    if name in EVEN_IN_SIGMA:
        return [0.9 - 0.8 * place for place in places]
    return [1 / (1 + math.exp((1 - 2 * place) * log_snr(0.9))) for place in places]


def inner_error(name: str, flow: str, steps: int, method: Solver | None = None) -> float:
    """Of a run that begins with an exact past."""
    field, path = FLOWS[flow]
    levels = inner_levels(name, steps, PAST.get(name, 0))
    earlier, levels = levels[: PAST.get(name, 0)], levels[PAST.get(name, 0) :]
    slopes = [field(path(sigma), sigma) for sigma in earlier]
    past = [
        (sigma, slope if name == "ipndm" else data(path(sigma), slope, sigma))
        for sigma, slope in zip(earlier, slopes, strict=True)
    ]
    kept = (path(earlier[-1]),) if name.startswith("unipc") else ()
    begin = State(past=tuple(reversed(past)), kept=kept)
    found = integrate(field, path(levels[0]), levels, method or name, state=begin)
    return float((found - path(levels[-1])).abs().max())


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("flow", FLOWS)
def test_order(name: str, flow: str) -> None:
    """Half the width of the steps, 2^-order of the error; the start is exact so as not to hide it."""
    observed = math.log2(inner_error(name, flow, 80) / inner_error(name, flow, 160))
    if (name, flow) == ("midpoint", "normal"):
        assert observed > SOLVERS[name].order  # its leading error cancels wherever spread(sigma)^2 is a quadratic
    else:
        assert abs(observed - SOLVERS[name].order) < 0.15


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_whole_runs(name: str) -> None:
    """From 1 to 0, with the solver's own first and last steps."""

    def error(steps: int) -> float:
        levels = [1 - i / steps for i in range(steps)] + [0.0]
        return float((integrate(velocity, STARTS, levels, name) - follow(STARTS, 1, 0)).abs().max())

    method = SOLVERS[name]
    claimed = min(method.order, method.start_order or method.order)
    assert math.log2(error(160) / error(320)) > claimed - 0.3
    assert error(160) < 2e-2


@pytest.mark.parametrize("name", [*SOLVERS, "ddim:1"])
@pytest.mark.parametrize(
    "levels", [[1.0, 0.0], [1.0, 0.4, 0.0], [1.0, 0.9, 0.2, 0.1, 0.0], [0.6, 0.3, 0.0], [0.6, 0.0]]
)
def test_straight_flow_is_exact(name: str, levels: list[float]) -> None:
    """All paths to one picture are straight: any solver arrives, from any level, in any number of steps."""
    picture, x = randn(3, 4, seed=1).double(), randn(3, 4, seed=2).double()

    def towards(x_now: Tensor, sigma: float) -> Tensor:
        if name == "rk4":  # asks for the velocity at 0 as well, where only the path can tell it
            return (x - picture) / levels[0]
        return (x_now - picture) / sigma

    found = integrate(towards, x, levels, name, step_noise([1, 2, 3]))
    assert_close(found, picture, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [*SOLVERS, "ddim:1", "euler-ancestral:0.4"])
@pytest.mark.parametrize(
    "levels", [[1.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.5, 0.1], [1.0, 0.7, 0.5, 0.2, 0.0], [0.8, 0.0]]
)
def test_finite(name: str, levels: list[float]) -> None:
    """lambda is infinite at both ends, the latents are not."""
    for dtype in (torch.float32, DOUBLE):
        x = randn(2, 5).to(dtype)
        found = integrate(velocity, x, levels, name, step_noise([1, 2]))
        assert found.isfinite().all() and found.dtype == dtype and found.shape == x.shape


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_runs_may_end_before_zero(name: str) -> None:
    """A run to 0.3 is near the path as well: the last step is no special one."""
    levels = [1 - 0.7 * i / 60 for i in range(61)]
    assert_close(integrate(velocity, STARTS, levels, name), follow(STARTS, 1, 0.3), rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", [*SOLVERS, "ddim:0.5", "ddim:0"])
@pytest.mark.parametrize("levels", [[1.0, 0.0], [1.0, 0.6, 0.3, 0.0], [1.0, 0.6, 0.3]])
def test_model_calls(name: str, levels: list[float]) -> None:
    """What is said before the run is what the run does."""
    asked: list[float] = []

    def counting(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return velocity(x, sigma)

    integrate(counting, randn(2, 3), levels, name, step_noise([1, 2]))
    assert len(asked) == solver(name).model_calls(levels)
    assert all(levels[-1] <= sigma <= levels[0] for sigma in asked)


def test_ddim_without_noise_is_euler() -> None:
    """Eta 0 is Euler's step itself, and eta near 0 is near it."""
    levels, rng = [1.0, 0.8, 0.3, 0.1, 0.0], step_noise(range(9))
    expected = integrate(velocity, STARTS, levels, "euler")
    assert torch.equal(integrate(velocity, STARTS, levels, "ddim"), expected)
    assert torch.equal(integrate(velocity, STARTS, levels, "ddim:0"), expected)
    assert_close(integrate(velocity, STARTS, levels, "ddim:1e-8", rng), expected, rtol=0, atol=1e-6)
    assert torch.equal(integrate(velocity, STARTS, levels, "euler-ancestral:0"), expected)
    assert_close(integrate(velocity, STARTS, levels, "euler-ancestral:1e-12", rng), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flow", FLOWS)
def test_dpmpp_2s_begins_at_one(flow: str) -> None:
    """From sigma 1, where lambda has no middle, its first step has an error of third order as well."""
    field = FLOWS[flow][0]

    def exact(sigma: float) -> Tensor:
        return follow(STARTS, 1, sigma) if flow == "normal" else 1 / (sigma**2 + CONSTANTS)

    def error(width: float) -> float:
        found = integrate(field, exact(1), [1.0, 1 - width], "dpmpp-2s")
        return float((found - exact(1 - width)).abs().max())

    assert math.log2(error(0.01) / error(0.005)) > 2.85


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("corrector", [True, False])
def test_unipc_orders(order: int, corrector: bool) -> None:
    """The predictor's order; the corrector raises it by one."""
    method = Solver("", unipc(order, corrector), 0)
    observed = math.log2(
        inner_error(f"unipc-{order}", "curved", 80, method) / inner_error(f"unipc-{order}", "curved", 160, method)
    )
    assert abs(observed - (order + corrector)) < 0.15


@pytest.mark.parametrize("order", [0, 4])
def test_unipc_has_three_orders(order: int) -> None:
    with pytest.raises(InputError, match="order of UniPC must be 1, 2 or 3"):
        unipc(order)


# Fresh noise.


def marginal_is_right(x: Tensor, sigma: float) -> None:
    """Mean and variance are within four standard errors, and a little for the width of the steps."""
    deviation, count = spread(sigma), x.numel()
    assert abs(float(x.mean()) - (1 - sigma) * MEAN) < 4 * deviation / math.sqrt(count) + 2e-3
    assert abs(float(x.var()) / deviation**2 - 1) < 4 * math.sqrt(2 / count) + 2e-2


@pytest.mark.parametrize("name", [name for name in NOISY if name not in RENOISE])
@pytest.mark.parametrize("end", [0.0, 0.4])
def test_noise_keeps_the_distribution(name: str, end: float) -> None:
    """As much is drawn as was taken away: the latents of all runs stay distributed as the flow says."""
    levels = [1 - (1 - end) * i / 200 for i in range(200)] + [end]
    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    marginal_is_right(integrate(velocity, x, levels, name, step_noise([5])), end)


@pytest.mark.parametrize("name", RENOISE)
def test_new_noise_keeps_the_distribution(name: str) -> None:
    """With a network that knows where each path ends, few steps are enough."""

    def to_the_end(x: Tensor, sigma: float) -> Tensor:
        return (x - follow(x, sigma, 0)) / sigma

    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    for levels in ([1.0, 0.5, 0.0], [1.0, 0.7, 0.5, 0.4]):
        marginal_is_right(integrate(to_the_end, x, levels, name, step_noise([5])), levels[-1])


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_used(name: str) -> None:
    """Another seed is another result, the same seed the same one; none at all is refused."""
    levels = [1.0, 0.6, 0.3, 0.0]
    one, again, other = (integrate(velocity, randn(1, 9), levels, name, step_noise([seed])) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 1e-2
    with pytest.raises(InputError, match="rng must be given"):
        integrate(velocity, randn(1, 9), levels, name)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_no_noise_where_none_is_promised(name: str) -> None:
    def never(step: int, x: Tensor) -> Tensor:
        raise AssertionError(f"{name} drew noise")

    integrate(velocity, randn(1, 9), [1.0, 0.6, 0.3, 0.0], name, never)


# Names.


@pytest.mark.parametrize("name", ["nope", "", "Euler", "heun:1", "euler:0.5", "dpmpp-2m-sde:1", "lcm:0", "nope:1"])
def test_unknown_names(name: str) -> None:
    """The message lists all that are known."""
    with pytest.raises(InputError, match="unknown solver") as caught:
        solver(name)
    assert all(known in str(caught.value) for known in [*SOLVERS, "ddim:ETA", "euler-ancestral:ETA", repr(name)])


@pytest.mark.parametrize("base", ["ddim", "euler-ancestral"])
@pytest.mark.parametrize("eta", ["2", "-0.1", "nan", "inf", "x", "", "0.5:1"])
def test_bad_eta(base: str, eta: str) -> None:
    with pytest.raises(InputError, match="number from 0 to 1"):
        solver(f"{base}:{eta}")


def test_names_are_kept() -> None:
    """A solver answers to the name it was asked for by."""
    for name in [*SOLVERS, "ddim:0.5", "euler-ancestral:0.25"]:
        assert solver(name).name == name
    assert solver("ddim:0.5").noisy and not solver("ddim:0").noisy and not solver("euler-ancestral:0").noisy


# Purity.


@pytest.mark.parametrize("name", [*SOLVERS, "ddim:0.5"])
def test_nothing_is_changed_in_place(name: str) -> None:
    """Neither latents, nor velocities, nor what a state holds; so that every state may be gone back to."""
    method, rng = solver(name), step_noise([1, 2])
    x, state, seen = randn(2, 7), State(steps=5), []
    for a, b in pairwise([1.0, 0.8, 0.6, 0.35, 0.1, 0.0]):
        while True:
            v = velocity(x, a if state.ask is None else state.ask)
            held = [x, v, *state.kept, *(prediction for _, prediction in state.past)]
            copies = [tensor.clone() for tensor in held]
            x_next, after = method.step(x, v, a, b, state, rng)
            assert after is not state
            twice = method.step(x, v, a, b, state, rng)
            assert torch.equal(twice[0], x_next) and (twice[1].step, twice[1].ask) == (after.step, after.ask)
            seen.append((held, copies))
            x, state = x_next, after
            if state.ask is None:
                break
    for held, copies in seen:
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(held, copies, strict=True))
    assert state.step == 5
    with pytest.raises(FrozenInstanceError):
        state.step = 0


@pytest.mark.parametrize("name", [*SOLVERS, "ddim:0.5"])
def test_two_runs_may_take_turns(name: str) -> None:
    """One solver, two runs on different levels, a step of each at a time: as if each were alone."""
    method = solver(name)
    plans = [([1.0, 0.7, 0.4, 0.2, 0.0], randn(1, 5, seed=1)), ([0.9, 0.8, 0.5, 0.3, 0.1], randn(1, 5, seed=2))]
    alone = [integrate(velocity, x, levels, method, step_noise([i])) for i, (levels, x) in enumerate(plans)]
    runs = [(x, State(steps=4)) for _, x in plans]
    for step in range(4):
        for i, (levels, _) in enumerate(plans):
            x, state = runs[i]
            a, b = levels[step], levels[step + 1]
            x, state = method.step(x, velocity(x, a), a, b, state, step_noise([i]))
            while state.ask is not None:
                x, state = method.step(x, velocity(x, state.ask), a, b, state, step_noise([i]))
            runs[i] = x, state
    assert all(torch.equal(x, expected) for (x, _), expected in zip(runs, alone, strict=True))


def in_threads(work: list) -> None:
    """Four threads at a time give, bit for bit, what one after the other gives."""
    expected = [run() for run in work]
    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(run) for run in work * 2]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 2, strict=True))
    assert len({tuple(result.flatten()[:3].tolist()) for result in expected}) > len(work) // 2  # not all the same


def test_threads_share_solvers() -> None:
    """32 runs: every solver, on two schedules."""
    short, long = [1.0, 0.5, 0.0], [1 - i / 25 for i in range(25)] + [0.0]
    names = [*SOLVERS, "ddim:0.5"] * 2

    def plan(i: int, name: str):
        levels = short if i % 2 else long
        return lambda: integrate(velocity, randn(2, 50, seed=i), levels, name, step_noise([i, i + 1]))

    in_threads([plan(i, name) for i, name in enumerate(names[:32])])


def test_threads_share_a_network() -> None:
    """Whole runs of one network, each with a solver and a schedule of its own."""
    model, inputs = randomise(Flux1(FLUX1)), flux1_inputs(FLUX1, rows=2, columns=2)
    names = ["heun", "unipc-3", "dpmpp-2m-sde", "ipndm", "rk4", "dpmpp-3m", "lcm", "euler"]

    def plan(i: int, name: str):
        levels = [1 - j / (i % 3 + 2) for j in range(i % 3 + 2)] + [0.0]
        fixed = [inputs[key] for key in ("img_ids", "txt", "txt_ids", "y")]
        noise = randn(*inputs["img"].shape, seed=i)
        return lambda: denoise(model, noise, *fixed, levels, method=name, rng=step_noise([i, 9]))

    in_threads([plan(i, name) for i, name in enumerate(names)])


# The numbers behind.


@given(st.floats(1e-12, 1 - 1e-12))
def test_log_snr(sigma: float) -> None:
    """The inverse of a logistic function; odd around 1/2, and infinite at the ends."""
    assert 1 / (1 + math.exp(log_snr(sigma))) == pytest.approx(sigma, rel=1e-9)
    assert log_snr(1 - sigma) == pytest.approx(
        -log_snr(sigma), rel=1e-6, abs=1e-6 * (1 + 1e-16 / min(sigma, 1 - sigma))
    )
    assert (log_snr(0), log_snr(1)) == (math.inf, -math.inf)
