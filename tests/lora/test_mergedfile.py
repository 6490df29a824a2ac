"""Files of packed weights with LoRAs merged in: wide where they change, or in the format that they had."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from miniflux.checkpoints import load_into
from miniflux.checkpoints.files import open_tensors
from miniflux.checkpoints.formats.reading import contents_of, format_of
from miniflux.checkpoints.layouts import Counterpart, to_theirs
from miniflux.checkpoints.quantized import dense_weight, packed_layers
from miniflux.errors import LoraError, OutputError
from miniflux.lora import attach, merge_files
from miniflux.models.flux1 import Flux1
from tests import reference
from tests.checkpoints.formats.made import E4M3, SMALL, WIDE, WRITERS, empty, network, write_file
from tests.lora.made import lora, networks_of, relative, tensors_of
from tests.lora.test_packing import LINEAR1, MODULATION, QKV, coarse, delta, written
from tests.lora.test_quantised import out, pair
from tests.tiny import randn

CHANGED = (QKV, LINEAR1, MODULATION)


def files_of(tmp_path: Path, name: str) -> tuple[Path, Path]:
    ending = "safetensors" if name in WRITERS else "gguf"
    return tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"


def loaded(path: Path, like: Flux1) -> Flux1:
    """Strictly, in float32."""
    model = empty(like.config)
    load_into(model, path, dtype=torch.float32)
    return model


def raw(path: Path) -> dict[str, Tensor]:
    source = open_tensors(path)
    return {key: source[key].contiguous().view(-1).view(torch.uint8) for key in source}


def same(before: Tensor, after: Tensor | None) -> bool:
    return after is not None and torch.equal(before, after)


ORIGINAL = ("fp8 e4m3", "scaled fp8, comfy_quant", "scaled fp8, header", "fp8 by rows", "int8", "nvfp4", "Q8_0", "Q4_K")
CASES = [(name, "original") for name in ORIGINAL] + [
    (name, "diffusers") for name in ("scaled fp8, old", "nf4, nested", "nvfp4, header", "Q5_0")
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_what_changes_becomes_wide(name: str, layout: str, tmp_path: Path) -> None:
    """W + dW of what the reference unpacks, to the rounding of float16; every other tensor keeps its bytes."""
    base, merged = files_of(tmp_path, name)
    packed, plain = pair(base, network(SMALL if name in WRITERS else WIDE), name, layout)
    tensors = lora(plain, *CHANGED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (receipt,) = merge_files(base, [(tensors, 0.5)], merged)
    assert receipt.applied == receipt.expected == 3
    model = loaded(merged, packed)
    for layer in CHANGED:
        found = dense_weight(model.get_submodule(layer))
        expected = plain.get_submodule(layer).weight.double() + 0.5 * delta(tensors, layer)
        assert found is not None and relative(found, expected) < 2**-12, layer
    attach(packed, tensors, scale=0.5)
    torch.testing.assert_close(out(model), out(packed), rtol=2e-2, atol=2e-3 * float(out(packed).abs().max()))
    before, after = raw(base), raw(merged)
    layers = {key.removesuffix(".weight") for key in before if key.endswith(".weight")}
    theirs = {n for n in layers for k in before if k.startswith(n + ".") and not same(before[k], after.get(k))}
    assert len(theirs) == (3 if layout == "original" else 8) and after.keys() <= before.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == [base.name, merged.name]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_packed_again(name: str, layout: str, tmp_path: Path) -> None:
    """On request, as somebody else packs W + dW; the file says the same of itself as the base does."""
    base, merged = files_of(tmp_path, name)
    packed, plain = pair(base, network(SMALL if name in WRITERS else WIDE), name, layout)
    tensors = coarse(plain, *CHANGED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge_files(base, [(tensors, 1.0)], merged, pack=True)
    model = loaded(merged, packed)
    before, after = (contents_of(open_tensors(path)).stored for path in (base, merged))
    assert {k: (s.format, s.shape) for k, s in after.items()} == {k: (s.format, s.shape) for k, s in before.items()}
    assert format_of(open_tensors(merged)).startswith(format_of(open_tensors(base)))  # which may leave out the size
    for layer in CHANGED:
        module = packed.get_submodule(layer)
        wanted = (plain.get_submodule(layer).weight.double() + delta(tensors, layer)).float()
        how = "swap halves" if module.swapped else "rows" if len(module.stored) > 1 else "same"
        dense = dense_weight(model.get_submodule(layer))
        assert dense is not None
        pairs = (
            to_theirs(t, Counterpart(("",) * len(module.stored), how), packed.config.hidden_size)
            for t in (dense, wanted)
        )
        for ours, part in zip(*pairs, strict=True):
            assert (~torch.isclose(ours, written(name, part), rtol=1e-5, atol=1e-7)).double().mean() < 1e-3, layer
    others = [key for key in packed_layers(packed) if key not in CHANGED]
    assert all(torch.equal(packed_layers(model)[k].dense(), packed_layers(packed)[k].dense()) for k in others)


def test_others_read_the_gguf_file(tmp_path: Path) -> None:
    """The package that defines the container, and its own unpacking."""
    base, merged = files_of(tmp_path, "Q8_0")
    _, plain = pair(base, network(WIDE), "Q8_0", "original")
    for pack in (False, True):
        tensors = coarse(plain, QKV)
        merge_files(base, [(tensors, 1.0)], merged, pack=pack)
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(merged).tensors}
        for key in (f"{QKV}.weight", f"{LINEAR1}.weight"):
            assert found[key].tensor_type.name == ("F16" if QKV in key and not pack else "Q8_0")
            dense = torch.from_numpy(gguf.quants.dequantize(found[key].data, found[key].tensor_type).copy())
            change = delta(tensors, QKV) if QKV in key else 0.0
            assert relative(dense, plain.get_parameter(key).double() + change) < (0.01 if pack else 2**-12)
        assert "Q8_0" in format_of(open_tensors(merged))


def test_the_header_describes_what_is_there(tmp_path: Path) -> None:
    """Layers that are packed no more are taken from ComfyUI's table; the rest of the header stays."""
    base, merged = files_of(tmp_path, "nf4")
    model = network(SMALL)
    write_file(base, model, "scaled fp8, header", "original")
    merge_files(base, [(lora(model, QKV), 1.0)], merged)
    tables = []
    for path in (base, merged):
        with safe_open(path, "pt") as file:
            tables.append(json.loads(file.metadata()["_quantization_metadata"])["layers"])
    assert tables[0].keys() - tables[1].keys() == {QKV} and tables[1].items() <= tables[0].items()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("pack", [True, False])
