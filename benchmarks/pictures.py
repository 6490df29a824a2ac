"""Whole nano pictures against diffusers' FluxPipeline, with the same weights and embeddings, alone and several at once;
they take turns in one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import peers
import torch
from timing import Report, options, times

import miniflux
from miniflux.sampling import initial_noise, pack

SIDE, STEPS, GUIDANCE = 128, 20, 4.0


def main() -> None:
    arguments = options(__doc__, rounds=10)
    arguments.add_argument("--images", type=int, nargs="*", default=[1, 8])
    asked = arguments.parse_args()
    report = Report(
        "Whole pictures of nano-dev, 128x128, 20 steps", "FluxPipeline of diffusers, same weights and texts"
    )
    ours = miniflux.load("nano", device="cpu")
    prompt = "a red circle on a blue background"
    text = ours.text.encode([prompt])
    theirs = peers.pipeline(ours)
    for images in asked.images:
        noise = torch.cat([pack(initial_noise(SIDE, SIDE, i)) for i in range(images)])

        def mine() -> list[Any]:
            return ours.generate(prompt, images=images, steps=STEPS, guidance=GUIDANCE).images  # noqa: B023

        def other() -> list[Any]:
            return theirs(
                prompt_embeds=text.txt,
                pooled_prompt_embeds=text.vec,
                latents=noise,  # noqa: B023
                num_images_per_prompt=images,  # noqa: B023
                height=SIDE,
                width=SIDE,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
            ).images

        gap = max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(mine(), other(), strict=True))
        a, b = times(mine, other, rounds=asked.rounds)
        report.add(f"{images} at once", a, b, note=f"apart by {gap} of 255")
    report.write(asked.json)


if __name__ == "__main__":
    main()
