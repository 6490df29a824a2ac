"""Strict loading: one report of everything, no copies, and a module that a failure leaves as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miniflux.checkpoints import files, load_into, open_tensors, save, to_layout
from miniflux.checkpoints.loading import is_finite
from miniflux.errors import CheckpointError
from miniflux.models.flux1 import Flux1
from tests.tiny import FLUX1, flux1_inputs, randn, randomise

QKV = "double_blocks.1.img_attn.qkv.weight"
SCALE = "single_blocks.0.norm.key_norm.scale"
LAYOUTS = ("original", "diffusers")


@pytest.fixture(scope="module")
def model() -> Flux1:
    return randomise(Flux1(FLUX1))


def empty() -> Flux1:
    with torch.device("meta"):
        return Flux1(FLUX1)


def equal(module: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    state = module.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[key], tensors[key]) for key in state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_the_meta_device(model: Flux1, layout: str, tmp_path: Path) -> None:
    """Loaded weights are those that were saved, the report names every tensor, and the network computes the same."""
    path = tmp_path / "a.safetensors"
    save(model, path, layout=layout)
    other = empty()
    report = load_into(other, path)
    assert (report.layout, report.problems, report.dtypes) == (layout, {}, {"float32": len(report.used)})
    assert sorted(report.used) == sorted(load_file(path))
    assert str(report) == f"{path}: {len(report.used)} tensors, all used (layout: {layout})"
    assert equal(other, model.state_dict())
    with torch.inference_mode():
        assert torch.equal(other(**flux1_inputs(FLUX1)), model(**flux1_inputs(FLUX1)))


def test_a_file_a_folder_an_index_a_dict(model: Flux1, tmp_path: Path) -> None:
    """Whatever holds the tensors, the network is the same."""
    state = model.state_dict()
    keys, index = list(state), {}
    for i in range(3):
        part = keys[i::3]
        save_file({key: state[key] for key in part}, tmp_path / f"m-{i}.safetensors")
        index |= dict.fromkeys(part, f"m-{i}.safetensors")
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}), "utf-8")
    for source in (path, tmp_path, str(tmp_path), dict(state), open_tensors(path)):
        other = empty()
        load_into(other, source)
        assert equal(other, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_weights_are_views_of_the_mapped_file(model: Flux1, dtype: torch.dtype, tmp_path: Path) -> None:
    """A copy would double the memory of a 24 GB checkpoint."""
    path = tmp_path / "a.safetensors"
    save(Flux1(FLUX1).to(dtype), path)
    for asked in (None, dtype):
        other, source = empty(), open_tensors(path)
        load_into(other, source, device="cpu", dtype=asked)
        for key, tensor in other.state_dict().items():
            assert (tensor.dtype, tensor.data_ptr()) == (dtype, source[key].data_ptr())


def test_what_needs_no_copy_in_another_layout_is_a_view_too(model: Flux1, tmp_path: Path) -> None:
    """Only joined rows and swapped halves are new memory."""
    path = tmp_path / "a.safetensors"
    save(model, path, layout="diffusers")
    other, source = empty(), open_tensors(path)
    load_into(other, source)
    mapped = {source[key].data_ptr() for key in source}
    copied = [key for key, tensor in other.state_dict().items() if tensor.data_ptr() not in mapped]
    kinds = {key.split(".", 2)[-1].rsplit(".", 1)[0] for key in copied}
    assert kinds == {"img_attn.qkv", "txt_attn.qkv", "linear1", "1"}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("large", [1, 10**9])
def test_memory_of_their_own_for_large_tensors(
    model: Flux1, large: int, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in pages that the system lends are the same ones, may be written to, and outlive the call."""
    monkeypatch.setattr(files, "LARGE", large)
    path = tmp_path / "a.safetensors"
    save(model, path, layout="diffusers")
    other = empty()
    load_into(other, path, dtype=dtype)
    assert equal(other, {key: tensor.to(dtype) for key, tensor in model.state_dict().items()})
    with torch.no_grad():
        other.get_parameter(QKV).fill_(2.0)
    assert other.get_parameter(QKV).sum() == 2.0 * other.get_parameter(QKV).numel()


