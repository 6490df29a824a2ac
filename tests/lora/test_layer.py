"""Changes of single layers against their formulas, in every form and beside each other; and under torch.compile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from miniflux.errors import LoraError
from miniflux.lora import attach, detach, merge, set_scale, unmerge
from miniflux.lora.layer import (
    Change,
    Dense,
    Hadamard,
    Kronecker,
    LowRank,
    Magnitude,
    add_changes,
    changes_of,
    remove_changes,
    rescale,
)
from miniflux.models.flux1 import Flux1
from tests.lora.made import lora, relative
from tests.tiny import FLUX1, flux1_inputs, randn, randomise

OUT, WIDTH = 12, 8


def linear(bias: bool = True) -> nn.Linear:
    return randomise(nn.Linear(WIDTH, OUT, bias=bias))


def low_rank(height: int = OUT, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(down, up)."""
    return randn(3, WIDTH, seed=seed), randn(height, 3, seed=seed + 1)


def form(name: str, weight: Tensor, rows: tuple[int, int]) -> tuple[Change, Tensor]:
    """A change of these rows, and its dW in float64."""
    height = rows[1] - rows[0]
    down, up = low_rank(height)
    bias = randn(height, seed=8)
    if name == "LoRA":
        return LowRank(down, up, rows, 0.7, bias), 0.7 * up.double() @ down.double()
    if name == "LoHa":
        (b2, a2) = low_rank(height, seed=2)
        dense = 0.7 * (up.double() @ down.double()) * (a2.double() @ b2.double())
        return Hadamard(up, down, a2, b2, rows, 0.7, bias), dense
    if name.startswith("LoKr"):
        w1, w2 = randn(2, 4, seed=3), randn(height // 2, 2, seed=4)
        dense = 0.7 * torch.kron(w1.double(), w2.double())
        if name.endswith("a b"):  # a product that gives the same matrix
            return Kronecker(w1, w2 @ torch.eye(2), rows, 0.7, bias, w2_b=torch.eye(2)), dense
        if name.endswith("a b first"):
            return Kronecker(w1, w2, rows, 0.7, bias, w1_b=torch.eye(4)), dense
        return Kronecker(w1, w2, rows, 0.7, bias), dense
    if name == "diff":
        whole = randn(height, WIDTH, seed=5)
        return Dense(whole, rows, bias), whole.double()
    old = weight[rows[0] : rows[1]].double()
    total = old + 0.7 * up.double() @ down.double()
    axis = 0 if "column" in name else 1
    magnitude = randn(*((1, WIDTH) if axis == 0 else (height, 1)), seed=6).abs() + 0.5
    dense = magnitude.double() * total / total.norm(dim=axis, keepdim=True) - old
    return Magnitude(LowRank(down, up, rows, 0.7, bias), magnitude, weight[rows[0] : rows[1]]), dense


FORMS = ["LoRA", "LoHa", "LoKr", "LoKr a b", "LoKr a b first", "diff", "DoRA by row", "DoRA by column"]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rows", [(0, OUT), (4, 8), (8, 12)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_forward_and_delta(name: str, rows: tuple[int, int], bias: bool) -> None:
    """scale * (dW x + b) is added to those rows of the output; `delta` and `norm` speak of the same dW."""
    layer = linear(bias)
    change, dense = form(name, layer.weight, rows)
    old = layer.weight[rows[0] : rows[1]]
    assert relative(change.delta(old), dense) < 1e-5
    if not name.startswith("DoRA"):  # which needs the weight
        assert change.norm() == pytest.approx(float(dense.norm()), rel=1e-5)
    add_changes(layer, "x", [change])
    for shape in ((5,), (2, 3), (2, 1, 2)):
        x = randn(*shape, WIDTH, seed=7)
        for scale in (1.0, -0.5):
            rescale([change], [scale])
            expected = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
            expected[..., rows[0] : rows[1]] += scale * (x.double() @ dense.T + change.bias.double())
            assert relative(layer(x), expected) < 1e-5


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_kronecker_of_any_shape(rows1: int, columns1: int, rows2: int, columns2: int) -> None:
    """kron(w1, w2) x without the product, against the product."""
    w1, w2 = randn(rows1, columns1, seed=1), randn(rows2, columns2, seed=2)
    x = randn(3, columns1 * columns2, seed=3)
    found = Kronecker(w1, w2, (0, rows1 * rows2)).forward(x, lambda x: x)
    torch.testing.assert_close(found, x @ torch.kron(w1, w2).T, rtol=1e-4, atol=1e-5)


def test_dora_with_the_norms_of_the_weight_changes_nothing() -> None:
    """Closed form: no change of direction, and the lengths as they were."""
    layer = linear()
    for axis in (0, 1):
        norms = layer.weight.detach().norm(dim=axis, keepdim=True)
        nothing = LowRank(torch.zeros(2, WIDTH), torch.zeros(OUT, 2), (0, OUT))
        change = Magnitude(nothing, norms, layer.weight.detach())
        assert float(change.delta(layer.weight.detach()).abs().max()) < 1e-6


@pytest.mark.parametrize(
    "order", [("LoRA", "DoRA by row"), ("DoRA by column", "LoRA"), ("diff", "DoRA by row", "LoKr")]
)
@torch.inference_mode()
def test_changes_of_one_layer_add_up(order: tuple[str, ...]) -> None:
    """Each speaks of the layer's own weight, whatever else hangs there: y = (W + dW1 + dW2) x + b + b1 + b2."""
    layer = linear()
    expected, bias = layer.weight.double(), layer.bias.double()
    for i, name in enumerate(order):
        change, dense = form(name, layer.weight, (0, OUT))
        add_changes(layer, str(i), [change])
        expected, bias = expected + dense, bias + change.bias.double()
    x = randn(4, WIDTH, seed=3)
    assert relative(layer(x), x.double() @ expected.T + bias) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMS)
