"""Adapters in packed weights: wide and exact, or packed again; what is merged, and what comes out again bitwise."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miniflux.checkpoints import FORMATS, QuantizedLinear, load_into
from miniflux.checkpoints.layouts import Counterpart, to_theirs
from miniflux.checkpoints.quantized import dense_weight, packed_layers
from miniflux.errors import CheckpointError, LoraError
from miniflux.lora import attach, attached, detach, merge, set_scale, unmerge
from miniflux.models.flux1 import Flux1, Flux1Config
from tests import reference
from tests.checkpoints.formats.made import SMALL, WIDE, WRITERS, empty, network, write_file, write_gguf
from tests.lora.made import Encoders, Networks, changed, lora, networks_of, relative, tensors_of
from tests.lora.test_quantised import LAYERS, QKV, out, pair
from tests.tiny import randn

LINEAR1, MODULATION = "single_blocks.0.linear1", "final_layer.adaLN_modulation.1"
PLAIN_WRITERS = {"nf4, nested": "nf4", "fp4, nested": "fp4"}  # scales of scales are not written


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    """The state of a network, down to the bits."""
    return {key: t.clone().contiguous().view(-1).view(torch.uint8) for key, t in model.state_dict().items()}


def places(model: nn.Module) -> dict[str, int]:
    """Where the tensors lie in memory."""
    return {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}


def same(now: dict[str, Tensor], before: dict[str, Tensor]) -> bool:
    return list(now) == list(before) and all(torch.equal(now[key], before[key]) for key in now)


def path_of(folder: Path, name: str) -> Path:
    return folder / ("a.safetensors" if name in WRITERS else "a.gguf")


def sizes_for(name: str) -> Flux1Config:
    return SMALL if name in WRITERS else WIDE


def coarse(model: nn.Module, *layers: str, size: float = 0.25) -> dict[str, Tensor]:
    """A LoRA of powers of two, whose products and sums are exact in float32."""
    tensors = lora(model, *layers, rank=2, alpha=2.0)
    return {key: t if key.endswith("alpha") else t.sign() * size for key, t in tensors.items()}


def delta(tensors: dict[str, Tensor], layer: str) -> Tensor:
    """dW in float64 from the file."""
    up, down = (tensors[f"{layer}.lora_{half}.weight"].double() for half in ("up", "down"))
    return up @ down * float(tensors[f"{layer}.alpha"]) / len(down)


def written(name: str, weight: Tensor) -> Tensor:
    """What a weight becomes in a format: by the writers of the tests, by the package gguf, or, for what that does not
    write, by ours."""
    if name in WRITERS:
        return WRITERS[PLAIN_WRITERS.get(name, name)][0](weight)[1]
    kind = gguf.GGMLQuantizationType[name]
    try:
        raw = gguf.quants.quantize(weight.numpy().copy(), kind)
    except NotImplementedError:
        return FORMATS[name].unpack(FORMATS[name].pack(weight))
    return torch.from_numpy(gguf.quants.dequantize(raw, kind).astype(np.float32))


CASES = [(name, "original") for name in (*WRITERS, "Q8_0", "Q4_K", "IQ4_XS")] + [
    (name, "diffusers") for name in ("scaled fp8, old", "nf4, nested", "nvfp4, header", "Q5_0")
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_merged_weights_are_wide_and_exact(name: str, layout: str, tmp_path: Path) -> None:
    """W + dW of what the reference unpacks, to float32 rounding; other layers keep their bytes, and so does the file's
    memory, to which unmerging goes back."""
    path = path_of(tmp_path, name)
    packed, plain = pair(path, network(sizes_for(name)), name, layout)
    before, where, base = bytes_of(packed), places(packed), out(packed)
    layers = (*LAYERS, MODULATION)
    tensors = lora(plain, *layers)
    attach(packed, tensors, scale=0.5)
    attached_output = out(packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge(packed) > 0
    for layer in layers:
        expected = plain.get_submodule(layer).weight.double() + 0.5 * delta(tensors, layer)
        found = dense_weight(packed.get_submodule(layer))
        assert found is not None and relative(found, expected) < 2e-7, layer
    torch.testing.assert_close(out(packed), attached_output, rtol=1e-4, atol=1e-4 * float(attached_output.abs().max()))
    now = bytes_of(packed)
    assert all(torch.equal(now[key], before[key]) for key in before if not key.startswith(layers))
    unmerge(packed)
    assert torch.equal(out(packed), attached_output)
    assert same(bytes_of(packed), before) and places(packed) == where
    detach(packed, "lora")
    assert torch.equal(out(packed), base)


@pytest.mark.parametrize(("name", "layout"), [case for case in CASES if case[0] != "IQ4_XS"])
def test_packed_again(name: str, layout: str, tmp_path: Path) -> None:
    """In the same format, as somebody else packs W + dW."""
    path = path_of(tmp_path, name)
    packed, plain = pair(path, network(sizes_for(name)), name, layout)
    before, where = bytes_of(packed), places(packed)
    labels = {layer: [how.format for how in module.stored] for layer, module in packed_layers(packed).items()}
    layers = (QKV, LINEAR1, MODULATION)
    tensors = coarse(plain, *layers)
    attach(packed, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge(packed, pack=True)
    assert labels == {layer: [how.format for how in module.stored] for layer, module in packed_layers(packed).items()}
    for layer in layers:
        module = packed.get_submodule(layer)
        wanted = (plain.get_submodule(layer).weight.double() + delta(tensors, layer)).float()
        how = "swap halves" if module.swapped else "rows" if len(module.stored) > 1 else "same"
        parts = to_theirs(wanted, Counterpart(("",) * len(module.stored), how), packed.config.hidden_size)
        found = to_theirs(module.dense(), Counterpart(("",) * len(module.stored), how), packed.config.hidden_size)
        for ours, part in zip(found, parts, strict=True):
            theirs = written(name, part)
            assert (~torch.isclose(ours, theirs, rtol=1e-5, atol=1e-7)).double().mean() < 1e-3, layer  # ties
            assert relative(ours, part) <= 1.001 * relative(theirs, part)
    unmerge(packed)
    assert same(bytes_of(packed), before) and places(packed) == where
    detach(packed, "lora")


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("name", "layout"), [("fp8 by rows", "original"), ("nf4, nested", "diffusers"), ("Q8_0", "original")]
)
def test_two_in_and_one_out(name: str, layout: str, keep: bool, pack: bool, tmp_path: Path) -> None:
    """What is left is bitwise what merging the other alone gives; scales per block count."""
    path = path_of(tmp_path, name)
    packed, plain = pair(path, network(sizes_for(name)), name, layout)
    before = bytes_of(packed)
    bias = {f"{LINEAR1}.diff_b": randn(plain.get_submodule(LINEAR1).out_features)}
    files = {"a": coarse(plain, QKV, LINEAR1), "b": {**lora(plain, LINEAR1, MODULATION, seed=20), **bias}}
    scales = {"a": {"double_blocks": 2.0}, "b": {"single_blocks": 3.0}}
    alone: dict[str, dict[str, Tensor]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for which, tensors in files.items():
            attach(packed, tensors, scales[which], which)
            merge(packed, which, pack=pack)
            alone[which] = bytes_of(packed)
            unmerge(packed, which)
            detach(packed, which)
            assert same(bytes_of(packed), before)
        for which, tensors in files.items():
            attach(packed, tensors, scales[which], which)
        both = out(packed)
        merge(packed, "a", keep=keep, pack=pack)
        merge(packed, keep=keep, pack=pack)
    if not pack:
        torch.testing.assert_close(out(packed), both, rtol=1e-4, atol=1e-4 * float(both.abs().max()))
    for first, left in (("a", "b"), ("b", "a")):
        unmerge(packed, first, base=None if keep else path)
        assert same(bytes_of(packed), alone[left])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merge(packed, first, pack=pack)
    unmerge(packed, base=None if keep else path)
    detach(packed, "a"), detach(packed, "b")
    assert same(bytes_of(packed), before) and attached(packed) == {}


@pytest.mark.parametrize("pack", [True, False])
def test_only_the_rows_that_change(pack: bool, tmp_path: Path) -> None:
    """q of a qkv whose parts are packed apart: k and v keep their bytes, and their memory."""
    packed, plain = pair(tmp_path / "a.safetensors", network(SMALL), "scaled fp8, old", "diffusers")
    hidden = SMALL.hidden_size
    half = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": randn(2, hidden),
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": randn(hidden, 2, seed=1)}  # fmt: skip
    where = places(packed)
    attach(packed, half)
    merge(packed, pack=pack)
    moved = {key for key, place in places(packed).items() if place != where.get(key)}
    assert moved == {f"{QKV}.weight_0"} | ({f"{QKV}.scale_weight_0"} if pack else set())
    expected = plain.get_submodule(QKV).weight.double()
    down, up = half.values()
    expected[:hidden] += up.double() @ down.double()
    found = packed.get_submodule(QKV).dense()
    assert torch.equal(found[hidden:].double(), expected[hidden:])
    assert relative(found[:hidden], expected[:hidden]) < (0.04 if pack else 1e-6)


@pytest.mark.parametrize("pack", [True, False])
def test_scale_0_and_biases_leave_the_bytes(pack: bool, tmp_path: Path) -> None:
    """What changes no weight rounds none."""
    packed, plain = pair(tmp_path / "a.safetensors", network(SMALL), "nf4", "original")
    before = bytes_of(packed)
    attach(packed, lora(plain, QKV), scale=0.0, name="zero")
    merge(packed, "zero", pack=pack)
    assert same(bytes_of(packed), before)
    attach(packed, {f"{QKV}.diff_b": randn(3 * SMALL.hidden_size)}, name="bias")
    merge(packed, "bias", pack=pack)
    now = bytes_of(packed)
    assert {key for key in now if not torch.equal(now[key], before[key])} == {f"{QKV}.bias"}
    unmerge(packed)
    assert same(bytes_of(packed), before)


@pytest.mark.parametrize("name", ["fp8 e4m3", "nf4, nested"])
@pytest.mark.parametrize("dialect", ["loha-kohya", "lokr-kohya", "dora-kohya-per-input", "dora-peft", "bfl-control"])
def test_dialects(name: str, dialect: str, tmp_path: Path) -> None:
    """Merged, every form does what it does attached; a control LoRA's wider input too."""
    about = reference.dialect(f"flux1-{dialect}")["tiny"]
    path, tensors = tmp_path / "a.safetensors", tensors_of(about["tensors"])
    packed, _ = pair(path, networks_of(about["config"]).transformer, name)
    before = bytes_of(packed)
    attach(packed, tensors)
    expected = out(packed)
    for keep in (True, False):
        merge(packed, keep=keep)
        torch.testing.assert_close(out(packed), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        unmerge(packed, base=path)
        assert torch.equal(out(packed), expected)
    detach(packed, "lora")
    assert same(bytes_of(packed), before)


def test_a_dora_sees_the_original(tmp_path: Path) -> None:
    """Its norms are those of the base, also while another adapter is merged into it."""
    packed, plain = pair(tmp_path / "a.safetensors", network(SMALL), "int8", "original")
    dora = {**lora(plain, QKV, seed=20), f"{QKV}.dora_scale": randn(3 * SMALL.hidden_size, 1, seed=3).abs() + 0.1}
    attach(packed, lora(plain, QKV), name="x")
    merge(packed, "x")
    attach(packed, dora, name="dora")
    unmerge(packed, "x")
    detach(packed, "x")
    merge(packed, "dora")
    expected = changed(plain.get_submodule(QKV).weight.detach(), dora, QKV)
    assert relative(packed.get_submodule(QKV).dense(), expected) < 1e-6


# What rounding takes is said


def test_what_is_lost_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A change below the steps of the format: warning and log have the figures of an independent computation."""
    packed, plain = pair(tmp_path / "a.safetensors", network(SMALL), "nf4", "original")
    weight = plain.get_submodule(QKV).weight.detach()
    attach(packed, coarse(plain, QKV, size=2**-5))
    with (
        caplog.at_level(logging.INFO, "miniflux.lora"),
        pytest.warns(UserWarning, match="lose part of their change") as caught,
    ):
        merge(packed, pack=True)
    change = delta(coarse(plain, QKV, size=2**-5), QKV)
    wanted = weight.double() + change
    new = WRITERS["nf4"][0](wanted.float())[1].double()
    left, error = float(((new - weight) * change).sum() / change.square().sum()), relative(new, wanted)
    assert left < 0.5
    (said,) = (str(warning.message) for warning in caught)
    assert "1 of 1 packed weights lose part of their change" in said
    assert f"{QKV} (bitsandbytes nf4) {left:.0%} is left" in said
    assert f"the largest relative error is {error:.2g}, that of {QKV} (bitsandbytes nf4)" in caplog.text


def test_nothing_is_told_where_nothing_is_lost(tmp_path: Path) -> None:
    """int8 holds a change as large as the weight."""
    packed, plain = pair(tmp_path / "a.safetensors", network(SMALL), "int8", "original")
    attach(packed, coarse(plain, QKV, LINEAR1, size=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(packed, pack=True)


def test_wide_wins(tmp_path: Path) -> None:
    """Where an adapter that is merged wide meets one that is packed again, nothing is rounded; left alone, it is."""
    packed, plain = pair(tmp_path / "a.safetensors", network(SMALL), "int8", "original")
    attach(packed, lora(plain, QKV), name="packed")
    merge(packed, pack=True)
    alone = bytes_of(packed)
    attach(packed, lora(plain, QKV, seed=5), name="wide")
    merge(packed, "wide")
    expected = plain.get_submodule(QKV).weight.double() + sum(
        delta(lora(plain, QKV, seed=seed), QKV) for seed in (0, 5)
    )
    assert relative(packed.get_submodule(QKV).dense(), expected) < 1e-6
    unmerge(packed, "wide")
    assert same(bytes_of(packed), alone)


def test_the_dtype_of_the_network(tmp_path: Path) -> None:
    """Wide weights are as wide as the network's others, and run in any dtype."""
    model = network(SMALL)
    write_file(tmp_path / "a.safetensors", model, "fp8 e4m3", "original")
    packed = empty(SMALL)
    load_into(packed, tmp_path / "a.safetensors", dtype=torch.bfloat16)
    attach(packed, lora(model, QKV))
    merge(packed)
    layer = packed.get_submodule(QKV)
    assert isinstance(layer, QuantizedLinear) and layer.weight.dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float32):
        x = randn(3, SMALL.hidden_size).to(dtype)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight.to(dtype), layer.bias.to(dtype)))