def test_fresh_memory() -> None:
    """Of any size and shape, the empty and the scalar among them."""
    for shape in ((), (0,), (0, 5), (3, 5), (1024, 1025), (2**22 + 1,)):
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.bool):
            made = files.fresh(shape, dtype)
            assert (made.shape, made.dtype, made.is_contiguous()) == (torch.Size(shape), dtype, True)
            made.view(torch.uint8).fill_(1) if shape else made.fill_(1)
    assert files.fresh((2**23,), torch.uint8, "meta").is_meta


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_to_a_loaded_weight_leaves_the_file_alone(model: Flux1, layout: str, tmp_path: Path) -> None:
    """Training or merging an adapter in place must not eat the checkpoint."""
    path = tmp_path / "a.safetensors"
    save(model, path, layout=layout)
    before = path.read_bytes()
    other = empty()
    load_into(other, path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2).add_(1)
    assert path.read_bytes() == before
    again = empty()
    load_into(again, path)
    assert equal(again, model.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_dtypes(layout: str, stored: torch.dtype, asked: torch.dtype | None, tmp_path: Path) -> None:
    """A file keeps its dtype unless another is asked for; then every weight is rounded exactly once."""
    model = randomise(Flux1(FLUX1)).to(stored)
    path = tmp_path / "a.safetensors"
    save(model, path, layout=layout)
    other = empty()
    load_into(other, path, dtype=asked)
    assert equal(other, {key: tensor.to(asked or stored) for key, tensor in model.state_dict().items()})
    assert {p.dtype for p in other.parameters()} == {asked or stored}


def test_parts_of_one_linear_in_different_dtypes(model: Flux1, tmp_path: Path) -> None:
    """Joined in float32, so that none is rounded to the dtype of its neighbour."""
    theirs = to_layout(model, model.state_dict(), "diffusers")
    half = {key: t.bfloat16() if ".to_q." in key or ".proj_mlp." in key else t.clone() for key, t in theirs.items()}
    save_file(half, tmp_path / "a.safetensors")
    expected, from_dict, from_file = dict(model.state_dict()), empty(), empty()
    load_into(from_dict, half)
    load_into(from_file, tmp_path / "a.safetensors")
    assert equal(from_file, from_dict.state_dict())
    hidden, state = FLUX1.hidden_size, from_file.state_dict()
    assert torch.equal(state[QKV][:hidden], expected[QKV][:hidden].bfloat16().float())
    assert torch.equal(state[QKV][hidden:], expected[QKV][hidden:])


def test_float8_files_are_widened(model: Flux1, tmp_path: Path) -> None:
    """Plain float8 files hold weights without scales; their values are taken as they are, those of linears stay so."""
    small = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in model.state_dict().items()}
    save_file(small, tmp_path / "a.safetensors")
    other = empty()
    report = load_into(other, tmp_path / "a.safetensors", dtype=torch.bfloat16)
    assert report.dtypes == {"float8_e4m3fn": len(small)}
    state = other.state_dict()
    assert {key for key in state if state[key].dtype == torch.float8_e4m3fn} == {k for k in small if small[k].ndim == 2}
    assert {t.dtype for t in state.values() if t.ndim == 1} == {torch.bfloat16}
    assert all(torch.equal(tensor.bfloat16(), small[key].bfloat16()) for key, tensor in state.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_report_lists_every_missing_unused_misshapen_key(model: Flux1, layout: str, tmp_path: Path) -> None:
    """A user who mends one key at a time gives up."""
    tensors = to_layout(model, model.state_dict(), layout)
    names = {
        "original": ("img_in.weight", QKV, "final_layer.linear.bias", SCALE),
        "diffusers": (
            "x_embedder.weight",
            "transformer_blocks.1.attn.to_k.weight",
            "proj_out.bias",
            "single_transformer_blocks.0.attn.norm_k.weight",
        ),
    }[layout]
    missing, part, misshapen, scalar = names
    del tensors[missing], tensors[part]
    tensors |= {misshapen: randn(3), scalar: torch.tensor(1.0), "extra.one": randn(1), "extra.two": randn(1)}
    path = tmp_path / "a.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError) as caught:
        load_into(empty(), path)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{path}: 2 missing, such as img_in.weight")
    assert lines[0].endswith(f"(layout: {layout})")
    here = {key: "" if layout == "original" else f" (here: {name})" for key, name in zip((QKV,), (part,), strict=True)}
    assert set(lines[1:]) == {
        f"  missing: img_in.weight{'' if layout == 'original' else f' (here: {missing})'}",
        f"  missing: {QKV}{here[QKV]}",
        "  unused: extra.one",
        "  unused: extra.two",
        "  misshapen: final_layer.linear.bias: [3] in the file, [16] expected",
        f"  misshapen: {SCALE}: [] in the file, [16] expected",
    } | ({f"  unused: {name}" for name in split(tensors, part)} if layout == "diffusers" else set())


def split(tensors: Mapping[str, Tensor], part: str) -> list[str]:
    """q and v of a linear whose k is missing: nothing uses them then."""
    return [part.replace("to_k", other) for other in ("to_q", "to_v") if part.replace("to_k", other) in tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(layout: str, value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """One NaN turns every picture black; all such tensors are named."""
    model = randomise(Flux1(FLUX1)).to(dtype)
    with torch.no_grad():
        for key in (QKV, SCALE):
            model.get_parameter(key).view(-1)[-1] = value
    path = tmp_path / "a.safetensors"
    save(model, path, layout=layout)
    with pytest.raises(CheckpointError, match=rf"^{path}: 2 not finite \(NaN or infinite\), such as {QKV}") as caught:
        load_into(empty(), path)
    assert f": {QKV}\n" in str(caught.value) and str(caught.value).endswith(f": {SCALE}")


def test_weights_too_large_for_the_dtype_asked_for_are_refused(model: Flux1) -> None:
    """float16 ends at 65504: what is finite in the file may not be afterwards."""
    state = model.state_dict() | {SCALE: torch.full((16,), 1e5)}
    load_into(empty(), state, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=f"1 not finite .* such as {SCALE}"):
        load_into(empty(), state, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("asked", [None, torch.float32])
def test_weights_stored_as_whole_numbers_are_refused(
    model: Flux1, dtype: torch.dtype, asked: torch.dtype | None
) -> None:
    """They are the codes of a quantised file; taken as values they would draw noise."""
    state = model.state_dict()
    state |= {QKV: state[QKV].to(dtype)}
    message = f"1 not floating-point, such as {QKV}: {str(dtype).removeprefix('torch.')} "
    with pytest.raises(CheckpointError, match=message):
        load_into(empty(), state, dtype=asked)


@pytest.mark.parametrize(
    "change", [{QKV: None}, {"extra": randn(1)}, {QKV: randn(2, 2)}, {SCALE: torch.full((16,), torch.nan)}]
)
def test_a_failure_leaves_the_module_as_it_was(model: Flux1, change: dict[str, Tensor | None]) -> None:
    """A half-loaded network is worse than none."""
    target = randomise(Flux1(FLUX1), seed=5)
    before, storage = (
        {k: t.clone() for k, t in target.state_dict().items()},
        {k: t.data_ptr() for k, t in target.state_dict().items()},
    )
    state = {key: tensor for key, tensor in {**model.state_dict(), **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError):
        load_into(target, state)
    assert equal(target, before)
    assert {key: tensor.data_ptr() for key, tensor in target.state_dict().items()} == storage
    meta = empty()
    with pytest.raises(CheckpointError):
        load_into(meta, state)
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_a_dict_of_tensors_is_left_alone(model: Flux1) -> None:
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = dict(state)
    load_into(empty(), state, dtype=torch.bfloat16)
    assert list(state) == list(before) and all(state[key] is before[key] for key in state)
    assert equal(model, state)


def test_an_unknown_layout_is_refused(model: Flux1) -> None:
    with pytest.raises(CheckpointError, match="no layout 'banana'; known: original, diffusers"):
        load_into(empty(), model.state_dict(), layout="banana")


def test_a_layout_that_is_named_is_not_guessed(model: Flux1) -> None:
    """So that a file that fits two layouts is read as the caller says."""
    with pytest.raises(CheckpointError, match=r"missing: img_in\.weight \(here: x_embedder\.weight\)"):
        load_into(empty(), model.state_dict(), layout="diffusers")


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (("weight._data", "weight._scale"), "optimum-quanto"),
        (("weight", "SCB", "weight_format"), "LLM.int8()"),
        (("qweight", "wscales", "lora_down", "lora_up"), "Nunchaku"),
    ],
)
def test_packings_that_are_not_read_are_named(model: Flux1, parts: tuple[str, ...], named: str, tmp_path: Path) -> None:
    """People take such files for broken ones if they only hear of keys."""
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key != QKV}
    layer = QKV.removesuffix("weight")
    save_file(
        tensors | {layer + part: torch.zeros(4, 4, dtype=torch.int8) for part in parts}, tmp_path / "a.safetensors"
    )
    with pytest.raises(CheckpointError, match="weights packed by") as error:
        load_into(empty(), tmp_path / "a.safetensors")
    assert named in str(error.value).splitlines()[0]


def test_finiteness() -> None:
    """Every dtype, empty tensors, and tensors on the meta device, which have no values."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn):
        assert is_finite(torch.ones(3).to(dtype))
        assert not is_finite(torch.tensor([1.0, torch.nan, 2.0]).to(dtype))
    assert is_finite(torch.empty(0)) and is_finite(torch.empty(3, device="meta"))


PEAK = '''
"""Load a file in a child of this process for each way of loading; say how far the memory rose above the network."""
import json, os, resource, sys, torch
from dataclasses import replace
from miniflux.checkpoints import load_into, save
from miniflux.models.flux1 import Flux1
from tests.tiny import FLUX1

torch.set_num_threads(1)
folder, config = sys.argv[1], replace(FLUX1, hidden_size=512, num_heads=4, axes_dim=(16, 56, 56), depth_single_blocks=8)
UNIT = 1 if sys.platform == "darwin" else 1024


def child(work):
    """What `work` returns, computed in a process of its own."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        with os.fdopen(writing, "w") as file:
            json.dump(work(), file)
        os._exit(0)
    os.close(writing)
    os.wait()
    with os.fdopen(reading) as file:
        return json.load(file)


def peak():
    """Highest resident memory so far. Linux's ru_maxrss may still count the process that started this one."""
    if os.path.exists("/proc/self/status"):
        lines = open("/proc/self/status").read().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def write(layout):
    model = Flux1(config).to(torch.bfloat16)
    save(model, f"{folder}/{layout}.safetensors", layout=layout)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return sum(sizes), max(sizes)


def load(layout, dtype):
    with torch.device("meta"):
        model = Flux1(config)
    before = peak()
    load_into(model, f"{folder}/{layout}.safetensors", dtype=dtype)
    return peak() - before, str(model.img_in.weight.dtype)


found = {"sizes": [child(lambda: write(layout)) for layout in ("original", "diffusers")]}
for layout in ("original", "diffusers"):
    for dtype in (None, torch.float32):
        # Pages that were let go may still count on a busy machine: the lower of two is what loading takes.
        found[f"{layout} {dtype}"] = min(child(lambda: load(layout, dtype)) for _ in range(2))
print(json.dumps(found))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="measures memory in forked processes")
def test_peak_memory_is_the_size_of_the_result_and_one_tensor(tmp_path: Path) -> None:
    """A checkpoint that fits must load: no second copy, neither of bytes nor of pages of the file."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    (size, largest), again = found.pop("sizes")
    assert [size, largest] == again and size > 60e6
    for name, (peak, dtype) in found.items():
        factor = 2 if "float32" in name else 1
        assert dtype == ("torch.float32" if "float32" in name else "torch.bfloat16")
        assert 0.5 * factor * size < peak < factor * (size + largest) + 40e6, (name, peak, size, largest)