def test_files_of_several_networks(pack: bool, prefix: str, tmp_path: Path) -> None:
    """The transformer is changed as in a file of its own, the others are copied; so is a file of it behind a prefix."""
    model = network(SMALL)
    write_file(tmp_path / "a.safetensors", model, "scaled fp8, header", "original")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        header = file.metadata()
    about = json.loads(header["_quantization_metadata"])
    about["layers"] = {prefix + key: value for key, value in about["layers"].items()}
    whole = {prefix + key: tensor for key, tensor in load_file(tmp_path / "a.safetensors").items()}
    others = {"vae.decoder.conv_in.weight": randn(3, 3), "logit_scale": torch.ones(())}
    header["_quantization_metadata"] = json.dumps(about)
    save_file(whole | others, tmp_path / "whole.safetensors", header)
    loras = [(coarse(model, QKV, MODULATION), 1.0)]
    for name in ("a", "whole"):
        merge_files(tmp_path / f"{name}.safetensors", loras, tmp_path / f"{name} merged.safetensors", pack=pack)
    alone, found = (load_file(tmp_path / f"{name} merged.safetensors") for name in ("a", "whole"))
    assert found.keys() == {prefix + key for key in alone} | others.keys()
    assert all(same(raw_of(found[prefix + key]), raw_of(tensor)) for key, tensor in alone.items())
    assert all(torch.equal(found[key], tensor) for key, tensor in others.items())
    load_into(empty(SMALL), tmp_path / "whole merged.safetensors")


