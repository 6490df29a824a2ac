"""Stages 5 and 6 of the nano recipe: nano-dev and nano-schnell learn from pictures that they drew themselves.

A flow trained on noise mixed with true pictures never sees its own small mistakes on the way, and outlines wobble. Here
it is put where its own steps have led and is shown the clean drawing of what it was about to draw (`pairs`), in latents
and, near the end, in decoded pixels, where an edge a pixel off is seen.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miniflux.models.autoencoder import Autoencoder
from miniflux.models.flux1 import Flux1
from miniflux.nano import scenes
from miniflux.nano.recipe.distil import SCHNELL_STEPS, rounded
from miniflux.nano.recipe.flow import embed, velocity
from miniflux.nano.recipe.pairs import Pair, Pairs
from miniflux.nano.recipe.text import TextEncoders
from miniflux.sampling import unpack
from miniflux.training.flow import mixed_precision
from miniflux.training.state import TrainingState, cosine_rate

log = logging.getLogger(__name__)

DECIDED = 0.8  # noise level below which a picture is decided; above it the network keeps to what it predicted before
SEEN = 0.7  # ... and below which the picture that it points to is decoded and compared
DECODED = 6  # pictures of the main canvas that are decoded in a step
ROUNDED = 0.25  # share of the batches with weights rounded to four bits
REUSE = 24  # times that a pair is drawn, on average, before it is replaced
PIXELS = 2.0  # weight of the loss on pixels


@dataclass(frozen=True)
class Phase:
    """A stretch of training: steps, on which canvases (the main one first; of the others, one named twice is drawn
    twice as often), pictures a step on the main one, learning rate, share of the batches that show it, and pairs kept
    of the main canvas and of each other one."""

    name: str
    steps: int
    sizes: tuple[tuple[int, int], ...]
    batch: int
    rate: float
    main: float = 0.6
    kept: tuple[int, int] = (500, 24)


class Canvases:
    """Pairs of many canvases. A batch is of one canvas; small canvases fill large batches."""

    def __init__(self, phase: Phase, make: Callable[[tuple[int, int], int], Pairs], seed: int) -> None:
        self.phase, self.shares, self.rng = phase, Counter(phase.sizes[1:]), random.Random(seed)
        self.pools = [make(size, seed + 7 * i) for i, size in enumerate((phase.sizes[0], *self.shares))]

    def draw(self) -> tuple[Pairs, list[Pair]]:
        others = range(1, len(self.pools))
        main = not others or self.rng.random() < self.phase.main
        i = 0 if main else self.rng.choices(others, list(self.shares.values()))[0]
        pool, most = self.pools[i], self.phase.kept[i > 0]
        batch = share_of(self.phase.batch, pool.size, self.pools[0].size)
        while len(pool) < min(batch, most):
            pool.renew(batch, most)
        filling = len(pool) < most
        pool.renew(max(1, (3 if filling else 1) * batch // REUSE), most)
        return pool, pool.draw(batch)


def share_of(count: int, size: tuple[int, int], main: tuple[int, int]) -> int:
    """How many pictures of a canvas do the work of `count` of the main one; at most twice as many."""
    return max(1, min(2 * count, count * main[0] * main[1] // (size[0] * size[1])))


def pixel_error(
    autoencoder: Autoencoder, latents: Tensor, pictures: list[scenes.Scene], size: tuple[int, int]
) -> Tensor:
    """How far packed latents (B, L, 64), decoded, are from the clean drawings: values, their square, and edges."""
    width, height = size
    drawn = np.stack([np.asarray(scenes.render(scene, width, height)) for scene in pictures])
    pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    error = autoencoder.decode(unpack(latents, height, width)).float() - pixels
    edges = (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
    return error.abs().mean() + 0.5 * edges + error.square().mean()


def clean_error(x0: Tensor, sigmas: Tensor, pool: Pairs, pairs: list[Pair]) -> Tensor:
    """How far the pictures (B, L, 64) that predictions point to are from the clean ones; of low noise levels, where
    they are nearly there, as if from 0.35. Some are compared as pixels as well."""
    clean = torch.stack([pair.clean for pair in pairs])
    weights = 1 / sigmas[:, None, None].clamp_min(0.35) ** 2
    loss = (weights * (x0 - clean).square()).mean()
    seen = [i for i in range(len(pairs)) if sigmas[i] <= SEEN]
    seen = seen[: share_of(DECODED, pool.size, (128, 128))]
    if seen:
        loss = loss + PIXELS * pixel_error(pool.autoencoder, x0[seen], [pairs[i].scene for i in seen], pool.size)
    return loss


def dev_loss(
    student: Flux1, before: Flux1, encoders: TextEncoders, pool: Pairs, pairs: list[Pair], rng: random.Random
) -> Tensor:
    """From states on its own way: while nothing is decided, predict what nano-dev did `before`; then, the clean
    picture."""
    at = [rng.randrange(len(pair.states)) for pair in pairs]
    x = torch.stack([pair.states[i] for pair, i in zip(pairs, at, strict=True)])
    sigmas = torch.tensor([pair.levels[i] for pair, i in zip(pairs, at, strict=True)])
    strength = torch.tensor([pair.guidance for pair in pairs])
    high = sigmas > DECIDED
    with torch.no_grad():
        text = embed(encoders, [pair.caption for pair in pairs], rng)
        kept = velocity(before, x, pool.size, sigmas, text, guidance=strength).float()
    network = rounded(student) if rng.random() < ROUNDED else student
    v = velocity(network, x, pool.size, sigmas, text, guidance=strength).float()
    loss = torch.zeros(())
    if high.any():
        loss = loss + F.mse_loss(v[high], kept[high]) * high.float().mean()
    if not high.all():
        low = ~high
        x0 = (x - sigmas[:, None, None] * v)[low]
        chosen = [pair for pair, is_low in zip(pairs, low.tolist(), strict=True) if is_low]
        loss = loss + clean_error(x0, sigmas[low], pool, chosen) * low.float().mean()
    return loss


def schnell_loss(student: Flux1, encoders: TextEncoders, pool: Pairs, pairs: list[Pair], rng: random.Random) -> Tensor:
    """From where its own steps have led, go straight to the clean picture of what nano-dev makes of the noise."""
    step = rng.choices(range(SCHNELL_STEPS), (0.4, 0.2, 0.2, 0.2))[0]
    x = torch.stack([pair.states[0] for pair in pairs])
    with torch.no_grad():
        text = embed(encoders, [pair.caption for pair in pairs], rng)
        for i in range(step):
            at = torch.full((len(x),), 1 - i / SCHNELL_STEPS)
            x = x - velocity(student, x, pool.size, at, text).float() / SCHNELL_STEPS  # Euler
    at = torch.full((len(x),), 1 - step / SCHNELL_STEPS)
    x0 = x - at[:, None, None] * velocity(student, x, pool.size, at, text).float()
    return clean_error(x0, at, pool, pairs)


def run(
    state: TrainingState[Any],
    phase: Phase,
    make: Callable[[tuple[int, int], int], Pairs],
    loss_of: Callable[[Pairs, list[Pair], random.Random], Tensor],
    seed: int,
    every: tuple[int, Callable[[int], object]],
) -> None:
    """Train to the end of the phase, from wherever `state` is; saved every 100 steps. `every`: (steps, what to do
    then)."""
    if state.step >= phase.steps:
        return
    rng = random.Random(seed + state.step)
    canvases = Canvases(phase, make, seed + state.step)
    started, first, mean = time.monotonic(), state.step, 0.0
    while state.step < phase.steps:
        pool, pairs = canvases.draw()
        with mixed_precision():
            loss = loss_of(pool, pairs, rng)
        state.optimise(loss, cosine_rate(state.step, phase.steps, floor=0.02))
        mean = loss.item() if mean == 0 else 0.98 * mean + 0.02 * loss.item()
        if state.step % 50 == 0:
            pace = (time.monotonic() - started) / (state.step - first)
            made, kept = (sum(getattr(pool, what) for pool in canvases.pools) for what in ("made", "kept"))
            log.info(
                "%s step %d/%d loss %.4f %.2f s a step, %d of %d drawings as asked",
                phase.name, state.step, phase.steps, mean, pace, kept, made,
            )  # fmt: skip
        if state.step % 100 == 0:
            state.save()
        if state.step % every[0] == 0:
            every[1](state.step)
    state.save()
