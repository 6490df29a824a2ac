"""Runs that begin in the middle: continuous in the strength for every solver, and plain runs where a step begins."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from miniflux.sampling import (
    SOLVERS,
    Schedule,
    State,
    add_noise,
    from_strength,
    integrate,
    schedule,
    solver,
    step_noise,
)
from miniflux.sampling.running import advance, start
from miniflux.sampling.schedules import dynamic_shift
from tests.sampling.test_solvers import CONSTANTS, curved, velocity

DOUBLE = torch.float64
EVERY = [*SOLVERS, "ddim:1", "ddim:0.4", "euler-ancestral:0.4"]
SOURCE = torch.linspace(-1, 1.4, 9, dtype=DOUBLE)[None]
NOISE = torch.randn(1, 9, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
SCHEDULES = [
    schedule("uniform", 6),
    schedule("flow-dpmpp", 5),
    schedule("uniform", 16, dynamic_shift(1.15)),  # some solvers take more care in runs of fewer than 15 steps
]
BOUND = 40  # of the slope; Euler's own is 7 to 18. A jump of 4e-5 would break it.
FLOWS = {"normal": velocity, "curved": lambda x, sigma: curved(x / 5 + 1 / CONSTANTS[0], sigma)}


def drawn(name: str, whole: Schedule, strength: float, flow: str = "normal") -> Tensor:
    part = from_strength(whole, strength)
    return integrate(FLOWS[flow], add_noise(SOURCE, 0.0, part[0], NOISE), part, name, step_noise([5]))


def steepest(name: str, whole: Schedule, places: list[float], flow: str) -> float:
    places = sorted({place for place in places if 0 < place <= 1})
    found = [drawn(name, whole, place, flow) for place in places]
    return max(float((b - a).abs().max()) / (q - p) for (p, a), (q, b) in pairwise(zip(places, found, strict=True)))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("flow", FLOWS)
def test_continuous(name: str, flow: str) -> None:
    """However fine the grid, neighbours are no further apart than in proportion to their distance: also where a step
    more begins, at both ends, and for solvers that look back or draw noise."""
    assert steepest(name, SCHEDULES[0], [i / 60 + 1e-4 for i in range(60)], flow) < BOUND
    for whole in SCHEDULES:
        for boundary in sorted({1, 2, whole.steps // 2, whole.steps - 1, whole.steps}):
            near = [boundary / whole.steps + side * 1e-6 for side in (-1, 0, 1)]
            assert steepest(name, whole, near, flow) < BOUND, boundary


@pytest.mark.parametrize("name", EVERY)
def test_whole_steps_are_a_plain_run(name: str) -> None:
    """Where a step begins, nothing is special but the number of the step that noise is keyed by."""
    whole, keyed = schedule("uniform", 8), step_noise([5])
    for done in (0, 3, 7):
        part = from_strength(whole, 1 - done / 8)
        assert list(part) == list(whole)[done:] and (part.skipped, part.share) == (done, 1)
        begin = add_noise(SOURCE, 0.0, part[0], NOISE)
        expected = integrate(velocity, begin, list(part), name, lambda step, x, d=done: keyed(step + d, x))
        assert torch.equal(integrate(velocity, begin, part, name, keyed), expected)


@pytest.mark.parametrize("name", EVERY)
def test_calls_are_known(name: str) -> None:
    """What makes it continuous costs no call of the network."""
    part, asked = from_strength(schedule("uniform", 6), 0.7), []

    def counting(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return velocity(x, sigma)

    integrate(counting, NOISE, part, name, step_noise([5]))
    method = SOLVERS[name.partition(":")[0]]
    assert len(asked) == method.model_calls(part) and asked[0] == part[0]


@pytest.mark.parametrize("name", [name for name, method in SOLVERS.items() if method.noisy])
def test_noise_keeps_its_size(name: str) -> None:
    """In a shortened step the fresh noise turns in, so that the latents stay as noisy as the flow says."""
    part = Schedule("", (0.8, 0.5), share=0.5, begun=0.95)
    noise = torch.randn(1, 40_000, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    at_rest = integrate(lambda x, sigma: noise, 0.8 * noise, part, name, step_noise([5]))  # of a picture that is black
    assert float(at_rest.std()) == pytest.approx(0.5, rel=0.02)
    straight = integrate(lambda x, sigma: noise, 0.8 * noise, list(part), "euler")
    assert not torch.allclose(at_rest, straight, atol=1e-2)


def test_memory_is_handed_over() -> None:
    """The twin run lives only while the shortened step is remembered; it is part of what a run resumes from."""
    part, method = from_strength(schedule("uniform", 8), 0.8), solver("unipc-3")
    x, state = NOISE, start(part)
    twins = []
    for sigma, sigma_next in pairwise(part):
        assert isinstance(state, State)
        x, state = advance(method, x, velocity(x, sigma), sigma, sigma_next, state)
        twins.append(state.twin is not None)
    assert twins == [True, True, True, False, False, False, False]
