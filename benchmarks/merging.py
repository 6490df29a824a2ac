"""What is left of a LoRA in a merged weight: wide, packed again in the format of its base, or packed after merging."""

from __future__ import annotations

import argparse
import time

import torch

from miniflux.checkpoints import FORMATS
from miniflux.checkpoints.formats.encodings import writable
from miniflux.lora.packing import again, rounding

NAMES = [name for name in writable() if name in FORMATS]
RANK = 16


def measure(size: int, sizes: list[float]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(size, size) / size**0.5
    change = torch.randn(size, RANK) @ torch.randn(RANK, size)
    change *= weight.norm() / change.norm()
    heads = " ".join(f"{f'{s:g}':>7}" for s in sizes)
    print(f"share of the change that is left, at |dW| / |W| = ...\n{'base':<18} {'merged':<11} {heads}  error  s / 1e9")
    for name in NAMES:
        parts = FORMATS[name].pack(weight)
        stored = FORMATS[name].read({k: (p.dtype, tuple(p.shape)) for k, p in parts.items()}, parts.__getitem__)
        before = stored.unpack(parts, torch.empty(weight.shape))
        for how, dtype in (("packed", None), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
            found = []
            for s in sizes:
                begin = time.perf_counter()
                stack = again(name, stored, before + s * change, dtype)
                seconds = time.perf_counter() - begin
                found.append(rounding(name, before, before + s * change, stack))
            left, worst = " ".join(f"{max(0.0, r.arrived):7.3f}" for r in found), max(r.error for r in found)
            print(f"{name:<18} {how:<11} {left} {worst:6.4f} {seconds * 1e9 / weight.numel():8.0f}")
        late = [FORMATS[name].unpack(FORMATS[name].pack(weight + s * change)) - before for s in sizes]
        shares = ((new * change).sum() / (s * change.square().sum()) for new, s in zip(late, sizes, strict=True))
        print(f"{name:<18} {'then packed':<11}", *(f"{float(share):7.3f}" for share in shares))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="rows and columns; default %(default)s")
    parser.add_argument("--changes", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1], metavar="|dW|/|W|")
    options = parser.parse_args()
    measure(options.size, options.changes)
