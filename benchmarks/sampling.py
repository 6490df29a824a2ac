"""Sampling on nano: solvers at equal cost, what step caches spare, what classifier-free guidance does to pictures, what
previews cost."""

from __future__ import annotations

import argparse
import random
from statistics import median

import numpy as np
from timing import median_times

import miniflux
from miniflux.nano import scenes
from miniflux.nano.recipe.adherence import judge
from miniflux.pipeline import Pipeline
from miniflux.result import psnr
from miniflux.sampling import guide
from miniflux.study.solvers import captions, distance

# Solver, steps and schedule; the first is what the others are compared with.
SOLVERS = (
    ("euler", 20, "auto"),
    ("dpmpp-2m", 12, "auto"),
    ("unipc", 12, "auto"),
    ("dpmpp-2m", 12, "uniform"),
    ("unipc", 12, "uniform"),
    ("euler", 20, "beta-flow"),
)


def solvers(pipe: Pipeline, count: int, reference: tuple[str, int]) -> None:
    """Relative L2 distance of the latents from a run of many steps; the median over prompts."""
    texts = captions(count, seed=50)
    exact = pipe.generate(texts, solver=reference[0], steps=reference[1], schedule="uniform").latents
    print(f"{'solver':<10} {'calls':>5} {'schedule':<20} {'median distance':>15} {'nearer than the first':>22}")
    first = None
    for name, steps, schedule in SOLVERS:
        result = pipe.generate(texts, solver=name, steps=steps, schedule=schedule)
        gaps = [distance(result.latents[i : i + 1], exact[i : i + 1]) for i in range(count)]
        first = gaps if first is None else first
        nearer = sum(a < b for a, b in zip(gaps, first, strict=True))
        said = result.settings[0]["schedule"] + (" (its own)" if schedule == "auto" else "")
        print(f"{name:<10} {steps:>5} {said:<20} {median(gaps):15.4f} {nearer:>15} of {count}", flush=True)


def caches(pipe: Pipeline, count: int) -> None:
    """Blocks spared and the PSNR against the exact run, 28 steps as FLUX.1 dev is often run."""
    texts = captions(count, seed=51)
    print(f"\n{'cache':<12} {'block evaluations':>17} {'median PSNR':>11} {'lowest':>7}")
    for name in ("first-block", "tea", "mag", "taylor"):
        found = pipe.generate(texts, cache=name, check_cache=True, steps=28).settings
        evaluated, skipped = (sum(said["cache"][key] for said in found) for key in ("evaluated", "skipped"))
        psnrs = [said["cache"]["psnr"] for said in found]
        fewer = f"{(evaluated + skipped) / evaluated:.2f} x fewer"
        print(f"{name:<12} {fewer:>17} {median(psnrs):>11.1f} {min(psnrs):7.1f}", flush=True)


def guidance(pipe: Pipeline, count: int) -> None:
    """Adherence and the share of channel values at 0 or 255, at rising scales of classifier-free guidance."""
    rng = random.Random(52)
    wanted = [(scenes.two_objects if i % 2 else scenes.one_object)(rng) for i in range(count)]
    print(f"\n{'guidance':<10} {'all right':>9} {'saturated':>9}")
    for scale in (1.0, 1.5, 2.0, 3.0):
        result = pipe.generate([s.caption for s in wanted], seed=900, guidance=1.0, guide=guide("cfg", scale=scale))
        right = sum(judge(image, scene).all for image, scene in zip(result.images, wanted, strict=True))
        pixels = np.stack([np.asarray(image) for image in result.images])
        clipped = 100 * np.mean((pixels == 0) | (pixels == 255))
        print(f"cfg {scale:<6g} {100 * right / count:8.0f}% {clipped:8.2f}%", flush=True)


def previews(pipe: Pipeline, count: int) -> None:
    """Time against that of a step, and PSNR against the finished picture: of the end, and of a run half done."""
    texts, kinds = captions(count, seed=53), ("table", "tiny")
    ends: dict[str, list[float]] = {kind: [] for kind in kinds}
    halves: dict[str, list[float]] = {kind: [] for kind in kinds}
    for text in texts:
        whole, half = pipe.generate(text), pipe.generate(text, stop=10)
        for kind in kinds:
            for values, result in ((ends, whole), (halves, half)):
                values[kind].append(psnr(pipe.preview(result.moment, 128, 128, kind), whole.images[0]))
    moment, latents = whole.moment, whole.latents
    calls = [lambda steps=steps: pipe.generate(text, steps=21, stop=steps) for steps in (1, 11)]
    calls += [lambda kind=kind: pipe.preview(moment, 128, 128, kind) for kind in kinds]
    calls += [lambda: pipe.autoencoder.decode(latents)]
    one, eleven, *times = median_times(*calls)
    step = (eleven - one) / 10
    print(f"\n{'preview':<12} {'of a step':>9} {'end':>8} {'half done':>9}    a step: {1000 * step:.1f} ms")
    for kind, seconds in zip(kinds, times, strict=False):
        print(f"{kind:<12} {100 * seconds / step:8.1f}% {median(ends[kind]):5.1f} dB {median(halves[kind]):6.1f} dB")
    print(f"{'autoencoder':<12} {100 * times[-1] / step:8.1f}%", flush=True)


def _reference(text: str) -> tuple[str, int]:
    name, _, steps = text.partition(":")
    return name, int(steps)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--prompts", type=int, default=50)
    arguments.add_argument(
        "--reference", type=_reference, default=("euler", 1000), help="SOLVER:STEPS; rk4:50 takes a fifth of the time"
    )  # fmt: skip
    arguments.add_argument("--parts", nargs="*", default=["solvers", "caches", "guidance", "previews"])
    options = arguments.parse_args()
    pipe = miniflux.load("nano")
    if "solvers" in options.parts:
        solvers(pipe, options.prompts, options.reference)
    for part in (caches, guidance, previews):
        if part.__name__ in options.parts:
            part(pipe, options.prompts)


if __name__ == "__main__":
    main()
