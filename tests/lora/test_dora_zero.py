"""DoRA where a row or column of base and change is zero; and alphas that do not count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miniflux.checkpoints.quantized import packed_layers
from miniflux.errors import LoraError
from miniflux.lora import attach, detach, extract, merge, merge_files, read, save, unmerge
from miniflux.lora.layer import LowRank, Magnitude
from miniflux.models.flux1 import Flux1
from tests.lora.conftest import INPUTS, out
from tests.tiny import FLUX1, randn

LAYER, HIDDEN = "double_blocks.0.img_mlp.0", FLUX1.hidden_size
DEAD = [0, 5, 9]  # rows or columns


def weight_of(network: nn.Module) -> nn.Parameter:
    return network.get_submodule(LAYER).weight  # pyright: ignore


def dora(by_column: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A DoRA of one layer, whose change is zero in the dead rows or columns, with the magnitudes of 1 there."""
    rows = 4 * HIDDEN
    down, up = randn(3, HIDDEN, seed=3) / 4, randn(rows, 3, seed=4) / 4
    if by_column:
        down[:, DEAD] = 0
    else:
        up[DEAD] = 0
    magnitude = randn(1, HIDDEN).abs() + 0.5 if by_column else randn(rows, 1).abs() + 0.5
    prefix = f"lora_unet_{LAYER.replace('.', '_')}"
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude}
    return {f"{prefix}.{name}": tensor.to(dtype) for name, tensor in tensors.items()}


def kill(network: Flux1, by_column: bool) -> None:
    with torch.no_grad():
        weight = weight_of(network)
        (weight.T if by_column else weight)[DEAD] = 0


def expected(weight: Tensor, tensors: dict[str, Tensor], by_column: bool) -> Tensor:
    """The formula of the paper in float64; zero rows and columns stay zero."""
    down, up, magnitude = (tensor.double() for tensor in tensors.values())
    changed = weight.double() + up @ down
    axis = 0 if by_column else 1
    norms = torch.linalg.vector_norm(changed, dim=axis, keepdim=True)
    return torch.where(norms == 0, 0.0, magnitude * changed / norms)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_zero_rows_and_columns_do_not_change(network: Flux1, by_column: bool, dtype: torch.dtype) -> None:
    """Item 7: attached, merged and unmerged, in every precision: finite, and what the paper says of the others."""
    kill(network, by_column)
    network.to(dtype)
    before, tensors = weight_of(network).clone(), dora(by_column, dtype)
    plain = out(network, {k: v.to(dtype) if k in ("img", "txt", "y") else v for k, v in INPUTS.items()})
    receipt = attach(network, tensors, name="x")
    wanted = expected(before, tensors, by_column)
    change = receipt.modules[0].change
    assert change is not None and bool(change.delta(before).isfinite().all()) and receipt.modules[0].norm > 0
    torch.testing.assert_close((before.float() + change.delta(before)).double(), wanted, rtol=0, atol=2e-5)
    dead = change.delta(before).T[DEAD] if by_column else change.delta(before)[DEAD]
    assert not bool(dead.any())
    x = randn(6, HIDDEN, seed=8).to(dtype)
    layer = network.get_submodule(LAYER)
    found, exact = layer(x).double(), x.double() @ wanted.T + layer.bias.double()  # pyright: ignore
    largest, places = float(exact.abs().max()), {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
    assert float((found - exact).abs().max()) < places[dtype] * largest
    merge(network, "x")
    assert bool(weight_of(network).isfinite().all())
    torch.testing.assert_close(
        weight_of(network).double(), wanted, rtol=0, atol=places[dtype] * float(wanted.abs().max())
    )
    unmerge(network, "x")
    detach(network, "x")
    assert torch.equal(weight_of(network), before)
    again = out(network, {k: v.to(dtype) if k in ("img", "txt", "y") else v for k, v in INPUTS.items()})
    assert torch.equal(again, plain)


def test_a_row_that_the_change_takes_away() -> None:
    """W + dW = 0, W is not: what is left has no direction, and is zero."""
    weight, down = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0]])
    change = Magnitude(LowRank(down, torch.tensor([[-1.0], [0.0]]), (0, 2)), torch.tensor([2.0, 5.0]), weight)
    torch.testing.assert_close(weight + change.delta(weight), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))


