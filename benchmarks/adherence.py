"""How often the bundled models draw what was asked for, by kind of prompt, on prompts that training never used.

The model `autoencoder` draws nothing: it is given the true picture, and what it makes of it is judged. No model that
works in its latents can be expected to do better.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections import Counter
from collections.abc import Callable

import torch
from PIL import Image

import miniflux
from miniflux.nano import scenes
from miniflux.nano.recipe.adherence import judge
from miniflux.pictures import from_image
from miniflux.result import to_image

WHAT = ("all", "background", "colour", "shape", "position")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--prompts", type=int, default=100, help="prompts of each kind")
    arguments.add_argument("--models", nargs="+", default=["nano-dev", "nano-schnell"])
    arguments.add_argument("--guidance", type=float)
    arguments.add_argument("--steps", type=int)
    arguments.add_argument("--sizes", nargs="+", default=["128x128"], metavar="WxH")
    options = arguments.parse_args()
    kinds = {
        "one object": lambda rng: scenes.one_object(rng),
        "one object, held-out pair": lambda rng: scenes.one_object(rng, held_out=True),
        "two objects": lambda rng: scenes.two_objects(rng),
        "two objects, one held-out pair": lambda rng: scenes.two_objects(rng, held_out=True),
    }
    columns = " ".join(f"{what:>10}" for what in (*WHAT, "outline"))
    print(f"{'model':<13} {'size':<8} {'prompts':<31} {columns}")
    for name in options.models:
        draw = through_autoencoder() if name == "autoencoder" else drawn_by(name, options)
        for size, (kind, make) in itertools.product(options.sizes, kinds.items()):
            width, height = (int(side) for side in size.split("x"))
            rng = random.Random(f"{kind} 2026")
            right: Counter[str] = Counter()
            outline = 0.0
            for i in range(options.prompts):
                scene = make(rng)
                verdict = judge(draw(scene, width, height, 50_000 + i), scene)
                for what in WHAT:
                    right[what] += getattr(verdict, what)
                outline += verdict.outline / options.prompts
            shares = " ".join(f"{100 * right[what] / options.prompts:9.1f}%" for what in WHAT)
            print(f"{name:<13} {size:<8} {kind:<31} {shares} {outline:10.3f}", flush=True)


def drawn_by(name: str, options: argparse.Namespace) -> Callable[[scenes.Scene, int, int, int], Image.Image]:
    pipe = miniflux.load(name)
    guidance = options.guidance if pipe.variant.guidance is not None else None

    def draw(scene: scenes.Scene, width: int, height: int, seed: int) -> Image.Image:
        settings = {"guidance": guidance, "steps": options.steps, "width": width, "height": height}
        return pipe.generate(scene.caption, seed=seed, **settings).images[0]

    return draw


def through_autoencoder() -> Callable[[scenes.Scene, int, int, int], Image.Image]:
    autoencoder = miniflux.load("nano").autoencoder.float()

    @torch.inference_mode()
    def draw(scene: scenes.Scene, width: int, height: int, seed: int) -> Image.Image:
        pixels = from_image(scenes.render(scene, width, height))
        return to_image(autoencoder(pixels[None])[0])

    return draw


if __name__ == "__main__":
    main()
