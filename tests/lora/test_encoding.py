"""From one dialect to another: the same changes, or a refusal that says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from miniflux.checkpoints import to_layout
from miniflux.errors import InputError, LoraError, OutputError
from miniflux.lora import attach, convert, detach, read, save, set_scale
from miniflux.models.flux1 import Flux1
from miniflux.variants import variant
from tests import reference
from tests.lora.made import FLUX1_DIALECTS, Networks, lora, networks_of, relative, tensors_of
from tests.lora.test_attach import FILES, control
from tests.tiny import FLUX1, randn, randomise

WRITABLE = ("diffusers", "kohya", "comfyui", "xlabs")
NAMES = {"diffusers": "diffusers", "kohya": "kohya", "comfyui": "ComfyUI", "xlabs": "XLabs"}
QKV, LINEAR1 = "double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"
HIDDEN = FLUX1.hidden_size

# What cannot be said: (file, dialect) -> why; beside them xlabs, which can hardly say anything.
REFUSED = {
    ("dora-kohya-per-input", "diffusers"): "DoRA",
    ("dora-kohya-per-input", "xlabs"): "DoRA|no name",
    ("dora-kohya-per-output", "xlabs"): "no place for its magnitude|no name",
    ("dora-peft", "xlabs"): "no place for its magnitude|no name",
    ("lokr-kohya", "diffusers"): "LoKr",
    ("lokr-kohya", "xlabs"): "LoKr|no name",
    ("lokr-lycoris", "diffusers"): "LoKr",
    ("lokr-lycoris", "kohya"): "LoKr",
    ("lokr-lycoris", "comfyui"): "LoKr",
    ("lokr-lycoris", "xlabs"): "LoKr|no name",
}
XLABS_CAN = ("xlabs-diffusion-model-prefix", "xlabs-double-and-single", "xlabs-double-only")


def whole(found: Networks, tensors: dict[str, Tensor] | Path) -> dict[str, Tensor]:
    """What a file changes: for each layer the whole dW, or bias, or norm, in float64."""
    receipt = attach(found, tensors, name="whole")
    changes: dict[str, Tensor] = {}
    for module in receipt.modules:
        layer = found.layer(module.target)
        if module.change is None or module.rows is None:
            changes[f"{module.target} norm"] = layer.scale.detach().double().clone()
            continue
        start, end = module.rows
        if getattr(module.change, "difference", layer) is not None:  # else it is a bias alone
            delta = changes.setdefault(module.target, torch.zeros(layer.weight.shape, dtype=torch.float64))
            delta[start:end] += module.change.delta(layer.weight[start:end].detach())
        if module.change.bias is not None:
            bias = changes.setdefault(f"{module.target} bias", torch.zeros(len(layer.weight), dtype=torch.float64))
            bias[start:end] += module.change.bias.double()
    detach(found, "whole")
    return changes


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Layer by layer; what is all zero may be left out."""
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert relative(found[name], change) < 1e-6, name


@pytest.mark.parametrize("name", FLUX1_DIALECTS)
def test_reference_dialects(name: str, tmp_path: Path) -> None:
    """Every dialect into every writable one, by way of a file."""
    about = reference.dialect(f"flux1-{name}")["tiny"]
    config = dict(about["config"])
    if name == "bfl-control":
        config["in_channels"] //= 2
    found, tensors = networks_of(config), tensors_of(about["tensors"])
    attach(found, tensors, scale=0.5, name="x")  # type: ignore[arg-type]
    written: dict[str, Path] = {}
    for dialect in WRITABLE:
        path = tmp_path / f"{dialect}.safetensors"
        reason = REFUSED.get((name, dialect))
        if dialect == "xlabs" and name not in XLABS_CAN:
            reason = reason or "no name for it|hold no (clip|t5) part|no place"
        if reason is None:
            assert save(found, "x", path, dialect) == len(load_file(path))  # type: ignore[arg-type]
            written[dialect] = path
            continue
        with pytest.raises(LoraError, match=reason) as caught:
            save(found, "x", path, dialect)  # type: ignore[arg-type]
        assert str(caught.value).startswith(f"cannot be written exactly as {dialect}: ") and not path.exists()
    detach(found, "x")  # type: ignore[arg-type]
    expected = whole(found, tensors)
    for dialect, path in written.items():
        file = read(path)
        assert (file.dialect, file.unmatched) == (NAMES[dialect], [])
        assert_same(whole(found, path), expected)