@pytest.mark.parametrize("size", [1e-20, 1e-30, 6e-8])
def test_very_small_rows_are_no_zero_rows(size: float) -> None:
    """Squares that vanish in float32, and stretches beyond the range of float16."""
    weight = size * torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    change = Magnitude(LowRank(torch.zeros(1, 2), torch.zeros(2, 1), (0, 2)), torch.tensor([5.0, 2.0]), weight)
    torch.testing.assert_close(weight + change.delta(weight), torch.tensor([[3.0, 4.0], [2.0, 0.0]]))
    if size > 1e-8:
        layer = nn.Linear(2, 2, bias=False)
        layer.weight = nn.Parameter(weight.half())
        half = Magnitude(change.inner, change.magnitude, layer.weight.detach())
        x = torch.tensor([[1.0, 2.0]]).half()
        y = layer(x) + half(x, lambda inputs: layer(inputs))
        torch.testing.assert_close(y.float(), torch.tensor([[11.0, 2.0]]), rtol=5e-2, atol=0)


@pytest.mark.parametrize("by_column", [False, True])
@torch.no_grad()
def test_zero_rows_in_files(network: Flux1, by_column: bool, tmp_path: Path) -> None:
    """Merged into a file, converted to another dialect and back, and taken out of a tuned file: all finite."""
    kill(network, by_column)
    base, merged, taken = (tmp_path / f"{name}.safetensors" for name in ("base", "merged", "taken"))
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, base)
    tensors = dora(by_column)
    merge_files(base, [(tensors, 1.0)], merged)
    weight = load_file(merged)[f"{LAYER}.weight"]
    torch.testing.assert_close(weight.double(), expected(weight_of(network), tensors, by_column), rtol=0, atol=2e-5)
    found = extract(base, merged, taken, rank=64)
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(taken).values()) and len(found) == 1
    attach(network, tensors, name="x")
    save(network, "x", tmp_path / "again.safetensors", "kohya")
    assert all(
        torch.equal(tensor, tensors[key])
        for key, tensor in load_file(tmp_path / "again.safetensors").items()
        if key in tensors
    )


@pytest.mark.parametrize("form", ["int8", "fp8", "nf4"])
@torch.no_grad()
def test_zero_rows_of_packed_layers(form: str, tmp_path: Path) -> None:
    """nano with zero rows, packed: attached and merged, the picture is finite."""
    import miniflux
    from miniflux.checkpoints import convert as pack
    from miniflux.weights.finding import BUNDLED

    wide, packed = tmp_path / "wide.safetensors", tmp_path / "packed.safetensors"
    state = load_file(BUNDLED / "flux1-nano-dev.safetensors")
    state[f"{LAYER}.weight"][DEAD] = 0
    from safetensors import safe_open

    with safe_open(BUNDLED / "flux1-nano-dev.safetensors", "pt") as file:
        save_file(state, wide, file.metadata())
    pack(wide, packed, format=form)
    pipe = miniflux.load("nano", weights={"transformer": packed})
    assert LAYER in packed_layers(pipe.transformer)
    out_features, width = state[f"{LAYER}.weight"].shape
    down, up = randn(2, width) / 20, randn(out_features, 2, seed=1) / 20
    up[DEAD] = 0
    magnitude = torch.linalg.vector_norm(state[f"{LAYER}.weight"].float(), dim=1, keepdim=True) + 0.1
    prefix = f"lora_unet_{LAYER.replace('.', '_')}"
    tensors = {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up, f"{prefix}.dora_scale": magnitude}
    attach(pipe, tensors, name="x")
    quick: dict[str, Any] = {"steps": 2, "width": 32, "height": 32}
    attached = pipe.generate("a star", **quick).latents
    merge(pipe, "x")
    merged = pipe.generate("a star", **quick).latents
    assert bool(attached.isfinite().all()) and float((attached - merged).norm() / merged.norm()) < 1e-3


