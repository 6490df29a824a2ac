"""Noise levels: how the steps are spread between pure noise (sigma 1) and the picture (sigma 0)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import overload

from miniflux.checks import finite, plain, shown, whole
from miniflux.errors import InputError

Curve = Callable[[float], float]
"""How far the noise levels are moved towards 1: from an evenly spaced level in [0, 1] to the one that is used."""

GRID = 10_000  # levels of the table that ComfyUI's schedules pick from
TRAINED = 1000  # levels that diffusers counts in
KARRAS_RHO = 7.0  # arXiv 2206.00364, appendix D
# The levels of FLUX.1 found by dynamic programming (arXiv 2503.21774; `NOISE_LEVELS` of ComfyUI's OptimalSteps node).
OPTIMAL_STEPS = (0.9968, 0.9886, 0.9819, 0.975, 0.966, 0.9471, 0.9158, 0.8287, 0.5512, 0.2808, 0.001)
BETA_SHAPE = 0.6  # arXiv 2407.12173: both parameters of the distribution


@dataclass(frozen=True)
class Schedule(Sequence[float]):
    """Noise levels from the first to the last, mostly 0. Prints itself as a table; is a sequence of floats.

    Attributes:
        name: how it was made.
        sigmas: the levels. They fall, except where a restart goes back up by adding noise.
        skipped: of a part of a schedule (`from_strength`), whole steps before it.
        share, begun: how much is left of the first step of that part, above 0 to 1, and the level where the whole step
            begins.
    """

    name: str
    sigmas: tuple[float, ...]
    skipped: int = 0
    share: float = 1.0
    begun: float | None = None

    def __post_init__(self) -> None:
        if len(self.sigmas) < 2:
            raise InputError(f"a schedule needs at least two noise levels, got {list(self.sigmas)}")
        for i, sigma in enumerate(self.sigmas):
            if not 0 <= sigma <= 1:  # also refuses NaN
                raise InputError(f"noise level {i} is {sigma!r}; expected a number from 0 to 1")
            if i and sigma == self.sigmas[i - 1]:
                raise InputError(f"noise level {i} is {sigma!r}, not below the one before, {sigma!r}")

    @property
    def restarts(self) -> int:
        """How often the levels rise."""
        return sum(b > a for a, b in pairwise(self.sigmas))

    @property
    def steps(self) -> int:
        """How often they fall."""
        return len(self.sigmas) - 1 - self.restarts

    @property
    def falling(self) -> list[float]:
        """The levels that the steps end at, and the first one."""
        return [self.sigmas[0], *(b for a, b in pairwise(self.sigmas) if b < a)]

    def remaining(self, done: int) -> list[tuple[float, float]]:
        """(level, next level) of what is left when so many steps are done."""
        pairs = list(pairwise(self.sigmas))
        for start in range(len(pairs)):
            if done == 0:
                return pairs[start:]
            done -= pairs[start][1] < pairs[start][0]
        return []

    def __len__(self) -> int:
        return len(self.sigmas)

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[float, ...]: ...
    def __getitem__(self, index: int | slice) -> float | tuple[float, ...]:
        return self.sigmas[index]

    def __str__(self) -> str:
        lines = [f"{self.name}, {self.steps} steps", f"{'step':>4} {'sigma':>8} {'width':>8}"]
        done = 0
        for a, b in pairwise(self.sigmas):
            done += b < a
            lines.append(f"{done if b < a else '+':>4} {a:8.5f} {a - b:8.5f}")
        return "\n".join([*lines, f"{'end':>4} {self.sigmas[-1]:8.5f}"])


def shift_sigma(mu: float, sigma: float) -> float:
    """Move a noise level towards 1 by mu: e^mu / (e^mu + 1 / sigma - 1); 0 and 1 stay (arXiv 2403.03206, 5.3.2)."""
    return 0.0 if sigma == 0 else math.exp(mu) / (math.exp(mu) + (1 / sigma - 1))


FLUX3_SHIFT = 6.93  # the static shift of FLUX.3 (modular pipeline of diffusers)


def flux1_mu(image_tokens: int) -> float:
    """The shift of FLUX.1 dev: the line through (256 tokens, 0.5) and (4096 tokens, 1.15), `flux/sampling.py`.

    Larger pictures keep more of their structure under the same noise, so they need more steps at high noise.
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    return slope * image_tokens + (0.5 - slope * 256)


