"""What loading takes: peak memory of a fresh process against the size of the file, and time against reading the file
once. Linux only: it reads /proc.

Writes a FLUX.1 transformer with random weights and loads it from both layouts: about a gigabyte in bfloat16, or with
`--large` 4.4 GB in float16, and then with diffusers as well: with the file in the page cache, and after dropping it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from miniflux.checkpoints import load_into, open_tensors, save
from miniflux.checkpoints.writing import safetensors_frame, write_frame
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
# diffusers reads single files of the official width only.
LARGE = replace(CONFIG, hidden_size=3072, num_heads=24, depth=4, depth_single_blocks=6)
MEASURE = """
import sys, time, torch
path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
def status(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
{prepare}
before, start = status("VmRSS"), time.perf_counter()
{work}
print(status("VmHWM") - before, time.perf_counter() - start)
"""
READ = MEASURE.format(
    prepare="buffer = bytearray(2**24); file = open(path, 'rb', buffering=0)", work="while file.readinto(buffer): pass"
)
OURS = MEASURE.format(
    prepare="""
from benchmarks.loading import CONFIG, LARGE
from miniflux.checkpoints import load_into
from miniflux.models.flux1 import Flux1
with torch.device("meta"):
    network = Flux1(LARGE if dtype == torch.float16 else CONFIG)
""",
    work="load_into(network, path, dtype=dtype)",
)
SINGLE = MEASURE.format(
    prepare="from pathlib import Path\nfrom diffusers import FluxTransformer2DModel",
    work="FluxTransformer2DModel.from_single_file(path, config=f'{Path(path).parent}/diffusers', torch_dtype=dtype)",
)
FOLDER = MEASURE.format(
    prepare="from pathlib import Path\nfrom diffusers import FluxTransformer2DModel",
    work="FluxTransformer2DModel.from_pretrained(Path(path).parent, torch_dtype=dtype)",
)
ROUNDS = 3


def measured(code: str, path: Path, dtype: str, cold: bool = False) -> tuple[int, float]:
    """Peak bytes over the start, and seconds: the least of a few fresh processes, because machines are shared. `cold`:
    the file is dropped from the page cache before each of them."""
    root, found = Path(__file__).parent.parent, list[tuple[int, float]]()
    for _ in range(ROUNDS):
        if cold:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        arguments = [sys.executable, "-c", code, str(path), dtype]
        run = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
        peak, seconds = run.stdout.split()[-2:]
        found.append((int(peak), float(seconds)))
    return max(peak for peak, _ in found), min(seconds for _, seconds in found)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        large(Path(folder)) if "--large" in sys.argv else small(Path(folder))


def small(folder: Path) -> None:
    print(f"{'case':<28} {'file MB':>8} {'largest MB':>10} {'peak MB':>8} {'over file + largest':>20}")
    network = Flux1(CONFIG).to(torch.bfloat16)
    for layout in ("original", "diffusers"):
        path = folder / f"{layout}.safetensors"
        save(network, path, layout=layout)
        sizes = [entry.size for entry in open_tensors(path).entries.values()]
        for dtype, factor in (("bfloat16", 1), ("float32", 2)):
            peak, _ = measured(OURS, path, dtype)
            result, biggest = factor * sum(sizes), factor * max(sizes)
            over = (peak - result - biggest) / 1e6
            name = f"{layout}, as {dtype}"
            print(f"{name:<28} {result / 1e6:8.0f} {biggest / 1e6:10.0f} {peak / 1e6:8.0f} {over:17.0f} MB")


def large(folder: Path) -> None:
    with torch.device("meta"):
        network = Flux1(LARGE)
    kinds = {key: (torch.float16, tuple(tensor.shape)) for key, tensor in network.state_dict().items()}
    original = folder / "original.safetensors"
    theirs = folder / "diffusers" / "diffusion_pytorch_model.safetensors"
    theirs.parent.mkdir(exist_ok=True)

    def made(key: str) -> Tensor:
        return torch.empty(kinds[key][1]).normal_(std=0.02).half()

    frame = safetensors_frame(original.name, kinds, {})
    write_frame(original, frame, ((key, made(key)) for key in frame.places))
    load_into(network, original)
    save(network, theirs, layout="diffusers")
    about = {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": LARGE.in_channels,
        "num_layers": LARGE.depth,
        "num_single_layers": LARGE.depth_single_blocks,
        "attention_head_dim": LARGE.hidden_size // LARGE.num_heads,
        "num_attention_heads": LARGE.num_heads,
        "joint_attention_dim": LARGE.context_in_dim,
        "pooled_projection_dim": LARGE.vec_in_dim,
        "guidance_embeds": LARGE.guidance_embed,
        "axes_dims_rope": list(LARGE.axes_dim),
    }
    (theirs.parent / "config.json").write_text(json.dumps(about), "utf-8")
    sizes = [entry.size for entry in open_tensors(original).entries.values()]
    print(f"float16, {sum(sizes) / 1e9:.2f} GB, largest tensor {max(sizes) / 1e6:.0f} MB")
    head = f"{'cold s':>8} {'x reading':>9} {'cached s':>8} {'x reading':>9} {'peak GB':>8}"
    print(f"{'case':<30} {head} {'(peak - largest) / weights':>27}")
    cases = (
        ("reading the original file once", READ, original),
        ("miniflux", OURS, original),
        ("diffusers, from_single_file", SINGLE, original),
        ("reading diffusers' file once", READ, theirs),
        ("miniflux", OURS, theirs),
        ("diffusers, from_pretrained", FOLDER, theirs),
    )
    reading: dict[Path, tuple[float, float]] = {}
    for name, code, path in cases:
        (_, cold), (peak, cached) = measured(code, path, "float16", cold=True), measured(code, path, "float16")
        once = reading.setdefault(path, (cold, cached))  # the first case of a file reads it
        share = max(0.0, (peak - max(sizes)) / sum(sizes))
        times = f"{cold:8.2f} {cold / once[0]:9.2f} {cached:8.2f} {cached / once[1]:9.2f}"
        print(f"{name:<30} {times} {peak / 1e9:8.2f} {share:27.3f}", flush=True)


if __name__ == "__main__":
    main()
