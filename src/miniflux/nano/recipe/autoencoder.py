"""Stage 1 of the nano recipe: the autoencoder.

Trained on flat and lit scenes, first on crops (cheap, and an autoencoder is local), then on whole pictures, and last
on scenes drawn small, whose shapes are a few latents wide. The
posterior has a fixed width and the mean pays for its size, which keeps the latents smooth and near unit variance; the
decoder sees noisy latents and so forgives the small errors a flow model makes.
"""

from __future__ import annotations

import logging
import math
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miniflux.models.autoencoder import Autoencoder
from miniflux.nano import scenes
from miniflux.training.flow import mixed_precision
from miniflux.training.state import TrainingState, cosine_rate
from miniflux.variants import NANO_AUTOENCODER

log = logging.getLogger(__name__)

# Scale and shift of the latents are measured at the end.
CONFIG = replace(NANO_AUTOENCODER, scale_factor=1.0, shift_factor=0.0)
POSTERIOR_STD = 0.1


@dataclass(frozen=True)
class Phase:
    """A stretch of training on squares of `crop` pixels out of scenes drawn on `canvases` (sides in pixels; the same
    number of each); `focus` of the squares lie around an edge in the picture, `stars` of the scenes hold a star."""

    crop: int
    batch: int
    steps: int
    focus: float = 0.0
    canvases: tuple[int, ...] = (128,)
    stars: float = 0.0


@dataclass(frozen=True)
class Round:
    """Phases under one cosine of the learning rate."""

    phases: tuple[Phase, ...]
    rate: float

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


# The first round learns colours and places; corners need crops that contain some, and whole pictures at the end.
# The others draw the same scenes on small canvases, where a star, the hardest shape, is ten pixels high.
ROUNDS = (
    Round((Phase(32, 48, 3000), Phase(128, 6, 1300)), 1.5e-3),
    Round((Phase(48, 24, 4000, focus=0.9), Phase(128, 6, 500)), 1.2e-3),
    Round((Phase(64, 16, 2400, focus=0.9, canvases=(64, 64, 64, 96, 128, 192)),), 6e-4),
    Round((Phase(48, 24, 2000, focus=0.95, canvases=(64, 64, 64, 96, 128), stars=0.5),), 6e-4),
)
POOL = 6000  # pictures kept in memory, one of them replaced at every step
MEASURED = 256  # pictures that scale and shift of the latents are measured on
CHECKED = 64  # pictures that the reconstruction is measured on


def picture(rng: random.Random, size: int, stars: float = 0.0) -> np.ndarray:
    """A training picture: (size, size, 3) bytes; 70 % flat, 30 % lit; any colours in 15 %; a star in `stars` of them
    and in some of the others."""
    star = rng.random() < stars
    while True:
        scene = (scenes.two_objects if rng.random() < 0.5 else scenes.one_object)(rng)
        if not star or any(shape.kind == "star" for shape in scene.shapes):
            break
    lit = rng.random() < 0.3
    image = scenes.render_lit(scene, size, size, rng) if lit else scenes.render(scene, size, size)
    pixels = np.asarray(image)
    if rng.random() < 0.15:
        pixels = pixels[..., rng.sample(range(3), 3)]
    return pixels


