"""Which device and which precision to compute in."""

from __future__ import annotations

import logging
import time
from functools import cache

import torch

from miniflux.errors import InputError

log = logging.getLogger(__name__)

SMALL = 1_000_000_000  # bytes in float32 below which precision is free
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is: CUDA, then Apple's MPS, then the CPU.

    Raises:
        InputError: there is no such device here.
    """
    if device is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"device {str(device)!r} cannot be used here; try cpu") from error
    if chosen.type == "meta":
        raise InputError("device 'meta' holds no data; try cpu")
    return chosen


def device_of_process(i: int, asked: str | None) -> str | None:
    """Of process i: the one that is asked for; else the GPUs in turn, if there are several."""
    gpus = torch.cuda.device_count()
    return f"cuda:{i % gpus}" if asked is None and gpus > 1 else asked


def choose_dtype(
    dtype: str | torch.dtype | None, device: torch.device, stored: torch.dtype, parameters: int
) -> torch.dtype:
    """The precision asked for, or the one that suits the device.

    Weights stored in float32 are computed in float32. Half-precision ones stay as they are on accelerators. On a CPU
    a small model is widened to float32, because that costs nothing; a large one only where this CPU is slower at
    bfloat16 than at float32, which is measured once.

    Args:
        stored: dtype of the weights in the file.
        parameters: number of weights.

    Raises:
        InputError: not one of float32, bfloat16, float16.
    """
    if dtype is not None:
        chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if chosen is None or chosen not in DTYPES.values():
            raise InputError(f"dtype {str(dtype)!r} is not one of {', '.join(DTYPES)}")
        return chosen
    if stored not in (torch.bfloat16, torch.float16):
        wide = stored in (torch.float32, torch.float64)
        return torch.float32 if device.type == "cpu" or wide else torch.bfloat16
    if device.type != "cpu":
        return stored
    if 4 * parameters <= SMALL:
        return torch.float32
    ratio = bfloat16_slowness()
    chosen = torch.float32 if ratio > 1 or stored == torch.float16 else stored
    name = str(chosen).removeprefix("torch.")
    log.info("bfloat16 matrix products take %.1f times as long as float32 on this CPU: computing in %s", ratio, name)
    return chosen


@cache
def bfloat16_slowness() -> float:
    """How many times longer a bfloat16 matrix product takes than a float32 one on this CPU; measured once."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times: list[float] = []
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)
