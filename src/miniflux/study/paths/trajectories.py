"""Paths from noise to a picture, kept and measured: after every step, and after every block.

    path = trajectory(pipe, "a red circle on a blue background", steps=12)
    print(table(path))

Letters in shapes: S steps, N blocks, C h w channels, rows and columns of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from miniflux.checks import shown
from miniflux.errors import InputError
from miniflux.families import FAMILIES
from miniflux.pipeline import Pipeline
from miniflux.result import Result
from miniflux.sampling import Moment
from miniflux.sampling.latents import PIXELS_PER_TOKEN
from miniflux.sampling.observing import observed
from miniflux.sampling.solvers import data
from miniflux.study.paths.geometry import angle, relative, spread, straightness, turns
from miniflux.study.paths.lens import Lens, picture_blocks

REFUSED = {
    "watch": "it is looked on here already: call generate in observed() for more",
    "callback": "it could change the path",
    "cache": "a step cache leaves blocks out",
    "restart": "noise that is added on the way makes several paths of one",
}


@dataclass(frozen=True, repr=False, eq=False)
class Trajectory:
    """The path of one picture. All tensors are float32, on the CPU.

    Attributes:
        result: what `generate` made, the same as without somebody looking on.
        sigmas: the noise levels, S + 1 of them.
        latents: (S + 1, C, h, w): the start, and after every step.
        pictures: (S, C, h, w): what each step points to, x - sigma * v with the guided v; `Moment.picture`.
        positive: (S, C, h, w): the velocity for the prompt alone, at the beginning of each step.
        blocks: names of the N blocks that were looked at.
        seen: (S, N, C, h, w): the velocity that the lens reads after each of them, for the prompt alone.
    """

    result: Result
    sigmas: tuple[float, ...]
    latents: Tensor
    pictures: Tensor
    positive: Tensor
    blocks: tuple[str, ...]
    seen: Tensor

    def __repr__(self) -> str:
        return f"<Trajectory: {len(self.pictures)} steps, {len(self.blocks)} blocks, {self.result!r}>"

    @property
    def velocities(self) -> Tensor:
        """(S, C, h, w): the guided velocities; where guidance did nothing, `positive` bit for bit."""
        found = [self.positive[k] if self.guided(k) == 0 else self._guided(k) for k in range(len(self.pictures))]
        return torch.stack(found)

    def _guided(self, k: int) -> Tensor:
        return (self.latents[k] - self.pictures[k]) / self.sigmas[k]

    def guided(self, step: int) -> float:
        """What guidance by other texts changed in a step, over the prediction for the prompt alone:
        |v - v_positive| / |v_positive|. 0 where there is none; the guidance input of distilled models is no part of
        it, see `apart`."""
        alone = data(self.latents[step], self.positive[step], self.sigmas[step])
        change = (alone - self.pictures[step]).double().norm() / self.sigmas[step]
        return float(change / self.positive[step].double().norm())

    def block_pictures(self, step: int) -> Tensor:
        """(N, C, h, w): the latents of the picture that each block points to in a step, x - sigma * v."""
        return data(self.latents[step], self.seen[step], self.sigmas[step])


@dataclass(frozen=True)
class Step:
    """One step of a path. Distances are relative: |a - b| / |b|.

    Attributes:
        sigma, sigma_next: noise levels before and after it.
        size: root mean square of the latents after it.
        from_start: how far these are from the first latents.
        to_end: and from the last ones.
        pointed: how far the picture that it points to is from the last latents.
        turn: angle in degrees between its velocity and that of the step before it; None of the first, and where one of
            them is zero.
        guided: what guidance by other texts changed, over the prediction for the prompt alone.
    """

    sigma: float
    sigma_next: float
    size: float
    from_start: float
    to_end: float
    pointed: float
    turn: float | None
    guided: float


@dataclass(frozen=True)
class Block:
    """How near a block's velocity is to the one that the network ends with in the same step.

    Attributes:
        name: of the block.
        distances: |v - v_end| / |v_end| for each step.
        cosines: of the angle between the two, from -1 to 1.
    """

    name: str
    distances: tuple[float, ...]
    cosines: tuple[float, ...]


@dataclass(frozen=True)
class Apart:
    """How far two paths are apart in one step: |a - b| / |b|.

    Attributes:
        sigma: the noise level that the step begins at.
        latents: after the step.
        pictures: that it points to.
        velocities: at its beginning. In the first step both begin at the same latents, so this is what the other
            setting does by itself.
        angle: between the velocities, in degrees; None where one of them is zero.
    """

    sigma: float
    latents: float
    pictures: float
    velocities: float
    angle: float | None


def trajectory(pipe: Pipeline, prompt: str, *, blocks: Sequence[str] | None = None, **asked: Any) -> Trajectory:
    """Draw one picture and keep its path.

    Args:
        blocks: names of those to look at, of `lens.picture_blocks`; None for all, () for none. What is kept of them
            takes 4 * S * N * C * h * w bytes: 1.6 MB of nano, 1.7 GB of FLUX.1 dev at 1024x1024 with 28 steps.
        asked: of `Pipeline.generate`.

    Raises:
        InputError: several pictures, an unknown block, or an argument under which there is no single path that can be
            followed (`REFUSED`); and as `generate`.
    """
    _check(prompt, asked)
    family, known = FAMILIES[pipe.variant.family], picture_blocks(pipe.transformer.config)
    wanted = known if blocks is None else list(blocks)
    for name in wanted:
        if name not in known:
            raise InputError(f"no block {shown(name)} with the picture's tokens; known: {', '.join(known)}")
    end = known[-1]
    seen = Lens(pipe.transformer, family.conditioning, [*wanted, end])
    reached: list[tuple[float, Tensor, Tensor]] = []

    def watch(_: int, moment: Moment) -> None:
        reached.append((moment.sigma, moment.x.cpu(), moment.picture.cpu()))

    with observed(seen):
        result = pipe.generate(prompt, watch=watch, **asked)
    rows, columns = (side * PIXELS_PER_TOKEN // family.patch for side in result.latents.shape[-2:])
    begin = asked.get("resume")

    def latents(tokens: Sequence[Tensor]) -> Tensor:
        return family.unpack(torch.cat(list(tokens)), rows, columns)

    start = seen.looks[0].x if begin is None else begin.x.cpu()  # in bfloat16 the network is told it rounded
    looks = [latents([look.velocities[name] for name in wanted]) for look in seen.looks] if wanted else []
    nothing = result.latents.new_zeros(len(reached), 0, *result.latents.shape[1:])
    return Trajectory(
        result,
        (*(look.sigma for look in seen.looks), reached[-1][0]),
        latents([start, *(x for _, x, _ in reached)]),
        latents([picture for _, _, picture in reached]),
        latents([look.velocities[end] for look in seen.looks]),
        tuple(wanted),
        torch.stack(looks) if looks else nothing,
    )


def _check(prompt: object, asked: dict[str, Any]) -> None:
    if not isinstance(prompt, str):
        raise InputError(f"one picture is followed: the prompt must be a text, got {shown(prompt)}")
    if asked.get("images", 1) != 1:
        raise InputError(f"one picture is followed: images must be 1, got {shown(asked['images'])}")
    for name, why in REFUSED.items():
        if asked.get(name) is not None:
            raise InputError(f"{name} is not taken when a path is followed: {why}")
    levels = asked.get("schedule", "auto")
    if not isinstance(levels, str) and any(after > before for before, after in pairwise(levels)):
        raise InputError(f"schedule rises, got {shown(levels)}: {REFUSED['restart']}")


def steps(path: Trajectory) -> tuple[Step, ...]:
    """The numbers of every step."""
    first, last = path.latents[0], path.latents[-1]
    turned = [None, *turns(path.velocities)]
    return tuple(
        Step(
            sigma=path.sigmas[k],
            sigma_next=path.sigmas[k + 1],
            size=float(after.double().square().mean().sqrt()),
            from_start=relative(after, first),
            to_end=relative(after, last),
            pointed=relative(path.pictures[k], last),
            turn=turned[k],
            guided=path.guided(k),
        )
        for k, after in enumerate(path.latents[1:])
    )


def blocks(path: Trajectory) -> tuple[Block, ...]:
    """How near every block that was looked at is to what the network says at the end, step by step."""
    found: list[Block] = []
    for n, name in enumerate(path.blocks):
        pairs = list(zip(path.seen[:, n], path.positive, strict=True))
        cosines = (torch.cosine_similarity(a.double().flatten(), b.double().flatten(), 0) for a, b in pairs)
        found.append(Block(name, tuple(relative(a, b) for a, b in pairs), tuple(float(c) for c in cosines)))
    return tuple(found)


def apart(path: Trajectory, other: Trajectory) -> tuple[Apart, ...]:
    """How far a path is from another one through the same noise levels: the same run at another guidance, say.

    Raises:
        InputError: their noise levels or sizes differ.
    """
    if path.sigmas != other.sigmas or path.latents.shape != other.latents.shape:
        raise InputError(
            f"paths of the same noise levels and size are compared, got {len(path.pictures)} steps from "
            f"{path.sigmas[0]:g} of {tuple(path.latents.shape[1:])} and {len(other.pictures)} from "
            f"{other.sigmas[0]:g} of {tuple(other.latents.shape[1:])}"
        )
    mine, theirs = path.velocities, other.velocities
    return tuple(
        Apart(
            path.sigmas[k],
            relative(path.latents[k + 1], other.latents[k + 1]),
            relative(path.pictures[k], other.pictures[k]),
            relative(mine[k], theirs[k]),
            angle(mine[k], theirs[k]),
        )
        for k in range(len(mine))
    )


def table(path: Trajectory) -> str:
    """The numbers of every step as text, and below them those of the whole path."""
    lines = [f"{'step':>4} {'sigma':>7} {'size':>6} {'from start':>10} {'to end':>7} {'pointed':>7} {'turn':>7} guided"]
    for k, step in enumerate(steps(path), 1):
        turn = f"{'-':>7}" if step.turn is None else f"{step.turn:6.1f}°"
        lines.append(
            f"{k:4d} {step.sigma_next:7.4f} {step.size:6.3f} {step.from_start:10.3f} {step.to_end:7.3f} "
            f"{step.pointed:7.3f} {turn} {step.guided:6.3f}"
        )
    return "\n".join([*lines, f"straightness {straightness(path.latents, path.sigmas):.4f} (0: a straight line)"])


def block_table(path: Trajectory) -> str:
    """How near every block is to the end as text: distance, and cosine in brackets, of some of the steps."""
    chosen = spread(len(path.pictures), 6)
    width = max((len(name) for name in path.blocks), default=0)
    lines = [" " * width + "".join(f"{f'sigma {path.sigmas[k]:.3f}':>17}" for k in chosen)]
    for block in blocks(path):
        cells = (f"{block.distances[k]:8.3f} ({block.cosines[k]:5.2f})" for k in chosen)
        lines.append(f"{block.name:<{width}}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def apart_table(found: Sequence[Apart]) -> str:
    """How far two paths are apart as text, a step per row."""
    lines = [f"{'step':>4} {'sigma':>7} {'velocity':>8} {'angle':>7} {'pointed':>7} {'latents':>7}   apart"]
    for k, step in enumerate(found, 1):
        turned = f"{'-':>7}" if step.angle is None else f"{step.angle:6.1f}°"
        lines.append(
            f"{k:4d} {step.sigma:7.4f} {step.velocities:8.3f} {turned} {step.pictures:7.3f} {step.latents:7.3f}"
        )
    return "\n".join(lines)
