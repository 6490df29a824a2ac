"""What formats of packed weights do to the bundled model: size, error of the weights, pictures, adherence.

Every format is written with `convert` and drawn with beside the bundled bfloat16 file: same prompts, same seeds.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from pathlib import Path

import miniflux
from miniflux.checkpoints import convert
from miniflux.checkpoints.formats.ggml import BLOCKS
from miniflux.nano import scenes
from miniflux.nano.recipe.adherence import judge
from miniflux.result import psnr
from miniflux.variants import variant
from miniflux.weights.finding import BUNDLED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=50, help="prompts of one object, and as many of two")
    parser.add_argument("--model", default="nano-dev")
    parser.add_argument("--formats", nargs="+", default=["fp8", "int8", "nf4", "Q8_0", "Q4_K"], metavar="NAME")
    options = parser.parse_args()
    source = BUNDLED / variant(options.model).file
    rng = random.Random("formats 2026")
    prompts = [make(rng) for make in (scenes.one_object, scenes.two_objects) for _ in range(options.prompts)]
    head = f"{'format':<10} {'file MB':>8} {'worst layer':>12} {'PSNR dB':>8} {'one object':>11} {'two objects':>12}"
    print(f"{options.model}, {len(prompts)} prompts, default steps\n{head} {'all':>7}", flush=True)
    plain = draw(miniflux.load(options.model), prompts)
    row("bfloat16", source, None, plain, plain, prompts)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.formats:
            path = Path(folder) / f"{name}{'.gguf' if name in BLOCKS else '.safetensors'}"
            made = convert(source, path, format=name)
            pipe = miniflux.load(options.model, weights={"transformer": path})
            row(name, path, made.layers[0].error, draw(pipe, prompts), plain, prompts)


def draw(pipe: miniflux.Pipeline, prompts: list[scenes.Scene]) -> list:
    """One picture of each scene, the i-th from seed 50,000 + i, ten at a time."""
    images: list = []
    for start in range(0, len(prompts), 10):
        captions = [scene.caption for scene in prompts[start : start + 10]]
        images += pipe.generate(captions, seed=50_000 + start).images
    return images


def row(name: str, path: Path, worst: float | None, images: list, plain: list, prompts: list[scenes.Scene]) -> None:
    right = [judge(image, scene).all for image, scene in zip(images, prompts, strict=True)]
    half = len(right) // 2
    shares = [100 * sum(some) / len(some) for some in (right[:half], right[half:], right)]
    same = [psnr(a, b) for a, b in zip(images, plain, strict=True)]
    finite = [value for value in same if math.isfinite(value)]
    mean = f"{sum(finite) / len(finite):8.1f}" if finite else f"{'equal':>8}"
    error = f"{worst:12.2e}" if worst is not None else f"{'-':>12}"
    size = path.stat().st_size / 1e6
    print(f"{name:<10} {size:8.2f} {error} {mean} {shares[0]:10.1f}% {shares[1]:11.1f}% {shares[2]:6.1f}%", flush=True)


if __name__ == "__main__":
    main()
