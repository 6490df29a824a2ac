"""GGUF files: what other programs write, and what nobody should."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miniflux.checkpoints import inspect, load_into, open_tensors
from miniflux.checkpoints.formats.reading import contents_of, format_of
from miniflux.checkpoints.quantized import packed_layers
from miniflux.errors import CheckpointError, MissingExtraError
from miniflux.models.flux1 import Flux1
from tests.checkpoints.formats.made import WIDE, empty, network, random_blocks, write_gguf

LAYER = "double_blocks.0.img_mlp.0"


@pytest.fixture(scope="module")
def model() -> Flux1:
    return network(WIDE)


@pytest.fixture(scope="module")
def sound(model: Flux1, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write_gguf(path, model, "Q4_K", "original")
    return path


def one(
    path: Path, kind: str = "Q8_0", shape: tuple[int, ...] = (4, 64), raw: np.ndarray | None = None
) -> gguf.GGUFWriter:
    """A writer with one tensor, `x.weight`."""
    writer = gguf.GGUFWriter(path, "flux")
    wanted = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(np.ones(shape, np.float32), wanted) if raw is None else raw
    writer.add_tensor("x.weight", data, raw_dtype=wanted)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_entries_of_a_file(sound: Path) -> None:
    """Axes are in the order of torch, packed tensors are rows of bytes, metadata are strings."""
    source = open_tensors(sound)
    entry = source.entries[f"{LAYER}.weight"]
    assert (entry.dtype, entry.shape, entry.block, entry.unpacked) == (torch.uint8, (256, 144), "Q4_K", (256, 256))
    assert source.entries["img_in.weight"].shape == (256, 64)
    assert source.metadata["general.architecture"] == "flux"
    buffer = torch.empty(256, 144, dtype=torch.uint8)
    source.read(f"{LAYER}.weight", buffer)
    assert torch.equal(buffer, source[f"{LAYER}.weight"])
    assert contents_of(source).entries[f"{LAYER}.weight"].shape == (256, 256)


def test_files_of_stable_diffusion_cpp_state_no_architecture(model: Flux1, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", model, "Q8_0", "original", architecture=None)
    assert "general.architecture" not in open_tensors(tmp_path / "a.gguf").metadata
    assert load_into(empty(WIDE), tmp_path / "a.gguf").problems == {}


def test_a_folder_with_one_file(sound: Path) -> None:
    assert [file.path for file in open_tensors(sound.parent).files] == [sound]
    (part,) = inspect(sound.parent).parts
    assert (part.network, part.layout, part.problems) == ("Flux1", "original", [])


def test_the_stated_type_names_the_format(sound: Path, tmp_path: Path) -> None:
    writer = one(tmp_path / "a.gguf")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_S)
    finish(writer)
    assert format_of(open_tensors(tmp_path / "a.gguf")) == "GGUF Q4_K_S"
    assert format_of(open_tensors(sound)) == "GGUF Q4_K"
    assert "GGUF Q4_K (" in str(inspect(sound))


def test_rows_that_fit_no_block_are_stored_as_others(tmp_path: Path) -> None:
    """`comfy.gguf.orig_shape`: a weight of 24 x 96 as nine rows of 256; and a plain tensor likewise."""
    config = replace(WIDE, hidden_size=96, num_heads=6, vec_in_dim=96, context_in_dim=96)
    small = network(config)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    expected = {}
    for key, weight in small.state_dict().items():
        if weight.ndim == 2 and weight.numel() % 256 == 0:
            raw = gguf.quants.quantize(weight.numpy().reshape(-1, 256), gguf.GGMLQuantizationType.Q8_0)
            expected[key] = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0))
            expected[key] = expected[key].view(weight.shape)
            writer.add_tensor(key, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(weight.shape))
        else:
            writer.add_tensor(key, weight.numpy())
    writer.add_array("comfy.gguf.orig_shape.img_in.bias", [96])
    finish(writer)
    loaded = empty(config)
    load_into(loaded, tmp_path / "a.gguf")
    layers = packed_layers(loaded)
    assert {f"{name}.weight" for name in layers} == expected.keys() and len(expected) > 10
    assert all(torch.equal(layer.dense(), expected[f"{name}.weight"]) for name, layer in layers.items())


def test_false_shapes_are_refused(tmp_path: Path) -> None:
    writer = one(tmp_path / "a.gguf")
    writer.add_array("comfy.gguf.orig_shape.x.weight", [5, 5])
    finish(writer)
    with pytest.raises(CheckpointError, match=r"orig_shape.x.weight is \[5, 5\], stored is \[4, 64\]"):
        open_tensors(tmp_path / "a.gguf")


def test_scales_inside_the_blocks_must_be_finite(model: Flux1, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, model, "Q5_K", "original")
    entry = open_tensors(path).entries[f"{LAYER}.weight"]
    content = bytearray(path.read_bytes())
    content[entry.start + 2 : entry.start + 4] = np.float16("nan").tobytes()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"not finite.*{LAYER}.weight \(its GGUF Q5_K scales\)"):
        load_into(empty(WIDE), path)


def test_types_that_are_not_read(tmp_path: Path) -> None:
    raw = np.zeros((1, 66), np.uint8)
    finish(one(tmp_path / "a.gguf", "IQ2_XXS", raw=raw))
    with pytest.raises(CheckpointError, match=r"'x.weight' is of type IQ2_XXS, which is not read; read are .*Q4_K"):
        open_tensors(tmp_path / "a.gguf")


def test_the_extra_is_named(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"miniflux\[gguf\]"):
        open_tensors(sound)


def test_a_huge_array_in_the_header(tmp_path: Path) -> None:
    """Millions of values would become millions of objects."""
    writer = one(tmp_path / "a.gguf")
    writer.add_array("tokens", [1, 2, 3])
    finish(writer)
    content = (tmp_path / "a.gguf").read_bytes()
    place = content.index(b"tokens") + 6 + 4 + 4
    for length in (2**21, 2**40, 2**63):
        (tmp_path / "b.gguf").write_bytes(
            content[:place] + length.to_bytes(8, "little") + content[place + 8 :] + bytes(2**22)
        )
        start = time.monotonic()
        with pytest.raises(CheckpointError, match="b.gguf: not a GGUF file, or cut off"):
            open_tensors(tmp_path / "b.gguf")
        assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"\x08" + b"\0" * 30, b"GGUF" * 99]
)
def test_no_gguf_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="a.gguf"):
        open_tensors(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="no such file|cannot be read"):
        open_tensors(tmp_path / "none.gguf")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tiny") / "a.gguf"
    writer = one(path, "Q4_K", raw=random_blocks("Q4_K", 2, 256))
    writer.add_string("axes_dim", "[4, 6, 6]")
    writer.add_array("comfy.gguf.orig_shape.x.weight", [1, 512])
    finish(writer)
    return path.read_bytes()


@given(data=st.data())
def test_any_change_is_read_or_refused(
    tiny: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes changed or cut off anywhere: a CheckpointError, or tensors that lie within the file."""
    content = bytearray(tiny)
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(content)
    try:
        source = open_tensors(path)
    except CheckpointError:
        return
    for key in source:
        assert source[key].shape == source.entries[key].shape
    contents_of(source)
