"""Every solver that diffusers has too, step by step on a nonlinear flow: the same states from the same noise levels.

diffusers computes some steps in float32, hence the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from miniflux.sampling import State, solver
from miniflux.sampling.solvers import StepNoise, log_snr
from tests.parity.peers import diffusers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
DOUBLE = torch.float64
TOLERANCE = 1e-5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


MIXING, BEGIN = normal(8, 8, seed=1) / 3, normal(2, 6, 8, seed=2)


def velocity(x: Tensor, sigma: float) -> Tensor:
    """Nonlinear in x, and not constant in time."""
    return torch.tanh(x @ MIXING) * (1 + sigma) + 0.3 * x


def levels(top: float, steps: int) -> list[float]:
    """Evenly spaced; the last one is 0."""
    return [top * (1 - i / steps) for i in range(steps)] + [0.0]


def ours(name: str, sigmas: list[float], rng: StepNoise | None = None) -> list[Tensor]:
    """The state after every step."""
    method, x, state, states = solver(name), BEGIN, State(steps=len(sigmas) - 1), []
    for a, b in pairwise(sigmas):
        x, state = method.step(x, velocity(x, a), a, b, state, rng)
        while state.ask is not None:
            x, state = method.step(x, velocity(x, state.ask), a, b, state, rng)
        states.append(x)
    return states


def theirs(scheduler: Any, sigmas: list[float], **options: Any) -> list[Tensor]:
    """The state after every call of the network, at these levels instead of the scheduler's own."""
    scheduler.sigmas = torch.tensor(sigmas, dtype=DOUBLE)
    x, states = BEGIN, []
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, sigmas[i]), t, x, return_dict=False, **options)[0]
        states.append(x)
    return states


def equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Step by step; the states move, so that equal is not all the same."""
    assert len(actual) == len(expected)
    assert (actual[0] - actual[-1]).abs().max() > 0.1
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, b.to(DOUBLE), rtol=0, atol=TOLERANCE, msg=lambda text, i=i: f"step {i}: {text}")


def flow(kind: str, **options: Any) -> Any:
    """A scheduler made for diffusion models, turned towards flows."""
    return getattr(diffusers, kind)(use_flow_sigmas=True, prediction_type="flow_prediction", **options)


def same_numbers(dtype: torch.dtype) -> tuple[torch.Generator, StepNoise]:
    """A generator for diffusers, and noise that draws the same numbers from another one: one set per step."""
    left, right = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    return left, lambda _step, x: torch.randn(x.shape, generator=right, dtype=dtype).to(x)


cases = [pytest.param(steps, top, id=f"{steps}-{top:g}") for steps in (8, 20) for top in (1 - 1e-6, 0.97)]
every_case = pytest.mark.parametrize(("steps", "top"), cases)


MULTISTEP, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
PEERS: dict[str, Callable[[], Any]] = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "ddim": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "dpmpp-2m": lambda: flow(MULTISTEP),
    "dpmpp-3m": lambda: flow(MULTISTEP, solver_order=3),
    "unipc": lambda: flow(UNIPC),
    "unipc-1": lambda: flow(UNIPC, solver_order=1),
    "unipc-2": lambda: flow(UNIPC, solver_order=2),
    "unipc-3": lambda: flow(UNIPC, solver_order=3),
}


@every_case
@pytest.mark.parametrize("name", PEERS)
def test_one_call_per_step(name: str, steps: int, top: float) -> None:
    """Orders of the start, of the middle and of the last steps, with fewer and more than 15 steps."""
    scheduler, sigmas = PEERS[name](), levels(top, steps)
    scheduler.set_timesteps(steps)
    equal(ours(name, sigmas), theirs(scheduler, sigmas))


@every_case
@pytest.mark.parametrize(
    ("name", "make", "drawn"),
    [
        ("dpmpp-2m-sde", lambda: flow("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"), torch.float32),
        ("stochastic", lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), torch.float32),
        ("lcm", lambda: diffusers.FlowMatchLCMScheduler(), DOUBLE),
    ],
    ids=["dpmpp-2m-sde", "stochastic", "lcm"],
)
def test_fresh_noise(name: str, make: Callable[[], Any], drawn: torch.dtype, steps: int, top: float) -> None:
    """Given the same normal numbers (`drawn`: the type diffusers draws them in), stochastic solvers agree as well."""
    scheduler, sigmas = make(), levels(top, steps)
    scheduler.set_timesteps(steps)
    generator, rng = same_numbers(drawn)
    equal(ours(name, sigmas, rng), theirs(scheduler, sigmas, generator=generator))


@every_case
def test_heun(steps: int, top: float) -> None:
    """Their schedule has every level but the first twice: each second call finishes a step, and so does the last."""
    scheduler, sigmas = diffusers.FlowMatchHeunDiscreteScheduler(), levels(top, steps)
    scheduler.set_timesteps(steps)
    twice = [sigmas[0], *(sigma for sigma in sigmas[1:-1] for _ in range(2)), 0.0]
    scheduler.sigmas = torch.tensor(twice, dtype=DOUBLE)
    x, states = BEGIN, []
    places = [0, *(i for i in range(1, steps) for _ in range(2))]  # where each call is made
    for place, t in zip(places, scheduler.timesteps, strict=True):
        x = scheduler.step(velocity(x, sigmas[place]), t, x, return_dict=False)[0]
        states.append(x)
    equal(ours("heun", sigmas), [*states[1:-1:2], states[-1]])


@every_case
def test_dpmpp_2s(steps: int, top: float) -> None:
    """Their single-step solver finishes a step at every second level: those between are our middles in lambda."""
    sigmas = levels(top, steps)
    finer = [top]
    for a, b in pairwise(sigmas[:-1]):
        middle = torch.tensor((log_snr(a) + log_snr(b)) / 2, dtype=DOUBLE)
        finer += [torch.sigmoid(-middle).item(), b]
    finer.append(0.0)
    scheduler = flow("DPMSolverSinglestepScheduler", solver_order=2, lower_order_final=True)
    scheduler.set_timesteps(len(finer) - 1)
    assert scheduler.order_list == [1, 2] * (steps - 1) + [1]
    states = theirs(scheduler, finer)
    equal(ours("dpmpp-2s", sigmas), [*states[1:-1:2], states[-1]])


@every_case
def test_ipndm(steps: int, top: float) -> None:
    """Theirs turns predictions into slopes with alpha and beta; with alpha 1 and beta sigma it is the flow's."""
    scheduler, sigmas = diffusers.IPNDMScheduler(), levels(top, steps)
    scheduler.set_timesteps(steps)
    scheduler.betas = torch.tensor(sigmas, dtype=DOUBLE)
    scheduler.alphas = torch.ones_like(scheduler.betas)
    x, states = BEGIN, []
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(velocity(x, sigma) - sigma * x, t, x, return_dict=False)[0]
        states.append(x)
    equal(ours("ipndm", sigmas), states)


@every_case
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_euler_ancestral(eta: float, steps: int, top: float) -> None:
    """Against their port of ComfyUI's; it wants the levels as they are, and draws in float32."""
    kind = "LTXEulerAncestralRFScheduler"
    if not hasattr(diffusers, kind):
        pytest.skip(f"this diffusers has no {kind}")
    scheduler, sigmas = getattr(diffusers, kind)(eta=eta), levels(top, steps)
    scheduler.set_timesteps(sigmas=sigmas)
    scheduler.timesteps = scheduler.timesteps[:-1]
    generator, rng = same_numbers(torch.float32)
    equal(ours(f"euler-ancestral:{eta}", sigmas, rng), theirs(scheduler, sigmas, generator=generator))
