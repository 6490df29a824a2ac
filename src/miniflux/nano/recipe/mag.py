"""The MagCache table of nano-dev: `python -m miniflux.nano.recipe.mag` prints it for `variants/tables.py`."""

from __future__ import annotations

import random
import sys
from statistics import mean

import miniflux
from miniflux.nano import scenes
from miniflux.sampling.caches import Measure
from miniflux.variants import FLUX1_MAG_RATIOS

PROMPTS = 6


def main() -> None:
    rng, measured = random.Random(21), Measure()
    captions = [(scenes.two_objects if i % 2 else scenes.one_object)(rng).caption for i in range(PROMPTS)]
    miniflux.load("nano").generate(captions, steps=len(FLUX1_MAG_RATIOS), cache=measured)
    ratios = [f"{mean(step):.4f}".rstrip("0").ljust(3, "0") for step in zip(*measured.runs, strict=True)]
    rows = [", ".join(ratios[:14]), ", ".join(ratios[14:])]
    sys.stdout.write("\n".join(["NANO_MAG_RATIOS = (", *(f"    *({row})," for row in rows), ")", ""]))


if __name__ == "__main__":
    main()
