"""LoRA and DoRA against PEFT's layers and diffusers' loader: the same file, the same output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from miniflux.lora import attach, save
from miniflux.models.flux1 import Flux1Config
from tests import reference
from tests.lora.made import lora, tensors_of
from tests.parity.peers import flux1_pair
from tests.tiny import FLUX1, flux1_inputs, randn, randomise

peft = pytest.importorskip("peft", reason="parity of LoRA needs PEFT: pip install miniflux[test]")


def theirs_of(reference: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """A forward of FluxTransformer2DModel with the arguments of ours."""
    return reference(
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["y"],
        timestep=inputs["timesteps"],
        img_ids=inputs["img_ids"][0],
        txt_ids=inputs["txt_ids"][0],
        guidance=inputs["guidance"],
        return_dict=False,
    )[0]


def near(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 2}, {"lora_alpha": 6, "use_rslora": True}, {"use_dora": True},
                                      {"use_dora": True, "lora_alpha": 8}, {"lora_bias": True}], ids=str)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # PEFT of its own biases
@torch.inference_mode()
def test_layer(settings: dict[str, Any], tmp_path: Path) -> None:
    """A folder that PEFT saved, on our network and on PEFT's."""
    theirs, ours = flux1_pair(FLUX1)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "proj_out", "proj_mlp"], **settings)
    wrapped = peft.get_peft_model(theirs, config)
    for i, (name, parameter) in enumerate(wrapped.named_parameters()):
        if "lora_" in name:
            value = 0.3 * randn(*parameter.shape, seed=i)
            parameter.copy_(value.abs() + 0.5 if "magnitude" in name else value)
    wrapped.eval().save_pretrained(tmp_path)
    inputs = flux1_inputs(FLUX1)
    plain, expected = ours(**inputs), theirs_of(wrapped.base_model.model, inputs)
    receipt = attach(ours, tmp_path)
    assert receipt.applied == receipt.expected and {m.kind for m in receipt.modules} == {
        "DoRA" if "use_dora" in settings else "LoRA"
    }
    assert not torch.allclose(plain, expected, rtol=0.01)
    near(ours(**inputs), expected)


def loaded(theirs: nn.Module, tensors: dict[str, Tensor], scale: float) -> nn.Module:
    """diffusers' network with a LoRA in its own names."""
    theirs.load_lora_adapter(tensors, adapter_name="x", prefix="transformer")  # type: ignore[operator]
    theirs.set_adapters("x", scale)  # type: ignore[operator]
    return theirs.eval()


@pytest.mark.parametrize(
    ("name", "scale"),
    [  # of DoRA only 1: PEFT scales the direction before it is normalised, we go a straight line from the base
        ("diffusers-peft", 1.0),
        ("diffusers-peft", 0.4),
        ("diffusers-with-alpha", 1.0),
        ("diffusers-with-alpha", -0.5),
        ("dora-peft", 1.0),
    ],
)
@torch.inference_mode()
def test_reference_files(name: str, scale: float) -> None:
    """Our reading of the reference file against diffusers'."""
    about = reference.dialect(f"flux1-{name}")["tiny"]
    theirs, ours = flux1_pair(Flux1Config(**about["config"]))
    tensors = {key: tensor.float() for key, tensor in tensors_of(about["tensors"]).items()}
    given = dict(tensors)
    if name == "diffusers-with-alpha":  # alphas are for their pipeline, the network takes them apart
        given = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
        alphas = {key.removesuffix(".alpha"): float(t) for key, t in tensors.items() if key.endswith(".alpha")}
        for prefix, alpha in alphas.items():
            given[f"{prefix}.lora_B.weight"] = given[f"{prefix}.lora_B.weight"] * alpha / 4
    inputs = flux1_inputs(ours.config)
    plain = ours(**inputs)
    expected = theirs_of(loaded(theirs, given, scale), inputs)
    attach(ours, tensors, scale=scale, name="x")
    assert not torch.allclose(plain, expected, rtol=0.01)
    near(ours(**inputs), expected)


CONVERTERS = {
    "kohya": "_convert_kohya_flux_lora_to_diffusers",
    "xlabs": "_convert_xlabs_flux_lora_to_diffusers",
}


@torch.inference_mode()
def test_saved_files_load_in_diffusers(tmp_path: Path) -> None:
    """What we write in diffusers' names draws the same there."""
    theirs, ours = flux1_pair(FLUX1)
    layers = ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "double_blocks.1.txt_mlp.2", "img_in",
              "final_layer.adaLN_modulation.1")  # fmt: skip
    attach(ours, lora(ours, *layers), name="x")
    save(ours, "x", tmp_path / "a.safetensors", "diffusers")
    inputs = flux1_inputs(FLUX1)
    near(theirs_of(loaded(theirs, load_file(tmp_path / "a.safetensors"), 1.0), inputs), ours(**inputs))


@pytest.mark.parametrize("saved", ["kohya", "xlabs"])
@torch.inference_mode()
def test_saved_files_pass_the_converters_of_diffusers(saved: str, tmp_path: Path) -> None:
    """And what we write in kohya's and XLabs' names is what diffusers takes it for."""
    from diffusers.loaders import lora_conversion_utils as conversion

    theirs, ours = flux1_pair(FLUX1)
    layers = ["double_blocks.0.img_attn.qkv", "double_blocks.1.txt_attn.proj"]
    if saved == "kohya":
        layers += ["double_blocks.1.img_mlp.0", "single_blocks.0.linear2"]
    attach(ours, lora(ours, *layers), name="x")
    save(ours, "x", tmp_path / "a.safetensors", saved)
    converter = getattr(conversion, CONVERTERS[saved])
    inputs = flux1_inputs(FLUX1)
    given = converter(load_file(tmp_path / "a.safetensors"))
    near(theirs_of(loaded(theirs, given, 1.0), inputs), ours(**inputs))


@torch.inference_mode()
def test_dora_layer_of_peft() -> None:
    """The layer alone, so that a difference points here."""
    plain = randomise(nn.Linear(8, 12))
    holder = nn.ModuleDict({"layer": plain})
    wrapped = peft.get_peft_model(holder, peft.LoraConfig(r=3, lora_alpha=2, target_modules=["layer"], use_dora=True))
    layer = wrapped.base_model.model["layer"]
    down, up, magnitude = randn(3, 8, seed=1), randn(12, 3, seed=2), randn(12, seed=3).abs() + 0.5
    layer.lora_A["default"].weight.copy_(down)
    layer.lora_B["default"].weight.copy_(up)
    layer.lora_magnitude_vector["default"].weight.copy_(magnitude)
    from miniflux.lora.layer import LowRank, Magnitude, add_changes

    ours = randomise(nn.Linear(8, 12))
    add_changes(ours, "x", [Magnitude(LowRank(down, up, (0, 12), 2 / 3), magnitude, ours.weight)])
    x = randn(5, 8, seed=4)
    near(ours(x), layer.eval()(x))
