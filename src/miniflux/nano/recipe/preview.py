"""The preview table of nano's autoencoder, for `variants/tables.py`: `python -m miniflux.nano.recipe.preview`."""

from __future__ import annotations

import random
import sys

import torch

from miniflux.nano import scenes
from miniflux.nano.recipe.export import Nano
from miniflux.pictures import from_image
from miniflux.sampling import previews

SCENES = 256


def main() -> None:
    rng = random.Random(12)
    drawn = [(scenes.two_objects if i % 2 else scenes.one_object)(rng) for i in range(SCENES)]
    pictures = [
        scenes.render(s, 128, 128) if i % 4 else scenes.render_lit(s, 128, 128, rng) for i, s in enumerate(drawn)
    ]
    pixels = torch.stack([from_image(picture) for picture in pictures])
    table = previews.fit(Nano.load().autoencoder, pixels)
    rows = [f"    ({', '.join(f'{value:.4f}' for value in row)})," for row in table]
    sys.stdout.write("\n".join(["NANO_PREVIEW = (", *rows, ")", ""]))


if __name__ == "__main__":
    main()
