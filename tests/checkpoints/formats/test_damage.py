"""Packed weights that cannot be read as they are meant: refused by name, and the network is left as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miniflux.checkpoints import load_into, open_tensors, save
from miniflux.checkpoints.loading import compare
from miniflux.errors import CheckpointError
from tests.checkpoints.formats.made import SMALL, WRITERS, empty, network, text, write_file

LAYER = "double_blocks.0.img_mlp.0"
WEIGHT = f"{LAYER}.weight"
NF4_STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensors, dict[str, str]]]:
    """A sound file of every format: its tensors and its metadata."""
    found, model = {}, network(SMALL)
    for name in WRITERS:
        path = tmp_path_factory.mktemp("sound") / "a.safetensors"
        write_file(path, model, name, "original")
        found[name] = (load_file(path), open_tensors(path).metadata)
    return found


def refused(path: Path, tensors: Tensors, metadata: dict[str, str], message: str) -> None:
    save_file(tensors, path, metadata=metadata)
    target = empty(SMALL)
    before = dict(target.named_modules())
    with pytest.raises(CheckpointError, match=message) as error:
        load_into(target, path)
    assert str(error.value).startswith(str(path))
    assert dict(target.named_modules()) == before and all(t.is_meta for t in target.state_dict().values())


def without(part: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(f"{LAYER}.{part}")


def put(part: str, value: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{LAYER}.{part}": value})


def state(**changes: object) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        about = json.loads(bytes(tensors[NF4_STATE].tolist())) | changes
        tensors[NF4_STATE] = text({key: value for key, value in about.items() if value is not None})

    return change


NAN = torch.tensor(float("nan"))
DAMAGE: list[tuple[str, Callable[[Tensors], Any], str]] = [
    ("scaled fp8, old", without("scale_weight"), f"{WEIGHT}: weight_scale .or scale_weight. is missing"),
    ("scaled fp8, old", put("scale_weight", torch.ones(3)), f"{WEIGHT}: scale_weight has the shape .3., expected .., "),
    ("scaled fp8, old", put("scale_weight", NAN), f"not finite.*{LAYER}.scale_weight"),
    ("scaled fp8, old", put("scale_weight", torch.tensor(1)), f"{WEIGHT}: scale_weight is stored as int64"),
    ("scaled fp8, old", put("weight_scale", torch.tensor(1.0)), f"{WEIGHT}: has both scale_weight and weight_scale"),
    ("scaled fp8, old", put("scale_output", torch.tensor(1.0)), f"1 unused, such as {LAYER}.scale_output"),
    ("scaled fp8, comfy_quant", without("weight_scale"), f"{WEIGHT}: weight_scale is missing"),
    ("scaled fp8, comfy_quant", put("comfy_quant", text("?")), f"{WEIGHT}: comfy_quant is no JSON object"),
    (
        "scaled fp8, comfy_quant",
        put("comfy_quant", torch.zeros(4, dtype=torch.uint8)),
        f"{WEIGHT}: comfy_quant is no JSON",
    ),
    (
        "scaled fp8, comfy_quant",
        put("comfy_quant", text({"format": "mxfp8"})),
        f"{WEIGHT}: comfy_quant names .*'mxfp8'",
    ),
    ("scaled fp8, comfy_quant", put("comfy_quant", text({"format": "nvfp4"})), f"{WEIGHT}: weight is said to be nvfp4"),
    ("scaled fp8, comfy_quant", put("weight_scale", torch.ones(2, 2)), f"{WEIGHT}: weight_scale has the shape .2, 2."),
    ("scaled fp8, header", without("weight_scale"), f"{WEIGHT}: weight_scale is missing"),
    ("fp8 by rows", without("weight_scale"), f"{WEIGHT}: weight_scale .or scale_weight. is missing"),
    ("fp8 by rows", put("weight_scale", torch.full((256,), torch.inf)), f"not finite.*{LAYER}.weight_scale"),
    ("fp8 e4m3", put("weight", torch.full((256, 64), 127, dtype=torch.uint8).view(torch.float8_e4m3fn)), "not finite"),
    ("fp8 e5m2", put("weight", torch.full((256, 64), torch.inf).to(torch.float8_e5m2)), f"not finite.*{WEIGHT}"),
    (
        "fp8 e4m3",
        put("weight", torch.zeros(256, 60).to(torch.float8_e4m3fn)),
        f"1 misshapen, such as {WEIGHT}: .256, 60.",
    ),
    ("int8", without("weight_scale"), f"{WEIGHT}: weight_scale is missing"),
    ("int8", put("weight_scale", torch.ones(64, 1)), f"{WEIGHT}: weight_scale has the shape .64, 1."),
    ("int8", put("comfy_quant", text({"format": "int8_tensorwise", "convrot": True})), f"{WEIGHT}: .*rotated weights"),
    ("nf4", without("weight.absmax"), f"{WEIGHT}: weight.absmax is missing"),
    ("nf4", without("weight.quant_map"), f"{WEIGHT}: weight.quant_map is missing"),
    ("nf4", without("weight.quant_state.bitsandbytes__nf4"), f"{WEIGHT}: .*bitsandbytes__nf4 .or fp4. is missing"),
    ("nf4", put("weight.absmax", torch.ones(5)), f"{WEIGHT}: weight.absmax has the shape .5., expected .256."),
    ("nf4", put("weight.absmax", torch.full((256,), torch.nan)), f"not finite.*{LAYER}.weight_absmax"),
    (
        "nf4",
        put("weight", torch.zeros(9, 1, dtype=torch.uint8)),
        f"{WEIGHT}: weight has the shape .9, 1., expected .8192",
    ),
    ("nf4", state(shape=[64, 256]), f"1 misshapen, such as {WEIGHT}: .64, 256. in the file, .256, 64. expected"),
    ("nf4", state(shape=None), f"{WEIGHT}: weight.quant_state.* says shape None"),
    ("nf4", state(shape=[-256, -64]), f"{WEIGHT}: weight.quant_state.* says shape"),
    ("nf4", state(shape="big"), f"{WEIGHT}: weight.quant_state.* says shape 'big'"),
    ("nf4", state(blocksize=0), f"{WEIGHT}: weight.quant_state.* says blocksize 0"),
    ("nf4", state(blocksize=2**62), f"{WEIGHT}: weight.absmax has the shape"),
    ("nf4", state(quant_type="int3"), f"{WEIGHT}: weight.quant_state.* says quant_type 'int3'"),
    ("nf4", state(nested_blocksize=256), f"{WEIGHT}: weight.quant_state.* says nested_offset None"),
    ("nf4", put(NF4_STATE.removeprefix(LAYER + "."), torch.zeros(8, dtype=torch.uint8)), f"{WEIGHT}: .* is no JSON"),
    ("nf4, nested", without("weight.nested_absmax"), f"{WEIGHT}: weight.nested_absmax is missing"),
    ("nf4, nested", without("weight.nested_quant_map"), f"{WEIGHT}: weight.nested_quant_map is missing"),
    ("nf4, nested", put("weight.nested_absmax", torch.ones(7)), f"{WEIGHT}: weight.nested_absmax has the shape .7."),
    ("nf4, nested", state(nested_offset=float("nan")), f"{WEIGHT}: "),
    ("nf4, nested", state(nested_offset="x"), f"{WEIGHT}: weight.quant_state.* says nested_offset 'x'"),
    ("nvfp4", without("weight_scale"), f"{WEIGHT}: weight_scale is missing"),
    ("nvfp4", without("weight_scale_2"), f"{WEIGHT}: weight_scale_2 is missing"),
    ("nvfp4", put("weight_scale_2", torch.ones(2)), f"{WEIGHT}: weight_scale_2 has the shape .2."),
    ("nvfp4", put("weight_scale_2", NAN), f"not finite.*{LAYER}.weight_scale_2"),
    ("nvfp4", put("weight_scale", torch.ones(256, 3).to(torch.float8_e4m3fn)), f"{WEIGHT}: weight_scale has the shape"),
    (
        "nvfp4, header",
        put("weight_scale", torch.ones(256, 3).to(torch.float8_e4m3fn)),
        f"{WEIGHT}: weight_scale has the sh",
    ),
    ("nvfp4", put("pre_quant_scale", torch.ones(64)), f"1 unused, such as {LAYER}.pre_quant_scale"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE, ids=[f"{n}-{m[-30:]}" for n, _, m in DAMAGE])
def test_side_tensors(
    files: dict[str, tuple[Tensors, dict[str, str]]],
    name: str,
    damage: Callable[[Tensors], Any],
    message: str,
    tmp_path: Path,
) -> None:
    tensors, metadata = files[name]
    tensors = dict(tensors)
    damage(tensors)
    refused(tmp_path / "b.safetensors", tensors, metadata, message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "damaged.*_quantization_metadata is no JSON"),
        ("[]", "damaged.*_quantization_metadata is no JSON object with layers"),
        (json.dumps({"layers": {LAYER: "float8_e4m3fn"}}), f"{WEIGHT}: comfy_quant is no JSON object with a format"),
        (
            json.dumps({"layers": {LAYER: {"format": "nvfp4"}}}),
            f"{WEIGHT}: weight is said to be nvfp4, stored is float8",
        ),
    ],
)
def test_header(files: dict[str, tuple[Tensors, dict[str, str]]], value: str, message: str, tmp_path: Path) -> None:
    tensors, metadata = files["scaled fp8, header"]
    refused(tmp_path / "b.safetensors", tensors, metadata | {"_quantization_metadata": value}, message)


def test_every_problem_in_one_report(files: dict[str, tuple[Tensors, dict[str, str]]]) -> None:
    """Two damaged layers, a missing one and a foreign tensor are all named, and nothing else."""
    tensors = dict(files["nf4"][0])
    del tensors[f"{WEIGHT}.absmax"], tensors["txt_in.weight.quant_map"]
    del tensors["img_in.weight"], tensors["img_in.bias"]
    tensors["foreign"] = torch.ones(1)
    report = compare(empty(SMALL), tensors)
    assert sorted(report.damaged) == [
        f"{WEIGHT}: weight.absmax is missing",
        "txt_in.weight: weight.quant_map is missing",
    ]
    assert report.missing == ["img_in.weight", "img_in.bias"]
    sides = {f"img_in.weight.{name}" for name in ("absmax", "quant_map", "quant_state.bitsandbytes__nf4")}
    assert set(report.unused) == {"foreign", *sides}


def test_what_is_not_needed_is_said(files: dict[str, tuple[Tensors, dict[str, str]]]) -> None:
    """Scales of inputs and the marker of the old form are accounted for, with the reason."""
    report = compare(empty(SMALL), files["scaled fp8, old"][0])
    layers = {key.removesuffix(".scale_weight") for key in report.used if key.endswith(".scale_weight")}
    assert report.redundant.keys() == {"scaled_fp8", *(f"{layer}.scale_input" for layer in layers)}
    assert all(report.redundant.values()) and "not needed: scaled_fp8 (" in str(report)


def test_packed_networks_are_not_saved(files: dict[str, tuple[Tensors, dict[str, str]]], tmp_path: Path) -> None:
    model = empty(SMALL)
    load_into(model, files["nf4"][0])
    with pytest.raises(CheckpointError, match="convert the file"):
        save(model, tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())