# Refusals


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    """A control LoRA may widen a packed input to what its format cannot hold: said before anything is changed, with the
    layer and the format; wide it can be merged."""
    packed, plain = pair(tmp_path / "a.safetensors", network(SMALL), "nvfp4", "original")
    control = {"img_in.lora_A.weight": randn(2, 100), "img_in.lora_B.weight": randn(SMALL.hidden_size, 2)}
    attach(packed, lora(plain, QKV) | control)
    before, output = bytes_of(packed), out(packed)
    with pytest.raises(
        LoraError, match="img_in cannot be packed again: nvfp4 is not written for 64x100 numbers; attach"
    ):
        merge(packed, pack=True)
    assert same(bytes_of(packed), before) and torch.equal(out(packed), output)
    merge(packed)
    with pytest.raises(LoraError, match="merged into the weights: unmerge"):
        set_scale(packed, "lora", 0.5)
    unmerge(packed)
    detach(packed, "lora")
    assert packed.config == SMALL


@pytest.mark.parametrize("pack", [True, False])
def test_numbers_beyond_the_range(pack: bool, tmp_path: Path) -> None:
    """Of float16, or of the scales in a block: all layers stay as they were."""
    name = "Q8_0" if pack else "nf4"
    path, model = path_of(tmp_path, name), network(sizes_for(name))
    write_gguf(path, model, name, "original") if pack else write_file(path, model, name, "original")
    packed = empty(model.config)
    load_into(packed, path, dtype=torch.float16)
    before = bytes_of(packed)
    attach(packed, lora(model, LINEAR1, QKV), scale={"double_blocks": 1e9})
    with pytest.raises(LoraError, match=f"{QKV}: .*beyond the range of {'GGUF Q8_0' if pack else 'float16'}"):
        merge(packed, pack=pack)
    assert same(bytes_of(packed), before)
    set_scale(packed, "lora", 1.0)
    detach(packed, "lora")


