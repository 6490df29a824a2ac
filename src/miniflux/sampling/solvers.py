"""Solvers: from one noise level to the next, along the velocity v = noise - picture.

Each is a pure function `step(x, v, sigma, sigma_next, state, rng) -> (x, state)`. What it remembers is in the `State`
it returns; nothing is kept elsewhere, so any number of runs may share a solver. One that needs the network at another
place before it can finish its step returns that place as x, and its noise level as `state.ask`:

    v = velocity(x, sigma)
    x, state = solver.step(x, v, sigma, sigma_next, state, rng)
    while state.ask is not None:
        v = velocity(x, state.ask)
        x, state = solver.step(x, v, sigma, sigma_next, state, rng)

Here lambda = log((1 - sigma) / sigma), half the logarithm of the signal-to-noise ratio, from -inf (noise) to inf; the
data prediction is x - sigma v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from miniflux.errors import InputError

StepNoise = Callable[[int, Tensor], Tensor]
"""(number of the step, latents) -> standard normal noise of their shape; the same numbers for the same step."""


@dataclass(frozen=True)
class State:
    """What a solver remembers; never changed, only replaced. `State()` is where a run begins.

    Attributes:
        step: steps finished.
        steps: steps of the whole run; None if that is not known. Some solvers take the last ones with care.
        ask: noise level at which the network is wanted before the step is finished; None when it is finished.
        kept: tensors of the step under way.
        past: (noise level, prediction) of earlier steps, the newest first.
        skipped, share, begun: of the schedule, see `Schedule`.
        twin: the same run without the memory of a shortened first step, see `running.advance`.
    """

    step: int = 0
    steps: int | None = None
    ask: float | None = None
    kept: tuple[Tensor, ...] = ()
    past: tuple[tuple[float, Tensor], ...] = ()
    skipped: int = 0
    share: float = 1.0
    begun: float | None = None
    twin: State | None = None

    @property
    def left(self) -> float:
        """Steps still to be made, this one among them."""
        return math.inf if self.steps is None else self.steps - self.step

    def row(self, i: int) -> State:
        """What is remembered of picture i of a batch."""
        kept, past = (x[i : i + 1] for x in self.kept), ((sigma, x[i : i + 1]) for sigma, x in self.past)
        return replace(self, kept=tuple(kept), past=tuple(past), twin=None if self.twin is None else self.twin.row(i))

    def asking(self, sigma: float, *kept: Tensor) -> State:
        return replace(self, ask=sigma, kept=kept)

    def done(self, *seen: tuple[float, Tensor], keep: int = 0, kept: tuple[Tensor, ...] = ()) -> State:
        """The step is finished; of the newly `seen` and the past, `keep` predictions are remembered."""
        return replace(self, step=self.step + 1, ask=None, kept=kept, past=(*seen, *self.past)[:keep])


BEGIN = State()
Step = Callable[[Tensor, Tensor, float, float, State, "StepNoise | None"], tuple[Tensor, State]]


@dataclass(frozen=True)
class Solver:
    """A way to integrate the flow.

    Attributes:
        name: as users type it.
        step: the function.
        order: of the error of a whole run in the width of the steps, where the velocity is smooth.
        calls: of the network, per step.
        last_calls: of the network, for a step that ends at noise level 0.
        noisy: whether it draws fresh noise.
        start_order: of the error that its first steps leave behind, where that is lower than `order`.
        spacing: of the steps, that suits it (`schedules.SPACINGS`). Solvers in lambda have only a first order at both
            ends of a run, where lambda is infinite, and take small steps there.
        jumps: how it uses a prediction, if each step is made of one alone: as the way to the next noise level, or to
            the picture, to which new noise is added. A flow map can be asked for either; for other solvers predictions
            are slopes at one place.
    """

    name: str
    step: Step
    order: int
    calls: int = 1
    last_calls: int = 1
    noisy: bool = False
    start_order: int | None = None
    spacing: str = "uniform"
    jumps: Literal["to the next level", "to the end"] | None = None

    def target(self, sigma_next: float) -> float | None:
        """The noise level that a prediction is used to jump to."""
        return None if self.jumps is None else sigma_next if self.jumps == "to the next level" else 0.0

    def model_calls(self, sigmas: Sequence[float]) -> int:
        """How often a run through these noise levels calls the network."""
        return sum(self.calls if sigma > 0 else self.last_calls for sigma in sigmas[1:])


def log_snr(sigma: float) -> float:
    """lambda of a noise level: log((1 - sigma) / sigma); -inf at 1, inf at 0."""
    if sigma in (0, 1):
        return -math.inf if sigma else math.inf
    return math.log1p(-sigma) - math.log(sigma)


def data(x: Tensor, v: Tensor, sigma: float) -> Tensor:
    """The picture that a velocity points to."""
    return x - sigma * v


def _exponential(x: Tensor, picture: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The exact step if the predicted picture stays the same; finite at both ends (arXiv 2211.01095, equation 8)."""
    h = log_snr(sigma_next) - log_snr(sigma)
    return sigma_next / sigma * x - (1 - sigma_next) * math.expm1(-h) * picture


