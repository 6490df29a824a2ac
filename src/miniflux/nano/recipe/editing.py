"""The editing nano models: `python -m miniflux.nano.recipe.editing fill|kontext [FOLDER]`, after nano-dev is made.

Both start as nano-dev. nano-fill sees a picture with a hole, and the mask, as channels beside the noise, as FLUX.1 Fill
does; nano-kontext sees the picture to be changed as tokens behind its own, as FLUX.1 Kontext does. Hours
each on a CPU core; `edited` judges what they draw.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from miniflux.checkpoints import load_into
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.flux1 import Flux1
from miniflux.nano import scenes
from miniflux.nano.recipe import edits
from miniflux.nano.recipe.export import Nano, export_network
from miniflux.nano.recipe.flow import MAIN_TOKENS, OTHERS, SHORT, noise_levels
from miniflux.nano.recipe.pairs import latents_of
from miniflux.nano.recipe.polish import share_of
from miniflux.nano.recipe.realism import encoders_of
from miniflux.nano.recipe.text import TextEncoders, varied
from miniflux.sampling import image_ids, pack, text_ids
from miniflux.training.flow import logit_normal_sigmas, mix, mixed_precision
from miniflux.training.state import TrainingState, cosine_rate

log = logging.getLogger(__name__)

MAIN, SMALL = (128, 128), (64, 64)
OFTEN = 0.9  # share of the batches that show this canvas
MATTERS = 5.0  # how much more a token counts that shows a shape, or that changes
DESCRIBED = 0.2  # share of the edits that are told by what the result shows
PLAIN = 0.15  # share of nano-kontext's batches that start from no picture, as nano-dev does
REUSE = 12  # batches that an example is seen in, on average


Examples = Callable[[int, "tuple[int, int]", Autoencoder, random.Random], "tuple[list[str], Tensor, Tensor]"]
"""(how many, canvas, autoencoder, choices) -> words, latents (N, L, 64), and what is seen beside them (N, L, C)."""


@dataclass(frozen=True)
class Goal:
    """One of the two models: what it is trained on.

    Attributes:
        small, many: so many of the steps come first, with so many pictures each, on a small canvas, which has a quarter
            of the tokens: enough to learn what an instruction means.
        guidance: strengths that its input is told; the example tells so much that they make no difference.
    """

    name: str
    file: str
    steps: int
    batch: int
    small: int
    many: int
    rate: float
    guidance: tuple[float, float]
    examples: Examples


@torch.no_grad()
def holes(
    count: int, size: tuple[int, int], autoencoder: Autoencoder, rng: random.Random
) -> tuple[list[str], Tensor, Tensor]:
    """Words, the whole picture, and beside it (N, L, 64 + 256) the picture with its hole, and the mask."""
    made = [edits.hole(rng, *size) for _ in range(count)]
    pixels = np.stack([np.asarray(scenes.render(one.scene, *size)) for one in made])
    masks = torch.from_numpy(np.stack([one.mask for one in made]))[:, None]
    whole = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with mixed_precision():
        both = autoencoder.encode(torch.cat((whole, whole * (1 - masks))).contiguous(memory_format=torch.channels_last))
    x0, seen = pack(both.float().contiguous()).chunk(2)
    side = autoencoder.config.downscale
    folded = pack(rearrange(masks, "B C (h py) (w px) -> B (C py px) h w", py=side, px=side))
    return [one.words for one in made], x0, torch.cat((seen, folded), dim=-1)


def instructions(
    count: int, size: tuple[int, int], autoencoder: Autoencoder, rng: random.Random
) -> tuple[list[str], Tensor, Tensor]:
    """Words, the picture they lead to, and the one that is changed (N, L, 64). Some of the words say what the result
    shows instead of what to do."""
    made = [edits.edit(rng) for _ in range(count)]
    shown = [np.asarray(scenes.render(scene, *size)) for one in made for scene in (one.after, one.before)]
    both = latents_of(autoencoder, shown)
    words = [edits.described(one.after) if rng.random() < DESCRIBED else one.words for one in made]
    return [varied(one, rng) for one in words], both[0::2], both[1::2]


def captions(
    count: int, size: tuple[int, int], autoencoder: Autoencoder, rng: random.Random
) -> tuple[list[str], Tensor, Tensor]:
    """Words, pictures, and nothing beside them (N, 0, 64): what nano-dev learned, which is forgotten otherwise."""
    made = [(scenes.two_objects if rng.random() < 0.5 else scenes.one_object)(rng) for _ in range(count)]
    x0 = latents_of(autoencoder, [np.asarray(scenes.render(scene, *size)) for scene in made])
    return [varied(scene.caption, rng) for scene in made], x0, x0[:, :0]


GOALS = {
    goal.name: goal
    for goal in (
        Goal("fill", "flux1-nano-fill.safetensors", 4_000, 24, 1_000, 48, 6e-4, (1.0, 40.0), holes),
        Goal("kontext", "flux1-nano-kontext.safetensors", 10_500, 16, 2_500, 40, 8e-4, (1.0, 6.0), instructions),
    )
}


class Pool:
    """Examples of one canvas, kept in memory and renewed little by little."""

    def __init__(
        self, examples: Examples, autoencoder: Autoencoder, size: tuple[int, int], count: int, seed: int
    ) -> None:
        self.examples, self.autoencoder, self.size = examples, autoencoder, size
        self.rng, self.next = random.Random(seed), 0
        made = [self._make(min(32, count - i)) for i in range(0, count, 32)]
        self.words = [word for words, _, _ in made for word in words]
        self.x0, self.seen = torch.cat([x0 for _, x0, _ in made]), torch.cat([seen for _, _, seen in made])

    def _make(self, count: int) -> tuple[list[str], Tensor, Tensor]:
        words, x0, seen = self.examples(count, self.size, self.autoencoder, self.rng)
        return words, x0.to(torch.bfloat16), seen.to(torch.bfloat16)

    def draw(self, batch: int) -> tuple[list[str], Tensor, Tensor]:
        """A batch of random ones; some are then replaced."""
        chosen = [self.rng.randrange(len(self.words)) for _ in range(batch)]
        drawn = [self.words[i] for i in chosen], self.x0[chosen].float(), self.seen[chosen].float()
        words, x0, seen = self._make(max(1, batch // REUSE))
        places = [(self.next + i) % len(self.words) for i in range(len(words))]
        self.next = (self.next + len(words)) % len(self.words)
        self.x0[places], self.seen[places] = x0, seen
        for place, word in zip(places, words, strict=True):
            self.words[place] = word
        return drawn


def beginning(dev: Flux1, channels: int) -> Flux1:
    """nano-dev with a wider input, to which the new channels say nothing yet."""
    student = Flux1(replace(dev.config, in_channels=dev.config.in_channels + channels))
    weights = dev.state_dict()
    weights["img_in.weight"] = F.pad(weights["img_in.weight"], (0, channels))
    student.load_state_dict(weights)
    return student


def editing_loss(
    model: Callable[..., Tensor],
    goal: Goal,
    encoders: TextEncoders,
    size: tuple[int, int],
    words: list[str],
    x0: Tensor,
    seen: Tensor,
) -> Tensor:
    """Flow matching towards the result, beside what is seen: channels for Fill, tokens for Kontext."""
    batch, tokens, _ = x0.shape
    sigmas, noise = high_levels(batch, tokens), torch.randn_like(x0)
    ids = image_ids(batch, size[1] // 16, size[0] // 16)
    x = mix(x0, noise, sigmas)
    matters = shaped(x0)
    if goal.name == "fill":
        x = torch.cat((x, seen), dim=-1)
    elif seen.shape[1]:
        matters = matters + changed(x0, seen)
        there = ids.clone()
        there[..., 0] = 1
        x, ids = torch.cat((x, seen), dim=1), torch.cat((ids, there), dim=1)
    with torch.no_grad():
        text = encoders(words, SHORT)
    strength = torch.empty(batch).uniform_(*goal.guidance)
    v = model(x, ids, text.txt, text_ids(batch, text.txt.shape[1]), sigmas, text.vec, strength)
    error = (v[:, :tokens].float() - (noise - x0)).square().mean(-1)
    counts = 1 + MATTERS * matters
    return (counts * error).mean() / counts.mean()


def high_levels(batch: int, tokens: int) -> Tensor:
    """Noise levels of which half are higher than those of nano-dev: there the words and the picture that is seen decide
    what will be where, while it is known from before how a shape becomes sharp."""
    high = logit_normal_sigmas(batch, 2.2 + 0.5 * math.log(tokens / MAIN_TOKENS), 1.2)
    return torch.where(torch.rand(batch) < 0.5, high, noise_levels(batch, tokens))


def shaped(x0: Tensor) -> Tensor:
    """Which tokens (B, L) show more than background: 1 or 0. Most show nothing else, and are learned first."""
    return ((x0 - x0.median(dim=1, keepdim=True).values).abs().mean(-1) > 0.15).float()


def changed(x0: Tensor, seen: Tensor) -> Tensor:
    """Which tokens (B, L) show something else than what was seen there: 1 or 0."""
    return ((x0 - seen).abs().mean(-1) > 0.15).float()


def matrices(name: str) -> bool:
    """Weights that Muon trains: the matrices inside the blocks."""
    return "blocks" in name


def make(name: str, folder: Path, steps: int | None = None, start: Path | None = None) -> Path:
    """Train, or go on training; returns the finished file.

    Args:
        start: weights of an earlier run to begin with, instead of nano-dev's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    goal = GOALS[name] if steps is None else replace(GOALS[name], steps=steps)
    torch.manual_seed(21)
    pipe = Nano.load()
    autoencoder = pipe.autoencoder.to(memory_format=torch.channels_last)  # pyright: ignore
    encoders = encoders_of(pipe.text)
    channels = holes(1, MAIN, autoencoder, random.Random(0))[2].shape[-1] if name == "fill" else 0
    student = beginning(pipe.transformer, channels)
    if start is not None:
        load_into(student, start, dtype=torch.float32)
    student.requires_grad_(True)
    state = TrainingState(student, folder / name, goal.rate, {"goal": name}, decay=0.998, matrices=matrices)
    state.resume()
    rng = random.Random(7 + state.step)

    def collected(size: tuple[int, int], count: int, examples: Examples = goal.examples) -> Pool:
        return Pool(examples, autoencoder, size, count, state.step + size[0] + 31 * size[1])

    def plain(size: tuple[int, int]) -> list[Pool]:
        return [collected(size, 750, captions)] if goal.name == "kontext" else []

    if state.step < goal.small:
        _train(state, goal, [collected(SMALL, 3000)], plain(SMALL), goal.small, goal.many, encoders, rng)
    pools = [collected(size, 1500 if size == MAIN else 64) for size in (MAIN, *OTHERS)]
    _train(state, goal, pools, plain(MAIN), goal.steps, goal.batch, encoders, rng)
    path = folder / "weights" / goal.file
    finished: nn.Module = copy.deepcopy(state.average).eval().requires_grad_(False)
    export_network(finished, path)
    log.info("finished: %s, %d bytes", path, path.stat().st_size)
    return path


