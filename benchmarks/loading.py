"""How much memory loading takes: the peak of a fresh process against the size of the file. Linux only: it reads /proc.

Writes a FLUX.1 transformer of about a gigabyte with random weights (hidden size 1024), then loads it from both layouts.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from miniflux.checkpoints import open_tensors, save
from miniflux.models.flux1 import Flux1, Flux1Config

CONFIG = Flux1Config(
    in_channels=64,
    out_channels=64,
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=1024,
    num_heads=8,
    depth=8,
    depth_single_blocks=16,
    axes_dim=(16, 56, 56),
    guidance_embed=True,
)
LOAD = """
import sys, torch
from benchmarks.loading import CONFIG
from miniflux.checkpoints import load_into
from miniflux.models.flux1 import Flux1
with torch.device("meta"):
    network = Flux1(CONFIG)
def status(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = status("VmRSS")
load_into(network, sys.argv[1], dtype=getattr(torch, sys.argv[2]) if len(sys.argv) > 2 else None)
print(status("VmHWM") - before)
"""


def main() -> None:
    print(f"{'case':<28} {'file MB':>8} {'largest MB':>10} {'peak MB':>8} {'over file + largest':>20}")
    with tempfile.TemporaryDirectory() as folder:
        network = Flux1(CONFIG).to(torch.bfloat16)
        for layout in ("original", "diffusers"):
            path = Path(folder) / f"{layout}.safetensors"
            save(network, path, layout=layout)
            sizes = [entry.size for entry in open_tensors(path).entries.values()]
            for dtype, factor in (("", 1), ("float32", 2)):
                arguments = [sys.executable, "-c", LOAD, str(path), *([dtype] if dtype else [])]
                root = Path(__file__).parent.parent
                found = subprocess.run(arguments, check=True, capture_output=True, text=True, cwd=root)
                peak, result, largest = int(found.stdout), factor * sum(sizes), factor * max(sizes)
                name = f"{layout}{', as ' + dtype if dtype else ''}"
                over = (peak - result - largest) / 1e6
                print(f"{name:<28} {result / 1e6:8.0f} {largest / 1e6:10.0f} {peak / 1e6:8.0f} {over:17.0f} MB")


if __name__ == "__main__":
    main()