def _fresh(rng: StepNoise | None, state: State, x: Tensor) -> Tensor:
    if rng is None:
        raise InputError("this solver draws noise at every step: rng must be given, got None")
    return rng(state.skipped + state.step, x)


# Methods on the velocity.


def euler(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
) -> tuple[Tensor, State]:
    """A straight line. The release's method; DDIM without noise is the same."""
    return x + (sigma_next - sigma) * v, state.done()


def heun(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
) -> tuple[Tensor, State]:
    """The mean of the slopes at both ends; Euler's step to 0 (arXiv 2206.00364, algorithm 1)."""
    if state.ask is None:
        if sigma_next == 0:
            return euler(x, v, sigma, sigma_next, state)
        return x + (sigma_next - sigma) * v, state.asking(sigma_next, x, v)
    begin, slope = state.kept
    return begin + (sigma_next - sigma) / 2 * (slope + v), state.done()


def midpoint(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
) -> tuple[Tensor, State]:
    """The slope halfway."""
    half = (sigma_next - sigma) / 2
    if state.ask is None:
        return x + half * v, state.asking(sigma + half, x)
    (begin,) = state.kept
    return begin + 2 * half * v, state.done()


def rk4(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
) -> tuple[Tensor, State]:
    """The classical Runge-Kutta method."""
    h = sigma_next - sigma
    begin, *slopes = (*state.kept, v) if state.kept else (x, v)
    if len(slopes) == 1 or len(slopes) == 2:
        return begin + h / 2 * v, state.asking(sigma + h / 2, begin, *slopes)
    if len(slopes) == 3:
        return begin + h * v, state.asking(sigma_next, begin, *slopes)
    k1, k2, k3, k4 = slopes
    return begin + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), state.done()


# Adams-Bashforth weights for steps of equal width, by the number of slopes; the newest first.
ADAMS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
) -> tuple[Tensor, State]:
    """Adams-Bashforth over up to four slopes, as if all steps had the width of this one (arXiv 2202.09778; `IPNDM`
    of diffusers). Its order holds for evenly spaced noise levels."""
    slopes = (v, *(slope for _, slope in state.past))
    slope = sum(weight * k for weight, k in zip(ADAMS[len(slopes) - 1], slopes, strict=True))
    return x + (sigma_next - sigma) * slope, state.done((sigma, v), keep=3)


# Methods on the predicted picture: exponential integrators.


