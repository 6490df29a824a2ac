"""Adapters in weights: the same output, and out again bitwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miniflux.checkpoints import load_into, save, to_layout
from miniflux.errors import CheckpointError, LoraError
from miniflux.lora import attach, attached, detach, merge, set_scale, unmerge
from miniflux.models.flux1 import Flux1
from tests.lora.conftest import out
from tests.lora.made import lora, networks_of
from tests.lora.test_attach import FILES, control, control_base, wider
from tests.reference import Golden, of_exponentials
from tests.tiny import FLUX1, flux1_inputs, randn

QKV, LINEAR1, LINEAR2 = "double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "single_blocks.0.linear2"
INPUTS = flux1_inputs(FLUX1)
LAYOUTS = ("original", "diffusers")


def state(network: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


def equal(network: nn.Module, tensors: dict[str, Tensor]) -> bool:
    now = network.state_dict()
    return list(now) == list(tensors) and all(torch.equal(now[key], tensors[key]) for key in now)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("form", FILES)
def test_merged_output_is_the_attached_one(form: str, keep: bool, network: Flux1) -> None:
    before, plain = state(network), out(network)
    attach(network, FILES[form](network), scale=0.7, name="x")
    inputs = wider(network)
    attached_output, parameters = out(network, inputs), dict(network.named_parameters())
    kept = merge(network, "x", keep=keep)
    assert (kept > 0) == (keep and form not in ("norm",))
    close(out(network, inputs), attached_output)
    unmerge(network, "x", base=None if keep or form == "norm" else before)
    assert torch.equal(out(network, inputs), attached_output)
    if keep:
        assert all(parameters[key] is value for key, value in network.named_parameters())
    detach(network, "x")
    assert equal(network, before) and torch.equal(out(network), plain)


def test_control_lora_merges(golden: Callable[[str], Golden]) -> None:
    """The output of BFL's wrapper again, from plain weights."""
    data = golden("flux1_control_lora")
    network, tensors = control_base(data)
    before = state(network)
    attach(network, tensors, scale=0.85, name="control")
    merge(network)
    told = [data[name] for name in ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")]
    with torch.inference_mode():
        torch.testing.assert_close(
            network(*told), data["output"], rtol=0, atol=2e-5 + of_exponentials(lambda: network(*told))
        )
    unmerge(network)
    detach(network, "control")
    assert equal(network, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wide", [False, True])
def test_originals_from_the_base_file(layout: str, wide: bool, network: Flux1, tmp_path: Path) -> None:
    """Weights that were not kept come back from the checkpoint, whatever its layout; a wider input too."""
    before = state(network)
    save(network, tmp_path / "base.safetensors", layout=layout)
    tensors = control(network) if wide else lora(network, QKV, LINEAR1, "final_layer.adaLN_modulation.1")
    attach(network, tensors, name="x")
    attached_output = out(network, wider(network))
    assert merge(network, "x", keep=False) == 0
    merged = state(network)
    with pytest.raises(LoraError, match="were not kept.*keep=False"):
        unmerge(network, "x")
    assert equal(network, merged)
    unmerge(network, "x", base=tmp_path / "base.safetensors")
    assert torch.equal(out(network, wider(network)), attached_output)
    detach(network, "x")
    assert equal(network, before)


def test_a_base_that_is_another_is_refused(network: Flux1) -> None:
    """A key that is missing or has another shape; the merged weights stay."""
    base = state(network)
    attach(network, lora(network, QKV), name="x")
    merge(network, "x", keep=False)
    merged = state(network)
    for bad, said in (
        ({k: t for k, t in base.items() if k != f"{QKV}.bias"}, f"lacks {QKV}.bias"),
        ({**base, f"{QKV}.weight": torch.zeros(3, 3)}, f"has \\[3, 3\\] for {QKV}.weight"),
    ):
        with pytest.raises(CheckpointError, match=said):
            unmerge(network, "x", base=bad)
        assert equal(network, merged)
    unmerge(network, "x", base=to_layout(network, base, "diffusers"))
    detach(network, "x")
    assert equal(network, base)


@pytest.mark.parametrize("first_out", ["a", "b"])
@pytest.mark.parametrize("keep", [True, False])
def test_two_in_and_one_out(first_out: str, keep: bool, network: Flux1) -> None:
    """Nothing is subtracted: what is left is bitwise what merging the other alone gives."""
    before = state(network)
    files = {"a": lora(network, QKV, LINEAR1), "b": lora(network, LINEAR1, LINEAR2, seed=20)}
    alone: dict[str, dict[str, Tensor]] = {}
    for name, tensors in files.items():
        attach(network, tensors, name=name)
        merge(network, name)
        alone[name] = state(network)
        unmerge(network, name)
        detach(network, name)
    for name, tensors in files.items():
        attach(network, tensors, name=name)
    both = out(network)
    merge(network, "a", keep=keep)
    close(out(network), both)
    merge(network, keep=keep)  # the rest
    close(out(network), both)
    base = None if keep else before
    other = "b" if first_out == "a" else "a"
    unmerge(network, first_out, base=base)
    detach(network, first_out)
    assert equal(network, alone[other])
    unmerge(network, other, base=base)
    detach(network, other)
    assert equal(network, before)


def test_kept_originals_need_no_base(network: Flux1) -> None:
    """Another adapter's weights that were not kept are no reason to refuse this one."""
    before = state(network)
    attach(network, lora(network, QKV), name="kept")
    attach(network, lora(network, LINEAR2), name="lost")
    merge(network, "kept")
    merge(network, "lost", keep=False)
    unmerge(network, "kept")
    assert torch.equal(network.get_submodule(QKV).weight, before[f"{QKV}.weight"])


def test_an_attached_dora_does_not_see_what_is_merged(network: Flux1) -> None:
    """Its norms are those of the base: with the other adapter out again it is what it is alone."""
    dora = {**lora(network, QKV, seed=20), f"{QKV}.dora_scale": randn(96, 1, seed=3).abs() + 0.1}
    attach(network, dora, name="dora")
    alone = out(network)
    detach(network, "dora")
    attach(network, lora(network, QKV), name="x")
    merge(network, "x")
    attach(network, dora, name="dora")
    unmerge(network, "x")
    detach(network, "x")
    assert torch.equal(out(network), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_bitwise(dtype: torch.dtype, network: Flux1, tmp_path: Path) -> None:
    """Subtracting in half precision would not; views of a mapped file stay views."""
    save(network.to(dtype), tmp_path / "base.safetensors")
    with torch.device("meta"):
        loaded = Flux1(FLUX1)
    load_into(loaded, tmp_path / "base.safetensors")
    before, pointers = state(loaded), [p.data_ptr() for p in loaded.parameters()]
    attach(loaded, lora(network, QKV, LINEAR1, LINEAR2), scale=0.3, name="x")
    merge(loaded)
    assert loaded.get_submodule(QKV).weight.dtype == dtype and not equal(loaded, before)
    unmerge(loaded)
    assert equal(loaded, before) and pointers == [p.data_ptr() for p in loaded.parameters()]


def test_merged_weights_are_rounded_once(network: Flux1) -> None:
    """W + dW is computed in float32 and then rounded, also for a bfloat16 weight."""
    tensors = lora(network, QKV, rank=4, alpha=2.0)
    network.to(torch.bfloat16)
    weight = network.get_submodule(QKV).weight.detach().clone()
    attach(network, tensors, scale=0.3, name="x")
    merge(network)
    exact = (
        weight.double() + 0.15 * tensors[f"{QKV}.lora_up.weight"].double() @ tensors[f"{QKV}.lora_down.weight"].double()
    )
    found = network.get_submodule(QKV).weight
    assert float((found.double() - exact).abs().max()) <= float(exact.abs().max()) * 2**-8
    assert (found != exact.to(torch.bfloat16)).float().mean() < 0.001  # halfway cases alone


def test_merged_adapters_stay_as_they_are(network: Flux1) -> None:
    """No other scale, no detaching, no second merge."""
    attach(network, lora(network, QKV), name="x")
    with pytest.raises(LoraError, match="'x' is not merged"):
        unmerge(network, "x")
    with pytest.raises(LoraError, match="no LoRA is merged"):
        unmerge(network)
    merge(network, "x")
    merged, output = state(network), out(network)
    for act in (
        lambda: set_scale(network, "x", 0.5),
        lambda: detach(network, "x"),
        lambda: merge(network, "x"),
        lambda: merge(network),
    ):
        with pytest.raises(LoraError, match="merged"):
            act()
        assert equal(network, merged) and torch.equal(out(network), output)
    assert attached(network) == {"x": 1.0}


@pytest.mark.parametrize("act", [detach, lambda found, name: set_scale(found, name, 0.5)])
def test_merged_in_one_network_only(act: Callable[[Any, str], None]) -> None:
    """What is refused because of a text encoder leaves the transformer alone too."""
    sizes = {"hidden": 24, "intermediate": 40, "layers": 2}
    found = networks_of({**vars(FLUX1), "clip": sizes})
    prefix = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    encoder = {f"{prefix}.lora_down.weight": randn(2, 24), f"{prefix}.lora_up.weight": randn(40, 2)}
    flat = {
        key.replace(QKV, f"lora_unet_{QKV.replace('.', '_')}"): t for key, t in lora(found.transformer, QKV).items()
    }
    attach(found, {**flat, **encoder}, name="x")  # type: ignore[arg-type]
    merge(found.text.clip, "x")
    before = out(found.transformer)
    with pytest.raises(LoraError, match="merged"):
        act(found, "x")
    assert torch.equal(out(found.transformer), before) and attached(found.transformer) == {"x": 1.0}


def test_nothing_to_merge(network: Flux1) -> None:
    with pytest.raises(LoraError, match="no LoRA is attached"):
        merge(network)
    with pytest.raises(LoraError, match="no LoRA named 'x'"):
        merge(network, "x")


def test_a_bias_that_the_layer_lacks(network: Flux1) -> None:
    """Attached it can be added; merged there is no place for it. Nothing of the other layers is merged either."""
    layer = network.get_submodule(QKV)
    layer.bias = None
    attach(network, {**lora(network, LINEAR1, QKV), f"{QKV}.diff_b": torch.ones(96)}, name="x")
    before, output = state(network), out(network)
    with pytest.raises(LoraError, match=f"{QKV} has no bias"):
        merge(network, "x")
    assert equal(network, before) and torch.equal(out(network), output)


def test_a_bias_goes_with_its_adapter(network: Flux1) -> None:
    """Of two in one layer only one changes the bias; without it the bias is the base's, the other still merged."""
    before = state(network)
    attach(network, lora(network, QKV), name="weight")
    attach(network, {f"{QKV}.diff_b": torch.ones(96)}, name="bias")
    merge(network, "weight")
    alone = state(network)
    merge(network, "bias")
    assert torch.equal(network.get_submodule(QKV).bias, before[f"{QKV}.bias"] + 1)
    unmerge(network, "bias")
    assert equal(network, alone)


def test_scale_0_leaves_the_bits(network: Flux1) -> None:
    """A zero that is added would turn -0 into 0."""
    weight = network.get_submodule(QKV).weight
    weight.data[0, 0] = -0.0
    attach(network, lora(network, QKV), scale=0.0, name="x")
    merge(network)
    assert network.get_submodule(QKV).weight is weight


def test_a_widened_input_is_not_narrowed_below_others(network: Flux1) -> None:
    """What is merged into it, or reads its new half, has to go first; and it is not widened below what is merged."""
    before = state(network)
    narrow, wide = lora(network, "img_in"), control(network)
    second = {key: 2 * tensor for key, tensor in wide.items() if key.startswith("img_in")}
    attach(network, narrow, name="narrow")
    merge(network)
    with pytest.raises(LoraError, match="would widen img_in, into which another LoRA is merged: unmerge it first"):
        attach(network, wide, name="control")
    unmerge(network)
    attach(network, wide, name="control")
    merge(network, "narrow")
    output = out(network, wider(network))
    with pytest.raises(LoraError, match="'control' has widened img_in, and 'narrow' is merged into it: unmerge it fir"):
        detach(network, "control")
    unmerge(network)
    attach(network, second, name="second")
    with pytest.raises(LoraError, match="'control' has widened img_in, and 'second' reads its new inputs: detach it"):
        detach(network, "control")
    detach(network, "second")
    close(out(network, wider(network)), output)
    detach(network, "control"), detach(network, "narrow")
    assert equal(network, before) and network.config == FLUX1


def test_a_dora_of_the_input_and_a_wider_one(network: Flux1) -> None:
    """Its norms are those of the narrow weight: refused in both orders, with the reason."""
    dora = {**lora(network, "img_in"), "img_in.dora_scale": randn(32, 1).abs() + 0.1}
    attach(network, dora, name="dora")
    with pytest.raises(LoraError, match=r"would widen img_in, whose norms another LoRA \(DoRA\) depends on"):
        attach(network, control(network), name="control")
    detach(network, "dora")
    attach(network, control(network), name="control")
    with pytest.raises(LoraError, match="img_in: its change is 32x16, img_in wants 32x32"):
        attach(network, dora, name="dora")
    assert list(attached(network)) == ["control"]


@pytest.mark.parametrize("form", ["LoRA", "control", "norm"])
def test_originals_follow_the_network(form: str, network: Flux1) -> None:
    """Into another dtype (or onto another device), while they are set aside."""
    expected = {key: tensor.half() for key, tensor in network.state_dict().items()}
    attach(network, FILES[form](network), name="x")
    merge(network, keep=True)
    network.half()
    unmerge(network)
    merge(network)
    unmerge(network)
    detach(network, "x")
    assert equal(network, expected) and all(p.dtype == torch.float16 for p in network.parameters())


@pytest.mark.parametrize("form", ["LoRA", "DoRA"])
def test_the_receipt_of_what_is_merged(form: str, network: Flux1) -> None:
    """Read for the first time after merging it says the same: the scale in the weight, and norms of the original."""
    expected = str(attach(network, FILES[form](network), scale=0.7, name="x"))
    detach(network, "x")
    receipt = attach(network, FILES[form](network), scale=0.7, name="x")
    merge(network)
    assert str(receipt) == expected
    unmerge(network)
    assert str(receipt) == expected