@pytest.mark.parametrize("dialect", WRITABLE)
@pytest.mark.parametrize("form", FILES)
def test_forms(form: str, dialect: str, tmp_path: Path) -> None:
    """Every kind of change, on layers that some dialects divide."""
    found = Networks(randomise(Flux1(FLUX1)))
    tensors = FILES[form](found.transformer)
    attach(found, tensors, name="x")  # type: ignore[arg-type]
    path = tmp_path / "out.safetensors"
    possible = {
        "diffusers": ("LoRA", "LoHa", "DoRA", "bias", "norm", "control"),
        "kohya": FILES,
        "comfyui": FILES,
        "xlabs": ("LoHa",),
    }[dialect]
    if form not in possible:
        with pytest.raises(LoraError, match=f"cannot be written exactly as {dialect}: .+: .+"):
            save(found, "x", path, dialect)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []
        return
    save(found, "x", path, dialect)  # type: ignore[arg-type]
    detach(found, "x")  # type: ignore[arg-type]
    assert_same(whole(found, path), whole(found, tensors))


@pytest.mark.parametrize("order", [("diffusers", "kohya", "diffusers"), ("comfyui", "diffusers", "kohya", "comfyui")])
def test_chains(order: tuple[str, ...], tmp_path: Path) -> None:
    """There and back: parts that were fused come apart again."""
    found = Networks(randomise(Flux1(FLUX1)))
    tensors = lora(found.transformer, QKV, LINEAR1, "final_layer.adaLN_modulation.1", "img_in")
    source: dict[str, Tensor] | Path = tensors
    for i, dialect in enumerate(order):
        attach(found, source, name="x")  # type: ignore[arg-type]
        source = tmp_path / f"{i}.safetensors"
        save(found, "x", source, dialect)  # type: ignore[arg-type]
        detach(found, "x")  # type: ignore[arg-type]
    assert_same(whole(found, source), whole(found, tensors))


@pytest.mark.parametrize("form", ["LoRA", "LoHa", "DoRA", "bias", "control"])
def test_diffusers_modules_are_those_of_flux1(form: str, tmp_path: Path) -> None:
    """FLUX.2 has other names for some of the same layers; a loader would pass over them without a word."""
    network = randomise(Flux1(FLUX1))
    attach(network, FILES[form](network), name="x")
    save(network, "x", tmp_path / "a.safetensors", "diffusers")
    detach(network, "x")
    modules = {key.rpartition(".")[0] for key in to_layout(network, network.state_dict(), "diffusers")}
    written = {group.module.removeprefix("transformer.") for group in read(tmp_path / "a.safetensors").groups}
    assert written <= modules


def test_parts_with_different_alphas(tmp_path: Path) -> None:
    """Fused rows have one alpha: the others go into the numbers."""
    found = Networks(randomise(Flux1(FLUX1)))
    tensors: dict[str, Tensor] = {}
    for i, part in enumerate("qv"):  # k is left as it is
        prefix = f"transformer.transformer_blocks.0.attn.to_{part}"
        tensors[f"{prefix}.lora_A.weight"] = randn(3 + i, HIDDEN, seed=i)
        tensors[f"{prefix}.lora_B.weight"] = randn(HIDDEN, 3 + i, seed=i + 2)
        tensors[f"{prefix}.alpha"] = torch.tensor(1.0 + i)
    attach(found, tensors, name="x")  # type: ignore[arg-type]
    save(found, "x", tmp_path / "a.safetensors", "kohya")  # type: ignore[arg-type]
    detach(found, "x")  # type: ignore[arg-type]
    assert_same(whole(found, tmp_path / "a.safetensors"), whole(found, tensors))