def raw_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("name", ["fp8 e4m3", "nf4, nested"])
@pytest.mark.parametrize("dialect", ["lokr-kohya", "dora-kohya-per-input", "dora-peft", "bfl-control"])
def test_dialects(name: str, dialect: str, tmp_path: Path) -> None:
    """DoRA looks at the packed weight; a control LoRA widens a packed input."""
    about = reference.dialect(f"flux1-{dialect}")["tiny"]
    tensors, (base, merged) = tensors_of(about["tensors"]), files_of(tmp_path, name)
    packed, _ = pair(base, networks_of(about["config"]).transformer, name)
    merge_files(base, [(tensors, 1.0)], merged)
    attach(packed, tensors)
    expected = out(packed)
    torch.testing.assert_close(
        out(loaded(merged, packed)), expected, rtol=2e-2, atol=4e-3 * float(expected.abs().max())
    )


@pytest.mark.parametrize("pack", [True, False])
def test_files_of_float8_throughout(pack: bool, tmp_path: Path) -> None:
    """Some are, to the last bias and norm."""
    model = network(SMALL)
    state = {key: tensor.to(E4M3) for key, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors", {"axes_dim": json.dumps(SMALL.axes_dim)})
    norm = "double_blocks.0.img_attn.norm.key_norm"
    tensors = {f"{QKV}.diff_b": randn(3 * SMALL.hidden_size) / 64, f"{norm}.diff": randn(16) / 4}
    merge_files(tmp_path / "a.safetensors", [(tensors, 1.0)], tmp_path / "b.safetensors", pack=pack)
    found, rounding = load_file(tmp_path / "b.safetensors"), 2**-4 if pack else 2**-11
    for key, change in ((f"{QKV}.bias", f"{QKV}.diff_b"), (f"{norm}.scale", f"{norm}.diff")):
        expected = state[key].double() + tensors[change].double()
        torch.testing.assert_close(found[key].double(), expected, rtol=rounding, atol=2**-9 if pack else 1e-6)
    same = [key for key in state if key not in (f"{QKV}.bias", f"{norm}.scale")]
    assert all(torch.equal(found[key].view(torch.uint8), state[key].view(torch.uint8)) for key in same)


def test_rounding_is_told(tmp_path: Path) -> None:
    base, merged = files_of(tmp_path, "nf4")
    model = network(SMALL)
    write_file(base, model, "nf4", "original")
    with pytest.warns(UserWarning, match=r"1 of 1 packed weights lose part of their change.*bitsandbytes nf4. \d+% is"):
        merge_files(base, [(coarse(model, QKV, size=2**-5), 1.0)], merged, pack=True)


REFUSED: dict[str, tuple[Callable[[Flux1], dict[str, Tensor]], str, str, bool, str]] = {
    "shape": (
        lambda m: {"img_in.lora_A.weight": randn(2, 100), "img_in.lora_B.weight": randn(SMALL.hidden_size, 2)},
        *(
            "nvfp4",
            "b.safetensors",
            True,
            "img_in cannot be packed again: nvfp4 is not written for 64x100 numbers; atta",
        ),
    ),
    "blocks": (lambda m: lora(m, QKV), "Q8_0", "b.safetensors", False, "ends in .gguf"),
    "no blocks": (lambda m: lora(m, QKV), "nf4", "b.gguf", False, "ends in .safetensors"),
    "range": (
        lambda m: {k: 1e4 * t for k, t in lora(m, QKV).items()},
        "nf4",
        "b.safetensors",
        False,
        "beyond the range",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_leave_nothing_behind(kind: str, tmp_path: Path) -> None:
    make, name, target, pack, said = REFUSED[kind]
    base, _ = files_of(tmp_path, name)
    _, plain = pair(base, network(SMALL if name in WRITERS else WIDE), name)
    with pytest.raises((LoraError, OutputError), match=said):
        merge_files(base, [(make(plain), 1.0)], tmp_path / target, pack=pack)
    assert [path.name for path in tmp_path.iterdir()] == [base.name]
