"""How much memory converting takes: the peak of a process against the largest tensor. Linux only: it reads /proc.

Writes a FLUX.1 transformer of 0.6 GB with random weights (hidden size 2048), then converts it into each format; and the
same weights as NF4 into another packed format.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from loading import LARGE

from miniflux.checkpoints import convert, open_tensors, save
from miniflux.models.flux1 import Flux1

CONFIG = replace(LARGE, hidden_size=2048, num_heads=16, depth=1, depth_single_blocks=2)
CASES = {
    "diffusers": ("", ".safetensors"),
    "float32": ("float32", ".safetensors"),
    "fp8": ("fp8", ".safetensors"),
    "fp8_e4m3": ("fp8_e4m3", ".safetensors"),
    "int8": ("int8", ".safetensors"),
    "nf4": ("nf4", ".safetensors"),
    "Q8_0": ("Q8_0", ".gguf"),
    "Q4_K": ("Q4_K", ".gguf"),
    "nf4 to int8": ("int8", ".safetensors"),
}
PACKED = "nf4 to int8"  # its source is packed itself
CONVERT = """
import sys, torch
from converting import CONFIG
from dataclasses import replace
from miniflux.checkpoints import convert, save
from miniflux.models.flux1 import Flux1
torch.set_num_threads(1)
source, target, layout, format = sys.argv[1:]
tiny = source + ".tiny.safetensors"
save(Flux1(replace(CONFIG, hidden_size=256, num_heads=2, depth_single_blocks=1)).bfloat16(), tiny)
convert(tiny, target, layout=layout or None, format=format or None)  # what torch loads late
def status(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS")
convert(source, target, layout=layout or None, format=format or None)
print(status("VmHWM") - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=list(CASES), choices=CASES, metavar="NAME")
    options = parser.parse_args()
    print(f"{'format':<12} {'file MB':>8} {'largest tensor MB':>18} {'peak MB':>8} {'ratio':>6} {'MB/s':>6}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        torch.manual_seed(0)
        save(Flux1(CONFIG).to(torch.bfloat16), source)
        packed = Path(folder) / "packed.safetensors"
        if PACKED in options.formats:
            convert(source, packed, format="nf4")
        sizes = [entry.size for entry in open_tensors(source).entries.values()]
        for name in options.formats:
            form, ending = CASES[name]
            target = Path(folder) / f"target{ending}"
            layout = "diffusers" if name == "diffusers" else ""
            started = time.monotonic()
            found = subprocess.run(
                [sys.executable, "-c", CONVERT, str(packed if name == PACKED else source), str(target), layout, form],
                check=True,
                capture_output=True,
                text=True,
                cwd=Path(__file__).parent,
            )
            taken = time.monotonic() - started
            target.unlink()
            peak = int(found.stdout)
            print(
                f"{name:<12} {sum(sizes) / 1e6:8.0f} {max(sizes) / 1e6:18.0f} {peak / 1e6:8.0f} "
                f"{peak / max(sizes):6.2f} {sum(sizes) / 1e6 / taken:6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