def dpmpp_2m(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
) -> tuple[Tensor, State]:
    """DPM-Solver++ over two predictions (arXiv 2211.01095, algorithm 2); the step to 0 is of first order."""
    picture = d = data(x, v, sigma)
    if state.past and sigma_next > 0:
        before, old = state.past[0]
        h, h0 = log_snr(sigma_next) - log_snr(sigma), log_snr(sigma) - log_snr(before)
        d = picture + (picture - old) * (h / h0 / 2)  # h0 is infinite after a step from sigma 1
    return _exponential(x, d, sigma, sigma_next), state.done((sigma, picture), keep=1)


def dpmpp_2s(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
) -> tuple[Tensor, State]:
    """DPM-Solver++ with a second call halfway in lambda (arXiv 2211.01095, algorithm 1); first order in the step to 0.

    From sigma 1, where lambda has no middle, the middle of (1 - sigma) / sigma is taken: a second order as well. So it
    is in a shortened first step that would have begun there.
    """
    if state.ask is None:
        picture = data(x, v, sigma)
        if sigma_next == 0:
            return _exponential(x, picture, sigma, sigma_next), state.done()
        if sigma == 1 or (state.begun == 1 and state.step == 0):
            middle = 2 / (1 / sigma + 1 / sigma_next)
        else:
            middle = 1 / (1 + math.exp((log_snr(sigma) + log_snr(sigma_next)) / 2))
        return _exponential(x, picture, sigma, middle), state.asking(middle, x)
    (begin,) = state.kept
    return _exponential(begin, data(x, v, state.ask), sigma, sigma_next), state.done()


def dpmpp_2m_sde(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
) -> tuple[Tensor, State]:
    """The stochastic DPM-Solver++ 2M (`sde-dpmsolver++` of diffusers, midpoint): each step forgets some of the noise
    and draws as much anew."""
    picture = d = data(x, v, sigma)
    h = log_snr(sigma_next) - log_snr(sigma)
    if state.past and sigma_next > 0:
        before, old = state.past[0]
        d = picture + (picture - old) * (h / (log_snr(sigma) - log_snr(before)) / 2)
    fresh = -math.expm1(-2 * h)  # share of the noise's variance that is new
    x = sigma_next / sigma * math.exp(-h) * x + (1 - sigma_next) * fresh * d
    if sigma_next > 0:
        x = x + sigma_next * math.sqrt(fresh) * _fresh(rng, state, x)
    return x, state.done((sigma, picture), keep=1)


def dpmpp_3m(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
) -> tuple[Tensor, State]:
    """DPM-Solver++ over three predictions (`solver_order=3` of diffusers): second order until there are three, and in
    the last step but one of runs of fewer than 15.

    The formula is that of diffusers and k-diffusion, whose term for the second derivative is half of what a third order
    takes: its order is 2, with a smaller error than `dpmpp_2m`.
    """
    short = state.steps is not None and state.skipped + state.steps < 15 and state.left == 2
    if len(state.past) < 2 or sigma_next == 0 or short:
        x_next, after = dpmpp_2m(x, v, sigma, sigma_next, state)
        return x_next, replace(after, past=(after.past[0], *state.past)[:2])
    (sigma1, d1), (sigma2, d2) = state.past
    d0 = data(x, v, sigma)
    h = log_snr(sigma_next) - log_snr(sigma)
    r0 = (log_snr(sigma) - log_snr(sigma1)) / h
    r1 = (log_snr(sigma1) - log_snr(sigma2)) / h  # infinite if sigma2 is 1: its slope then counts nothing
    slope0, slope1 = (d0 - d1) / r0, (d1 - d2) / r1
    first = slope0 + r0 / (r0 + r1) * (slope0 - slope1)
    second = (slope0 - slope1) / (r0 + r1)
    phi = math.expm1(-h)
    x_next = _exponential(x, d0, sigma, sigma_next)
    x_next = x_next + (1 - sigma_next) * ((phi / h + 1) * first - ((phi + h) / h**2 - 0.5) * second)
    return x_next, state.done((sigma, d0), keep=2)


