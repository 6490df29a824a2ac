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

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import miniflux
from miniflux.checkpoints.files import write_tensors
from miniflux.checkpoints.saving import write_beside
from miniflux.models.flux1 import Flux1
from miniflux.nano.recipe.distil import GUIDANCE_RANGE
from miniflux.nano.recipe.flow import OTHERS, Phase, embed, run, velocity
from miniflux.nano.recipe.text import TextEncoders
from miniflux.pipeline import Pipeline
from miniflux.training.flow import logit_normal_sigmas, mix
from miniflux.training.lora import TrainableLora
from miniflux.training.state import TrainingState

log = logging.getLogger(__name__)

RANK = 64
MAIN = (128, 128)
PHASES = [Phase("realism", 2600, (MAIN, *OTHERS), 32, 2e-3, main=0.7)]
POOL = 1500
SCALES = (0.75, 1.25)  # practised: the light is on at 0.8 already, and 1.25 does not overdo it
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


def encoders_of(pipe: Pipeline) -> TextEncoders:
    """The text encoders of a pipeline, as the recipe calls them."""
    encoders = TextEncoders(pipe.text.clip_tokenizer, pipe.text.t5_tokenizer)
    encoders.clip, encoders.t5 = pipe.text.clip, pipe.text.t5
    return encoders


def realism_loss(
    flux: Flux1,
    lora: TrainableLora,
    plain: Flux1,
    encoders: TextEncoders,
    captions: list[str],
    x0: Tensor,
    size: tuple[int, int],
    rng: random.Random,
) -> Tensor:
    """Flow matching on lit pictures, for the guided prediction.

    nano-dev predicts what guidance makes of a prediction. What it makes of it, v(g) - v(1) of the plain model, is added
    to the target, so that the LoRA learns the light and leaves the guidance as it is. Light is seen at all noise
    levels, not only at the high ones where shapes are decided.
    """
    lora.set_scale(rng.uniform(*SCALES))
    sigmas, noise = logit_normal_sigmas(len(x0), mean=0.5, std=1.4), torch.randn_like(x0)
    strength = torch.empty(len(x0)).uniform_(*GUIDANCE_RANGE)
    x = mix(x0, noise, sigmas)
    with torch.no_grad():
        text = embed(encoders, captions, rng)
        guided = velocity(plain, x, size, sigmas, text, guidance=strength).float()
        pushed = guided - velocity(plain, x, size, sigmas, text, guidance=torch.ones_like(strength)).float()
    return F.mse_loss(velocity(flux, x, size, sigmas, text, guidance=strength).float(), noise - x0 + pushed)


def make(folder: Path) -> Path:
    """Train, or go on training; returns the finished file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(11)
    pipe, plain = miniflux.load("nano-dev", dtype="float32"), miniflux.load("nano-dev", dtype="float32").transformer
    for network in (pipe.transformer, plain, pipe.autoencoder, pipe.text.clip, pipe.text.t5):
        network.requires_grad_(False)
    lora = TrainableLora(pipe.transformer, attention_layers(pipe.transformer), RANK, "realism")
    state = TrainingState(lora, folder / "realism", PHASES[0].rate, {"rank": RANK}, decay=0.995)
    state.resume()

    def report(step: int) -> None:
        lora.set_scale(1.0)
        pipe.generate(PROMPTS, images=3).save(folder / f"realism-{step:05d}.png")

    loss = partial(realism_loss, pipe.transformer, lora, plain, encoders_of(pipe))
    run(state, PHASES, pipe.autoencoder, loss, 6, POOL, (300, report), lit=True)
    path = folder / "weights" / "loras" / "realism.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
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
