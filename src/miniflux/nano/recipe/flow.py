"""Stage 2 of the nano recipe: the teacher, a FLUX.1 without guidance input trained together with its text encoders."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniflux.models.autoencoder import Autoencoder
from miniflux.models.flux1 import TIME_FEATURES, Flux1
from miniflux.models.layers import timestep_embedding
from miniflux.nano import scenes
from miniflux.nano.recipe.export import Nano
from miniflux.nano.recipe.text import T5_LENGTH, TextEncoders, varied
from miniflux.pipeline import Pipeline
from miniflux.sampling import image_ids, pack, text_ids
from miniflux.text import TextEmbedding
from miniflux.training.flow import logit_normal_sigmas, mix, mixed_precision
from miniflux.training.state import TrainingState, cosine_rate
from miniflux.variants import NANO_DEV, NANO_SCHNELL

log = logging.getLogger(__name__)

DEV = NANO_DEV
SCHNELL = NANO_SCHNELL


@dataclass(frozen=True)
class Phase:
    """A stretch of training: how many steps, on which canvases (width, height), how many pictures a step."""

    name: str
    steps: int
    sizes: tuple[tuple[int, int], ...]  # the main one first; of the others, one named twice is drawn twice as often
    batch: int
    rate: float
    main: float = 0.75  # share of the batches that show the first canvas


SMALL = ((64, 64),)
MAIN_TOKENS = 64  # of the main canvas, 128x128
SHORT = 32  # T5 tokens that nearly every caption fits in
COMPILE = True  # train the teacher with torch.compile on these canvases, which make most of the batches
COMPILED_SIZES = ((64, 64), (128, 128))
SIDES = (64, 96, 128, 160, 192)
# Canvases beside the main one: all of these sides, and some in between.
OTHERS = (
    *((width, height) for width in SIDES for height in SIDES if (width, height) != (128, 128)),
    *((80, 112), (112, 176), (144, 144), (176, 80)),
)


def initial_weights(model: nn.Module) -> None:
    """Blocks start as the identity: modulations and the last layer at zero, linears small and without bias."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            silent = name.endswith(".lin") or "final_layer" in name  # `lin` is what a Modulation has
            (nn.init.zeros_ if silent else nn.init.xavier_uniform_)(module.weight)
            if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                nn.init.zeros_(module.bias)


class Pictures:
    """Pairs of latents and captions, kept in memory and renewed little by little, for one canvas."""

    def __init__(self, autoencoder: Autoencoder, size: tuple[int, int], count: int, seed: int) -> None:
        self.autoencoder, self.size, self.rng = autoencoder, size, random.Random(seed)
        self.captions: list[str] = []
        self.latents: Tensor = torch.empty(0)
        self.next = 0
        parts = [self._make(min(64, count - i)) for i in range(0, count, 64)]
        self.captions = [caption for captions, _ in parts for caption in captions]
        self.latents = torch.cat([latents for _, latents in parts])

    @torch.inference_mode()
    def _make(self, count: int) -> tuple[list[str], Tensor]:
        made = [(scenes.two_objects if self.rng.random() < 0.6 else scenes.one_object)(self.rng) for _ in range(count)]
        drawn = [scenes.render(scene, *self.size) for scene in made]
        pixels = np.stack([np.asarray(picture) for picture in drawn])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        with mixed_precision():
            latent = self.autoencoder.encode(x.contiguous(memory_format=torch.channels_last))
        return [scene.caption for scene in made], pack(latent.contiguous()).to(torch.bfloat16)

    def renew(self, count: int) -> None:
        """Replace the oldest `count` pictures by fresh ones."""
        captions, latents = self._make(count)
        places = [(self.next + i) % len(self.captions) for i in range(count)]
        self.next = (self.next + count) % len(self.captions)
        self.latents[places] = latents
        for place, caption in zip(places, captions, strict=True):
            self.captions[place] = caption

    def draw(self, batch: int) -> tuple[list[str], Tensor]:
        """`batch` random pictures: captions as people type them, and packed latents (batch, L, 64)."""
        chosen = [self.rng.randrange(len(self.captions)) for _ in range(batch)]
        return [varied(self.captions[i], self.rng) for i in chosen], self.latents[chosen].float()


