"""The autoencoder of FLUX.1 with random weights against diffusers' with the same, in turns; and pictures in bands
against pictures as a whole: time in turns, peaks of memory in processes of their own."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from timing import Report, options, times
from torch import Tensor

from miniflux.memory import bands
from miniflux.memory.ledger import peak_size, resident_size
from miniflux.models.autoencoder import Autoencoder, Through, run_network
from miniflux.variants.sizes import FLUX1_AUTOENCODER

WAYS: dict[str, Through] = {"whole": run_network, "bands": bands.through}


def main() -> None:
    arguments = options(__doc__, rounds=5)
    arguments.add_argument("--sides", type=int, nargs=3, default=[512, 1024, 2048], metavar="PIXELS", help=
        "sides of the pictures against diffusers, in bands against whole, and in bands alone")  # fmt: skip
    arguments.add_argument("--small", action="store_true", help="an eighth of the channels")
    arguments.add_argument(
        "--only", choices=["peers", "times", "peaks"], nargs="*", default=["peers", "times", "peaks"]
    )
    arguments.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)  # what a process of its own is asked for
    asked = arguments.parse_args()
    report = Report("The autoencoder of FLUX.1, random weights", "diffusers, or the picture as a whole")
    torch.manual_seed(0)
    config = replace(FLUX1_AUTOENCODER, ch=16, num_groups=8) if asked.small else FLUX1_AUTOENCODER
    model = Autoencoder(config).eval().requires_grad_(False)
    bands.WHOLE = 0
    with torch.inference_mode():
        if asked.peak:
            way, direction, side = asked.peak
            print(*peak(model, WAYS[way], direction, int(side)))
            return
        first, second, third = asked.sides
        if "peers" in asked.only:
            against_diffusers(report, model, first, asked.rounds)
        if "times" in asked.only:
            in_bands(report, model, second, asked.rounds)
        if "peaks" in asked.only:
            peaks(asked.small, second, third)
    report.write(asked.json)


def given(model: Autoencoder, direction: str, side: int) -> Tensor:
    """A latent of a picture of that side, or its pixels."""
    if direction == "encode":
        return torch.rand(1, 3, side, side) * 2 - 1
    small = side // model.config.downscale
    return torch.randn(1, model.config.z_channels, small, small)


def against_diffusers(report: Report, model: Autoencoder, side: int, rounds: int) -> None:
    import peers

    theirs = peers.autoencoder(model)
    scale, shift = model.config.scale_factor, model.config.shift_factor
    latent, pixels = given(model, "decode", side), given(model, "encode", side)
    calls: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "decode": (lambda: model.decode(latent), lambda: theirs.decode(latent / scale + shift).sample),
        "encode": (lambda: model.encode(pixels), lambda: (theirs.encode(pixels).latent_dist.mode() - shift) * scale),
    }
    for direction, (mine, other) in calls.items():
        gap = apart(mine(), other())
        a, b = times(mine, other, rounds=rounds)
        report.add(f"{direction} {side}x{side}, diffusers", a, b, note=f"apart by {gap:.0e}")


def in_bands(report: Report, model: Autoencoder, side: int, rounds: int) -> None:
    for direction in ("decode", "encode"):
        x, run = given(model, direction, side), getattr(model, direction)
        gap = apart(run(x, bands.through), run(x))
        a, b = times(lambda: run(x, bands.through), lambda: run(x), rounds=rounds)  # noqa: B023
        report.add(f"{direction} {side}x{side} in bands, whole", a, b, note=f"apart by {gap:.0e}")


def peaks(small: bool, side: int, alone: int) -> None:
    def of(way: str, direction: str, side: int) -> list[int]:
        command = [sys.executable, __file__, *(["--small"] if small else []), "--peak", way, direction, str(side)]
        return [int(x) for x in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]

    for direction in ("decode", "encode"):
        (a, _), (b, _) = of("bands", direction, side), of("whole", direction, side)
        print(f"{direction} {side}x{side} in bands: {a / 2**20:.0f} MiB, whole {b / 2**20:.0f} MiB, {a / b:.2f}")
        _, process = of("bands", direction, alone)
        print(f"{direction} {alone}x{alone} in bands: {process / 2**30:.2f} GiB of the whole process", flush=True)


def peak(model: Autoencoder, way: Through, direction: str, side: int) -> tuple[int, int]:
    """The most bytes that a call takes beside what was there before, and the most that the process takes."""
    run = getattr(model, direction)
    run(given(model, direction, 8 * model.config.downscale))  # libraries have their own memory then
    x, before = given(model, direction, side), resident_size()
    run(x, way)
    most = peak_size()
    assert most is not None, "peaks are read from /proc"
    return most - before, most


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, beside the largest number."""
    return float((a - b).abs().max() / b.abs().max())


if __name__ == "__main__":
    main()
