"""What the bundled realism LoRA does to pictures: is the light there, and is the scene still the one asked for?

Every prompt is drawn twice from one seed, plain and with the LoRA. Where the objects are is read from the plain one.
Shading is measured as the spread of brightness inside the bodies (the rims left out) and on the background; of a pair,
the one with more of both is taken for the lit one, if it has at least a few levels more.
"""

from __future__ import annotations

import argparse
import random
import statistics

import numpy as np
from PIL import Image, ImageFilter

import miniflux
from miniflux.nano import scenes
from miniflux.nano.recipe.adherence import judge

MORE = 6.0  # levels of 255, of both spreads together, that tell the lit picture of a pair
FOREGROUND = 40.0  # distance in RGB from the background


def regions(plain: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Bodies without their rims, and background away from them, as boolean masks."""
    pixels = np.asarray(plain, float)
    edge = np.concatenate([pixels[:6].reshape(-1, 3), pixels[-6:].reshape(-1, 3)])
    body = np.linalg.norm(pixels - np.median(edge, axis=0), axis=-1) > FOREGROUND
    mask = Image.fromarray((255 * body).astype(np.uint8))
    inside = np.asarray(mask.filter(ImageFilter.MinFilter(5))) > 0
    outside = np.asarray(mask.filter(ImageFilter.MaxFilter(5))) == 0
    return inside, outside


def spread(image: Image.Image, mask: np.ndarray) -> float:
    """From the 5th to the 95th percentile of smoothed brightness in a region; 0 where there is none."""
    grey = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(1)), float)[mask]
    return float(np.subtract(*np.percentile(grey, [95, 5]))) if grey.size > 20 else 0.0


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pairs", type=int, default=100)
    arguments.add_argument("--scales", type=float, nargs="+", default=[0.8, 1.0])
    arguments.add_argument("--lora", default="realism")
    options = arguments.parse_args()
    pipe = miniflux.load("nano")
    rng = random.Random("realism 2026")
    made = [
        (scenes.two_objects if i % 2 else scenes.one_object)(rng, held_out=i % 4 == 0) for i in range(options.pairs)
    ]
    captions = [scene.caption for scene in made]
    plain = pipe.generate(captions, seed=70_000).images
    print(
        f"{'scale':>6} {'lit':>7} {'body':>7} {'ground':>7} {'all right':>10} {'colour':>7} {'shape':>7} {'place':>7}"
    )
    for scale in [0.0, *options.scales]:
        if scale:
            miniflux.lora.attach(pipe, options.lora, scale, name="light")
        images = pipe.generate(captions, seed=70_000).images if scale else plain
        if scale:
            miniflux.lora.detach(pipe, "light")
        bodies, grounds, lit = [], [], 0
        for flat, image in zip(plain, images, strict=True):
            inside, outside = regions(flat)
            bodies.append(spread(image, inside))
            grounds.append(spread(image, outside))
            lit += bodies[-1] + grounds[-1] - spread(flat, inside) - spread(flat, outside) >= MORE
        verdicts = [judge(image, scene) for image, scene in zip(images, made, strict=True)]
        shares = [100 * sum(getattr(v, what) for v in verdicts) / len(made) for what in ("all", "colour", "shape")]
        place = 100 * sum(v.position for v in verdicts) / len(made)
        print(
            f"{scale:6.2f} {100 * lit / len(made):6.1f}% {statistics.median(bodies):7.1f} "
            f"{statistics.median(grounds):7.1f} {shares[0]:9.1f}% {shares[1]:6.1f}% {shares[2]:6.1f}% {place:6.1f}%",
            flush=True,
        )


if __name__ == "__main__":
    main()
