"""Packed text encoders, all-in-one files, full-size files, and whole pipelines from packed files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import miniflux
from miniflux.checkpoints import inspect, load_into, open_tensors, to_layout
from miniflux.checkpoints.formats import FORMATS
from miniflux.checkpoints.formats.reading import contents_of
from miniflux.checkpoints.loading import compare
from miniflux.checkpoints.quantized import packed_layers
from miniflux.checkpoints.writing import write_tensors
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.variants import VARIANTS
from miniflux.weights.finding import BUNDLED
from tests.checkpoints.formats.made import SMALL, WRITERS, empty, network, write_file
from tests.checkpoints.raw import entry, raw
from tests.tiny import AUTOENCODER, CLIP, T5, randomise

T5_WIDE = replace(T5, d_model=64, d_kv=16, d_ff=64, num_heads=4, vocab_size=64)
CLIP_WIDE = replace(CLIP, hidden_size=64, intermediate_size=128, num_attention_heads=4)
IDS = torch.tensor([[3, 9, 1, 0, 0, 4, 49]])


def meta(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return type(model)(model.config)


def same(packed: nn.Module, model: nn.Module, dense: dict[str, Tensor]) -> None:
    """The packed network computes what `model` computes with these weights."""
    expected = meta(model)
    expected.load_state_dict({key: dense[key] for key in expected.state_dict()}, assign=True)
    with torch.inference_mode():
        torch.testing.assert_close(packed(IDS), expected(IDS), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fp8 e4m3", "scaled fp8, old", "int8", "nf4, nested", "nvfp4"])
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("model", [T5Encoder(T5_WIDE), ClipTextEncoder(CLIP_WIDE)], ids=["t5", "clip"])
def test_text_encoders(model: nn.Module, name: str, embeddings: bool, tmp_path: Path) -> None:
    """Linears stay packed; embeddings, which programs leave alone or only cast, are unpacked when they are loaded."""
    write, dense, tensors = WRITERS[name][0], {}, {}
    for key, weight in randomise(model).state_dict().items():
        linear = isinstance(model.get_submodule(key.rpartition(".")[0]), nn.Linear)
        if weight.ndim != 2 or not (linear or embeddings) or weight.numel() % 64 or weight.shape[1] % 16:
            tensors[key] = dense[key] = weight.clone()
        elif not linear and "scaled" in name:  # cast without a scale, as such files may have it
            tensors[key] = weight.to(torch.float8_e4m3fn)
            dense[key] = tensors[key].float()
        else:
            parts, dense[key] = write(weight)
            tensors |= {f"{key.removesuffix('weight')}{part}": t.clone() for part, t in parts.items()}
    if name.endswith("old"):
        tensors["scaled_fp8"] = torch.zeros(0).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = meta(model)
    report = load_into(loaded, tmp_path / "a.safetensors", dtype=torch.float32)
    assert sorted([*report.used, *report.redundant]) == sorted(tensors)
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert len(packed_layers(loaded)) == linears
    same(loaded, model, dense)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "F16"])
def test_t5_of_llama_cpp(kind: str, tmp_path: Path) -> None:
    """Its names, its packed embedding, and half precision for the rest."""
    model, dense = randomise(T5Encoder(T5_WIDE)), {}
    writer, wanted = gguf.GGUFWriter(tmp_path / "a.gguf", "t5encoder"), gguf.GGMLQuantizationType[kind]
    names = to_layout(model, model.state_dict(), "llama.cpp")
    for (theirs, weight), ours in zip(names.items(), model.state_dict(), strict=True):
        if weight.ndim == 2 and weight.shape[1] % 32 == 0:
            data = gguf.quants.quantize(weight.numpy(), wanted)
            writer.add_tensor(theirs, data, raw_dtype=wanted)
            dense[ours] = torch.from_numpy(gguf.quants.dequantize(data, wanted).astype("float32"))
        else:
            writer.add_tensor(theirs, weight.numpy())
            dense[ours] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = meta(model)
    load_into(loaded, tmp_path / "a.gguf", dtype=torch.float32)
    assert len(packed_layers(loaded)) == (0 if kind == "F16" else 14)
    same(loaded, model, dense)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_autoencoder_in_float8(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Convolutions are widened when they are loaded, also those that are linears in another layout."""
    model = randomise(Autoencoder(AUTOENCODER))
    small = {key: tensor.to(dtype) for key, tensor in to_layout(model, model.state_dict(), layout).items()}
    save_file(small, tmp_path / "a.safetensors")
    for asked in (None, torch.bfloat16):
        loaded = meta(model)
        load_into(loaded, tmp_path / "a.safetensors", dtype=asked)
        for key, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor.to(dtype).to(asked or torch.float32))


def test_t5_in_float16_widens_its_last_product(tmp_path: Path) -> None:
    """The sums that float16 cannot hold are computed in float32 by packed layers too."""
    model = randomise(T5Encoder(T5_WIDE)).half()
    tensors = {}
    for key, weight in model.state_dict().items():
        if weight.ndim == 2 and isinstance(model.get_submodule(key.rpartition(".")[0]), nn.Linear):
            tensors |= {f"{key.removesuffix('weight')}{p}": t for p, t in FORMATS["int8"].pack(weight).items()}
        else:
            tensors[key] = weight
    loaded = meta(model)
    load_into(loaded, tensors)
    hidden: list[torch.dtype] = []
    loaded.encoder.block[0].layer[1].DenseReluDense.wo.register_forward_hook(lambda _, x, y: hidden.append(y.dtype))
    assert loaded(IDS).dtype == torch.float16 and hidden == [torch.float32]