def _train(
    state: TrainingState[Flux1],
    goal: Goal,
    pools: list[Pool],
    plain: list[Pool],
    end: int,
    batch: int,
    encoders: TextEncoders,
    rng: random.Random,
) -> None:
    """Train up to a step, mostly on the first of the pools, now and then on pictures that start from none."""
    model: Callable[..., Tensor] = torch.compile(state.model, dynamic=False)

    def loss() -> Tensor:
        pool = pools[0] if len(pools) == 1 or rng.random() < OFTEN else rng.choice(pools[1:])
        if plain and rng.random() < PLAIN:
            pool = plain[0]
        words, x0, seen = pool.draw(share_of(batch, pool.size, pools[0].size))
        call = model if pool.size == pools[0].size else state.model
        return editing_loss(call, goal, encoders, pool.size, words, x0, seen)

    trained(state, goal.name, end, goal.steps, loss)


def trained(state: TrainingState[Any], name: str, end: int, total: int, loss: Callable[[], Tensor]) -> None:
    """Train up to a step of `total`, by which the rate falls; said every 50 steps, saved every 250."""
    started, first, mean = time.monotonic(), state.step, 0.0
    while state.step < end:
        with mixed_precision():
            found = loss()
        state.optimise(found, cosine_rate(state.step, total, floor=0.01))
        mean = found.item() if mean == 0 else 0.98 * mean + 0.02 * found.item()
        if state.step % 50 == 0:
            pace = (time.monotonic() - started) / (state.step - first)
            log.info("%s step %d/%d loss %.4f %.2f s a step", name, state.step, total, mean, pace)
        if state.step % 250 == 0:
            state.save()
    state.save()


def main() -> None:
    arguments = argparse.ArgumentParser(prog="miniflux.nano.recipe.editing", description=__doc__)
    arguments.add_argument("goal", choices=[*GOALS])
    arguments.add_argument("folder", type=Path, nargs="?", default=Path("runs/nano"))
    arguments.add_argument("--steps", type=int, help="fewer or more than usual")
    arguments.add_argument("--start", type=Path, metavar="FILE", help="begin with the weights of an earlier run")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.set_multithreading_enabled(False):
        options = arguments.parse_args()
        make(options.goal, options.folder, options.steps, options.start)


if __name__ == "__main__":
    main()