def test_plain_weights_beyond_the_range() -> None:
    """The same of a float16 network."""
    model = network(SMALL).half()
    before = bytes_of(model)
    attach(model, lora(model, LINEAR1, QKV), scale=1e7)
    with pytest.raises(LoraError, match=r"weight: with the LoRA in it, it has numbers beyond the range of float16"):
        merge(model)
    assert same(bytes_of(model), before)


# Originals that were not kept


def lost(tmp_path: Path, name: str = "nf4, nested") -> Flux1:
    packed, plain = pair(tmp_path / "a.safetensors", network(SMALL), name, "original")
    attach(packed, lora(plain, QKV))
    assert merge(packed, keep=False) == 0
    return packed


def poisoned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors[f"{QKV}.weight.nested_absmax"] = torch.full_like(tensors[f"{QKV}.weight.nested_absmax"], torch.nan)
    return tensors


BASES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != f"{QKV}.weight"}, f"lacks {QKV}.weight"),
    "a part missing": (
        lambda t: {k: v for k, v in t.items() if k != f"{QKV}.weight.quant_map"},
        f"{QKV}.weight is not stored as it was.*weight.quant_map is missing",
    ),
    "plain": (
        lambda t: {k: randn(192, 64) if k == f"{QKV}.weight" else v for k, v in t.items() if f"{QKV}.weight." not in k},
        "is not stored as it was.*it is float32 of .192, 64.; expected bitsandbytes nf4",
    ),
    "not finite": (poisoned, f"{QKV}.weight is not finite"),
}


