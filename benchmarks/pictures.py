"""Whole nano pictures against diffusers' FluxPipeline, with the same weights and embeddings, alone and several at once;
they take turns in one process."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import peers
import torch
from timing import median_times

import miniflux
from miniflux.sampling import initial_noise, pack

SIDE, STEPS, GUIDANCE = 128, 20, 4.0


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=10)
    arguments.add_argument("--images", type=int, nargs="*", default=[1, 8])
    options = arguments.parse_args()
    ours = miniflux.load("nano", device="cpu")
    prompt = "a red circle on a blue background"
    text = ours.text.encode([prompt])
    theirs = peers.pipeline(ours)
    for images in options.images:
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
        a, b = median_times(mine, other, rounds=options.rounds)
        print(f"{images} pictures: {1000 * a:.0f} ms, theirs {1000 * b:.0f} ms, {a / b:.2f}; apart by {gap} of 255")


if __name__ == "__main__":
    main()
