"""The nano ControlNet: `python -m miniflux.nano.recipe.edges [FOLDER]`, after nano-dev is made (extra `edges`).

One double block, in the layout of InstantX and Shakker Labs, that sees Canny edges as latents. nano-dev stays as it is.
The words say what is there; where exactly, and how large, only the edges do: shapes stand beside the places that
captions name. `judged` looks whether what is drawn lies where the edges were.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import miniflux
from miniflux import conditions
from miniflux.checkpoints import save
from miniflux.conditions.making import canny
from miniflux.conditions.steering import with_added
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.controlnet import ControlNet, ControlNetConfig
from miniflux.models.flux1 import Flux1, run_block
from miniflux.nano import scenes
from miniflux.nano.recipe.adherence import judge
from miniflux.nano.recipe.editing import Pool, trained
from miniflux.nano.recipe.export import Nano
from miniflux.nano.recipe.flow import SHORT, noise_levels
from miniflux.nano.recipe.pairs import latents_of
from miniflux.nano.recipe.realism import encoders_of
from miniflux.nano.recipe.text import TextEncoders, varied
from miniflux.pipeline import Pipeline
from miniflux.sampling import image_ids, text_ids
from miniflux.training.flow import mix
from miniflux.training.state import TrainingState

log = logging.getLogger(__name__)

SIZE = (128, 128)
STEPS, BATCH, RATE = 3_000, 24, 1e-3
ASIDE = 0.14  # how far from the place that the caption names, of the canvas
RADII = (0.75, 1.3)  # of the radius that the caption says
GUIDANCE = (1.0, 6.0)
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


def make(folder: Path, steps: int = STEPS) -> Path:
    """Train, or go on training; returns the finished file."""
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
    pipe: Pipeline, net: conditions.Steering, count: int, seed: int, scale: float = 1.0
) -> list[tuple[bool, float]]:
    """Scenes beside their captions: whether each is as the caption says but for the place, and its overlap."""
    rng, told = random.Random(seed), list[tuple[bool, float]]()
    for i in range(count):
        scene = aside(rng, held_out=i % 3 == 0)
        shown = scenes.render(scene, *SIZE)
        steered = [conditions.ControlNet(net, canny(shown), scale)]
        drawn = pipe.generate(scene.caption, seed=i, conditions=steered).images[0]
        a, b = covered(drawn, scene.background), covered(shown, scene.background)
        told.append((judge(drawn, scene).all, float((a & b).sum() / max(1, (a | b).sum()))))
    return told


def main() -> None:
    arguments = argparse.ArgumentParser(prog="miniflux.nano.recipe.edges", description=__doc__)
    arguments.add_argument("folder", type=Path, nargs="?", default=Path("runs/nano"))
    arguments.add_argument("--steps", type=int, default=STEPS)
    arguments.add_argument("--judge", type=Path, metavar="FILE", help="judge a file instead of training one")
    options = arguments.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.judge is not None:
        for scale in (0.0, 1.0):
            told = judged(miniflux.load("nano-dev"), conditions.load(options.judge), 60, 5, scale)
            right = sum(ok and overlap >= LIKE for ok, overlap in told) / len(told)
            overlaps = sorted(overlap for _, overlap in told)
            log.info("scale %g: %.0f %% right and where the edges are; median overlap %.2f", scale, 100 * right,
                     overlaps[len(overlaps) // 2])  # fmt: skip
        return
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.set_multithreading_enabled(False):
        make(options.folder, options.steps)


if __name__ == "__main__":
    main()