@torch.inference_mode()
def test_outputs_keep_the_dtype_of_the_layer(name: str, dtype: torch.dtype) -> None:
    """Files in float32 on half-precision networks, to the rounding of those."""
    layer = linear()
    change, _ = form(name, layer.weight, (4, 8))
    add_changes(layer, "x", [change])
    x = randn(4, WIDTH, seed=3)
    exact = layer(x)
    layer.weight, layer.bias = (nn.Parameter(p.to(dtype), requires_grad=False) for p in (layer.weight, layer.bias))
    found = layer(x.to(dtype))
    assert found.dtype == dtype and relative(found, exact) < 0.02


def test_a_layer_without_changes_is_as_it_was() -> None:
    """No hook, no attribute, the same keys."""
    layer = linear()
    before = (dict(layer.__dict__["_modules"]), list(layer.state_dict()))
    for name in ("a", "b.c"):
        add_changes(layer, name, [LowRank(*low_rank(), (0, OUT))])
    assert list(changes_of(layer)) == ["a", "b.c"] and list(layer.state_dict()) == before[1]
    for name in ("a", "b.c"):
        remove_changes(layer, name)
    assert (dict(layer.__dict__["_modules"]), list(layer.state_dict())) == before
    assert not layer._forward_hooks and changes_of(layer) == {} and "_lora_hook" not in layer.__dict__


class EightBit(nn.Module):
    """A quantised linear, as far as adapters see it: integers and one scale per row."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        step = plain.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (plain.weight.detach() / step).round().to(torch.int8))
        self.register_buffer("step", step)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.step, self.bias)


@torch.inference_mode()
def test_quantised_layers() -> None:
    """They are changed like any other; what needs their numbers is refused."""
    network = randomise(Flux1(FLUX1))
    network.double_blocks[0].img_mlp[0] = quantised = EightBit(network.double_blocks[0].img_mlp[0])
    name = "double_blocks.0.img_mlp.0"
    tensors = lora(network, name)
    x = randn(3, FLUX1.hidden_size, seed=4)
    plain = quantised(x)
    receipt = attach(network, tensors, name="x")
    delta = receipt.modules[0].change.delta()
    torch.testing.assert_close(quantised(x), plain + x @ delta.T, rtol=1e-4, atol=1e-5)
    assert name in str(receipt)
    before = quantised.weight.clone()
    with pytest.raises(LoraError, match=f"{name} is quantised"):
        merge(network, "x")
    assert torch.equal(quantised.weight, before)
    torch.testing.assert_close(quantised(x), plain + x @ delta.T, rtol=1e-4, atol=1e-5)
    detach(network, "x")
    assert torch.equal(quantised(x), plain)
    with pytest.raises(LoraError, match="quantised"):
        attach(network, {**tensors, f"{name}.dora_scale": torch.ones(4 * FLUX1.hidden_size, 1)}, name="y")


SHALLOW = replace(FLUX1, depth=1, depth_single_blocks=1)
LAYERS = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.linear")


@pytest.fixture
def compiled() -> Any:
    """A network, the same compiled without a code generator, and how often that was done."""
    torch._dynamo.reset()
    network, counter = randomise(Flux1(SHALLOW)), CompileCounter()
    yield network, torch.compile(network, backend=counter), counter
    torch._dynamo.reset()


@torch.inference_mode()
def test_another_scale_is_no_reason_to_compile_again(compiled: Any) -> None:
    """Also not the scale 0; and compiled code draws what eager code draws."""
    network, fast, counter = compiled
    inputs = flux1_inputs(FLUX1)
    plain = network(**inputs)
    attach(network, lora(network, *LAYERS), name="x")
    outputs = []
    for scale in (1.0, 0.5, -2.0, 0.0, 0.25):
        set_scale(network, "x", scale)
        found = fast(**inputs)
        outputs.append(found)
        torch.testing.assert_close(found, network(**inputs), rtol=1e-4, atol=1e-5)
    count = counter.frame_count
    assert count > 0
    for scale in (3.0, 0.0, -0.5, 1):
        set_scale(network, "x", scale)
        fast(**inputs)
    assert counter.frame_count == count
    torch.testing.assert_close(outputs[3], plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1])


@torch.inference_mode()
def test_a_merged_adapter_counts_once_in_compiled_code(compiled: Any) -> None:
    """What is not computed in eager mode is not computed there either."""
    network, _, counter = compiled
    attach(network, lora(network, "double_blocks.0.img_mlp.0", "double_blocks.0.img_mlp.2"), name="x")
    mlp = network.double_blocks[0].img_mlp
    fast, x = torch.compile(mlp, backend=counter), randn(3, FLUX1.hidden_size)
    expected = mlp(x)
    merge(network, "x")
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    unmerge(network, "x")
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
