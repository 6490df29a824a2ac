"""Seeded noise, and runs that begin, pause, rise and end where the user wants."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from miniflux.errors import InputError
from miniflux.models.flux1 import Flux1
from miniflux.sampling import (
    SOLVERS,
    Moment,
    Schedule,
    State,
    Words,
    add_noise,
    custom_schedule,
    from_strength,
    guide,
    initial_noise,
    integrate,
    schedule,
    step_noise,
    varied_noise,
    with_restarts,
)
from miniflux.sampling.denoising import RESTART_KEY
from miniflux.sampling.noise import slerp
from tests.sampling.test_denoising import Field, run
from tests.sampling.test_solvers import (
    DETERMINISTIC,
    MEAN,
    NOISY,
    RENOISE,
    VARIANCE,
    follow,
    marginal_is_right,
    velocity,
)
from tests.tiny import FLUX1, flux1_inputs, randn, randomise

SEEDS = st.integers(0, 2**64 - 1)
LEVELS = [1.0, 0.7, 0.4, 0.15, 0.0]
DOUBLE = torch.float64


@pytest.fixture(scope="module")
def model() -> Flux1:
    return randomise(Flux1(FLUX1))


@pytest.fixture
def inputs() -> dict:
    return flux1_inputs(FLUX1, rows=2, columns=2)


# Noise of a step.


@given(st.lists(SEEDS, min_size=1, max_size=4), st.integers(0, 2**63))
def test_rows_do_not_see_each_other(seeds: list[int], step: int) -> None:
    """A row of a batch is what its seed gives alone."""
    together = step_noise(seeds)(step, torch.zeros(len(seeds), 3, 2))
    alone = [step_noise([seed])(step, torch.zeros(1, 3, 2)) for seed in seeds]
    assert torch.equal(together, torch.cat(alone))


def test_order_of_calls_does_not_matter() -> None:
    """Nothing is remembered: not the calls before, not torch's global generator."""
    x, draw = torch.zeros(2, 7), step_noise([3, 4])
    forwards = [draw(step, x) for step in range(4)]
    torch.manual_seed(99)
    backwards = [draw(step, x) for step in reversed(range(4))][::-1]
    fresh = [step_noise([3, 4])(step, x) for step in range(4)]
    for a, b, c in zip(forwards, backwards, fresh, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@given(SEEDS, SEEDS, st.integers(0, 1000), st.integers(0, 1000))
def test_every_seed_and_step_has_its_own(seed: int, other: int, step: int, later: int) -> None:
    x = torch.zeros(1, 8)
    if (seed, step) != (other, later):
        assert not torch.equal(step_noise([seed])(step, x), step_noise([other])(later, x))


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_all_bits_of_a_seed_count(seed: int) -> None:
    """Also those that torch's own generator leaves out; and steps are no seeds."""
    x = torch.zeros(1, 50)
    draws = [step_noise([s])(0, x) for s in (seed, seed + 2**32, seed + 2**63)]
    draws += [step_noise([seed])(k, x) for k in (2**32, RESTART_KEY + 1)] + [step_noise([1])(seed + 5, x)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_numbers_are_standard_normal() -> None:
    """In mean, spread and shape, in the dtype asked for, and unrelated between rows, steps and starting noise."""
    draw, x = step_noise([5, 6]), torch.zeros(2, 40_000)
    first, second = draw(0, x), draw(1, x)
    for row in (*first, *second):
        assert abs(row.mean()) < 0.02 and abs(row.std() - 1) < 0.02
        assert abs((row.abs() < 1).float().mean() - math.erf(0.5**0.5)) < 0.01
    start = initial_noise(800, 800, 5).flatten()[:40_000]
    for a, b in pairwise([first[0], first[1], second[0], second[1], start, first[0]]):
        assert abs((a * b).mean()) < 0.02
    for dtype in (torch.bfloat16, DOUBLE):
        other = draw(0, x.to(dtype))
        assert other.dtype == dtype
        assert torch.equal(other, first.to(dtype))


def test_one_seed_per_row() -> None:
    with pytest.raises(InputError, match="2 seeds for a batch of 3"):
        step_noise([1, 2])(0, torch.zeros(3, 4))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_bad_seeds_are_refused(seed: int) -> None:
    """As they are for the starting noise."""
    with pytest.raises(InputError, match="seed"):
        step_noise([seed])(0, torch.zeros(1, 4))


@pytest.mark.parametrize("name", [*NOISY, "euler"])
def test_picture_of_a_batch_equals_it_alone(model: Flux1, name: str) -> None:
    """Stochastic solvers too: neither noise nor latents depend on the company."""
    inputs, seeds = flux1_inputs(FLUX1, batch=3, rows=2, columns=2), [5, 6, 7]
    together = run(model, inputs, LEVELS, method=name, rng=step_noise(seeds))
    assert (together[0] - together[1]).abs().max() > 0.1
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        alone = run(model, one, LEVELS, method=name, rng=step_noise(seeds[i : i + 1]))
        assert_close(alone, together[i : i + 1], rtol=0, atol=1e-5)


# Variations of a picture.


@given(st.floats(0, 1), st.integers(0, 1000))
def test_slerp_turns_evenly(amount: float, seed: int) -> None:
    """The angle to the first grows with the amount; between noises of one length, the length stays."""
    a, b = randn(50, seed=seed).double(), randn(50, seed=seed + 1).double()
    b = b * (a.norm() / b.norm())
    found = slerp(a, b, amount)
    assert float(found.norm()) == pytest.approx(float(a.norm()), rel=1e-9)

    def angle(x: Tensor, y: Tensor) -> float:
        return 2 * math.atan2(float((x - y).norm()), float((x + y).norm()))

    assert angle(a, found) == pytest.approx(amount * angle(a, b), abs=1e-6)


def test_slerp_ends() -> None:
    """Amount 0 is the first, 1 the second, whatever their lengths; equal and opposite ones are no trouble."""
    a, b = randn(4, 5, seed=1), 3 * randn(4, 5, seed=2)
    assert_close(slerp(a, b, 0.0), a, rtol=0, atol=1e-6)
    assert_close(slerp(a, b, 1.0), b, rtol=0, atol=1e-6)
    assert_close(slerp(a, a, 0.3), a, rtol=0, atol=1e-6)
    assert slerp(a, -a, 0.3).isfinite().all()


def test_varied_noise() -> None:
    """Bit for bit the noises of the two seeds at the ends; normal, and more like the nearer one, in between."""
    one, two = initial_noise(256, 320, 3), initial_noise(256, 320, 8)
    assert torch.equal(varied_noise(256, 320, 3, (8, 0.0)), one)
    assert torch.equal(varied_noise(256, 320, 3, (8, 1.0)), two)
    assert torch.equal(varied_noise(256, 320, 3, (8, 0)), one)
    near = varied_noise(256, 320, 3, (8, 0.2))
    assert near.shape == one.shape and near.dtype == torch.float32
    assert abs(near.std() - 1) < 0.02
    assert (near * one).mean() > 0.9 > 0.4 > (near * two).mean() > 0.2
    assert varied_noise(64, 64, 3, (8, 0.5), channels=4).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("amount", [math.nan, 2, -0.1, math.inf])
def test_bad_variations(amount: float) -> None:
    with pytest.raises(InputError, match="amount of variation must be a number from 0 to 1"):
        varied_noise(64, 64, 1, (2, amount))


def test_bad_seeds_of_variations() -> None:
    """Both seeds are checked."""
    for seed, other in ((-1, 2), (1, -2)):
        with pytest.raises(InputError, match="seed must be"):
            varied_noise(64, 64, seed, (other, 0.5))


# Part of a schedule.

PICTURE = MEAN + math.sqrt(VARIANCE) * torch.linspace(-1.5, 1.5, 9, dtype=DOUBLE)
NOISE = torch.linspace(2, -1, 9, dtype=DOUBLE)
BOUNDARIES = 6
MULTISTEP = ["ipndm", "dpmpp-2m", "dpmpp-3m", "res-multistep", "unipc", "unipc-2", "unipc-3"]


def changed(strength: float, name: str, steps: int = BOUNDARIES, dtype: torch.dtype = DOUBLE) -> Tensor:
    """The picture, changed by a strength."""
    part = from_strength(schedule("uniform", steps), strength)
    begin = (1 - part[0]) * PICTURE + part[0] * NOISE
    return integrate(velocity, begin.to(dtype), part, name).double()


def jump(place: float, name: str) -> float:
    """Between a strength just below a place and one just above (or at 1)."""
    return float((changed(min(1, place + 1e-6), name) - changed(place - 1e-6, name)).abs().max())


def jumps(name: str) -> list[float]:
    """At every boundary of a step, and in the middle of every step."""
    return [jump(i / BOUNDARIES / 2, name) for i in range(1, 2 * BOUNDARIES)]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_strength_is_continuous(name: str) -> None:
    """A millionth more is hardly another picture, also where a step more begins; a lot more is another picture."""
    assert max(jumps(name)) < 2e-5 and jump(1, name) < 2e-5
    assert (changed(0.9, name) - changed(0.3, name)).abs().max() > 0.1
    assert (changed(1e-6, name) - PICTURE).abs().max() < 1e-5


@pytest.mark.parametrize("name", MULTISTEP)
def test_rounding_of_a_strength_does_no_harm(name: str) -> None:
    """(1 - 0.56) * 25 is 10.999...: as a step of 1e-16 before the others, it must not spoil a run in float32."""
    begin, levels = 0.44 * PICTURE + 0.56 * NOISE, schedule("uniform", 25)[11:]
    exact = follow(begin, 0.56, 0)
    clean = float((integrate(velocity, begin, levels, name, state=State(steps=14, skipped=11)) - exact).abs().max())
    assert float((changed(0.56, name, 25, torch.float32) - exact).abs().max()) < 2 * clean + 1e-5


def test_no_step_is_only_rounding() -> None:
    """A first step narrower than what the network can tell apart costs a call for nothing."""
    narrow = []
    for steps in range(2, 51):
        whole = schedule("uniform", steps)
        for percent in range(1, 101):
            part = from_strength(whole, percent / 100)
            if part[0] - part[1] < 1e-9:
                narrow.append((steps, percent / 100, part[0] - part[1]))
    assert narrow == []


@given(st.floats(1e-6, 1), st.sampled_from(["uniform", "karras", "linear-quadratic"]), st.integers(1, 30))
def test_part_of_a_schedule(strength: float, spacing: str, steps: int) -> None:
    """It falls, ends with the levels of the whole, and has a share of its steps, rounded up."""
    whole = schedule(spacing, steps)
    part = from_strength(whole, strength)
    assert all(a > b for a, b in pairwise(part))
    assert part[1:] == whole[len(whole) - len(part) + 1 :]
    assert whole[len(whole) - len(part)] >= part[0] > part[1]
    assert abs(part.steps - strength * steps) < 1 + 1e-9


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_full_strength_is_the_whole_schedule(steps: int) -> None:
    for spacing in ("uniform", "beta", "ddim-uniform"):
        whole = schedule(spacing, steps)
        assert from_strength(whole, 1) == whole and from_strength(whole, 1.0) == whole


@pytest.mark.parametrize("strength", [0, -1, 2, math.nan, math.inf, 1 + 1e-9])
def test_bad_strengths(strength: float) -> None:
    with pytest.raises(InputError, match="strength must be a number above 0 and at most 1"):
        from_strength(schedule("uniform", 4), strength)


def test_tiny_strengths_still_are_schedules() -> None:
    """Any strength above 0 leaves a first and a last level."""
    for strength in (1e-15, 1e-17, 5e-324):
        part = from_strength(schedule("uniform", 4), strength)
        assert len(part) >= 2 and part[0] > part[-1] == 0


# Restarts.


def test_shape_of_restarts() -> None:
    """Down to the lower level, back up and down again, and on."""
    whole = custom_schedule([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    twice = with_restarts(whole, 0.38, 0.81, 2)
    assert list(twice) == [1.0, 0.8, 0.6, 0.4, 0.8, 0.6, 0.4, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert (twice.restarts, twice.steps, len(twice)) == (2, 9, 12)
    assert twice.falling == [1.0, 0.8, 0.6, 0.4, 0.6, 0.4, 0.6, 0.4, 0.2, 0.0]
    assert twice.remaining(0) == list(pairwise(twice))
    assert twice.remaining(3) == list(pairwise(twice))[3:]
    assert twice.remaining(3)[0] == (0.4, 0.8)
    assert twice.remaining(4)[0] == (0.6, 0.4)
    assert twice.remaining(8) == [(0.2, 0.0)]
    assert twice.remaining(9) == []
    assert "+" in str(twice) and "9 steps" in str(twice)
    assert (whole.restarts, whole.steps, whole.falling) == (0, 5, list(whole))


@given(
    st.lists(st.floats(0.001, 0.999), min_size=2, max_size=12, unique=True),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.99),
    st.integers(1, 4),
)
def test_restarts_of_any_schedule(inner: list[float], one: float, other: float, times: int) -> None:
    """So many rises, the levels of the schedule and no others, and what remains fits what is done."""
    whole, (low, high) = custom_schedule([1.0, *sorted(inner, reverse=True), 0.0]), sorted((one, other))
    try:
        found = with_restarts(whole, low, high, times)
    except InputError:
        nearest = [min(inner, key=lambda s, level=level: abs(s - level)) for level in (low, high)]
        assert low == high or abs(nearest[0] - low) >= abs(nearest[1] - low) or len({*nearest}) == 1
        return
    assert found.restarts == times and set(found) == set(whole) and (found[0], found[-1]) == (1.0, 0.0)
    assert len(found.falling) == found.steps + 1
    for done in range(found.steps + 1):
        rest = found.remaining(done)
        assert sum(b < a for a, b in rest) == found.steps - done
        assert rest == list(pairwise(found))[len(found) - 1 - len(rest) :]


@pytest.mark.parametrize(
    ("low", "high", "times"),
    [
        *((low, high, 1) for low, high in [(0.6, 0.4), (0.4, 0.4), (0, 0.5), (0.5, 1), (math.nan, 0.5), (0.4, 0.41)]),
        *((0.2, 0.6, times) for times in (0, True, 1.5)),
    ],
)
def test_bad_restarts(low: float, high: float, times: int) -> None:
    with pytest.raises(InputError, match="restart|no two levels"):
        with_restarts(schedule("uniform", 5), low, high, times)


def test_restarts_need_levels_between() -> None:
    for steps in (1, 2):
        with pytest.raises(InputError, match="take more steps"):
            with_restarts(schedule("uniform", steps), 0.3, 0.6, 1)
    restarted = with_restarts(schedule("uniform", 5), 0.3, 0.6, 1)
    with pytest.raises(InputError, match="restarts cannot be entered"):
        from_strength(restarted, 0.5)


@given(st.floats(0, 0.99), st.floats(0.001, 1))
def test_noise_that_is_added(sigma: float, rise: float) -> None:
    """The picture's share and the variance of the noise are those of the higher level."""
    sigma_next = sigma + rise * (1 - sigma)
    picture, old, new = torch.eye(3, dtype=DOUBLE)
    x = add_noise((1 - sigma) * picture + sigma * old, sigma, sigma_next, new)
    assert float(x[0]) == pytest.approx(1 - sigma_next, abs=1e-9)
    assert math.hypot(float(x[1]), float(x[2])) == pytest.approx(sigma_next, abs=1e-9)


@pytest.mark.parametrize("name", ["heun", "dpmpp-2m", "unipc", "dpmpp-2m-sde"])
def test_restarts_keep_the_distribution(name: str) -> None:
    """The latents of a run that goes back up are as those of one that does not."""
    levels = with_restarts(schedule("uniform", 60), 0.3, 0.7, 3)
    field = Field(lambda x, t: velocity(x, float(t.flatten()[0])))
    noise = {"img": randn(1, 20_000, 1), "img_ids": None, "txt": torch.zeros(1, 1, 1), "txt_ids": None, "y": None}
    marginal_is_right(run(field, noise, levels, method=name, rng=step_noise([4])), 0.0)
    plain = run(field, noise, schedule("uniform", 60), method="heun")
    again = run(field, noise, levels, method="heun", rng=step_noise([4]))
    assert (plain - again).abs().mean() > 0.1


# Runs that are cut in two.

BREAKS = {
    "plain": LEVELS,
    "restarts": with_restarts(schedule("uniform", 3), 0.3, 0.7, 2),
}


def moments_of(model: Flux1, inputs: dict, levels, **options) -> tuple[Tensor, list[Moment]]:
    """The result, and the run after every step."""
    moments: list[Moment] = []
    result = run(model, inputs, levels, callback=moments.append, **options)
    return result, moments


@pytest.mark.parametrize("name", [*SOLVERS, "ddim:0.5"])
@pytest.mark.parametrize("kind", BREAKS)
def test_a_run_may_be_resumed(model: Flux1, inputs: dict, name: str, kind: str) -> None:
    """From every moment on, bit for bit as if it had not been interrupted."""
    levels, options = BREAKS[kind], {"method": name, "rng": step_noise([1, 2])}
    result, moments = moments_of(model, inputs, levels, **options)
    steps = levels.steps if isinstance(levels, Schedule) else len(levels) - 1
    assert [moment.step for moment in moments] == list(range(1, steps + 1))
    assert {moment.steps for moment in moments} == {steps}
    for moment in moments[:-1]:
        fresh = inputs | {"img": torch.zeros_like(inputs["img"])}  # not looked at
        assert torch.equal(run(model, fresh, levels, resume=moment, **options), result)


@pytest.mark.parametrize("kind", BREAKS)
@pytest.mark.parametrize("name", ["euler", "heun", "unipc"])
def test_a_guided_run_may_be_resumed(model: Flux1, inputs: dict, name: str, kind: str) -> None:
    """What the guide remembers is part of the moment."""
    negative = Words(randn(2, 5, 20, seed=11), inputs["txt_ids"], randn(2, 12, seed=12))
    options = {
        "method": name,
        "rng": step_noise([1, 2]),
        "guide": guide("apg", scale=4.0, momentum=-0.5, threshold=2.0, eta=0.3),
        "negative": negative,
    }
    result, moments = moments_of(model, inputs, BREAKS[kind], **options)
    for moment in moments[:-1]:
        assert moment.memory is not None
        assert torch.equal(run(model, inputs, BREAKS[kind], resume=moment, **options), result)
    forgetful = replace(moments[0], memory=None)
    assert not torch.equal(run(model, inputs, BREAKS[kind], resume=forgetful, **options), result)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp-3m", "unipc-3", "euler-ancestral"])
def test_stop(model: Flux1, inputs: dict, name: str) -> None:
    """A run that is told to stop after so many steps returns what it had then; and may be resumed for some more."""
    options = {"method": name, "rng": step_noise([1, 2])}
    _, moments = moments_of(model, inputs, LEVELS, **options)
    for moment in moments:
        assert torch.equal(run(model, inputs, LEVELS, stop=moment.step, **options), moment.x)
    resumed = run(model, inputs, LEVELS, resume=moments[0], stop=3, **options)
    assert torch.equal(resumed, moments[2].x)
    counted: list[int] = []
    run(model, inputs, LEVELS, stop=2, callback=lambda moment: counted.append(moment.step), **options)
    assert counted == [1, 2]


def test_moments(model: Flux1, inputs: dict) -> None:
    """The level reached, and the picture that the last prediction pointed to."""
    result, moments = moments_of(model, inputs, LEVELS)
    assert [moment.sigma for moment in moments] == LEVELS[1:]
    begin, first = inputs["img"], moments[0]
    assert_close(first.picture, begin + (first.x - begin) / (LEVELS[1] - LEVELS[0]) * -LEVELS[0], rtol=0, atol=1e-5)
    assert_close(moments[-1].picture, result, rtol=0, atol=1e-5)


def test_bad_stops_and_resumes(inputs: dict) -> None:
    """Refused before the network is called."""
    field = Field(lambda x, _t: x)
    _, moments = moments_of(field, inputs, LEVELS)
    field.calls.clear()
    for stop in (0, -1, 5):
        with pytest.raises(InputError, match="stop must be a number of steps from 1 to 4"):
            run(field, inputs, LEVELS, stop=stop)
    with pytest.raises(InputError, match="stop must be a number of steps from 3 to 4, got 2"):
        run(field, inputs, LEVELS, stop=2, resume=moments[1])
    with pytest.raises(InputError, match="resume is from a run of 4 steps; this one has 3"):
        run(field, inputs, [1.0, 0.5, 0.2, 0.0], resume=moments[1])
    with pytest.raises(InputError, match="nothing is left to do"):
        run(field, inputs, LEVELS, resume=moments[-1])
    assert field.calls == []


def test_callback_may_replace_the_latents(model: Flux1, inputs: dict) -> None:
    """The run goes on from what it returns, as one resumed from there would; in float32."""
    _, moments = moments_of(model, inputs, LEVELS)
    other = randn(*inputs["img"].shape, seed=21)
    found = run(model, inputs, LEVELS, callback=lambda moment: other.double() if moment.step == 2 else None)
    assert found.dtype == torch.float32
    assert torch.equal(found, run(model, inputs, LEVELS, resume=replace(moments[1], x=other)))
    assert not torch.equal(found, run(model, inputs, LEVELS))
    assert torch.equal(run(model, inputs, LEVELS, callback=lambda moment: other), other)


# What is refused.


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([1.0, 0.5, 0.7, 0.0], "not below"),
        ([1.0, 0.5, 0.5, 0.0], "not below"),
        ([1.0, math.nan, 0.0], "nan"),
        ([math.nan, 0.5], "nan"),
        ([1.2, 0.5, 0.0], "from 0 to 1"),
        ([1.0, 0.5, -0.1], "from 0 to 1"),
        ([1.0], "at least two"),
        ([], "at least two"),
    ],
)
def test_bad_levels_are_refused_at_once(inputs: dict, levels: list[float], message: str) -> None:
    """Before the network is called."""
    field = Field(lambda x, _t: x)
    with pytest.raises(InputError, match=message):
        run(field, inputs, levels, rng=step_noise([1, 2]))
    assert field.calls == []


@pytest.mark.parametrize(
    "levels", [(1.0, 0.5, 0.5, 0.0), (1.0, math.nan, 0.0), (1.2, 0.5, 0.0), (1.0, 0.5, -0.1), (1.0,), ()]
)
def test_bad_schedules_are_refused_at_once(inputs: dict, levels: tuple[float, ...]) -> None:
    """The same for a `Schedule` somebody made by hand."""
    field = Field(lambda x, _t: x)
    with pytest.raises(InputError):
        run(field, inputs, Schedule("made by hand", levels), rng=step_noise([1, 2]))
    assert field.calls == []


@pytest.mark.parametrize(
    ("levels", "name"),
    [
        *((LEVELS, name) for name in [*RENOISE, "dpmpp-2m-sde", "ddim:0.5"]),
        (with_restarts(schedule("uniform", 4), 0.3, 0.7, 1), "euler"),
    ],
)
def test_missing_noise_is_refused_at_once(inputs: dict, levels, name: str) -> None:
    """Before the network is called."""
    field = Field(lambda x, _t: x)
    with pytest.raises(InputError, match="rng must be given"):
        run(field, inputs, levels, method=name)
    assert field.calls == []


def test_unknown_solver_is_refused_at_once(inputs: dict) -> None:
    field = Field(lambda x, _t: x)
    with pytest.raises(InputError, match="unknown solver 'nope'"):
        run(field, inputs, LEVELS, method="nope")
    assert field.calls == []