def flux2_mu(steps: int, image_tokens: int) -> float:
    """The empirical shift of FLUX.2 (`compute_empirical_mu` in `flux2/sampling.py`).

    Two lines in the number of tokens, one measured at 10 steps and one at 200; in between, linear in the steps. Above
    4300 tokens the second line alone.
    """
    mu_200 = 1.6927e-4 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return mu_200
    mu_10 = 8.73809524e-5 * image_tokens + 1.89833333
    slope = (mu_200 - mu_10) / 190
    return slope * steps + mu_200 - 200 * slope


def uniform_sigmas(steps: int) -> list[float]:
    """`steps` + 1 evenly spaced noise levels from 1 to 0.

    Raises:
        InputError: steps is not a whole number of at least 1.
    """
    steps = whole("steps", steps, 1)
    return [1 - i / steps for i in range(steps)] + [0.0]


def flux1_schedule(steps: int, image_tokens: int, shift: bool = True) -> list[float]:
    """Noise levels of FLUX.1: `steps` + 1 values, 1.0 ... 0.0.

    Args:
        image_tokens: rows * columns / 256 of the picture in pixels.
        shift: True for dev and its relatives; False for schnell, whose levels are evenly spaced.
    """
    sigmas = uniform_sigmas(steps)
    return [shift_sigma(flux1_mu(image_tokens), s) for s in sigmas] if shift else sigmas


def flux2_schedule(steps: int, image_tokens: int) -> list[float]:
    """Noise levels of FLUX.2: `steps` + 1 values, 1.0 ... 0.0; `image_tokens` as in `flux1_schedule`."""
    sigmas = uniform_sigmas(steps)
    mu = flux2_mu(steps, image_tokens)
    return [shift_sigma(mu, s) for s in sigmas]


def flux3_schedule(steps: int) -> list[float]:
    """Noise levels of FLUX.3: `steps` + 1 values, 1.0 ... 0.0, whatever the size of the picture."""
    return [static_shift(FLUX3_SHIFT)(s) for s in uniform_sigmas(steps)]


def static_shift(shift: float) -> Curve:
    """The curve shift * t / (1 + (shift - 1) t) (arXiv 2403.03206, 5.3.2): `shift_sigma` with mu = log(shift).

    Raises:
        InputError: shift is not a positive, finite number.
    """
    shift = plain(shift)
    if not finite(shift) or shift <= 0:
        raise InputError(f"shift must be a positive number, got {shown(shift)}")
    return lambda t: min(1.0, shift * t / (1 + (shift - 1) * t))  # at 1 some shifts round to a little more


def dynamic_shift(mu: float) -> Curve:
    """The curve of `shift_sigma` for one mu."""
    return lambda t: shift_sigma(mu, t)


def unshifted(t: float) -> float:
    """The curve of schnell: none."""
    return t


def stretch_to_terminal(sigmas: Sequence[float], terminal: float) -> list[float]:
    """Stretch levels (without the final 0) so that the last one is `terminal`; 1 stays (`shift_terminal` of diffusers).

    Raises:
        InputError: terminal is not between 0 and 1.
    """
    if not 0 < terminal < 1:
        raise InputError(f"terminal must be between 0 and 1, got {terminal!r}")
    scale = (1 - sigmas[-1]) / (1 - terminal)
    return [1 - (1 - sigma) / scale for sigma in sigmas]


def _spaced(start: float, end: float, count: int) -> list[float]:
    """`count` evenly spaced numbers from start to end."""
    return [start + (end - start) * i / max(1, count - 1) for i in range(count)]


def _even(steps: int, curve: Curve) -> list[float]:
    return [curve(t) for t in uniform_sigmas(steps)[:-1]]


