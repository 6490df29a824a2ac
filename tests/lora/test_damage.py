"""Files that are broken, or for something else: the first line says what is wrong, and the model stays as it was."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from miniflux.errors import CheckpointError, LoraError
from miniflux.lora import attach, attached, inspect, read
from miniflux.models.flux1 import Flux1
from miniflux.variants import VARIANTS
from tests.lora.made import lora
from tests.tiny import FLUX1, flux1_inputs, randn, randomise

QKV, LINEAR1 = "double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"
DOWN, UP, ALPHA = f"{QKV}.lora_down.weight", f"{QKV}.lora_up.weight", f"{QKV}.alpha"
HIDDEN = FLUX1.hidden_size


@pytest.fixture
def network() -> Iterator[Flux1]:
    """Checked after the test: bitwise as before, and nothing attached."""
    network = randomise(Flux1(FLUX1))
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with torch.inference_mode():
        output = network(**flux1_inputs(FLUX1))
        yield network
        assert attached(network) == {}
        assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())
        assert not any(module._forward_hooks for module in network.modules())
        assert torch.equal(network(**flux1_inputs(FLUX1)), output)


def good() -> dict[str, Tensor]:
    with torch.device("meta"):
        network = Flux1(FLUX1)
    return lora(network, QKV, LINEAR1, rank=3)


def moved(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


def without(*keys: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in good().items() if key not in keys}


def poisoned(value: float, key: str = UP) -> dict[str, Tensor]:
    tensors = good()
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[0] = value
    return tensors


DAMAGE: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "nothing": (dict, "none of the 0 keys"),
    "no LoRA": (lambda: {"conv.weight": torch.ones(1)}, "none of the 1 keys is of a known LoRA dialect.*conv.weight"),
    "a whole model": (lambda: randomise(Flux1(FLUX1)).state_dict(), "none of the|mean|find no use|kind of change"),
    "only down": (lambda: without(UP), f"{QKV} has {DOWN} but lacks its up"),
    "only up": (lambda: without(DOWN), f"{QKV} has {UP} but lacks its down"),
    "only alpha": (lambda: without(DOWN, UP), f"{QKV} has only alpha"),
    "half of LoHa": (lambda: {f"{QKV}.hada_w1_a": torch.ones(96, 2), f"{QKV}.hada_w1_b": torch.ones(2, 32)},
                     "lacks its hada_w2_a and hada_w2_b"),
    "half of LoKr": (lambda: {f"{QKV}.lokr_w1": torch.ones(4, 4), f"{QKV}.lokr_w2_a": torch.ones(24, 2)},
                     r"lacks its lokr_w2 \(or both of lokr_w2_a and lokr_w2_b\)"),
    "LoRA and LoHa": (lambda: {**good(), f"{QKV}.hada_w1_a": torch.ones(96, 2)}, f"{QKV} has LoRA and LoHa"),
    "LoRA and diff": (lambda: {**good(), f"{QKV}.diff": torch.ones(96, 32)}, f"{QKV} has LoRA and diff"),
    "ranks": (lambda: {**good(), UP: torch.ones(96, 4)}, rf"ranks of {QKV} disagree: down \[3, 32\] says 3, .* says 4"),
    "ranks of LoHa": (lambda: {f"{QKV}.hada_w1_a": torch.ones(96, 2), f"{QKV}.hada_w1_b": torch.ones(3, 32),
                               f"{QKV}.hada_w2_a": torch.ones(96, 2), f"{QKV}.hada_w2_b": torch.ones(2, 32)},
                      f"ranks of {QKV} disagree"),
    "NaN": (lambda: poisoned(float("nan")), f"{UP} holds numbers that are not finite"),
    "infinity": (lambda: poisoned(float("-inf"), DOWN), f"{DOWN} holds numbers that are not finite"),
    "alpha NaN": (lambda: {**good(), ALPHA: torch.tensor(float("nan"))}, f"{ALPHA} holds numbers that are not finite"),
    "alpha 0": (lambda: {**good(), ALPHA: torch.tensor(0.0)}, f"the alpha of {QKV} is 0"),
    "alpha of the wrong kind": (lambda: {**good(), ALPHA: torch.tensor(True)}, f"{ALPHA} has the dtype bool"),
    "rank 0": (lambda: {**good(), DOWN: torch.ones(0, 32), UP: torch.ones(96, 0)},
               r"lora_\w+.weight holds no numbers: its shape is"),
    "another shape than it says": (lambda: {**good(), f"{QKV}.reshape_weight": torch.tensor([96, 64])},
                                   rf"{QKV}.reshape_weight says \[96, 64\], its change is 96x32"),
    "alpha twice": (lambda: {**good(), ALPHA: torch.ones(2)}, rf"the alpha of {QKV} has the shape \[2\]"),
    "integers": (lambda: {**good(), UP: torch.ones(96, 3, dtype=torch.int8)}, f"{UP} has the dtype int8"),
    "no matrix": (lambda: {**good(), UP: torch.ones(96)}, rf"the up of {QKV} has the shape \[96\]"),
    "a real convolution": (lambda: {**good(), UP: torch.ones(96, 3, 3, 3)}, rf"the up of {QKV} has the shape"),
    "zero": (lambda: {key: torch.zeros_like(t) if "up" in key else t for key, t in good().items()},
             "all of its 2 changes are zero"),
    "block number": (lambda: moved(good(), "double_blocks.0", "double_blocks.7"),
                     r"no double_blocks.7.img_attn.qkv: it has 2 double blocks, counted from 0"),
    "two dialects": (lambda: {**good(), "lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight": torch.ones(2, 32),
                              "lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight": torch.ones(96, 2)},
                     "mixes dialects.*BFL: 2 modules.*kohya: 1 modules"),
    "two names for one tensor": (lambda: {**good(), f"{QKV}.lora_A.weight": torch.ones(3, 32)},
                                 f"both give the down of {QKV}"),
    "an unknown key": (lambda: {**good(), "foo.bar": torch.ones(1)}, "1 of its 7 tensors find no use: foo.bar"),
    "an unknown module": (lambda: {**good(), "double_blocks.0.img_attn.gate.lora_down.weight": torch.ones(1, 2)},
                          "1 of its 7 tensors find no use: double_blocks.0.img_attn.gate.lora_down.weight"),
    "width": (lambda: {**good(), DOWN: torch.ones(3, 31)}, f"{QKV}: its change is 96x31, {QKV} wants 96x32"),
    "height": (lambda: {**good(), UP: torch.ones(95, 3)}, f"{QKV}: its change is 95x32, {QKV} wants 96x32"),
    "bias": (lambda: {**good(), f"{QKV}.diff_b": torch.ones(95)},
             rf"{QKV}: its bias has the shape \[95\], expected \[96\]"),
    "magnitude": (lambda: {**good(), f"{QKV}.dora_scale": torch.ones(95, 1)},
                  rf"{QKV}: its DoRA magnitude has the shape \[95, 1\], expected \[96, 1\] or \[1, 32\]"),
    "LoHa that contradicts itself": (
        lambda: {f"{QKV}.hada_w1_a": torch.ones(96, 2), f"{QKV}.hada_w1_b": torch.ones(2, 32),
                 f"{QKV}.hada_w2_a": torch.ones(95, 2), f"{QKV}.hada_w2_b": torch.ones(2, 32)},
        f"{QKV}: its change is"),
    "a diff of one row": (lambda: {f"{QKV}.diff": torch.ones(32)}, f"{QKV}: its change is"),
    "LoRA of a norm": (lambda: {"single_blocks.0.norm.key_norm.lora_down.weight": torch.ones(2, 16),
                                "single_blocks.0.norm.key_norm.lora_up.weight": torch.ones(16, 2)},
                       "LoRA tensors do not fit single_blocks.0.norm.key_norm"),
    "norm of another size": (lambda: {"single_blocks.0.norm.key_norm.scale": torch.ones(9)},
                             r"has the shape \[9\], single_blocks.0.norm.key_norm wants \[16\]"),
    "for an encoder": (lambda: {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 4),
                                "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 2)},
                       "is for the clip network, which was not given"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_tensors(kind: str, network: Flux1) -> None:
    make, said = DAMAGE[kind]
    with pytest.raises(LoraError) as caught:
        attach(network, make(), name="x")
    assert re.search(said, str(caught.value).splitlines()[0])


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_named(kind: str, network: Flux1, tmp_path: Path) -> None:
    """The message begins with the file."""
    tensors = DAMAGE[kind][0]()
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises((LoraError, CheckpointError), match="bad.safetensors"):
        attach(network, path)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_files(cut: int, network: Flux1, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(good(), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="bad.safetensors"):
        attach(network, path)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_bad_metadata(text: str, network: Flux1, tmp_path: Path) -> None:
    save_file(good(), tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match="lora_adapter_metadata is (no JSON|not a JSON object)"):
        attach(network, tmp_path / "a.safetensors")
    save_file(good(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text, "utf-8")
    with pytest.raises(CheckpointError, match=r"adapter_config.json is (no JSON|not a JSON object)"):
        attach(network, tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("alpha", [0, "8", "NaN", [1]])
def test_bad_alphas_in_metadata(alpha: object, network: Flux1, tmp_path: Path) -> None:
    import json

    tensors = {key: tensor for key, tensor in good().items() if not key.endswith("alpha")}
    header = json.dumps({"transformer.lora_alpha": alpha}).replace('"NaN"', "NaN")
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": header})
    with pytest.raises(LoraError, match=rf"lora_alpha of {QKV}"):
        attach(network, tmp_path / "a.safetensors")


def test_all_reasons_are_listed(network: Flux1) -> None:
    """The first line has the first and how many more; then one line each."""
    tensors = {**moved(good(), "blocks.", "blocks.3"), "foo.bar": torch.ones(1)}
    with pytest.raises(LoraError) as caught:
        attach(network, tensors, name="x")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("the given tensors: 7 of its 7 tensors find no use: ") and "(and 2 more)" in first
    assert len(rest) == 2 and "foo.bar means nothing in the dialect BFL" in rest[-1]


@pytest.mark.parametrize("model", ["flux1-dev", "nano-dev", "flux1-canny-dev or flux1-depth-dev", "flux1-fill-dev"])
def test_widths_of_another_model(model: str, network: Flux1) -> None:
    """The message names the model that the file was made for, and this one's width."""
    hidden = 192 if model == "nano-dev" else 3072
    width = {"flux1-fill-dev": 384, "flux1-dev": 64, "nano-dev": 64}.get(model, 128)
    tensors = {"img_in.lora_A.weight": torch.ones(1, width),
               "img_in.lora_B.weight": torch.ones(hidden, 1)}  # fmt: skip
    with pytest.raises(LoraError) as caught:
        attach(network, tensors, name="x")
    first = str(caught.value).splitlines()[0]
    assert f"its widths are those of {model}" in first and f"this model's width is {HIDDEN}" in first


