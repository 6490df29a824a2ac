"""Which device and precision are chosen: as tables, with the accelerators and the speed of this machine pretended."""

from __future__ import annotations

import logging

import pytest
import torch

from miniflux.errors import InputError
from miniflux.memory import compute
from miniflux.memory.compute import SMALL, bfloat16_slowness, choose_device, choose_dtype

F64, F32, F16, BF16, F8 = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
LITTLE, MUCH = SMALL // 4, SMALL // 4 + 1  # parameters


def pretend(patch: pytest.MonkeyPatch, cuda: bool, mps: bool) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: cuda)
    patch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(False, False, "cpu"), (True, False, "cuda"), (True, True, "cuda"), (False, True, "mps")],
)
def test_the_best_device_there_is(cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda, mps)
    assert choose_device(None) == torch.device(expected)


def test_a_device_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where there is a better one."""
    pretend(monkeypatch, True, True)
    assert choose_device("cpu") == CPU and choose_device(CPU) == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", torch.device("cuda")])
def test_cuda_that_is_not_there(device: str | torch.device) -> None:
    with pytest.raises(InputError, match=rf"^device '{device}' cannot be used here; try cpu$"):
        choose_device(device)


@pytest.mark.parametrize("device", ["banana", "", "gpu", "cpu:x", "xla", "hpu", "vulkan", "fpga", "privateuseone"])
def test_devices_that_nobody_has(device: str) -> None:
    """torch raises a different type for almost each of them; the user reads the same line."""
    with pytest.raises(InputError, match=rf"^device '{device}' cannot be used here; try cpu$"):
        choose_device(device)


def test_the_meta_device_is_refused() -> None:
    """It would compute nothing, and quickly."""
    with pytest.raises(InputError, match="device 'meta' holds no data"):
        choose_device("meta")


@pytest.mark.parametrize(("name", "dtype"), [("float32", F32), ("bfloat16", BF16), ("float16", F16)])
def test_a_dtype_asked_for_is_taken(name: str, dtype: torch.dtype) -> None:
    """By name or as such, whatever is stored."""
    for device in (CPU, CUDA, MPS):
        for stored in (F32, BF16, F8):
            assert choose_dtype(name, device, stored, MUCH) == dtype
            assert choose_dtype(dtype, device, stored, LITTLE) == dtype


@pytest.mark.parametrize("dtype", ["banana", "fp16", "", "torch.float32", torch.int8, torch.float64, F8])
def test_other_dtypes_are_refused(dtype: str | torch.dtype) -> None:
    with pytest.raises(InputError, match=rf"^dtype '{dtype}' is not one of float32, bfloat16, float16$"):
        choose_dtype(dtype, CPU, F32, LITTLE)


def unmeasured() -> float:
    raise AssertionError("measured without need")


@pytest.mark.parametrize(
    ("device", "stored", "parameters", "expected"),
    [
        (CPU, F32, MUCH, F32),
        (CPU, F64, MUCH, F32),
        (CPU, F8, MUCH, F32),
        (CPU, F16, LITTLE, F32),
        (CPU, BF16, LITTLE, F32),
        (CUDA, F32, MUCH, F32),
        (CUDA, F64, LITTLE, F32),
        (CUDA, F8, MUCH, BF16),
        (CUDA, BF16, LITTLE, BF16),
        (CUDA, F16, MUCH, F16),
        (MPS, BF16, MUCH, BF16),
        (MPS, F32, LITTLE, F32),
    ],
)
def test_what_suits_the_device(
    device: torch.device, stored: torch.dtype, parameters: int, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without measuring: accelerators compute in what is stored, and small models are widened on the CPU."""
    monkeypatch.setattr(compute, "bfloat16_slowness", unmeasured)
    assert choose_dtype(None, device, stored, parameters) == expected


@pytest.mark.parametrize(
    ("stored", "slowness", "expected"),
    [(BF16, 10.0, F32), (BF16, 1.1, F32), (BF16, 0.9, BF16), (BF16, 0.3, BF16), (F16, 0.3, F32), (F16, 10.0, F32)],
)
def test_large_models_on_the_cpu_are_computed_in_what_is_faster_here(
    stored: torch.dtype,
    slowness: float,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Some processors multiply bfloat16 ten times slower; what was measured and chosen is said."""
    monkeypatch.setattr(compute, "bfloat16_slowness", lambda: slowness)
    with caplog.at_level(logging.INFO):
        assert choose_dtype(None, CPU, stored, MUCH) == expected
    assert f"{slowness:.1f} times" in caplog.text and str(expected).removeprefix("torch.") in caplog.text


def test_slowness_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio of the best times, on a pretended clock: other programs disturb some of the runs."""
    clock, times = [0.0], {BF16: iter([9.0, 6.0, 7.0, 8.0]), F32: iter([5.0, 4.0, 2.0, 3.0])}

    def multiply(a: torch.Tensor, b: torch.Tensor) -> None:
        assert a.dtype == b.dtype
        clock[0] += next(times[a.dtype])

    bfloat16_slowness.cache_clear()
    try:
        monkeypatch.setattr(compute.time, "perf_counter", lambda: clock[0])
        monkeypatch.setattr(torch, "mm", multiply)
        assert [bfloat16_slowness(), bfloat16_slowness()] == [3.0, 3.0]
    finally:
        bfloat16_slowness.cache_clear()