def test_the_scale_is_not_part_of_the_file(tmp_path: Path) -> None:
    """Zero at the moment of saving is no reason to save zeros; bytes do not depend on it."""
    network = randomise(Flux1(FLUX1))
    attach(network, lora(network, QKV), name="x")
    save(network, "x", tmp_path / "a.safetensors", "kohya")
    set_scale(network, "x", 0.0)
    save(network, "x", tmp_path / "b.safetensors", "kohya")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_reasons_are_listed(tmp_path: Path) -> None:
    """One line each, the first with the number of the others."""
    network = randomise(Flux1(FLUX1))
    attach(network, {**control(network), **lora(network, "double_blocks.1.img_mlp.0")}, name="x")
    with pytest.raises(LoraError) as caught:
        save(network, "x", tmp_path / "a.safetensors", "xlabs")
    lines = str(caught.value).splitlines()
    assert "(and 2 more)" in lines[0] and len(lines) == 3
    assert any("cannot replace a norm" in line for line in lines)
    assert any(line.startswith("double_blocks.1.img_mlp.0") or "double_blocks.1.img_mlp.0" in line for line in lines)


def test_rows_without_a_name_are_refused(tmp_path: Path) -> None:
    """XLabs names the attention's rows of a single block, not the MLP's."""
    network = randomise(Flux1(FLUX1))
    attach(network, lora(network, LINEAR1), name="x")
    with pytest.raises(LoraError, match=f"{LINEAR1}: xlabs has no name for its rows from {3 * HIDDEN} on"):
        save(network, "x", tmp_path / "a.safetensors", "xlabs")


def test_bad_arguments(tmp_path: Path) -> None:
    network = randomise(Flux1(FLUX1))
    attach(network, lora(network, QKV), name="x")
    with pytest.raises(InputError, match="unknown dialect 'a1111'.*kohya"):
        save(network, "x", tmp_path / "a.safetensors", "a1111")
    with pytest.raises(LoraError, match="no LoRA named 'y'"):
        save(network, "y", tmp_path / "a.safetensors")
    with pytest.raises(OutputError, match="safetensors"):
        save(network, "x", tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dialect", WRITABLE)
def test_convert_needs_no_weights(dialect: str, tmp_path: Path) -> None:
    """File to file, for a model that is only known by its sizes."""
    sizes = variant("nano")
    found = Networks(randomise(Flux1(sizes.transformer)))
    tensors = lora(found.transformer, "double_blocks.1.txt_attn.qkv", "single_blocks.2.linear2")
    path = tmp_path / "a.safetensors"
    assert convert(tensors, path, dialect, model="nano") == len(load_file(path))
    assert_same(whole(found, path), whole(found, tensors))
    with pytest.raises(LoraError, match="its widths are those of nano-dev"):
        convert(tensors, tmp_path / "b.safetensors", dialect, model="flux1-dev")
    with pytest.raises(InputError, match="unknown model 'sdxl'"):
        convert(tensors, tmp_path / "b.safetensors", dialect, model="sdxl")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dialect", ["kohya", "comfyui"])
def test_convert_keeps_differences_of_norms(dialect: str, tmp_path: Path) -> None:
    """What is added to a norm cannot become what replaces it where the norm is not known: kept, or refused."""
    found = Networks(randomise(Flux1(variant("nano").transformer)))
    key = "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff"
    tensors = {key: randn(32) / 4}
    path = tmp_path / "a.safetensors"
    try:
        convert(tensors, path, dialect, model="nano")
    except LoraError:
        assert not path.exists()
        return
    assert_same(whole(found, path), whole(found, tensors))