def test_the_right_width_with_a_wrong_name_blames_no_model() -> None:
    with torch.device("meta"):
        network = Flux1(VARIANTS["nano-dev"].transformer)
    with pytest.raises(LoraError) as caught:
        attach(network, {**lora(network, QKV), "foo.bar": torch.ones(1)}, name="x")
    assert "widths" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "count"),
    [
        ({"foo.lora_down.weight": (2, 3), "foo.lora_up.weight": (3, 2)}, 2),
        (
            {
                "double_blocks.9.img_attn.qkv.lora_down.weight": (2, 32),
                "double_blocks.9.img_attn.qkv.lora_up.weight": (96, 2),
            },
            2,
        ),
        ({"txt_in.lora_down.weight": (2, 7), "txt_in.lora_up.weight": (32, 2)}, 2),
        ({"foo.bar": (1,)}, 1),
    ],
)
def test_lenient(extra: dict[str, tuple[int, ...]], count: int) -> None:
    """strict=False: a warning with the number, the rest is used, and the receipt lists what was not."""
    network = randomise(Flux1(FLUX1))
    tensors = {**good(), **{key: randn(*shape) for key, shape in extra.items()}}
    with pytest.raises(LoraError, match=f"{count} of its {6 + count} tensors"):
        attach(network, tensors, name="x")
    with pytest.warns(UserWarning, match=f"{count} of its {6 + count} tensors find no use.*the rest is used"):
        receipt = attach(network, tensors, name="x", strict=False)
    assert sorted(receipt.unmatched) == sorted(extra)
    assert (receipt.applied, receipt.expected) == (2, 3)
    assert f"2 of 3 modules applied, {count} tensors without use" in str(receipt)
    assert all(f"no use: {key}" in str(receipt) for key in extra)
    other = randomise(Flux1(FLUX1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(other, good(), name="x", strict=False)
    with torch.inference_mode():
        assert torch.equal(network(**flux1_inputs(FLUX1)), other(**flux1_inputs(FLUX1)))


def test_lenient_with_nothing_left(network: Flux1) -> None:
    """Using none of a file is not lenient, it is nothing."""
    with pytest.raises(LoraError, match="find no use"):
        attach(network, moved(good(), "blocks.", "blocks.9"), name="x", strict=False)


def test_other_readers_refuse_as_well(tmp_path: Path) -> None:
    save_file(without(UP), tmp_path / "bad.safetensors")
    for reader in (read, inspect):
        with pytest.raises(LoraError, match="lacks its up"):
            reader(tmp_path / "bad.safetensors")
