"""Converting files: every layout in every format, read back equal; interrupted and gone on with; refused in words."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miniflux.checkpoints import (
    FORMATS,
    convert,
    inspect,
    layouts_of,
    load_into,
    open_tensors,
    save,
    save_all_in_one,
    to_layout,
)
from miniflux.checkpoints.formats.encodings import FLOATS, find_format, writable
from miniflux.checkpoints.formats.ggml import BLOCKS
from miniflux.checkpoints.layouts import ALL_IN_ONE
from miniflux.checkpoints.networks import BY_KIND
from miniflux.checkpoints.quantized import QuantizedLinear
from miniflux.conversion.resumable import Unfinished
from miniflux.conversion.tensors import FALLBACK
from miniflux.conversion.verifying import rows, unpacked
from miniflux.errors import CheckpointError, InputError, OutputError
from miniflux.models.autoencoder import Autoencoder, Flux2Autoencoder
from miniflux.models.causal_lm import CausalLm
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.flux2 import Flux2
from miniflux.models.flux3 import Flux3
from miniflux.models.t5 import T5Encoder
from tests.checkpoints.formats.made import WRITERS
from tests.tiny import AUTOENCODER, CLIP, FLUX1, FLUX2, FLUX2_AUTOENCODER, FLUX3, LM, T5, randomise

CONFIG = replace(FLUX1, hidden_size=64, num_heads=4, depth=1, depth_single_blocks=1)
MODEL = randomise(Flux1(CONFIG)).to(torch.bfloat16)
LAYOUTS = ("original", "diffusers", ALL_IN_ONE)
PACKED = [name for name in writable() if name not in FLOATS]


def ending(name: str) -> str:
    return ".gguf" if name in BLOCKS else ".safetensors"


def loaded(path: Path, network: nn.Module = MODEL) -> nn.Module:
    with torch.device("meta"):
        made = type(network)(network.config)  # pyright: ignore[reportArgumentType, reportCallIssue]
    report = load_into(made, path)
    assert not report.problems
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    save(MODEL, path, metadata={"author": "nobody"})
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FLOATS)
def test_floats(layout: str, name: str, source: Path, tmp_path: Path) -> None:
    """Every tensor is the old one, rounded once; where nothing is rounded it is bitwise the same."""
    path = tmp_path / "a.safetensors"
    made = convert(source, path, layout=layout, format=name)
    expected = to_layout(MODEL, MODEL.state_dict(), layout)
    found = load_file(path)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == FLOATS[name] and torch.equal(tensor, expected[key].to(FLOATS[name]))
    assert bool(made.layers) == (name == "float16")
    assert ("every number is the same" in str(made)) == (name != "float16")
    assert open_tensors(path).metadata["author"] == "nobody"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PACKED)
def test_packed(layout: str, name: str, source: Path, tmp_path: Path) -> None:
    """The linears of the blocks unpack to what the packer made of them; all other tensors are as they were."""
    if name in BLOCKS:
        pytest.importorskip("gguf")
    path = tmp_path / f"a{ending(name)}"
    made = convert(source, path, layout=layout, format=name)
    network, state = loaded(path), MODEL.state_dict()
    packed = 0
    for key, module in network.named_modules():
        if isinstance(module, QuantizedLinear):
            assert key.startswith(("double_blocks.", "single_blocks."))
            packed += 1
            weight, stacks = state[f"{key}.weight"], []
            for stack in module.stored:
                rows_, weight = weight[: stack.shape[0]], weight[stack.shape[0] :]
                form = FORMATS[name] if FORMATS[name].holds(stack.shape) else FORMATS[FALLBACK[name]]
                assert stack.format is form
                stacks.append(form.unpack(form.pack(rows_)))
            assert torch.equal(module.dense(), torch.cat(stacks))
    assert packed == 2 * 5 + 3 == sum(isinstance(m, nn.Linear) for k, m in MODEL.named_modules() if "blocks." in k)
    for key, parameter in network.named_parameters():  # the parts of packed weights are buffers
        assert torch.equal(parameter.float(), state[key].float()), key
    # The report: the error of each layer that was packed, the worst first.
    errors = [layer.error for layer in made.layers]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0 and errors[0] < (0.35 if name == "Q2_K" else 0.2)
    assert len(made.layers) == sum(len(m.stored) for m in network.modules() if isinstance(m, QuantizedLinear))
    worst = made.layers[0]
    if layout == "original":
        got = network.get_submodule(worst.name.removesuffix(".weight")).dense().double()  # type: ignore[operator]
        want = state[worst.name].double()
        assert math.isclose(worst.error, float((got - want).norm() / want.norm()), rel_tol=1e-5)
    assert f"{worst.error:.2e}  {worst.name}" in made.report(1)
    assert made.bytes_after < made.bytes_before


TEXT: list[tuple[nn.Module, str, int]] = [
    (randomise(T5Encoder(replace(T5, d_model=64, d_kv=16, num_heads=4, d_ff=96))), "q8_0", 2 * 7),
    (randomise(T5Encoder(replace(T5, d_model=64, d_kv=16, num_heads=4, d_ff=96))), "fp8", 2 * 7),
    (randomise(ClipTextEncoder(replace(CLIP, hidden_size=64, num_attention_heads=2, intermediate_size=96))), "nf4", 12),
]


@pytest.mark.parametrize(("network", "name", "count"), TEXT)
def test_text_encoders(network: nn.Module, name: str, count: int, tmp_path: Path) -> None:
    """Linears of the blocks are packed; embeddings and position biases, which are looked up, are not."""
    if name == "q8_0":
        pytest.importorskip("gguf")
    save(network, tmp_path / "a.safetensors")
    out = tmp_path / ("b.gguf" if name == "q8_0" else "b.safetensors")
    made = convert(tmp_path / "a.safetensors", out, format=name)
    found = loaded(out, network)
    assert len(made.layers) == count == sum(isinstance(m, QuantizedLinear) for m in found.modules())
    for key, parameter in found.named_parameters():  # the parts of packed weights are buffers
        assert torch.equal(parameter, network.state_dict()[key])


def test_the_autoencoder_is_not_packed(tmp_path: Path) -> None:
    network = randomise(Autoencoder(AUTOENCODER))
    save(network, tmp_path / "a.safetensors")
    made = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout="diffusers", format="nf4")
    assert not made.layers
    found = loaded(tmp_path / "b.safetensors", network)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), network.parameters(), strict=True))


@pytest.mark.parametrize("name", ["fp8_scaled_old", "nf4", "nvfp4_comfy", "Q5_1", "fp8_e5m2"])
def test_from_packed_to_floats_and_to_packed(name: str, source: Path, tmp_path: Path) -> None:
    """A packed source is unpacked first: in float32 without any loss, and from there into any other format."""
    if name in BLOCKS:
        pytest.importorskip("gguf")
    first = tmp_path / f"a{ending(name)}"
    convert(source, first, layout="diffusers", format=name)
    made = convert(first, tmp_path / "b.safetensors", layout="original", format="float32")
    assert not made.layers
    packed, plain = loaded(first), loaded(tmp_path / "b.safetensors")
    for key, module in packed.named_modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.dense(), plain.get_parameter(f"{key}.weight"))
    convert(first, tmp_path / "c.safetensors", layout=ALL_IN_ONE, format="int8")
    weight = plain.get_parameter("single_blocks.0.linear2.weight")
    again = loaded(tmp_path / "c.safetensors").get_submodule("single_blocks.0.linear2")
    assert torch.equal(again.dense(), FORMATS["int8"].unpack(FORMATS["int8"].pack(weight)))  # type: ignore[operator]


# Of the stacked weights (q, k, v; linear1) the scales of the whole differ, so that they cannot be put together.
WHOLE = ("fp8_scaled_old", "fp8_scaled", "nvfp4", "nvfp4_comfy")
WIDE = randomise(Flux1(replace(CONFIG, hidden_size=256, num_heads=4, axes_dim=(16, 24, 24)))).to(torch.bfloat16)


@pytest.mark.parametrize("name", [*WHOLE, "fp8_rows", "int8", "nf4", "Q8_0", "Q3_K"])
def test_without_a_format_packed_weights_stay(name: str, tmp_path: Path) -> None:
    """Into every layout and back: the same numbers, bit by bit, in the same format."""
    if name in BLOCKS:
        pytest.importorskip("gguf")
    end = ending(name)
    save(WIDE, tmp_path / "source.safetensors")
    convert(tmp_path / "source.safetensors", tmp_path / f"original{end}", format=name)
    expected, content = loaded(tmp_path / f"original{end}", WIDE), (tmp_path / f"original{end}").read_bytes()
    for before, after in (("original", "diffusers"), ("diffusers", "original"), ("original", ALL_IN_ONE)):
        made = convert(tmp_path / f"{before}{end}", tmp_path / f"new-{after}{end}", layout=after)
        assert not made.layers and "every number is the same" in str(made)
        shutil.move(tmp_path / f"new-{after}{end}", tmp_path / f"{after}{end}")
        found = loaded(tmp_path / f"{after}{end}", WIDE)
        for key, module in expected.named_modules():
            if isinstance(module, QuantizedLinear):
                other = found.get_submodule(key)
                assert isinstance(other, QuantizedLinear) and {how.format for how in other.stored} == {FORMATS[name]}
                assert torch.equal(other.dense(), module.dense())
    assert (tmp_path / f"original{end}").read_bytes() == content


@pytest.mark.parametrize("name", WHOLE)
def test_packed_weights_that_cannot_stay(name: str, tmp_path: Path) -> None:
    """q, k and v that were packed apart have scales of their own, for which one weight of all three has no place."""
    save(WIDE, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout="diffusers", format=name)
    with pytest.raises(InputError, match=r"double_blocks.0.img_attn.qkv.weight cannot stay .* differ in .*, int8, nf4"):
        convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", layout="original")
    assert not list(tmp_path.glob("c*"))
    assert not convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors").layers


@pytest.mark.parametrize("others", ["int8", "float8_e4m3fn", None])
def test_rows_that_are_stored_in_several_ways(others: str | None, tmp_path: Path) -> None:
    """q in nf4, k and v in another format or as numbers: they stay so where they stay apart, and only there."""
    state = {key: tensor.clone() for key, tensor in to_layout(WIDE, WIDE.state_dict(), "diffusers").items()}
    for name, form in (("to_q", "nf4"), ("to_k", others), ("to_v", others)):
        layer = f"transformer_blocks.0.attn.{name}"
        if form == "float8_e4m3fn":
            state[f"{layer}.weight"] = state[f"{layer}.weight"].to(torch.float8_e4m3fn)
        elif form is not None:
            parts = FORMATS[form].pack(state.pop(f"{layer}.weight"))
            state |= {f"{layer}.{part}": tensor.clone() for part, tensor in parts.items()}
    save_file(state, tmp_path / "a.safetensors")
    made = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = load_file(tmp_path / "b.safetensors")
    assert not made.layers and found.keys() == state.keys()
    assert all(tensor.dtype == state[key].dtype for key, tensor in found.items())
    assert all(
        torch.equal(tensor.view(torch.uint8), state[key].view(torch.uint8))
        for key, tensor in found.items()
        if tensor.ndim
    )
    with pytest.raises(
        InputError, match=r"qkv.weight cannot stay packed as it is: its rows are stored in several form"
    ):
        convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", layout="original")


def test_kept_as_other_programs_store_it(tmp_path: Path) -> None:
    """nf4 with nested statistics; scales in half precision; the last modulation, whose halves change places."""
    names = ("double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1")
    for kind in ("nested", "int8"):
        state = {key: tensor.clone() for key, tensor in WIDE.state_dict().items()}
        for name in names:
            weight = state.pop(f"{name}.weight")
            parts = WRITERS["nf4, nested"][0](weight.float())[0] if kind == "nested" else FORMATS["int8"].pack(weight)
            if kind == "int8":
                parts["weight_scale"] = parts["weight_scale"].half()
            state |= {f"{name}.{part}": tensor.clone() for part, tensor in parts.items()}
        save_file(state, tmp_path / "a.safetensors")
        made = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout="diffusers")
        before, after = (loaded(tmp_path / f"{file}.safetensors", WIDE) for file in "ab")
        assert not made.layers
        for name in names:
            old, new = before.get_submodule(name), after.get_submodule(name)
            assert isinstance(old, QuantizedLinear) and isinstance(new, QuantizedLinear)
            assert torch.equal(old.dense(), new.dense())
        (tmp_path / "b.safetensors").unlink()


def test_a_gguf_file_becomes_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    save(WIDE, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", format="Q4_K")
    made = convert(tmp_path / "a.gguf", tmp_path / "folder", layout="diffusers")
    assert not made.layers and (tmp_path / "folder" / "diffusion_pytorch_model.gguf").is_file()
    with pytest.raises(InputError, match=r"GGUF Q4_K is not in .safetensors files; say .*: float32, .*, nf4"):
        convert(tmp_path / "a.gguf", tmp_path / "b.safetensors")


def test_without_a_format_every_dtype_stays(tmp_path: Path) -> None:
    """Also of files that mix them; float8 vectors and matrices too."""
    state = {key: tensor.clone() for key, tensor in MODEL.state_dict().items()}
    state["img_in.weight"] = state["img_in.weight"].float()
    state["img_in.bias"] = state["img_in.bias"].to(torch.float8_e4m3fn)
    state["single_blocks.0.linear1.weight"] = state["single_blocks.0.linear1.weight"].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "a.safetensors")
    made = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout="diffusers")
    assert not made.layers
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", layout="original")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key].float(), tensor.float())


# -- FLUX.2 and FLUX.3 --

NEWER: dict[str, nn.Module] = {
    "flux2": randomise(Flux2(replace(FLUX2, hidden_size=64, num_heads=4))).to(torch.bfloat16),
    "flux3": randomise(Flux3(replace(FLUX3, hidden_size=64, num_heads=4))).to(torch.bfloat16),
    "autoencoder": randomise(Flux2Autoencoder(FLUX2_AUTOENCODER)),
    "language model": randomise(CausalLm(replace(LM, hidden_size=64, intermediate_size=96))).to(torch.bfloat16),
    "half of one": randomise(CausalLm(replace(LM, hidden_size=64, intermediate_size=96, layers_read=2))),
}
NEWER["autoencoder"].get_buffer("bn.num_batches_tracked").fill_(123_457)  # which float16 does not hold
BLOCKS_OF = {"flux2": (2, 2), "flux3": (2 * 3, 3)}


@pytest.mark.parametrize("name", NEWER)
def test_newer_networks_there_and_back(name: str, tmp_path: Path) -> None:
    """From its own layout into each other one and back, bit for bit and under the same header."""
    network = NEWER[name]
    save(network, tmp_path / "a.safetensors", metadata={"author": "nobody"})
    expected, about = load_file(tmp_path / "a.safetensors"), open_tensors(tmp_path / "a.safetensors").metadata
    for i, layout in enumerate(layouts_of(network)[1:]):
        there, back = tmp_path / f"there{i}.safetensors", tmp_path / f"back{i}.safetensors"
        made = convert(tmp_path / "a.safetensors", there, layout=layout)
        assert not made.layers and not made.kept and not made.left_out
        (part,) = inspect(there).parts
        assert (part.network, part.layout) == (type(network).__name__, layout)
        assert load_file(there).keys() != expected.keys()
        assert not convert(there, back, layout="original").layers
        found = load_file(back)
        assert found.keys() == expected.keys() and open_tensors(back).metadata == about
        assert all(found[key].dtype == t.dtype and torch.equal(found[key], t) for key, t in expected.items())


@pytest.mark.parametrize("name", NEWER)
@pytest.mark.parametrize("form", ["Q8_0", "fp8", "nf4", "int8", "float16"])
def test_newer_networks_packed(name: str, form: str, tmp_path: Path) -> None:
    """The linears of the blocks, and nothing else, in each layout; inspection knows them again, and they load."""
    if form in BLOCKS:
        pytest.importorskip("gguf")
    network = NEWER[name]
    save(network, tmp_path / "a.safetensors")
    plain = inspect(tmp_path / "a.safetensors").parts[0]
    for i, layout in enumerate(layouts_of(network)):
        path = tmp_path / f"b{i}{ending(form)}"
        convert(tmp_path / "a.safetensors", path, layout=layout, format=form)
        (part,) = inspect(path).parts
        assert (part.network, part.variant, part.layout) == (plain.network, plain.variant, layout)
        assert (part.parameters, len(part.redundant)) == (plain.parameters, len(plain.redundant))
        if name in BLOCKS_OF:
            assert part.problems == []
        found = loaded(path, network)
        inside = BY_KIND[type(network)].packed
        meant = {key for key, m in network.named_modules() if isinstance(m, nn.Linear) and key.startswith(inside)}
        packed = {key: m for key, m in found.named_modules() if isinstance(m, QuantizedLinear)}
        assert set(packed) == (meant if form != "float16" and inside else set())
        for key, layer in packed.items():
            weight = network.get_parameter(f"{key}.weight").detach().float()
            assert float((layer.dense() - weight).norm() / weight.norm()) < (0.12 if form == "nf4" else 0.04)
        state = network.state_dict()
        for key, tensor in found.state_dict().items():
            if key in state and key.rpartition(".")[0] not in packed:
                held = state[key].to(torch.float16) if form == "float16" and tensor.is_floating_point() else state[key]
                assert torch.equal(tensor.double(), held.double()), key
        if form in BLOCKS:
            architecture = open_tensors(path).metadata["general.architecture"]
            assert architecture == {"autoencoder": "flux", "flux2": "flux2", "flux3": "flux3"}.get(name, "qwen3")


def test_what_a_prompt_does_not_need_is_left_out(tmp_path: Path) -> None:
    """Of a language model of which a variant reads a part: the report counts it, and the result is read as before."""
    whole = randomise(CausalLm(replace(LM, layers_read=None)))
    config = replace(LM, layers_read=2)
    with_header = tmp_path / "a.safetensors"
    save(whole, tmp_path / "whole.safetensors")
    save_file(load_file(tmp_path / "whole.safetensors"), with_header, {"lm_config": json.dumps(asdict(config))})
    made = convert(with_header, tmp_path / "b.safetensors", layout="bare")
    assert set(made.left_out.values()) == {"comes behind the last layer that is read"}
    assert set(made.left_out) == {key for key in whole.state_dict() if key not in CausalLm(config).state_dict()}
    assert f"left out: lm_head.weight and {len(made.left_out) - 1} more (comes behind the last layer" in str(made)
    assert loaded(tmp_path / "b.safetensors", CausalLm(config))
    everything = convert(tmp_path / "whole.safetensors", tmp_path / "c.safetensors", layout="bare")
    assert not everything.left_out


# -- several networks, folders, shards --

NETWORKS: dict[str, nn.Module] = {
    "transformer": randomise(Flux1(FLUX1)),
    "vae": randomise(Autoencoder(AUTOENCODER)),
    "text_encoder": randomise(ClipTextEncoder(CLIP)),
    "text_encoder_2": randomise(T5Encoder(T5)),
}


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    pipe: Any = SimpleNamespace(
        transformer=NETWORKS["transformer"],
        autoencoder=NETWORKS["vae"],
        text=SimpleNamespace(networks={"clip": NETWORKS["text_encoder"], "t5": NETWORKS["text_encoder_2"]}),
    )
    save_all_in_one(pipe, tmp_path / "everything.safetensors")
    return tmp_path / "everything.safetensors"


def same(path: Path, network: nn.Module) -> bool:
    found = loaded(path, network).state_dict()
    return all(torch.equal(found[key], tensor) for key, tensor in network.state_dict().items())


def test_all_in_one_to_a_diffusers_folder_and_back(everything: Path, tmp_path: Path) -> None:
    """Bitwise the same file in the end."""
    folder = tmp_path / "some.model"
    convert(everything, folder, layout="diffusers")
    assert all(same(folder / name, network) for name, network in NETWORKS.items())
    assert json.loads((folder / "transformer/config.json").read_text("utf-8"))["axes_dims_rope"] == [4, 6, 6]
    convert(folder, tmp_path / "again.safetensors", layout=ALL_IN_ONE)
    a, b = load_file(everything), load_file(tmp_path / "again.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert open_tensors(tmp_path / "again.safetensors").metadata == open_tensors(everything).metadata


def test_all_in_one_to_single_files_and_packed(everything: Path, tmp_path: Path) -> None:
    convert(everything, tmp_path / "files", layout="original")
    names = {"flux1": "transformer", "ae": "vae", "clip_l": "text_encoder", "t5xxl_fp16": "text_encoder_2"}
    assert {p.stem for p in (tmp_path / "files").iterdir()} == set(names)
    for stem, name in names.items():
        assert same(tmp_path / "files" / f"{stem}.safetensors", NETWORKS[name])
    made = convert(everything, tmp_path / "packed.safetensors", format="fp8_scaled_old")
    keys = set(load_file(tmp_path / "packed.safetensors"))
    assert {"model.diffusion_model.scaled_fp8", "text_encoders.t5xxl.transformer.scaled_fp8"} <= keys
    assert all(loaded(tmp_path / "packed.safetensors", network) for network in NETWORKS.values())
    assert {layer.name.split(".")[0] for layer in made.layers} == {"model", "text_encoders"}


def test_shards(source: Path, tmp_path: Path) -> None:
    """A folder with an index and a config, which diffusers' index format and our reader take."""
    folder = tmp_path / "sharded"
    made = convert(source, folder, layout="diffusers", shard_bytes=100_000)
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text("utf-8"))
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == made.bytes_after
    assert all(key in load_file(folder / file) for key, file in index["weight_map"].items())
    assert all(torch.equal(a, b) for a, b in zip(loaded(folder).parameters(), MODEL.parameters(), strict=True))
    convert(folder, tmp_path / "one.safetensors", layout="original")
    back = load_file(tmp_path / "one.safetensors")
    assert all(torch.equal(back[key], tensor) for key, tensor in MODEL.state_dict().items())
    (folder / "config.json").write_text('{"mine": 1, "axes_dims_rope": [4, 6, 6]}', "utf-8")
    convert(folder, tmp_path / "copy", format="nf4")
    assert json.loads((tmp_path / "copy/config.json").read_text("utf-8"))["mine"] == 1