@pytest.mark.parametrize("kind", BASES)
def test_a_base_that_is_another(kind: str, tmp_path: Path) -> None:
    """Named, and the merged weights stay; the true one gives the very bytes."""
    packed = lost(tmp_path)
    merged, (make, said) = bytes_of(packed), BASES[kind]
    with pytest.raises(CheckpointError, match=said):
        unmerge(packed, base=make(load_file(tmp_path / "a.safetensors")))
    with pytest.raises(LoraError, match="were not kept"):
        unmerge(packed)
    assert same(bytes_of(packed), merged)
    unmerge(packed, base=tmp_path / "a.safetensors")
    detach(packed, "lora")
    fresh = empty(SMALL)
    load_into(fresh, tmp_path / "a.safetensors", dtype=torch.float32)
    assert same(bytes_of(packed), bytes_of(fresh))


def test_another_format_is_another_base(tmp_path: Path) -> None:
    """Even if the weights are the same to rounding; so are other statistics in the same format."""
    packed = lost(tmp_path)
    for name in ("fp4, nested", "nf4"):
        write_file(tmp_path / "b.safetensors", network(SMALL), name, "original")
        with pytest.raises(CheckpointError, match="not stored as it was when the network was loaded: it is bitsandb"):
            unmerge(packed, base=tmp_path / "b.safetensors")


