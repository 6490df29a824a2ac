"""Linears by either library: the product of the formula, the same rows in any batch, and PyTorch's own wherever the
other cannot serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from miniflux.models import linear as module
from miniflux.models.linear import LARGE, MANY, Linear, linear

needs_onednn = pytest.mark.skipif(module._onednn is None, reason="oneDNN is used where AVX-512 is")


def made(rows: int = 48, width: int = 192, out: int = 576, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = ((rows, width), (out, width), (out,))
    return tuple(torch.randn(shape, generator=generator) for shape in (x, weight, bias))  # type: ignore[return-value]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every product that oneDNN makes."""
    calls: list[int] = []
    real = module._onednn

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(module, "_onednn", real and counted)
    return calls


@pytest.mark.parametrize("shape", [(48,), (1,), (2, 7), (1, 3, 5)])
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_the_product_in_float64(shape: tuple[int, ...], biased: bool) -> None:
    x, weight, bias = made()
    x = x[:1].expand(*shape, -1) + torch.randn(*shape, 192, generator=torch.Generator().manual_seed(2))
    b = bias if biased else None
    with torch.inference_mode():
        y = linear(x, weight, b)
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)
    assert y.shape == (*shape, 576)


@torch.inference_mode()
def test_a_row_is_the_same_in_any_batch_and_wherever_it_lies() -> None:
    """Bit for bit, from four rows on; also of a slice, and of a weight that begins at an odd place."""
    x, weight, bias = made(rows=200)
    whole = linear(x, weight, bias)
    moved = torch.empty(weight.numel() + 1)[1:].view_as(weight).copy_(weight)
    for first, last in ((0, 4), (3, 11), (8, 112), (96, 200)):
        assert torch.equal(linear(x[first:last], weight, bias), whole[first:last])
        assert torch.equal(linear(x[first:last], moved, bias), whole[first:last])
    wide = torch.cat((x, x), dim=1)
    assert torch.equal(linear(wide[:, 192:], weight, bias), whole)


@needs_onednn
def test_large_products_without_gradients_go_to_onednn(asked: list[int]) -> None:
    layer = Linear(192, 576)
    x = made()[0]
    with torch.inference_mode():
        layer(x)
    with torch.no_grad():
        layer(x)
    assert len(asked) == 2


def test_others_do_not(asked: list[int]) -> None:
    """Gradients, tangents, other types, small, turned and foreign weights, autocast, no rows at all."""
    x, weight, bias = made()
    assert linear(x, weight.clone().requires_grad_(), bias).requires_grad

    class Foreign(Tensor):
        pass

    with torch.no_grad():
        assert linear(x.bfloat16(), weight.bfloat16(), None).dtype == torch.bfloat16
        assert linear(x.double(), weight.double(), None).dtype == torch.float64
        small = weight[: LARGE // 192 - 1]
        torch.testing.assert_close(linear(x, small), x @ small.T)
        turned = weight.T.contiguous().T
        torch.testing.assert_close(linear(x, turned), x @ weight.T, rtol=0, atol=1e-4)
        assert isinstance(linear(x, weight.as_subclass(Foreign)), Foreign)
        assert linear(x[:0], weight, bias).shape == (0, 576)
        assert linear(x.to("meta"), weight.to("meta"), None).is_meta
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight, bias).dtype == torch.bfloat16
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, x), weight)).tangent
            torch.testing.assert_close(tangent, x @ weight.T, rtol=0, atol=1e-4)
    assert not asked


def test_it_is_a_linear_to_everybody() -> None:
    """Its keys, its class, its gradient."""
    layer, other = Linear(192, 576), nn.Linear(192, 576)
    other.load_state_dict(layer.state_dict())
    x = made()[0]
    assert isinstance(layer, nn.Linear)
    layer(x).square().sum().backward()
    other(x).square().sum().backward()
    assert layer.weight.grad is not None and torch.equal(layer.weight.grad, other.weight.grad)  # type: ignore[arg-type]


@needs_onednn
@torch.inference_mode()
def test_many_rows_of_a_huge_weight_go_to_mkl_on_intel(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = made(rows=MANY + 88)
    monkeypatch.setattr(module, "_huge", weight.numel())
    whole = linear(x, weight, bias)
    assert not asked and torch.equal(whole, F.linear(x, weight, bias))
    assert torch.equal(linear(x[88:], weight, bias), whole[88:]) and not asked
    linear(x[89:], weight, bias)
    assert len(asked) == 1
    monkeypatch.setattr(module, "_huge", weight.numel() + 1)
    linear(x, weight, bias)
    assert len(asked) == 2