def res_multistep(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
) -> tuple[Tensor, State]:
    """Refined exponential solver over two predictions, in -log sigma (arXiv 2308.02157; `res_multistep` of ComfyUI)."""
    d = data(x, v, sigma)
    after = state.done((sigma, d), keep=1)
    if not state.past or sigma_next == 0:
        return euler(x, v, sigma, sigma_next)[0], after
    before, old = state.past[0]
    h = math.log(sigma / sigma_next)
    c = math.log(sigma / before) / h  # where the old prediction lies, in steps: below 0
    phi1 = -math.expm1(-h) / h
    phi2 = (1 - phi1) / h
    return math.exp(-h) * x + h * ((phi1 - phi2 / c) * d + phi2 / c * old), after


def unipc(order: int, corrector: bool = True) -> Step:
    """UniPC with B(h) = e^h - 1 (arXiv 2302.04867, algorithms 5 to 8; `bh2` of diffusers).

    The predictor has the given order. The corrector mends the point just reached with the prediction made there, which
    raises the order by one and costs no call.

    Raises:
        InputError: the order is not 1, 2 or 3.
    """
    if order not in (1, 2, 3):
        raise InputError(f"the order of UniPC must be 1, 2 or 3, got {order!r}")

    def step(
        x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
    ) -> tuple[Tensor, State]:
        d = data(x, v, sigma)
        if corrector and state.past and state.kept:
            used = int(min(order, len(state.past), state.left + 1))
            x = _unipc(state.kept[0], state.past[:used], sigma, d)
        past = ((sigma, d), *state.past)
        used = int(min(order, len(past), state.left))
        return _unipc(x, past[:used], sigma_next, None), state.done((sigma, d), keep=order, kept=(x,))

    return step


def _unipc(x: Tensor, past: Sequence[tuple[float, Tensor]], sigma_next: float, at_next: Tensor | None) -> Tensor:
    """UniP, or UniC if the prediction at the place it leads to is given."""
    sigma, d0 = past[0]
    h = log_snr(sigma_next) - log_snr(sigma)
    points = [((log_snr(s) - log_snr(sigma)) / h, d - d0) for s, d in past[1:] if s < 1]
    if at_next is not None:
        points.append((1.0, at_next - d0))
    result = _exponential(x, d0, sigma, sigma_next)
    if not points or (math.isinf(h) and at_next is None):
        return result
    if len(points) == 1:
        weights = [0.5]  # instead of the solution of one equation, as in the paper's code
    else:
        # B(h) sum_k w_k r_k^n = h phi_(n + 2)(-h) (n + 1)!: the moments of the exponential integral.
        b, phi = [], math.expm1(-h) / -h - 1
        factorial = 1
        for n in range(len(points)):
            b.append(phi * factorial / math.expm1(-h))
            factorial *= n + 2
            phi = phi / -h - 1 / factorial
        powers = [[r**n for r, _ in points] for n in range(len(points))]
        double = torch.float64
        weights = torch.linalg.solve(torch.tensor(powers, dtype=double), torch.tensor(b, dtype=double)).tolist()
    for weight, (r, difference) in zip(weights, points, strict=True):
        result = result - (1 - sigma_next) * math.expm1(-h) * weight / r * difference
    return result


# Methods with fresh noise.


def ddim(eta: float = 0.0) -> Step:
    """DDIM (arXiv 2010.02502, equation 12). eta 0 keeps the noise, and for this flow equals Euler; eta 1 draws as much
    of it anew as the diffusion from sigma_next to sigma would have added.

    Raises:
        InputError: eta is not between 0 and 1.
    """
    _check_eta(eta)

    def step(
        x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
    ) -> tuple[Tensor, State]:
        if eta == 0 or sigma_next == 0:
            return euler(x, v, sigma, sigma_next, state)
        h = log_snr(sigma_next) - log_snr(sigma)
        new = eta * sigma_next * math.sqrt(-math.expm1(-2 * h))
        old = math.sqrt(sigma_next**2 - new**2)
        noise = x + (1 - sigma) * v
        return (1 - sigma_next) * data(x, v, sigma) + old * noise + new * _fresh(rng, state, x), state.done()

    return step


