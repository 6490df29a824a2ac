"""References that are looked at once, against the same at every step (FLUX.2 klein): time of a whole picture.

    python -m benchmarks.references [--size 256] [--hidden 768]

Random weights of a smaller klein on a CPU; the two ways are timed in turns, in one run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from PIL import Image

from miniflux.conditions import Reference
from miniflux.models.flux2 import Flux2
from miniflux.pipeline import Pipeline
from miniflux.testing import randomise, tiny

STEPS, ROUNDS = 4, 3


def klein(hidden: int) -> Pipeline:
    """A klein of this width with 4 + 8 blocks."""
    small = tiny("flux2-klein-4b")
    sizes = {"hidden_size": hidden, "num_heads": hidden // 64, "depth": 4, "depth_single_blocks": 8}
    config = replace(small.variant.transformer, axes_dim=(16, 16, 16, 16), **sizes)
    variant = replace(small.variant, transformer=config)
    return Pipeline(variant, randomise(Flux2(config)).requires_grad_(False), small.autoencoder, small.text)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", type=int, default=256)
    options.add_argument("--hidden", type=int, default=768)
    given = options.parse_args()
    pipe, size = klein(given.hidden), given.size
    print(f"{given.hidden} wide, 4 + 8 blocks, {size}x{size}, {STEPS} steps, {torch.get_num_threads()} threads")
    print(f"{'references':>10} {'at every step, s':>18} {'once, s':>10} {'ratio':>7}")
    for count in (1, 4):
        pictures = [Image.effect_noise((size, size), 60 + i).convert("RGB") for i in range(count)]
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for once, found in times.items():
                seen = [Reference(one, index=i + 1, once=once) for i, one in enumerate(pictures)]
                begin = time.perf_counter()
                pipe.generate("a cat", conditions=seen, steps=STEPS, width=size, height=size)
                found.append(time.perf_counter() - begin)
        plain, kept = (statistics.median(times[once]) for once in (False, True))
        print(f"{count:>10} {plain:>18.2f} {kept:>10.2f} {plain / kept:>7.2f}")


if __name__ == "__main__":
    main()