def loss_of(model: Autoencoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, mean squared pixel error) of pictures (B, 3, H, W) in [-1, 1]."""
    mean = model.encoder(pixels).chunk(2, dim=1)[0]
    decoded = model.decoder(mean + POSTERIOR_STD * torch.randn_like(mean)).float()
    error = decoded - pixels
    edges = (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
    loss = error.abs().mean() + 0.5 * edges + error.square().mean() + 1e-3 * mean.float().square().mean()
    return loss, error.square().mean()


@torch.no_grad()
def with_measured_latents(model: Autoencoder, pixels: Tensor) -> Autoencoder:
    """The same network with scale and shift that bring its latents to mean 0 and variance 1 over `pixels`."""
    means = torch.cat([model.encoder(part).chunk(2, dim=1)[0] for part in pixels.split(16)])
    config = replace(
        model.config, scale_factor=round(1 / means.std().item(), 4), shift_factor=round(means.mean().item(), 4)
    )
    measured = Autoencoder(config)
    measured.load_state_dict(model.state_dict())
    return measured.eval()


def crop_of(picture: np.ndarray, phase: Phase, rng: random.Random) -> np.ndarray:
    """A random square of the picture; around one of its edges with probability `phase.focus`."""
    limit = len(picture) - phase.crop
    x, y = rng.randint(0, limit), rng.randint(0, limit)
    if rng.random() < phase.focus:
        grey = picture.astype(np.int16).sum(axis=-1)
        rows, columns = np.nonzero(np.abs(np.diff(grey, axis=1)) > 60)
        if len(rows):
            i = rng.randrange(len(rows))
            y, x = (max(0, min(limit, int(at) - rng.randrange(phase.crop))) for at in (rows[i], columns[i]))
    return picture[y : y + phase.crop, x : x + phase.crop]


def train(folder: Path, seed: int = 1, before: Autoencoder | None = None) -> Autoencoder:
    """Train, or go on training, in `folder`; returns the averaged network with its measured scale and shift. A
    finished network `before` is given the rounds on small canvases only and keeps its scale and shift."""
    torch.manual_seed(seed)
    model = Autoencoder(CONFIG).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if before is not None:
        model.load_state_dict(before.state_dict())
    with torch.no_grad():  # the half that predicts the log-variance is not trained: it states the fixed width
        model.encoder.conv_out.weight[CONFIG.z_channels :] = 0
        model.encoder.conv_out.bias[CONFIG.z_channels :] = 2 * math.log(POSTERIOR_STD)
    state = TrainingState(model, folder / "autoencoder", ROUNDS[0].rate, {"config": asdict(CONFIG), "seed": seed})
    if not state.resume() and before is not None:
        state.step = sum(round_.steps for round_ in ROUNDS[:2])
    rng = random.Random(seed + state.step)
    started, end = time.monotonic(), 0
    for round_ in ROUNDS:
        begin, state.rate = end, round_.rate
        for phase in round_.phases:
            end += phase.steps
            if state.step >= end:
                continue
            canvases = [phase.canvases[i % len(phase.canvases)] for i in range(POOL)]
            pool = [picture(rng, canvas, phase.stars) for canvas in canvases]
            while state.step < end:
                replaced = rng.randrange(POOL)
                pool[replaced] = picture(rng, canvases[replaced], phase.stars)
                crops = [crop_of(pool[rng.randrange(POOL)], phase, rng) for _ in range(phase.batch)]
                pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
                pixels = pixels.contiguous(memory_format=torch.channels_last)
                with mixed_precision():
                    loss, error = loss_of(model, pixels)
                state.optimise(loss, cosine_rate(state.step - begin, round_.steps))
                if state.step % 100 == 0:
                    psnr_now, seconds = -10 * math.log10(error.item() / 4), time.monotonic() - started
                    log.info(
                        "autoencoder step %d loss %.4f psnr %.1f dB %.0f s", state.step, loss.item(), psnr_now, seconds
                    )
                if state.step % 500 == 0:
                    state.save()
    state.save()
    average = Autoencoder(CONFIG if before is None else before.config)
    average.load_state_dict(state.average.state_dict())
    if before is not None:
        return average.eval()
    sample = np.stack([picture(random.Random(i), 128) for i in range(MEASURED)])
    return with_measured_latents(average.eval(), torch.from_numpy(sample).permute(0, 3, 1, 2).float() / 127.5 - 1)


@torch.no_grad()
def psnr(model: Autoencoder, lit: bool, side: int = 128) -> float:
    """Mean reconstruction PSNR in dB over unseen scenes of side x side pixels."""
    rng = random.Random(10_000 + lit)
    values: list[float] = []
    for _ in range(CHECKED):
        scene = scenes.two_objects(rng)
        image = scenes.render_lit(scene, side, side, rng) if lit else scenes.render(scene, side, side)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        values.append(-10 * math.log10(F.mse_loss(model(pixels).clamp(-1, 1), pixels).item() / 4))
    return sum(values) / CHECKED