def test_what_no_network_needs_is_left_out_and_said(tmp_path: Path) -> None:
    network = NETWORKS["text_encoder"]
    save_file({**network.state_dict(), "logit_scale": torch.ones(1)}, tmp_path / "a.safetensors")
    made = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout="without prefix")
    assert made.left_out == {"logit_scale": "only for comparing with images"} and "left out: logit_scale" in str(made)


# -- interrupted --


class Stop(Exception):
    pass


def stopping(after: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= after:
            raise Stop

    return progress


@pytest.mark.parametrize("name", ["nf4", "Q5_0", "float32"])
def test_goes_on_where_it_stopped(name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are those of a run in one go, and what was done is not done again."""
    if name in BLOCKS:
        pytest.importorskip("gguf")
    whole, path = tmp_path / f"whole{ending(name)}", tmp_path / f"a{ending(name)}"
    convert(source, whole, format=name)
    for after in (10, 25, 60):  # twice while it writes, once while it reads back
        with pytest.raises(Stop):
            convert(source, path, format=name, progress=stopping(after))
        assert not path.exists() and (tmp_path / f"{path.name}.part").is_dir()
    written: list[str] = []
    write = Unfinished.write

    def counted(self: Unfinished, file: str, key: str, parts: Any) -> None:
        written.append(key)
        write(self, file, key, parts)

    monkeypatch.setattr(Unfinished, "write", counted)
    made = convert(source, path, format=name)
    assert made.resumed and not written
    assert path.read_bytes().replace(b"a.", b"") == whole.read_bytes().replace(b"a.", b"")
    assert not list(tmp_path.glob("*.part"))


def test_bytes_that_the_journal_does_not_vouch_for_are_written_again(source: Path, tmp_path: Path) -> None:
    """After a power failure the journal may be ahead of the data, or end in half a line."""
    convert(source, tmp_path / "whole.safetensors", format="int8")
    path = tmp_path / "a.safetensors"
    with pytest.raises(Stop):
        convert(source, path, format="int8", progress=stopping(20))
    part = tmp_path / "a.safetensors.part"
    place = open_tensors(part / "a.safetensors").entries["double_blocks.0.img_attn.qkv.weight"].start
    with (part / "a.safetensors").open("r+b") as file:
        file.seek(place + 100)
        file.write(b"\xff" * 100)
    with (part / "journal.jsonl").open("a", encoding="utf-8") as file:
        file.write('["a.safetensors", "img_in.wei')
    made = convert(source, path, format="int8")
    assert 0 < made.resumed < 20
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_another_job_begins_anew(source: Path, tmp_path: Path) -> None:
    """Another format, or a source that has changed since: nothing of the old run is used."""
    with pytest.raises(Stop):
        convert(source, tmp_path / "a.safetensors", format="int8", progress=stopping(10))
    assert convert(source, tmp_path / "a.safetensors", format="nf4").resumed == 0
    mine = tmp_path / "mine.safetensors"
    save(MODEL, mine)
    with pytest.raises(Stop):
        convert(mine, tmp_path / "b.safetensors", format="int8", progress=stopping(10))
    save(randomise(Flux1(CONFIG), 7), mine)
    assert convert(mine, tmp_path / "b.safetensors", format="int8").resumed == 0


# -- refused --


def test_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says so; when there is room again the same call goes on."""
    from miniflux.conversion import resumable

    put, count = resumable._put, 0

    def full(file: Any, raw: memoryview) -> None:
        nonlocal count
        count += 1
        if count > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(file, raw)

    monkeypatch.setattr(resumable, "_put", full)
    with pytest.raises(OutputError, match="No space left on device; what is done stays there, the same call goes on"):
        convert(source, tmp_path / "a.safetensors", format="int8")
    monkeypatch.setattr(resumable, "_put", put)
    assert convert(source, tmp_path / "a.safetensors", format="int8").resumed


def test_what_is_read_back_must_be_what_was_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that forgets."""
    from miniflux.conversion import resumable

    put, count = resumable._put, 0

    def forgetful(file: Any, raw: memoryview) -> None:
        nonlocal count
        count += 1
        put(file, memoryview(bytes(len(raw))) if count == 30 else raw)

    monkeypatch.setattr(resumable, "_put", forgetful)
    with pytest.raises(OutputError, match="was not read back as it was written"):
        convert(source, tmp_path / "a.safetensors", format="float32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            "a.safetensors",
            {"format": "banana"},
            "unknown format 'banana'; written are float32, float16, bfloat16, fp8",
        ),
        ("a.safetensors", {"format": "Q8_K"}, "unknown format 'Q8_K'"),
        ("a.safetensors", {"layout": "banana"}, "no layout 'banana'; known: original, diffusers, all-in-one"),
        ("a.safetensors", {"format": "Q8_0"}, "Q8_0 is written to .gguf files"),
        ("a.gguf", {"format": "nf4"}, "nf4 is written to .safetensors files"),
        ("a.pt", {"format": "nf4"}, "files are written as .safetensors or .gguf, got the ending '.pt'"),
        ("no/a.safetensors", {"format": "nf4"}, "cannot be written: there is no folder"),
        ("model.safetensors", {"format": "nf4"}, "is what is read from"),
        ("", {"format": "nf4"}, "is what is read from"),
    ],
)
def test_refused(target: str, options: dict[str, str], message: str, source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "model.safetensors"
    mine.write_bytes(source.read_bytes())
    with pytest.raises((InputError, OutputError), match=message):
        convert(mine, tmp_path / target, **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert mine.read_bytes() == source.read_bytes()


def test_places_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("x")
    with pytest.raises(OutputError, match="is there already, and not empty"):
        convert(source, tmp_path / "full", layout="diffusers")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        convert(source, tmp_path / "folder.safetensors", format="nf4")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="there is no folder|cannot be written"):
        convert(source, tmp_path / "file" / "a.safetensors", format="nf4")
    for name in (".", "..", "/"):
        with pytest.raises(InputError, match=f"{name}: give the result a name of its own"):
            convert(source, name)


def test_sources_that_cannot_be_converted(source: Path, everything: Path, tmp_path: Path) -> None:
    """Strict as loading is: nothing is left behind."""
    out, broken = tmp_path / "out.safetensors", tmp_path / "broken.safetensors"
    state: dict[str, Tensor] = {key: tensor.clone() for key, tensor in MODEL.state_dict().items()}
    cases: list[tuple[dict[str, Tensor], str, str]] = [
        ({**state, "extra": torch.ones(1)}, "nf4", "1 unused, such as extra"),
        ({k: t for k, t in state.items() if k != "img_in.bias"}, "nf4", "1 missing, such as img_in.bias"),
        ({**state, "img_in.bias": state["img_in.bias"] * float("nan")}, "nf4", "img_in.bias is not finite"),
        ({**state, "img_in.bias": state["img_in.bias"] * 1e30}, "float16", "img_in.bias: has numbers beyond the range"),
        ({"x": torch.ones(1)}, "nf4", "no network known here"),
    ]
    for tensors, name, message in cases:
        save_file(tensors, broken)
        with pytest.raises(CheckpointError, match=message):
            convert(broken, out, format=name)
        assert not out.exists() and not list(tmp_path.glob("*.part"))
    convert(source, tmp_path / "packed.safetensors", format="nf4")
    with pytest.raises(InputError, match="is not in .gguf files; say which format it is to be in: .*bfloat16, Q4_0"):
        convert(tmp_path / "packed.safetensors", tmp_path / "a.gguf")
    with pytest.raises(InputError, match="4 networks in one file need the layout all-in-one"):
        convert(everything, out, layout="original")
    with pytest.raises(CheckpointError, match="no such file"):
        convert(tmp_path / "nothing.safetensors", out)


@pytest.mark.parametrize("name", ["ae.pt", "text_encoder_2/pytorch_model.bin", "ae.safetensors.crdownload"])
def test_networks_that_cannot_be_read_are_not_left_out(name: str, source: Path, tmp_path: Path) -> None:
    """A pickled autoencoder, or half of one, beside a transformer: nothing is written, and inspect names it."""
    folder = tmp_path / "model"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"x")
    (folder / source.name).write_bytes(source.read_bytes())
    why = "half of a download" if name.endswith("download") else "neither safetensors nor GGUF"
    with pytest.raises(CheckpointError, match=f"would be left out: {name} \\({why}\\); take them away"):
        convert(folder, tmp_path / "out", layout="diffusers")
    assert not list(tmp_path.glob("out*"))
    assert inspect(folder).parts[0].problems[-1] == f"beside it, {name} cannot be read: {why}"
    (folder / name).unlink()
    assert convert(folder, tmp_path / "out", layout="diffusers").networks == ["transformer"]


def test_a_report_without_layers(source: Path, tmp_path: Path) -> None:
    assert "the worst 0" in convert(source, tmp_path / "a.safetensors", format="nf4").report(worst=0)


def test_without_the_package_gguf(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from miniflux.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"miniflux\[gguf\]"):
        convert(source, tmp_path / "a.gguf", format="Q8_0")
    assert not list(tmp_path.iterdir())


# -- pieces --


@pytest.mark.parametrize("name", ["fp8", "FP8 scaled", "fp8-scaled", "fp8_scaled"])
def test_names_of_formats(name: str) -> None:
    assert find_format(name) is FORMATS["fp8_scaled"]
    assert find_format("q4_k") is FORMATS["Q4_K"] and find_format("BF16") is torch.bfloat16


@pytest.mark.parametrize("name", PACKED)
def test_some_rows_of_a_packed_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked a few rows at a time it is what it is as a whole, and all rows are in some slice."""
    from miniflux.conversion import verifying

    monkeypatch.setattr(verifying, "CHUNK", 1)
    form, weight = FORMATS[name], torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    parts = form.pack(weight)
    stored = form.read({key: (part.dtype, tuple(part.shape)) for key, part in parts.items()}, parts.__getitem__)
    pieces = [unpacked(stored, parts, some) for some in rows(weight.shape)]
    assert len(pieces) == 4
    assert torch.equal(torch.cat(pieces), form.unpack(parts))


@pytest.mark.parametrize("name", ["nf4", "fp8", "fp8_e4m3", "nvfp4_comfy", "int8", "float16", "Q4_K", "Q8_0", "IQ4_XS"])
def test_inspect_prints_names_that_are_accepted(name: str, tmp_path: Path) -> None:
    """What it says of a file can be given to `--format`, and what files and people call it, too."""
    if name in BLOCKS:
        pytest.importorskip("gguf")
    save(WIDE, tmp_path / "source.safetensors")
    path = tmp_path / f"a{ending(name)}"
    convert(tmp_path / "source.safetensors", path, format=name)
    line = next(line for line in str(inspect(path)).splitlines() if line.startswith("  format"))
    said = line.split()[1].removesuffix(":")
    assert find_format(said) == find_format(name)
    assert find_format(inspect(path).parts[0].format) == find_format(name)
    assert all(find_format(label) for label in inspect(path).parts[0].formats)
