"""Canny edges for nano-dev: `python -m miniflux.nano.recipe.edges controlnet|lora [FOLDER]` (extra `edges`).

The nano ControlNet is one double block, in the layout of InstantX and Shakker Labs, that sees edges as latents; the
nano Canny LoRA sees them as channels beside the noise, as that of Black Forest Labs does. nano-dev stays as it is. The
words say what is there; where exactly, and how large, only the edges do: shapes stand beside the places that captions
name. `judged` looks whether what is drawn lies where the edges were.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import miniflux
from miniflux import conditions
from miniflux.checkpoints import save
from miniflux.checkpoints.writing import write_tensors
from miniflux.conditions.making import canny
from miniflux.conditions.steering import with_added
from miniflux.disk import write_beside
from miniflux.lora.layer import LowRank
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.controlnet import ControlNet, ControlNetConfig
from miniflux.models.flux1 import Flux1, run_block
from miniflux.nano import scenes
from miniflux.nano.recipe.adherence import judge
from miniflux.nano.recipe.editing import Pool, trained
from miniflux.nano.recipe.editing import beginning as widened
from miniflux.nano.recipe.export import Nano
from miniflux.nano.recipe.flow import SHORT, noise_levels, velocity
from miniflux.nano.recipe.pairs import latents_of
from miniflux.nano.recipe.realism import encoders_of
from miniflux.nano.recipe.text import TextEncoders, varied
from miniflux.pipeline import Pipeline
from miniflux.sampling import image_ids, text_ids
from miniflux.training.flow import mix
from miniflux.training.lora import TrainableLora
from miniflux.training.state import TrainingState

log = logging.getLogger(__name__)

SIZE = (128, 128)
STEPS, BATCH, RATE = 3_000, 24, 1e-3
ASIDE = 0.14  # how far from the place that the caption names, of the canvas
RADII = (0.75, 1.3)  # of the radius that the caption says
GUIDANCE = (1.0, 6.0)
RANK = 32  # of the LoRA
LIKE = 0.8  # overlap (intersection over union) with the shapes whose edges were given


def aside(rng: random.Random, held_out: bool = False) -> scenes.Scene:
    """A scene whose shapes stand beside the places that its caption names, in another size."""
    scene = (scenes.two_objects if rng.random() < 0.4 else scenes.one_object)(rng, held_out)
    shapes: list[scenes.Shape] = []
    for shape in scene.shapes:
        radius = shape.radius * rng.uniform(*(RADII if len(scene.shapes) == 1 else (0.75, 1.1)))
        far = ASIDE if len(scene.shapes) == 1 else 0.05
        x, y = (min(max(at + rng.uniform(-far, far), radius), 1 - radius) for at in (shape.x, shape.y))
        shapes.append(replace(shape, x=x, y=y, radius=radius))
    return replace(scene, shapes=tuple(shapes))


def outlined(
    count: int, size: tuple[int, int], autoencoder: Autoencoder, rng: random.Random
) -> tuple[list[str], Tensor, Tensor]:
    """Words, the picture, and its edges (N, L, 64)."""
    made = [aside(rng) for _ in range(count)]
    shown = [scenes.render(scene, *size) for scene in made]
    both = latents_of(autoencoder, [np.asarray(one) for picture in shown for one in (picture, canny(picture))])
    return [varied(scene.caption, rng) for scene in made], both[0::2], both[1::2]


def beginning(dev: Flux1) -> ControlNet:
    """A copy of nano-dev's first double block, whose outputs are nothing yet (arXiv 2302.05543)."""
    config = dev.config
    sizes: dict[str, Any] = {
        **asdict(config),
        "depth": 1,
        "depth_single_blocks": 0,
        "control_channels": config.in_channels,
    }
    net = ControlNet(ControlNetConfig(**sizes))
    own = net.state_dict()
    net.load_state_dict({**own, **{name: x for name, x in dev.state_dict().items() if name in own}})
    for linear in (*net.controlnet_blocks, net.pos_embed_input):
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)
    return net


