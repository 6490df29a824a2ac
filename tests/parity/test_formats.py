"""Packed weights against bitsandbytes and diffusers: what they write is read, and what is written here is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miniflux.checkpoints.formats import FORMATS
from tests.tiny import randn


@pytest.fixture(scope="module")
def weight() -> Tensor:
    made = 0.05 * randn(96, 320)
    made[0, :64], made[1, 3] = 0, 2
    return made


@pytest.mark.slow  # importing bitsandbytes takes some seconds
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes(name: str, weight: Tensor) -> None:
    """Codes, statistics and tables are the same; nested statistics and the dtype of the original are understood."""
    functional = pytest.importorskip("bitsandbytes.functional")
    form = FORMATS[name]
    q, state = functional.quantize_4bit(weight, quant_type=name, blocksize=64)
    ours = form.pack(weight)
    theirs = {"weight": q, **{f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if "quant_state" not in key)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for nested in (False, True):
            q, state = functional.quantize_4bit(weight.to(dtype), quant_type=name, compress_statistics=nested)
            parts = {"weight": q, **{f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}}
            assert torch.equal(form.unpack(parts, dtype), functional.dequantize_4bit(q, state))


def test_black_forest_labs(weight: Tensor) -> None:
    """The formats of their files, as diffusers reads them."""
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    q, scale = utils.quantize_fp8r(weight[1:])
    ours = FORMATS["fp8_rows"].pack(weight[1:])
    assert torch.equal(ours["weight"].float(), q.float()) and torch.equal(ours["weight_scale"], scale)
    assert torch.equal(FORMATS["fp8_rows"].unpack(ours), utils.dequantize_fp8r(q, scale))
    q, scale, whole = utils.quantize_nvfp4(weight)
    ours = FORMATS["nvfp4"].pack(weight)
    assert torch.equal(ours["weight"], q) and torch.equal(ours["weight_scale"].float(), scale.float())
    assert torch.equal(ours["weight_scale_2"], whole)
    assert torch.equal(FORMATS["nvfp4"].unpack(ours), utils.dequantize_nvfp4(q, scale, whole))