def _flow_euler(steps: int, curve: Curve) -> list[float]:
    """Evenly spaced from 1 to 1/1000, the lowest trained level: flow Euler and Heun of diffusers, told no levels."""
    return [curve(t) for t in _spaced(1, 1 / TRAINED, steps)]


def _flow_dpmpp(steps: int, curve: Curve) -> list[float]:
    """Evenly spaced from 0.999 down: `use_flow_sigmas` of diffusers' DPM-Solver, DEIS and SA-Solver."""
    return [curve((1 - 1 / TRAINED) * t) for t in uniform_sigmas(steps)[:-1]]


def _flow_unipc(steps: int, curve: Curve) -> list[float]:
    """Evenly spaced from 1 towards 1/1000, which 0 takes the place of: `use_flow_sigmas` of diffusers' UniPC."""
    return [curve(t) for t in _spaced(1, 1 / TRAINED, steps + 1)[:-1]]


def _karras(levels: Sequence[float]) -> list[float]:
    """Evenly spaced in sigma^(1/7) between the first and the last of `levels` (arXiv 2206.00364, equation 5)."""
    high, low = levels[0] ** (1 / KARRAS_RHO), levels[-1] ** (1 / KARRAS_RHO)
    return [root**KARRAS_RHO for root in _spaced(high, low, len(levels))]


def _exponential(levels: Sequence[float]) -> list[float]:
    """Evenly spaced in log sigma between the first and the last of `levels`."""
    return [math.exp(x) for x in _spaced(math.log(levels[0]), math.log(levels[-1]), len(levels))]


def _beta(levels: Sequence[float]) -> list[float]:
    """Quantiles of a beta distribution between the first and the last of `levels`, as diffusers takes them."""
    quantiles = [beta_quantile(1 - t, BETA_SHAPE, BETA_SHAPE) for t in _spaced(0, 1, len(levels))]
    return [levels[-1] + q * (levels[0] - levels[-1]) for q in quantiles]


def _grid(k: int, curve: Curve) -> float:
    """Level k of ComfyUI's table, k = 1 ... GRID."""
    return curve(k / GRID)


def _simple(steps: int, curve: Curve) -> list[float]:
    """Every so-and-so-manieth level of ComfyUI's table, from the top."""
    return [_grid(GRID - int(i * GRID / steps), curve) for i in range(steps)]


def _sgm_uniform(steps: int, curve: Curve) -> list[float]:
    """Evenly spaced between the first and the last level of the table, then moved once more, as ComfyUI does it."""
    return [curve(t) for t in _spaced(_grid(GRID, curve), _grid(1, curve), steps + 1)[:-1]]


def _normal(steps: int, curve: Curve) -> list[float]:
    """As sgm-uniform, but the last level of the table is one of the steps."""
    return [curve(t) for t in _spaced(_grid(GRID, curve), _grid(1, curve), steps)]


