"""FLUX.3: the latents of FLUX.2, positions in half steps, references behind the beginning of the text, a static shift.

Source: `modular_pipelines/flux3` of diffusers.
"""

from __future__ import annotations

import math

from torch import Tensor

from miniflux.families.family import Family, Frame
from miniflux.families.flux2 import LARGEST, cropped, text_ids
from miniflux.families.flux2 import image_ids as whole_steps
from miniflux.sampling.forwards import flux3_conditioning, flux3_velocity
from miniflux.sampling.latents import PIXELS_PER_TOKEN as TOKEN
from miniflux.sampling.schedules import FLUX3_SHIFT, static_shift

LARGEST_ALONE = 4 * 1024**2  # pixels of the canvas of a single reference
LONGEST, SHORTEST = 4096, 64  # of the sides of that canvas
BACK_OFF = 0.995  # by how much it is made smaller where rounding up made it too large
STEP = 0.5  # on the axes of rows and columns, from one token to the next


def image_ids(batch: int, rows: int, columns: int) -> Tensor:
    """(0, half the row, half the column, 0), as (B, rows * columns, 4)."""
    return STEP * whole_steps(batch, rows, columns)


def reference_ids(number: int, rows: int, columns: int) -> Tensor:
    """(0, half the row, half the column, -number)."""
    ids = image_ids(1, rows, columns)
    ids[..., 3] = -number
    return ids


def reference_frame(width: int, height: int, count: int) -> Frame:
    """A single one is seen whole: made smaller where its canvas would be too large, and mirrored around itself up to
    whole tokens (`reference_canvas` in `flux3/pipeline.py` of the release). Of several, the middle of each."""
    if count > 1:
        return cropped(width, height, LARGEST)
    scale = min(1.0, math.sqrt(LARGEST_ALONE / (width * height)), LONGEST / max(width, height))
    while True:
        resized = max(1, round(width * scale)), max(1, round(height * scale))
        canvas = tuple(min(LONGEST, max(SHORTEST, -(-side // TOKEN) * TOKEN)) for side in resized)
        if canvas[0] * canvas[1] <= LARGEST_ALONE:
            return Frame(resized, (canvas[0], canvas[1]))
        scale *= BACK_OFF


FLUX3 = Family(
    name="flux3",
    patch=1,
    image_ids=image_ids,
    text_ids=text_ids,
    reference_ids=reference_ids,
    reference_frame=reference_frame,
    whole=True,
    shift=lambda tokens, steps: static_shift(FLUX3_SHIFT),
    velocity=flux3_velocity,
    conditioning=flux3_conditioning,
)