def control_loss(
    net: Callable[..., Any], dev: Flux1, encoders: TextEncoders, words: list[str], x0: Tensor, seen: Tensor
) -> Tensor:
    """Flow matching of nano-dev, to whose double blocks the ControlNet adds."""
    batch, tokens, _ = x0.shape
    sigmas, noise, ids = (
        noise_levels(batch, tokens),
        torch.randn_like(x0),
        image_ids(batch, SIZE[1] // 16, SIZE[0] // 16),
    )
    with torch.no_grad():
        text = encoders(words, SHORT)
    told = (text.txt, text_ids(batch, text.txt.shape[1]), sigmas, text.vec)
    x, strength = mix(x0, noise, sigmas), torch.empty(batch).uniform_(*GUIDANCE)
    (addition,), _ = net(x, ids, *told, seen, strength)

    def run(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
        out = run_block(name, block, streams, context)
        return with_added(out, addition, text.txt.shape[1]) if name.startswith("double") else out

    v = dev(x, ids, *told, strength, run=run)
    return (v.float() - (noise - x0)).square().mean()


def changed_layers(network: Flux1) -> list[str]:
    """What the LoRA changes: the input, and all linears of the blocks but the modulations."""
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if name == "img_in" or ("blocks" in name and not name.endswith(".lin"))]


def lora_loss(flux: Flux1, encoders: TextEncoders, words: list[str], x0: Tensor, seen: Tensor) -> Tensor:
    """Flow matching of nano-dev with a LoRA, which sees the edges as channels."""
    sigmas, noise = noise_levels(*x0.shape[:2]), torch.randn_like(x0)
    with torch.no_grad():
        text = encoders(words, SHORT)
    x, strength = torch.cat((mix(x0, noise, sigmas), seen), dim=-1), torch.empty(len(x0)).uniform_(*GUIDANCE)
    return (velocity(flux, x, SIZE, sigmas, text, guidance=strength).float() - (noise - x0)).square().mean()


def make_lora(folder: Path, steps: int = STEPS) -> Path:
    """Train, or go on training, the LoRA; returns the finished file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(23)
    pipe = Nano.load()
    wide = widened(pipe.transformer, pipe.transformer.config.in_channels).requires_grad_(False)
    lora, encoders = TrainableLora(wide, changed_layers(wide), RANK), encoders_of(pipe.text)
    state = TrainingState(lora, folder / "canny", RATE, {"rank": RANK}, decay=0.998)
    state.resume()
    pool = Pool(outlined, pipe.autoencoder.to(memory_format=torch.channels_last), SIZE, 1024, 43 + state.step)  # pyright: ignore
    trained(state, "lora", steps, steps, lambda: lora_loss(wide, encoders, *pool.draw(BATCH)))
    path = folder / "weights" / "canny.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = bfl_tensors(state.average)
    write_beside(path, lambda beside: write_tensors(beside, tensors, {"format": "pt"}))
    log.info("finished: %s, %d bytes", path, path.stat().st_size)
    return path


def bfl_tensors(lora: TrainableLora) -> dict[str, Tensor]:
    """As Black Forest Labs' control LoRAs name them: the layers' own names."""
    pairs = zip(lora.names, cast("list[LowRank]", list(lora.changes)), strict=True)
    return {
        f"{layer}.lora_{half}.weight": tensor.detach().to(torch.bfloat16)
        for layer, change in pairs
        for half, tensor in (("A", change.down), ("B", change.up))
    }


def make(folder: Path, steps: int = STEPS) -> Path:
    """Train, or go on training, the ControlNet; returns the finished file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(22)
    pipe = Nano.load()
    encoders, net = encoders_of(pipe.text), beginning(pipe.transformer).requires_grad_(True)
    state = TrainingState(net, folder / "controlnet", RATE, {}, decay=0.998, matrices=lambda name: "blocks" in name)
    state.resume()
    pool = Pool(outlined, pipe.autoencoder.to(memory_format=torch.channels_last), SIZE, 1024, 41 + state.step)  # pyright: ignore
    trained(state, "controlnet", steps, steps, lambda: control_loss(net, pipe.transformer, encoders, *pool.draw(BATCH)))
    path = folder / "weights" / "controlnet-canny.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(state.average.to(torch.bfloat16), path)
    log.info("finished: %s, %d bytes", path, path.stat().st_size)
    return path


def covered(image: Image.Image, background: str) -> np.ndarray:
    """Where a picture shows anything else than its background."""
    pixels = np.asarray(image, float) - np.asarray(scenes.PALETTE[background], float)
    return np.linalg.norm(pixels, axis=-1) > 60


def judged(
    pipe: Pipeline, steered: Callable[[Image.Image], conditions.Condition], count: int, seed: int
) -> list[tuple[bool, float]]:
    """Scenes beside their captions: whether each is as the caption says but for the place, and its overlap.

    Args:
        steered: from edges to what steers the picture.
    """
    rng, told = random.Random(seed), list[tuple[bool, float]]()
    for i in range(count):
        scene = aside(rng, held_out=i % 3 == 0)
        shown = scenes.render(scene, *SIZE)
        drawn = pipe.generate(scene.caption, seed=i, conditions=[steered(canny(shown))]).images[0]
        a, b = covered(drawn, scene.background), covered(shown, scene.background)
        told.append((judge(drawn, scene).all, float((a & b).sum() / max(1, (a | b).sum()))))
    return told


def report(goal: str, file: Path, count: int = 60) -> None:
    """Say how many pictures are right and where the edges are."""
    pipe = miniflux.load("nano-dev")
    if goal == "lora":
        miniflux.lora.attach(pipe, file)
        told = judged(pipe, conditions.Control, count, 5)
    else:
        net = conditions.load(file)
        told = judged(pipe, lambda edges: conditions.ControlNet(net, edges), count, 5)
    right, overlaps = sum(ok and overlap >= LIKE for ok, overlap in told), sorted(overlap for _, overlap in told)
    log.info("%.0f %% of %d right and where the edges are, %.0f %% right; median overlap %.2f", 100 * right / count,
             count, 100 * sum(ok for ok, _ in told) / count, overlaps[count // 2])  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(prog="miniflux.nano.recipe.edges", description=__doc__)
    arguments.add_argument("goal", choices=["controlnet", "lora"])
    arguments.add_argument("folder", type=Path, nargs="?", default=Path("runs/nano"))
    arguments.add_argument("--steps", type=int, default=STEPS)
    arguments.add_argument("--judge", type=Path, metavar="FILE", help="judge a file instead of training one")
    options = arguments.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.judge is not None:
        report(options.goal, options.judge)
        return
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.set_multithreading_enabled(False):
        file = (make_lora if options.goal == "lora" else make)(options.folder, options.steps)
    report(options.goal, file)


if __name__ == "__main__":
    main()
