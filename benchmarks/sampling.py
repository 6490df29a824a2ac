"""Sampling on nano: solvers at equal cost, what step caches spare, what classifier-free guidance does to pictures."""

from __future__ import annotations

import argparse
import random
from statistics import median

import numpy as np

import miniflux
from miniflux.nano import scenes
from miniflux.nano.recipe.adherence import judge
from miniflux.pipeline import Pipeline
from miniflux.sampling import guide
from miniflux.study.solvers import captions, distance

SOLVERS = (
    ("euler", 20, "uniform", None),
    ("dpmpp-2m", 12, "uniform", None),
    ("dpmpp-2m", 12, "beta", 1.0),
    ("unipc", 12, "beta", 1.0),
)


def solvers(pipe: Pipeline, count: int, reference_steps: int) -> None:
    """Relative L2 distance of the latents from a run of 1000 Euler steps; the median over prompts."""
    texts = captions(count, seed=50)
    reference = pipe.generate(texts, steps=reference_steps).latents
    print(f"{'solver':<10} {'calls':>5} {'schedule':<9} {'shift':<5} {'median distance':>15} {'nearer than Euler':>18}")
    first = None
    for name, steps, schedule, shift in SOLVERS:
        latents = pipe.generate(texts, solver=name, steps=steps, schedule=schedule, shift=shift).latents
        gaps = [distance(latents[i : i + 1], reference[i : i + 1]) for i in range(count)]
        first = gaps if first is None else first
        nearer = sum(a < b for a, b in zip(gaps, first, strict=True))
        said = "own" if shift is None else f"{shift:g}"
        print(f"{name:<10} {steps:>5} {schedule:<9} {said:<5} {median(gaps):15.4f} {nearer:>11} of {count}")


def caches(pipe: Pipeline, count: int) -> None:
    """Blocks spared and the PSNR against the exact run, 28 steps as FLUX.1 dev is often run."""
    texts = captions(count, seed=51)
    print(f"\n{'cache':<12} {'block evaluations':>17} {'median PSNR':>11} {'lowest':>7}")
    for name in ("first-block", "tea", "mag", "taylor"):
        found = pipe.generate(texts, cache=name, check_cache=True, steps=28).settings
        evaluated, skipped = (sum(said["cache"][key] for said in found) for key in ("evaluated", "skipped"))
        psnrs = [said["cache"]["psnr"] for said in found]
        fewer = f"{(evaluated + skipped) / evaluated:.2f} x fewer"
        print(f"{name:<12} {fewer:>17} {median(psnrs):>11.1f} {min(psnrs):7.1f}")


def guidance(pipe: Pipeline, count: int) -> None:
    """Adherence and the share of channel values at 0 or 255, at rising scales of classifier-free guidance."""
    rng = random.Random(52)
    wanted = [(scenes.two_objects if i % 2 else scenes.one_object)(rng) for i in range(count)]
    print(f"\n{'guidance':<10} {'all right':>9} {'saturated':>9}")
    for scale in (1.0, 1.5, 2.0, 3.0):
        result = pipe.generate([s.caption for s in wanted], seed=900, guidance=1.0, guide=guide("cfg", scale=scale))
        right = sum(judge(image, scene).all for image, scene in zip(result.images, wanted, strict=True))
        pixels = np.stack([np.asarray(image) for image in result.images])
        print(f"cfg {scale:<6g} {100 * right / count:8.0f}% {100 * np.mean((pixels == 0) | (pixels == 255)):8.2f}%")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--prompts", type=int, default=50)
    arguments.add_argument("--reference-steps", type=int, default=1000)
    options = arguments.parse_args()
    pipe = miniflux.load("nano")
    solvers(pipe, options.prompts, options.reference_steps)
    caches(pipe, options.prompts)
    guidance(pipe, options.prompts)


if __name__ == "__main__":
    main()