def euler_ancestral(eta: float = 1.0) -> Step:
    """Euler to a lower noise level, then noise back up to sigma_next (ComfyUI's for rectified flows).

    Raises:
        InputError: eta is not between 0 and 1.
    """
    _check_eta(eta)

    def step(
        x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
    ) -> tuple[Tensor, State]:
        down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
        if eta == 0 or sigma_next == 0:
            return euler(x, v, sigma, sigma_next, state)
        x = x + (down - sigma) * v
        up = (1 - sigma_next) / (1 - down)
        x = up * x + math.sqrt(max(0.0, sigma_next**2 - (up * down) ** 2)) * _fresh(rng, state, x)
        return x, state.done()

    return step


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be a number from 0 to 1, got {eta!r}")


def renoise(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, state: State = BEGIN, rng: StepNoise | None = None
) -> tuple[Tensor, State]:
    """The predicted picture under all new noise: LCM's step (arXiv 2310.04378, algorithm 2), which the flow Euler of
    diffusers calls `stochastic_sampling`."""
    picture = data(x, v, sigma)
    if sigma_next == 0:
        return picture, state.done()
    return (1 - sigma_next) * picture + sigma_next * _fresh(rng, state, x), state.done()


IN_LAMBDA = "beta-flow"
SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("euler", euler, 1, jumps="to the next level"),
        Solver("heun", heun, 2, calls=2),
        Solver("midpoint", midpoint, 2, calls=2, last_calls=2),
        Solver("rk4", rk4, 4, calls=4, last_calls=4),
        Solver("ipndm", ipndm, 4, start_order=2),
        Solver("dpmpp-2m", dpmpp_2m, 2, spacing=IN_LAMBDA),
        Solver("dpmpp-2s", dpmpp_2s, 2, calls=2, spacing=IN_LAMBDA),
        Solver("dpmpp-2m-sde", dpmpp_2m_sde, 1, noisy=True, spacing=IN_LAMBDA),
        Solver("dpmpp-3m", dpmpp_3m, 2, spacing=IN_LAMBDA),
        Solver("res-multistep", res_multistep, 2, spacing=IN_LAMBDA),
        Solver("unipc", unipc(2), 3, start_order=2, spacing=IN_LAMBDA),
        Solver("unipc-1", unipc(1), 2, spacing=IN_LAMBDA),
        Solver("unipc-2", unipc(2), 3, start_order=2, spacing=IN_LAMBDA),
        Solver("unipc-3", unipc(3), 4, start_order=2, spacing=IN_LAMBDA),
        Solver("ddim", ddim(), 1),
        Solver("euler-ancestral", euler_ancestral(), 1, noisy=True),
        Solver("lcm", renoise, 1, noisy=True, jumps="to the end"),
        Solver("stochastic", renoise, 1, noisy=True, jumps="to the end"),
    )
}
WITH_ETA: dict[str, Callable[[float], Step]] = {"ddim": ddim, "euler-ancestral": euler_ancestral}


def solver(name: str) -> Solver:
    """A solver by name; `ddim:0.5` and `euler-ancestral:0.5` say how much of the noise is drawn anew.

    Raises:
        InputError: an unknown name, or an eta that is not a number from 0 to 1.
    """
    base, colon, text = str(name).partition(":")
    if not isinstance(name, str) or base not in SOLVERS or (colon and base not in WITH_ETA):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"unknown solver {name!r}; known: {', '.join(SOLVERS)}, ddim:ETA, euler-ancestral:ETA")
    if not colon:
        return SOLVERS[base]
    try:
        eta = float(text)
    except ValueError:
        raise InputError(f"{name!r}: expected a number from 0 to 1 after the colon, got {text!r}") from None
    return replace(SOLVERS[base], name=name, step=WITH_ETA[base](eta), noisy=eta > 0)