# Alphas that do not count, after LyCORIS


def whole_factors(alpha: Tensor) -> dict[str, Tensor]:
    prefix = f"lora_unet_{LAYER.replace('.', '_')}"
    return {f"{prefix}.lokr_w1": randn(4, 4), f"{prefix}.lokr_w2": randn(HIDDEN, HIDDEN // 4), f"{prefix}.alpha": alpha}


ODD = [
    torch.tensor(1e10).half(),
    torch.tensor(float("nan")),
    torch.tensor(0.0),
    torch.ones(3),
    torch.tensor(float("inf")),
]


@pytest.mark.parametrize("alpha", ODD, ids=str)
def test_whole_kronecker_factors_have_no_alpha(network: Flux1, alpha: Tensor) -> None:
    """LyCORIS writes 1e10 there, which is infinite in float16: whatever it is, the change is kron(w1, w2)."""
    tensors = whole_factors(alpha)
    w1, w2, _ = tensors.values()
    receipt = attach(network, tensors, name="x")
    torch.testing.assert_close(receipt.modules[0].change.delta(), torch.kron(w1, w2))  # pyright: ignore
    assert receipt.modules[0].scale == 1.0


@pytest.mark.parametrize("alpha", ODD[:3], ids=str)
def test_whole_differences_have_no_alpha(network: Flux1, alpha: Tensor) -> None:
    prefix = f"lora_unet_{LAYER.replace('.', '_')}"
    difference, bias = randn(4 * HIDDEN, HIDDEN), randn(4 * HIDDEN, seed=1)
    tensors = {f"{prefix}.diff": difference, f"{prefix}.diff_b": bias, f"{prefix}.alpha": alpha}
    receipt = attach(network, tensors, name="x")
    torch.testing.assert_close(receipt.modules[0].change.delta(), difference)  # pyright: ignore
    detach(network, "x")
    del tensors[f"{prefix}.diff"]
    assert attach(network, tensors, name="x").modules[0].change.bias is not None  # pyright: ignore


@pytest.mark.parametrize("form", ["LoRA", "LoHa", "LoKr"])
@pytest.mark.parametrize("alpha", [ODD[0], ODD[1], ODD[2]], ids=str)
def test_where_alpha_counts_it_must_be_a_number(network: Flux1, form: str, alpha: Tensor) -> None:
    """Low ranks of every form, one low factor of a Kronecker product included."""
    prefix = f"lora_unet_{LAYER.replace('.', '_')}"
    a, b = randn(4 * HIDDEN, 2), randn(2, HIDDEN, seed=1)
    tensors = {
        "LoRA": {"lora_up.weight": a, "lora_down.weight": b},
        "LoHa": {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a + 1, "hada_w2_b": b - 1},
        "LoKr": {"lokr_w1": randn(4, 4), "lokr_w2_a": randn(HIDDEN, 2), "lokr_w2_b": randn(2, HIDDEN // 4)},
    }[form]
    with pytest.raises(LoraError, match=r"alpha"):
        read({f"{prefix}.{name}": tensor for name, tensor in tensors.items()} | {f"{prefix}.alpha": alpha})


def test_a_factor_of_whole_factors_is_written_into_them(network: Flux1, tmp_path: Path) -> None:
    """PEFT counts alpha there: converted, the change stays what it is."""
    receipt = attach(network, {k: v for k, v in whole_factors(torch.tensor(1.0)).items() if "alpha" not in k}, name="x")
    change = receipt.modules[0].change
    assert change is not None
    change.factor = 2.5
    save(network, "x", tmp_path / "a.safetensors", "kohya")
    detach(network, "x")
    again = attach(network, tmp_path / "a.safetensors")
    torch.testing.assert_close(again.modules[0].change.delta(), change.delta())  # pyright: ignore