class Data:
    """A collection of `Pictures`: one for the main canvas and smaller ones for the others."""

    def __init__(self, autoencoder: Autoencoder, sizes: tuple[tuple[int, int], ...], seed: int, pool: int) -> None:
        self.shares = Counter(sizes[1:])
        counts = [pool, *(max(1, pool // 40 * min(share, 4)) for share in self.shares.values())]
        self.pools = [
            Pictures(autoencoder, size, count, seed + 7 * i)
            for i, (size, count) in enumerate(zip((sizes[0], *self.shares), counts, strict=True))
        ]
        self.rng = random.Random(seed)

    def draw(self, batch: int, main: float) -> tuple[list[str], Tensor, tuple[int, int]]:
        """A batch of one canvas: the first one mostly. Smaller canvases fill larger batches."""
        pool = self.pools[0]
        if len(self.pools) > 1 and self.rng.random() > main:
            pool = self.rng.choices(self.pools[1:], list(self.shares.values()))[0]
        tokens = pool.latents.shape[1]
        batch = max(1, min(2 * batch, batch * self.pools[0].latents.shape[1] // tokens))
        pool.renew(max(1, batch // 16))
        captions, x0 = pool.draw(batch)
        return captions, x0, pool.size


def noise_levels(batch: int, tokens: int) -> Tensor:
    """Half of them high ones: what a shape will be is decided above 0.8 on the main canvas. The other half is for
    edges, which stay wobbly without it: a circle begun at 0.5 is no longer round in the end.

    The more tokens a picture has, the more noise it takes to hide it: log-odds grow by half the logarithm of their
    number (arXiv 2403.03206, section 5.3.2).
    """
    more = 0.5 * math.log(tokens / MAIN_TOKENS)
    high, low = (logit_normal_sigmas(batch, mean + more, std) for mean, std in ((1.2, 1.3), (-0.4, 1.0)))
    return torch.where(torch.rand(batch) < 0.5, high, low)


def velocity(
    model: Callable[..., Tensor], x: Tensor, size: tuple[int, int], sigmas: Tensor, text: TextEmbedding, **more: Tensor
) -> Tensor:
    """The network's prediction for packed latents of a canvas (width, height)."""
    ids = image_ids(len(x), size[1] // 16, size[0] // 16)
    if text.mask is not None:
        more["txt_mask"] = text.mask
    return model(x, ids, text.txt, text_ids(len(x), text.txt.shape[1]), sigmas, text.vec, **more)


def embed(encoders: TextEncoders, captions: list[str], rng: random.Random) -> TextEmbedding:
    """Captions with one of the paddings that users may choose: as released at two lengths, or masked."""
    chance = rng.random()
    return encoders(captions, T5_LENGTH if chance < 0.15 else SHORT, masked=chance >= 0.95)


@cache
def compiled(model: nn.Module) -> Callable[..., Tensor]:
    """The same network as a fused program: 1.6 times as fast to train on a CPU, after a minute of compiling a shape."""
    return torch.compile(model, dynamic=False)


class Teacher(nn.Module):
    """The transformer and the text encoders it is trained with."""

    def __init__(self, encoders: TextEncoders) -> None:
        super().__init__()
        self.flux, self.text = Flux1(SCHNELL), encoders
        initial_weights(self.flux)

    @torch.no_grad()
    def start_from(self, pipe: Pipeline) -> None:
        """Take over the weights of a finished nano-dev at guidance 1, where it is the teacher."""
        nano = Nano.of(pipe)
        dev = nano.transformer.float()
        guidance = dev.guidance_in(timestep_embedding(torch.ones(1), TIME_FEATURES))[0]
        self.flux.load_state_dict({k: v for k, v in dev.state_dict().items() if not k.startswith("guidance_in.")})
        self.flux.vector_in.out_layer.bias += guidance
        self.text.clip.load_state_dict(nano.text.clip.float().state_dict())
        self.text.t5.load_state_dict(nano.text.t5.float().state_dict())


def teacher_loss(
    teacher: Teacher, captions: list[str], x0: Tensor, size: tuple[int, int], rng: random.Random
) -> Tensor:
    """Flow matching with one caption in ten left out, so that guidance has something to compare with."""
    captions = ["" if rng.random() < 0.1 else caption for caption in captions]
    sigmas, noise = noise_levels(*x0.shape[:2]), torch.randn_like(x0)
    text = embed(teacher.text, captions, rng)
    flux = compiled(teacher.flux) if COMPILE and size in COMPILED_SIZES and text.mask is None else teacher.flux
    v = velocity(flux, mix(x0, noise, sigmas), size, sigmas, text)
    return F.mse_loss(v.float(), noise - x0)


def run(
    state: TrainingState[Any],
    phases: list[Phase],
    autoencoder: Autoencoder,
    loss_of: Callable[[list[str], Tensor, tuple[int, int], random.Random], Tensor],
    seed: int,
    pool: int,
    every: tuple[int, Callable[[int], None]],
) -> None:
    """Train through the phases, from wherever `state` is; saved every 500 steps. `pool` pictures of the
    main canvas are kept as latents, a fortieth of that or more of each other one. `every`: (steps, what to do then)."""
    end = 0
    for number, phase in enumerate(phases):
        begin, end = end, end + phase.steps
        if state.step >= end:
            continue
        rng = random.Random(seed + state.step)
        data = Data(autoencoder, phase.sizes, seed + 1000 * number + state.step, pool)
        started, first, mean = time.monotonic(), state.step, 0.0
        state.rate = phase.rate
        while state.step < end:
            captions, x0, size = data.draw(phase.batch, phase.main)
            with mixed_precision():
                loss = loss_of(captions, x0, size, rng)
            floor = 0.4 if number + 1 < len(phases) else 0.02
            state.optimise(loss, cosine_rate(state.step - begin, phase.steps, floor=floor))
            mean = loss.item() if mean == 0 else 0.98 * mean + 0.02 * loss.item()
            if state.step % 100 == 0:
                pace = (time.monotonic() - started) / (state.step - first)
                log.info("%s step %d/%d loss %.4f %.2f s a step", phase.name, state.step, end, mean, pace)
            if state.step % 500 == 0:
                state.save()
            if state.step % every[0] == 0:
                every[1](state.step)
        state.save()
