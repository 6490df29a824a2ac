"""Matrix products of float32 as miniflux makes them (`models/linear.py`) against PyTorch's own, over shapes from those
of nano to those of the releases. `models.linear.LARGE` comes from here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timing import Report, options, times

from miniflux.models.linear import linear

SHAPES = (
    *((4, 192, 1152), (48, 64, 192), (112, 192, 1344), (112, 960, 192), (896, 192, 1344)),
    *((1280, 768, 3072), (1280, 3072, 768), (1536, 3072, 3072)),
)
WORK = 2**28  # multiplications of a round


@torch.inference_mode()
def main() -> None:
    asked = options(__doc__, rounds=15).parse_args()
    report = Report("One linear layer", "F.linear")
    for rows, width, out in SHAPES:
        x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out)
        often = max(1, WORK // (rows * width * out))

        def ours(given=(x, weight, bias), often: int = often) -> None:  # type: ignore[no-untyped-def]
            for _ in range(often):
                linear(*given)

        def torchs(given=(x, weight, bias), often: int = often) -> None:  # type: ignore[no-untyped-def]
            for _ in range(often):
                F.linear(*given)

        mine, other = times(ours, torchs, rounds=asked.rounds)
        speed = 2e-9 * rows * width * out * often / mine.median
        report.add(f"{rows} rows, {width} -> {out}, {often} times", mine, other, note=f"{speed:.0f} GFLOP/s")
    report.write(asked.json)


if __name__ == "__main__":
    main()