def _ddim_uniform(steps: int, curve: Curve) -> list[float]:
    """Every n-th level of the table from the bottom; there may be a step more than asked for, as in ComfyUI."""
    stride = max(GRID // steps, 1)
    return [_grid(k + 1, curve) for k in range(1, GRID, stride)][::-1]


def _beta_grid(steps: int, curve: Curve) -> list[float]:
    """Quantiles of a beta distribution as places in ComfyUI's table; of equal places one is kept: steps may be lost."""
    places = [round(beta_quantile(1 - i / steps, BETA_SHAPE, BETA_SHAPE) * (GRID - 1)) for i in range(steps)]
    return [_grid(place + 1, curve) for place in dict.fromkeys(places)]


def _beta_flow(steps: int, curve: Curve) -> list[float]:
    """Quantiles of a beta distribution, moved by the curve: `beta-comfyui` without its table, so no step is lost."""
    return [curve(beta_quantile(1 - i / steps, BETA_SHAPE, BETA_SHAPE)) for i in range(steps)]


def _linear_quadratic(steps: int, curve: Curve, threshold: float = 0.025) -> list[float]:
    """Small equal steps through the first 0.025, half of them, then growing ones (arXiv 2410.13720, section 3.4.3)."""
    if steps == 1:
        return [1.0]
    linear = steps // 2
    rest = steps - linear
    excess = linear - threshold * steps
    quadratic = excess / (linear * rest**2)
    slope = threshold / linear - 2 * excess / rest**2
    done = [threshold * i / linear for i in range(linear)]
    done += [quadratic * i**2 + slope * i + quadratic * linear**2 for i in range(linear, steps)]
    return [1 - x for x in done]


def _optimal_steps(steps: int, curve: Curve) -> list[float]:
    """The table of OptimalSteps; for other numbers of steps than its 10, straight lines between its logarithms."""
    levels: list[float] = []
    for i in range(steps):
        place, share = divmod(i * (len(OPTIMAL_STEPS) - 1) / steps, 1)
        low, high = math.log(OPTIMAL_STEPS[int(place)]), math.log(OPTIMAL_STEPS[int(place) + 1])
        levels.append(math.exp(low + share * (high - low)))
    return levels


SPACINGS: dict[str, Callable[[int, Curve], list[float]]] = {
    "uniform": _even,  # the release's, and diffusers' default
    "flow-euler": _flow_euler,
    "flow-dpmpp": _flow_dpmpp,
    "flow-unipc": _flow_unipc,
    "karras": lambda steps, curve: _karras(_even(steps, curve)),
    "exponential": lambda steps, curve: _exponential(_even(steps, curve)),
    "beta": lambda steps, curve: _beta(_even(steps, curve)),
    "simple": _simple,
    "normal": _normal,
    "sgm-uniform": _sgm_uniform,
    "ddim-uniform": _ddim_uniform,
    "beta-comfyui": _beta_grid,
    "beta-flow": _beta_flow,  # what solvers in lambda like best: small steps at both ends
    "linear-quadratic": _linear_quadratic,
    "optimal-steps": _optimal_steps,
}
"""Ways to spread the steps: (steps, curve) -> the levels without the final 0."""
EVEN = ("uniform", "flow-euler", "flow-dpmpp", "flow-unipc")


def schedule(spacing: str, steps: int, curve: Curve = unshifted, terminal: float | None = None) -> Schedule:
    """Noise levels by name.

    Args:
        spacing: a key of `SPACINGS`. `uniform`, `flow-euler`, `flow-dpmpp`, `flow-unipc`, `karras`, `exponential` and
            `beta` are as in diffusers; `simple`, `normal`, `sgm-uniform`, `ddim-uniform`, `beta-comfyui`,
            `linear-quadratic` and `optimal-steps` as in ComfyUI. `beta-flow` is `beta-comfyui` without rounding.
        steps: how many; `ddim-uniform` may make one more, `beta-comfyui` fewer, as their originals do.
            `linear-quadratic` and `optimal-steps` have levels of their own and ignore the curve.
        curve: `unshifted`, `dynamic_shift(flux1_mu(tokens))`, `static_shift(3.0)` ...
        terminal: what the last level before 0 is stretched to; for evenly spaced ones only (`EVEN`).

    Raises:
        InputError: an unknown spacing, steps below 1, or a terminal that the spacing cannot have.
    """
    steps = whole("steps", steps, 1)
    if spacing not in SPACINGS:
        raise InputError(f"unknown schedule {spacing!r}; known: {', '.join(SPACINGS)}")
    if terminal is not None and (spacing not in EVEN or steps < 2):
        raise InputError(f"a terminal level needs one of {', '.join(EVEN)} and two steps, got {spacing!r} and {steps}")
    levels = SPACINGS[spacing](steps, curve)
    if terminal is not None:
        levels = stretch_to_terminal(levels, terminal)
    if spacing == "flow-unipc":
        levels[0] -= 1e-6  # as theirs, which takes the logarithm of 1 - sigma
    return custom_schedule([*levels, 0.0], spacing)


def custom_schedule(sigmas: Sequence[float], name: str = "custom") -> Schedule:
    """The user's own noise levels, checked.

    Raises:
        InputError: fewer than two, one that is not a number from 0 to 1, or one that is not below the one before.
    """
    if isinstance(sigmas, str) or not isinstance(sigmas, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"a schedule must be a name or a list of noise levels, got {shown(sigmas)}")
    levels = [plain(sigma) for sigma in sigmas]
    for i, level in enumerate(levels):
        if not finite(level):
            raise InputError(f"noise level {i} is {shown(level)}; expected a number from 0 to 1")
    made = Schedule(name, tuple(float(level) for level in levels))
    for i, (above, sigma) in enumerate(pairwise(made), start=1):
        if sigma > above:
            raise InputError(f"noise level {i} is {sigma!r}, not below the one before, {above!r}")
    return made


def from_strength(schedule: Schedule, strength: float) -> Schedule:
    """The part of a schedule that changes a picture by `strength`, from 0 (not at all) to 1 (all of it).

    It starts at the level that lies a share of 1 - strength of the steps after the first, between two levels if need
    be. What is left of that step is told to the solver (`running.advance`), so that the result changes continuously
    with the strength.

    Raises:
        InputError: strength is not a number above 0 and up to 1, or the schedule has restarts.
    """
    strength = plain(strength)
    if not finite(strength) or not 0 < strength <= 1:
        raise InputError(f"strength must be a number above 0 and at most 1, got {shown(strength)}")
    if schedule.restarts:
        raise InputError("a schedule with restarts cannot be entered in the middle")
    place = round((1 - strength) * schedule.steps, 9)  # (1 - 0.56) * 25 is 11, not a step of 1e-15 before it
    whole = min(math.floor(place), schedule.steps - 1)
    share = min(place - whole, 1 - 1e-9)
    start = schedule.sigmas[whole] + share * (schedule.sigmas[whole + 1] - schedule.sigmas[whole])
    sigmas = (start, *(sigma for sigma in schedule.sigmas[whole + 1 :] if sigma < start))
    if share == 0:
        return replace(schedule, sigmas=sigmas, skipped=whole)
    return replace(schedule, sigmas=sigmas, skipped=whole, share=1 - share, begun=schedule.sigmas[whole])


def with_restarts(schedule: Schedule, low: float, high: float, times: int) -> Schedule:
    """Go back from the level nearest to `low` to the one nearest to `high`, so many times (arXiv 2306.14878).

    Raises:
        InputError: not 0 < low < high < 1, both nearest to the same level, or times below 1.
    """
    low, high, times = plain(low), plain(high), plain(times)
    levels = finite(low) and finite(high) and 0 < low < high < 1
    if not levels or not finite(times) or not isinstance(times, int) or times < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"a restart needs 0 < low < high < 1 and times of at least 1, got {shown((low, high, times))}")
    inner = schedule.sigmas[1:-1]
    ends = [min(range(len(inner)), key=lambda i: abs(inner[i] - level)) + 1 if inner else 0 for level in (high, low)]
    if ends[0] == ends[1]:
        raise InputError(f"no two levels of this schedule are nearest to {low!r} and {high!r}: take more steps")
    first, last = ends
    again = schedule.sigmas[first : last + 1] * times
    sigmas = (*schedule.sigmas[: last + 1], *again, *schedule.sigmas[last + 1 :])
    return replace(schedule, name=f"{schedule.name} with {times} restarts", sigmas=sigmas)


def beta_quantile(p: float, a: float, b: float) -> float:
    """x for which a beta(a, b) variable is below x with probability p; by bisection, to double precision."""
    if p <= 0 or p >= 1:
        return float(p >= 1)
    low, high = 0.0, 1.0
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if _beta_probability(middle, a, b) < p:
            low = middle
        else:
            high = middle


def _beta_probability(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (DLMF 8.17.22)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_probability(1 - x, b, a)
    if x == 0:
        return 0.0
    front = math.exp(
        a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    ) / a  # fmt: skip
    # Lentz's method for 1 / (1 + d1 / (1 + d2 / (1 + ...))).
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value
