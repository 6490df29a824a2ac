"""Nano's tiny decoder for previews: `python -m miniflux.nano.recipe.tiny [FOLDER]`, after the autoencoder is made.

It learns from the autoencoder's latents to draw the pictures at half their size. A preview is of a picture that is not
decided yet, the mean of several, so latents are also mixed and disturbed. Some ten minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from miniflux.models.autoencoder import Autoencoder
from miniflux.models.tiny_autoencoder import TinyDecoder
from miniflux.nano.recipe.autoencoder import picture
from miniflux.nano.recipe.export import Nano, export_network
from miniflux.training.state import TrainingState, cosine_rate
from miniflux.variants import VARIANTS

log = logging.getLogger(__name__)

NANO = VARIANTS["nano-dev"]
PICTURES = 1200
STEPS, BATCH, RATE = 4000, 12, 3e-3
NOISE = 0.3  # at most so much is added to the latents
MIXED = 0.3  # share of latents that are a mean of two


@torch.no_grad()
def examples(autoencoder: Autoencoder, count: int, rng: random.Random, shrink: int) -> tuple[Tensor, Tensor]:
    """Latents (count, C, 16, 16) and their pictures (count, 3, 128 / shrink, 128 / shrink) in [-1, 1]."""
    latents: list[Tensor] = []
    small: list[Tensor] = []
    for _ in range(count):
        pixels = torch.from_numpy(picture(rng, NANO.size).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents.append(autoencoder.encode(pixels))
        small.append(F.avg_pool2d(pixels, shrink))
    return torch.cat(latents), torch.cat(small)


def loss_of(model: TinyDecoder, latents: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error) of a batch, after mixing and disturbing it."""
    share = torch.where(torch.rand(len(latents)) < MIXED, torch.rand(len(latents)), 1.0)[:, None, None, None]
    latents = torch.lerp(latents.roll(1, 0), latents, share)
    pixels = torch.lerp(pixels.roll(1, 0), pixels, share)
    latents = latents + NOISE * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
    error = model(latents) - pixels
    return error.abs().mean() + error.square().mean(), error.square().mean()


def train(folder: Path, autoencoder: Autoencoder, steps: int = STEPS, count: int = PICTURES) -> TinyDecoder:
    """Train, or go on training, in `folder`; returns the averaged network."""
    assert NANO.tiny is not None
    torch.manual_seed(3)
    model = TinyDecoder(NANO.tiny).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    state = TrainingState(model, folder / "tiny", RATE, {"config": asdict(NANO.tiny), "steps": steps}, decay=0.99)
    state.resume()
    shrink = autoencoder.config.downscale // NANO.tiny.upscale
    latents, pixels = examples(autoencoder, count, random.Random(31), shrink)
    while state.step < steps:
        chosen = torch.randint(count, (BATCH,))
        loss, error = loss_of(model, latents[chosen], pixels[chosen])
        state.optimise(loss, cosine_rate(state.step, steps))
        if state.step % 200 == 0:
            log.info("tiny step %d loss %.4f psnr %.1f dB", state.step, loss.item(), -10 * math.log10(error.item() / 4))
            state.save()
    average = TinyDecoder(NANO.tiny)
    average.load_state_dict(state.average.state_dict())
    return average.eval()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path, nargs="?", default=Path("nano-tiny"))
    folder: Path = arguments.parse_args().folder
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    autoencoder = Nano.load().autoencoder
    export_network(train(folder, autoencoder), folder / NANO.tiny_file)


if __name__ == "__main__":
    main()
