"""When drawing pictures together pays: time in a batch against one after the other, over canvases and batches.
`batching.PAYS` comes from here."""

from __future__ import annotations

from typing import Any

from timing import Report, options, times

import miniflux

SIDES = (64, 128, 256)
BATCHES = (2, 4, 8, 16)


def main() -> None:
    arguments = options(__doc__, rounds=3)
    arguments.add_argument("--steps", type=int, default=4)
    asked = arguments.parse_args()
    pipe = miniflux.load("nano", device="cpu")
    hidden, text = pipe.transformer.config.hidden_size, pipe.text.length
    report = Report("Pictures drawn together", "the same, one after the other")
    for side in SIDES:
        numbers = ((side // 16) ** 2 + text) * hidden
        shared: dict[str, Any] = {"steps": asked.steps, "width": side, "height": side, "t5_length": text}
        for batch in BATCHES:

            def drawn(together: int, images: int = batch, shared: dict[str, Any] = shared) -> Any:
                return pipe.generate("a red circle", images=images, batch=together, **shared)

            apart, together = times(lambda: drawn(1), lambda: drawn(batch), rounds=asked.rounds)  # noqa: B023
            report.add(f"{batch} of {side}x{side}", together, apart, note=f"{numbers * batch} numbers in the stream")
    report.write(asked.json)


if __name__ == "__main__":
    main()
