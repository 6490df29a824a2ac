"""GGUF files: what other programs write, and what nobody should."""

from __future__ import annotations

import struct
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniflux.checkpoints import inspect, load_into, open_tensors
from miniflux.checkpoints.formats.reading import contents_of, format_of
from miniflux.checkpoints.quantized import packed_layers
from miniflux.errors import CheckpointError, MissingExtraError
from miniflux.models.flux1 import Flux1
from tests.checkpoints import hostile
from tests.checkpoints.formats.made import WIDE, empty, network, random_blocks, write_gguf
from tests.hanging import no_hang

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


def test_vocabularies_are_left_out(tmp_path: Path) -> None:
    """Long arrays would become millions of objects; what comes behind them is read."""
    writer = one(tmp_path / "a.gguf")
    writer.add_array("texts", [f"word {i}" for i in range(1000)])
    writer.add_array("numbers", list(range(1000)))
    writer.add_array("halves", [i / 2 for i in range(1000)])
    writer.add_string("behind", "them")
    finish(writer)
    source = open_tensors(tmp_path / "a.gguf")
    assert source.metadata["behind"] == "them" and not {"texts", "numbers", "halves"} & set(source.metadata)
    raw = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(source["x.weight"].numpy(), raw)


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    """Their weights would be read as other numbers."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("x.weight", np.ones((2, 3), np.float32))
    finish(writer)
    with pytest.raises(CheckpointError, match="a.gguf: its numbers are big-endian, which are not read"):
        open_tensors(tmp_path / "a.gguf")


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


LENGTHS = st.integers(0, 40) | st.sampled_from([2**16, 2**31, 2**32, 2**60, 2**63, 2**64 - 1])
NAMES = st.binary(max_size=3) | st.sampled_from([b"a", b"b", b"comfy.gguf.orig_shape.a", b"general.alignment"])
VALUES = st.binary(max_size=12) | st.builds(struct.pack, st.just("<IQ"), st.integers(0, 12), LENGTHS)
TENSORS = st.builds(
    hostile.tensor,
    NAMES,
    st.lists(st.sampled_from([0, 1, 2, 8, 32, 256]) | LENGTHS, max_size=5).map(tuple),
    st.integers(0, 40),
    LENGTHS | st.just(0),
)


@st.composite
def changed(draw: st.DrawFn, sound: bytes) -> bytes:
    """A sound file with bytes changed or cut off anywhere; or a header made up."""
    if draw(st.booleans()):
        tensors = draw(st.lists(TENSORS, max_size=3))
        fields = draw(st.lists(st.builds(hostile.field, NAMES, st.integers(0, 13), VALUES), max_size=2))
        counts = [len(some) if draw(st.integers(0, 9)) else draw(LENGTHS) for some in (tensors, fields)]
        return hostile.gguf(
            *fields, *tensors, tensors=counts[0], fields=counts[1], data=draw(st.sampled_from([0, 64, 2000]))
        )
    content = bytearray(sound)
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, 400))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@settings(max_examples=1000)
@given(data=st.data())
def test_any_change_is_read_or_refused(
    tiny: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """1,000 damaged and made-up files: a CheckpointError of one line, or what the package reads."""
    content = data.draw(changed(tiny))
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    with no_hang():
        try:
            source = open_tensors(path)
        except CheckpointError as error:
            source = str(error)
    if isinstance(source, str):
        assert source.startswith(str(path)) and source.isprintable() and len(source) < 1500
        return
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(expected) == set(source)
    for key, tensor in expected.items():
        assert source[key].shape == source.entries[key].shape
        assert bytes(source[key].contiguous().view(-1).view(torch.uint8).numpy()) == tensor.data.tobytes()
    contents_of(source)