def test_the_base_may_hold_more(tmp_path: Path) -> None:
    """The network may be one of several in its file."""
    packed = lost(tmp_path, "int8")
    behind = {f"model.diffusion_model.{k}": t for k, t in load_file(tmp_path / "a.safetensors").items()}
    save_file(behind | {"vae.decoder.conv_in.weight": torch.ones(1)}, tmp_path / "all.safetensors")
    unmerge(packed, base=tmp_path / "all.safetensors")
    fresh = empty(SMALL)
    load_into(fresh, tmp_path / "a.safetensors", dtype=torch.float32)
    assert same(bytes_of(packed), bytes_of(fresh))


@pytest.mark.parametrize("dialect", ["kohya-with-clip-and-t5", "diffusers-peft-with-text-encoder"])
def test_text_encoders(dialect: str) -> None:
    """All networks of a pipeline, packed: every layer computes merged what it computes attached, and comes back."""
    about = reference.dialect(f"flux1-{dialect}")["tiny"]
    plain, tensors = networks_of(about["config"]), tensors_of(about["tensors"])
    packed = Networks(repacked(plain.transformer), Encoders(repacked(plain.text.clip), repacked(plain.text.t5)))
    parts = [part for part in (packed.transformer, packed.text.clip, packed.text.t5) if part.state_dict()]
    before = [bytes_of(part) for part in parts]
    receipt = attach(packed, tensors)  # type: ignore[arg-type]
    layers = {module.target: packed.layer(module.target) for module in receipt.modules}
    assert {target.partition(":")[0] for target in layers} >= {"clip"} and len(parts) >= 2
    assert any(isinstance(layer, QuantizedLinear) for target, layer in layers.items() if target.startswith("clip"))
    inputs = {target: randn(3, layer.in_features) for target, layer in layers.items()}
    expected = {target: layers[target](x) for target, x in inputs.items()}
    merge(packed)  # type: ignore[arg-type]
    assert all(relative(layers[target](x), expected[target]) < 2e-6 for target, x in inputs.items())
    unmerge(packed)  # type: ignore[arg-type]
    detach(packed, "lora")  # type: ignore[arg-type]
    assert all(same(bytes_of(part), state) for part, state in zip(parts, before, strict=True))


def repacked(model: Any) -> Any:
    """A network with its linears in int8."""
    if not (state := model.state_dict()):
        return model
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer = key.removesuffix(".weight")
        linear = key.endswith(".weight") and isinstance(model.get_submodule(layer), nn.Linear)
        parts = WRITERS["int8"][0](tensor)[0] if linear else {}
        tensors |= {f"{layer}.{part}": value for part, value in parts.items()} or {key: tensor}
    made = type(model)(model.config)
    load_into(made, tensors)
    return made
