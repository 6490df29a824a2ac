"""What hostile files cost until they are refused: CPU seconds and peak memory of a process of its own for each, and the
same for looking into an honest file of 24 GB. Linux only: it reads /proc.

The files are those of `tests/checkpoints/hostile.py`; the limits are a second and 200 MB.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from miniflux.checkpoints import inspect, open_tensors
from miniflux.errors import CheckpointError
from miniflux.models.flux1 import Flux1
from miniflux.variants import variant

sys.path.append(str(Path(__file__).parents[1]))
from tests.checkpoints.hostile import FILES, made
from tests.checkpoints.raw import sparse

LARGE = "an honest file of 24 GB, inspected"


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def measured(call: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds, and peak memory over the start in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of making the file
    before, start = status("VmRSS"), time.process_time()
    call()
    return time.process_time() - start, (status("VmHWM") - before) / 1e6


def cost(name: str) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        if name == LARGE:
            with torch.device("meta"):
                network = Flux1(variant("flux1-dev").transformer)
            shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
            path = sparse(Path(folder) / "a.safetensors", shapes)
            return measured(lambda: inspect(path))
        path = made(name, Path(folder))
        return measured(lambda: refused(path))


def refused(path: Path) -> None:
    try:
        open_tensors(path)
    except CheckpointError:
        return
    raise AssertionError(f"{path} was read")


def main() -> None:
    print(f"{'file':<48} {'CPU seconds':>11} {'peak MB':>8}")
    names = [LARGE, *FILES]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for name, (seconds, memory) in zip(names, pool.imap(cost, names, chunksize=1), strict=True):
            print(f"{name:<48} {seconds:11.3f} {memory:8.1f}", flush=True)


if __name__ == "__main__":
    main()
