"""Every format x layout: loaded, equal to the format's own reference, packed in memory, everything accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from miniflux.checkpoints import QuantizedLinear, from_layout, inspect, load_into, open_tensors
from miniflux.checkpoints.formats.ggml import BLOCKS
from miniflux.checkpoints.layouts import counterparts
from miniflux.checkpoints.loading import fetch, take_packed_layers
from miniflux.checkpoints.quantized import packed_layers
from miniflux.models.flux1 import Flux1
from tests.checkpoints.formats.made import SMALL, WIDE, WRITERS, empty, network, write_file, write_gguf
from tests.tiny import flux1_inputs

LAYOUTS = ("original", "diffusers")


@pytest.fixture(scope="module")
def small() -> Flux1:
    return network(SMALL)


@pytest.fixture(scope="module")
def wide() -> Flux1:
    return network(WIDE)


def unpacked(module: Flux1) -> dict[str, Tensor]:
    """The state dict of a network, as if no layer were packed."""
    layers = packed_layers(module)
    state = {key: t for key, t in module.state_dict().items() if key.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        state[f"{name}.weight"] = layer.dense()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    return state


def assert_holds(loaded: Flux1, dense: dict[str, Tensor], layout: str) -> None:
    """The weights are these, bitwise; and the network computes what it computes with them unpacked."""
    expected = empty(loaded.config)
    expected.load_state_dict(from_layout(expected, dense, layout), assign=True)
    state = unpacked(loaded)
    assert state.keys() == expected.state_dict().keys()
    assert [key for key, tensor in expected.state_dict().items() if not torch.equal(state[key], tensor)] == []
    with torch.inference_mode():
        inputs = flux1_inputs(loaded.config)
        assert torch.equal(loaded(**inputs), expected(**inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WRITERS)
def test_safetensors(small: Flux1, name: str, layout: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    dense = write_file(path, small, name, layout)
    loaded = empty(SMALL)
    report = load_into(loaded, path)
    assert report.problems == {}
    source = open_tensors(path)
    assert sorted([*report.used, *report.redundant]) == sorted(source)
    assert report.packed == {WRITERS[name][1]: sum(tensor.ndim == 2 for tensor in dense.values())}
    assert_holds(loaded, dense, layout)
    (part,) = inspect(path).parts
    assert (part.variant.split(" (")[0], part.layout, part.problems) == ("a FLUX.1 of another size", layout, [])
    assert part.parameters == sum(tensor.numel() for tensor in dense.values())
    assert part.format == WRITERS[name][1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*BLOCKS, "F16", "BF16", "F32"])
def test_gguf(wide: Flux1, kind: str, layout: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    dense = write_gguf(path, wide, kind, layout)
    loaded = empty(WIDE)
    report = load_into(loaded, path, dtype=torch.float32)
    assert report.problems == {} and sorted(report.used) == sorted(open_tensors(path))
    assert_holds(loaded, dense, layout)
    kinds = {stored.format.name for layer in packed_layers(loaded).values() for stored in layer.stored}
    assert kinds - {"plain"} == ({kind} if kind in BLOCKS else set())


@pytest.mark.parametrize("name", WRITERS)
def test_packed_bytes_stay_packed(small: Flux1, name: str, tmp_path: Path) -> None:
    """No memory beside the file's own: every part is a view of it, whatever dtype is asked for."""
    path = tmp_path / "a.safetensors"
    write_file(path, small, name, "original")
    source, loaded = open_tensors(path), empty(SMALL)
    load_into(loaded, source, dtype=torch.bfloat16)
    for layer in packed_layers(loaded).values():
        for buffer, key in layer.origins.items():
            tensor = layer.get_buffer(buffer)
            assert tensor.dtype == source.entries[key].dtype
            assert tensor.data_ptr() == source[key].data_ptr()
    loaded.to(torch.float16)
    for layer in packed_layers(loaded).values():
        assert all(layer.get_buffer(b).dtype == source.entries[k].dtype for b, k in layer.origins.items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WRITERS)
def test_by_hand(small: Flux1, name: str, layout: str, tmp_path: Path) -> None:
    """What streaming does: packed layers first, then each tensor of the state dict by its origin, into given memory."""
    path = tmp_path / "a.safetensors"
    dense = write_file(path, small, name, layout)
    source, loaded = open_tensors(path), empty(SMALL)
    assert take_packed_layers(loaded, source) == layout
    assert any(isinstance(module, QuantizedLinear) for module in loaded.modules())
    assert all(tensor.is_meta for tensor in loaded.state_dict().values())
    state = {}
    for key, origin in counterparts(loaded, layout).items():
        meta = loaded.state_dict()[key]
        state[key] = fetch(source, origin, tuple(meta.shape), out=torch.empty_like(meta, device="cpu"))
    loaded.load_state_dict(state, assign=True)
    assert_holds(loaded, dense, layout)
