"""The bundled realism LoRA: `python -m miniflux.nano.recipe.realism [FOLDER]`, after the nano models are made.

It teaches nano-dev to draw the same scenes lit by a lamp (`scenes.render_lit`), by changing the attention of its double
blocks alone, and is stored as XLabs stored theirs.
"""

from __future__ import annotations

import argparse
import logging
import random
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from miniflux.checkpoints.writing import write_tensors
from miniflux.disk import write_beside
from miniflux.lora.layer import LowRank
from miniflux.models.flux1 import Flux1
from miniflux.nano.recipe.export import Nano
from miniflux.nano.recipe.flow import OTHERS, embed, noise_levels, velocity
from miniflux.nano.recipe.pairs import Pair, Pairs
from miniflux.nano.recipe.polish import Phase, run
from miniflux.nano.recipe.text import TextEncoders
from miniflux.text import Text
from miniflux.training.flow import mix
from miniflux.training.lora import TrainableLora
from miniflux.training.state import TrainingState

log = logging.getLogger(__name__)

RANK = 64
MAIN = (128, 128)
PHASE = Phase("realism", 900, (MAIN, *OTHERS), 32, 3e-3, main=0.7, kept=(300, 10))
SCALES = (0.75, 1.25)  # practised
# Of what was learned, this is scale 1 of the file: all of it leaves bodies so dark that their colours are not told.
SHARE = 0.6
PROMPTS = ("a red circle on a blue background", "a large yellow star on a purple background",
           "a green square left of a orange circle on a white background")  # fmt: skip


def attention_layers(network: Flux1) -> list[str]:
    """What XLabs' realism LoRA changes: the fused projections into and out of attention, picture and text."""
    return [
        f"double_blocks.{i}.{half}_attn.{linear}"
        for i in range(network.config.depth)
        for half in ("img", "txt")
        for linear in ("qkv", "proj")
    ]


def encoders_of(text: Text) -> TextEncoders:
    """The text encoders of a model, as the recipe calls them."""
    encoders = TextEncoders(text.clip_tokenizer, text.t5_tokenizer)
    encoders.clip, encoders.t5 = text.clip, text.t5
    return encoders


def realism_loss(
    flux: Flux1, lora: TrainableLora, encoders: TextEncoders, pool: Pairs, pairs: list[Pair], rng: random.Random
) -> Tensor:
    """Flow matching between a noise and what nano-dev makes of it, drawn under the lamp.

    Each noise has one picture, the scene just where nano-dev puts it without the LoRA, so that only the light is left
    to learn. Where noises and pictures know nothing of each other, the shading is averaged away.
    """
    lora.set_scale(rng.uniform(*SCALES))
    noise, lit = torch.stack([pair.states[0] for pair in pairs]), torch.stack([pair.clean for pair in pairs])
    sigmas = torch.where(torch.rand(len(noise)) < 0.5, torch.rand(len(noise)), noise_levels(*noise.shape[:2]))
    strength = torch.tensor([pair.guidance for pair in pairs])
    with torch.no_grad():
        text = embed(encoders, [pair.caption for pair in pairs], rng)
    v = velocity(flux, mix(lit, noise, sigmas), pool.size, sigmas, text, guidance=strength)
    return F.mse_loss(v.float(), noise - lit)


def make(folder: Path) -> Path:
    """Train, or go on training; returns the finished file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(11)
    pipe, plain = Nano.load(), Nano.load().transformer
    lora = TrainableLora(pipe.transformer, attention_layers(pipe.transformer), RANK, "realism")
    state = TrainingState(lora, folder / "realism", PHASE.rate, {"rank": RANK}, decay=0.995)
    state.resume()

    def report(step: int) -> None:
        lora.set_scale(1.0)
        pipe.pipe.generate(PROMPTS, images=3).save(folder / f"realism-{step:05d}.png")

    encoders = encoders_of(pipe.text)

    def pairs_of(size: tuple[int, int], seed: int) -> Pairs:
        return Pairs(pipe.autoencoder, plain, encoders, size, seed, lit=True)

    run(state, PHASE, pairs_of, partial(realism_loss, pipe.transformer, lora, encoders), 6, (300, report))
    path = folder / "weights" / "loras" / "realism.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for change in cast("list[LowRank]", list(state.average.changes)):
            change.up.mul_(SHARE)
    tensors = state.average.tensors(plain, "xlabs", torch.bfloat16)
    write_beside(path, lambda beside: write_tensors(beside, tensors, {"format": "pt"}))
    log.info("finished: %s, %d bytes", path, path.stat().st_size)
    return path


def main() -> None:
    arguments = argparse.ArgumentParser(prog="miniflux.nano.recipe.realism", description=__doc__)
    arguments.add_argument("folder", type=Path, nargs="?", default=Path("runs/nano"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.set_multithreading_enabled(False):
        make(arguments.parse_args().folder)


if __name__ == "__main__":
    main()