@pytest.mark.parametrize("name", ["scaled fp8, old", "scaled fp8, header", "nvfp4, header", "nf4, nested"])
def test_all_in_one_files(name: str, tmp_path: Path) -> None:
    """Markers, side tensors and the header's description stand behind the prefix of their network."""
    write_file(tmp_path / "alone.safetensors", network(SMALL), name, "original")
    alone = open_tensors(tmp_path / "alone.safetensors")
    prefix, metadata = "model.diffusion_model.", dict(alone.metadata)
    if "_quantization_metadata" in metadata:
        about = json.loads(metadata["_quantization_metadata"])
        about["layers"] = {prefix + layer: value for layer, value in about["layers"].items()}
        metadata["_quantization_metadata"] = json.dumps(about)
    tensors = {prefix + key: alone[key] for key in alone}
    tensors |= {f"vae.{key}": t for key, t in randomise(Autoencoder(AUTOENCODER)).state_dict().items()}
    write_tensors(tmp_path / "all.safetensors", tensors, metadata)
    one, other = empty(SMALL), empty(SMALL)
    load_into(one, tmp_path / "alone.safetensors")
    report = load_into(other, tmp_path / "all.safetensors")
    assert report.problems == {} and report.packed == {WRITERS[name][1]: len(packed_layers(one))}
    for layer, theirs in zip(packed_layers(one).values(), packed_layers(other).values(), strict=True):
        assert torch.equal(layer.dense(), theirs.dense())
    parts = {part.network: part for part in inspect(tmp_path / "all.safetensors").parts}
    assert parts["Flux1"].format == WRITERS[name][1]
    assert all(problem.startswith("missing beside it") for problem in parts["Flux1"].problems)


def test_full_size(manifest: Callable[[str], dict[str, list[int]]], tmp_path: Path) -> None:
    """FLUX.1 dev in scaled float8: every published key, in a file of holes; told from the header in a moment."""
    header, end = {}, 0

    def add(key: str, shape: list[int], dtype: str, size: int) -> None:
        nonlocal end
        start, end = end, end + math.prod(shape) * size
        header[key] = entry(start, end, dtype, shape)

    matrices = 0
    for key, shape in manifest("bfl-flux1-dev").items():
        if len(shape) == 2:
            matrices += 1
            add(f"{key.removesuffix('weight')}weight_scale", [], "F32", 4)
    for key, shape in manifest("bfl-flux1-dev").items():
        add(key, shape, "F8_E4M3" if len(shape) == 2 else "BF16", 1 if len(shape) == 2 else 2)
    order = sorted(header, key=lambda key: header[key]["data_offsets"][0])
    path = tmp_path / "full.safetensors"
    with path.open("wb") as file:
        file.write(raw({key: header[key] for key in order}))
        file.truncate(file.tell() + end)
    with torch.device("meta"):
        model = Flux1(VARIANTS["flux1-dev"].transformer)
    report = compare(model, open_tensors(path))
    assert report.problems == {} and report.packed == {"fp8 scaled": matrices}
    contents = contents_of(open_tensors(path))
    assert sum(math.prod(e.shape) for e in contents.entries.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["fp8_scaled_old", "nf4", "Q8_0"])
def test_a_pipeline_from_a_packed_file(name: str, tmp_path: Path) -> None:
    """`miniflux.load` takes a packed transformer as any other; the picture is near that of the plain weights."""
    source, form = open_tensors(BUNDLED / "flux1-nano-dev.safetensors"), FORMATS[name]
    packed: dict[str, dict[str, Tensor]] = {}
    for key in source:
        if source[key].ndim == 2 and form.holds(tuple(source[key].shape)):
            packed[key.removesuffix(".weight")] = form.pack(source[key])
    path = tmp_path / ("mine.gguf" if name == "Q8_0" else "mine.safetensors")
    if name == "Q8_0":
        writer = gguf.GGUFWriter(path, "flux")
        writer.add_string("axes_dim", source.metadata["axes_dim"])
        for key in source:
            layer = packed.get(key.removesuffix(".weight"))
            if layer is not None:
                writer.add_tensor(key, layer["weight"].numpy(), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(key, source[key].float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        tensors = {key: source[key] for key in source if key.removesuffix(".weight") not in packed}
        tensors |= {f"{layer}.{part}": t for layer, parts in packed.items() for part, t in parts.items()}
        write_tensors(path, tensors | form.markers(), {**source.metadata, **form.header(packed)})
    settings = {"seed": 0, "steps": 2, "width": 64, "height": 64}
    pipe = miniflux.load(path, weights=BUNDLED)
    assert len(packed_layers(pipe.transformer)) == len(packed) and pipe.dtype == torch.float32
    drawn = pipe.generate("a red circle on a blue background", **settings).latents
    plain = miniflux.load("nano").generate("a red circle on a blue background", **settings).latents
    relative = float((drawn - plain).norm() / plain.norm())
    assert 0 < relative < {"fp8_scaled_old": 0.1, "nf4": 0.3, "Q8_0": 0.03}[name]
