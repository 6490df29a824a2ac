"""What a LoRA costs: a linear of FLUX.1's size with and without one, a change of scale, and the memory of a file."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from timing import median_times
from torch import nn

from miniflux import lora
from miniflux.checkpoints.writing import write_tensors
from miniflux.lora.layer import LowRank, add_changes
from miniflux.models.flux1 import Flux1
from miniflux.variants import VARIANTS

RANK, TOKENS = 16, 1536
CONFIG = VARIANTS["flux1-dev"].transformer


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@torch.inference_mode()
def overhead() -> None:
    hidden = CONFIG.hidden_size
    print(f"{'layer':<22} {'dtype':<9} {'bare ms':>8} {'with LoRA':>9} {'ratio':>6}")
    for dtype in (torch.float32, torch.bfloat16):
        for out, width in ((hidden, hidden), (3 * hidden, hidden), (hidden, 5 * hidden)):
            bare, adapted = nn.Linear(width, out).to(dtype), nn.Linear(width, out).to(dtype)
            add_changes(adapted, "x", [LowRank(torch.randn(RANK, width), torch.randn(out, RANK), (0, out)).to(dtype)])
            x = torch.randn(1, TOKENS, width, dtype=dtype)
            a, b = median_times(lambda: bare(x), lambda: adapted(x))  # noqa: B023
            name = f"{width} -> {out}"
            print(f"{name:<22} {str(dtype)[6:]:<9} {1000 * a:8.1f} {1000 * b:9.1f} {b / a:6.3f}")


def switching() -> None:
    """A file of the published realism LoRA's shape on a full-size transformer without numbers."""
    with torch.device("meta"):
        network = Flux1(CONFIG)
    tensors: dict[str, torch.Tensor] = {}
    for i in range(CONFIG.depth):
        for which, out in (("qkv_lora1", 3), ("qkv_lora2", 3), ("proj_lora1", 1), ("proj_lora2", 1)):
            start = f"double_blocks.{i}.processor.{which}"
            tensors[f"{start}.down.weight"] = torch.randn(RANK, CONFIG.hidden_size).bfloat16()
            tensors[f"{start}.up.weight"] = torch.randn(out * CONFIG.hidden_size, RANK).bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        write_tensors(path, tensors, {})
        del tensors
        before = resident_bytes()
        receipt = lora.attach(network, path, name="x")
        grown, size = resident_bytes() - before, path.stat().st_size
        print(f"loading {size / 1e6:.1f} MB onto {receipt.applied} modules: {grown / 1e6:.1f} MB, {grown / size:.2f} x")
        start = time.perf_counter()
        for i in range(100):
            lora.set_scale(network, "x", 0.5 + i / 100)
        print(f"a change of scale: {10 * (time.perf_counter() - start):.3f} ms")


def main() -> None:
    overhead()
    switching()


if __name__ == "__main__":
    main()
