"""When drawing pictures together pays: time in a batch against one after the other, over canvases and batches.
`batching.PAYS` comes from here."""

from __future__ import annotations

import argparse
from typing import Any

from timing import median_times

import miniflux

SIDES = (64, 128, 256)
BATCHES = (2, 4, 8, 16)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=4)
    options = arguments.parse_args()
    pipe = miniflux.load("nano", device="cpu")
    hidden, text = pipe.transformer.config.hidden_size, pipe.text.length
    print("numbers in the stream of a picture, of a batch: time against one after the other")
    for side in SIDES:
        numbers = ((side // 16) ** 2 + text) * hidden
        shared: dict[str, Any] = {"steps": options.steps, "width": side, "height": side, "t5_length": text}
        for batch in BATCHES:

            def drawn(together: int, images: int = batch, shared: dict[str, Any] = shared) -> Any:
                return pipe.generate("a red circle", images=images, batch=together, **shared)

            apart, together = median_times(lambda: drawn(1), lambda: drawn(batch), rounds=options.rounds)  # noqa: B023
            print(
                f"{side:4d}x{side:<4d} {numbers:8d} {batch:3d} x = {numbers * batch:8d}: {together / apart:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
