"""Adapters on and off a network, their names and scales: the base stays bitwise what it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import miniflux
from miniflux.conditions import Control
from miniflux.errors import InputError, LoraError
from miniflux.lora import attach, attached, detach, merge, read, set_scale, set_schedule
from miniflux.models.flux1 import Flux1
from miniflux.pipeline import Pipeline
from tests.lora.conftest import out
from tests.lora.made import lora, relative
from tests.reference import Golden, of_exponentials
from tests.tiny import FLUX1, flux1_inputs, randn

QKV, LINEAR1, LINEAR2 = "double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "single_blocks.0.linear2"
HIDDEN = FLUX1.hidden_size
INPUTS = flux1_inputs(FLUX1)


@pytest.fixture
def base(network: Flux1) -> Callable[[], bool]:
    """Whether the network is still bitwise what it was: keys, tensors, modules, outputs."""
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    parameters = dict(network.named_parameters())
    modules, output, config = [name for name, _ in network.named_modules()], out(network), network.config

    def same() -> bool:
        now = network.state_dict()
        return (
            list(now) == list(state)
            and all(torch.equal(now[key], state[key]) for key in state)
            and all(parameters[key] is value for key, value in network.named_parameters())
            and modules == [name for name, _ in network.named_modules()]
            and not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
            and torch.equal(out(network), output)
            and network.config == config
            and attached(network) == {}
        )

    return same


def control(network: Flux1, seed: int = 0) -> dict[str, Tensor]:
    """What BFL's control LoRAs do: a wider input, biases, other norms."""
    width = 2 * network.config.in_channels
    return {
        "img_in.lora_A.weight": randn(3, width, seed=seed),
        "img_in.lora_B.weight": randn(HIDDEN, 3, seed=seed + 1),
        "img_in.lora_B.bias": randn(HIDDEN, seed=seed + 2),
        "single_blocks.0.norm.key_norm.scale": randn(HIDDEN // 2, seed=seed + 3).abs() + 0.5,
    }


FILES: dict[str, Callable[[Flux1], dict[str, Tensor]]] = {
    "LoRA": lambda n: lora(n, QKV, LINEAR1, "final_layer.linear"),
    "LoHa": lambda n: {
        f"{QKV}.hada_w{i}_{half}": randn(*shape, seed=i)
        for i in (1, 2)
        for half, shape in (("a", (3 * HIDDEN, 2)), ("b", (2, HIDDEN)))
    },
    "LoKr": lambda n: {f"{LINEAR2}.lokr_w1": randn(4, 5, seed=1), f"{LINEAR2}.lokr_w2": randn(8, HIDDEN, seed=2)},
    "DoRA": lambda n: {**lora(n, QKV), f"{QKV}.dora_scale": randn(3 * HIDDEN, 1, seed=3).abs() + 0.1},
    "diff": lambda n: {f"{QKV}.diff": randn(3 * HIDDEN, HIDDEN), f"{QKV}.diff_b": randn(3 * HIDDEN)},
    "bias": lambda n: {"txt_in.diff_b": randn(HIDDEN)},
    "norm": lambda n: {"double_blocks.0.txt_attn.norm.query_norm.diff": randn(HIDDEN // 2) / 4},
    "control": control,
}


def wider(network: Flux1) -> dict[str, Any]:
    """Inputs as wide as the network asks for now."""
    more = randn(*INPUTS["img"].shape[:2], network.config.in_channels - FLUX1.in_channels, seed=9)
    return {**INPUTS, "img": torch.cat([INPUTS["img"], more], dim=-1)}


@pytest.mark.parametrize("form", FILES)
def test_on_and_off(form: str, network: Flux1, base: Callable[[], bool]) -> None:
    """An adapter has an effect, is not seen by the state dict, and leaves nothing behind."""
    plain, keys = out(network), list(network.state_dict())
    attach(network, FILES[form](network), name="x")
    assert list(network.state_dict()) == keys and attached(network) == {"x": 1.0}
    assert relative(out(network, wider(network)), plain) > 1e-4
    detach(network, "x")
    assert base()


def test_whole_numbers_that_are_no_weights(network: Flux1) -> None:
    """An alpha that was never cast, and the shape of the wider weight, as ComfyUI stores it."""
    tensors = lora(network, QKV, alpha=2.0)
    expected = out_with(network, tensors)
    tensors |= {f"{QKV}.alpha": torch.tensor(2), f"{QKV}.reshape_weight": torch.tensor([3 * HIDDEN, HIDDEN])}
    assert torch.equal(out_with(network, tensors), expected)
    wide = {key: tensor for key, tensor in control(network).items() if "norm" not in key}
    shape = {"img_in.reshape_weight": torch.tensor([HIDDEN, 2 * network.config.in_channels])}
    assert attach(network, wide | shape).applied == 1 and network.config.in_channels == 2 * FLUX1.in_channels


def out_with(network: Flux1, tensors: dict[str, Tensor]) -> Tensor:
    attach(network, tensors, name="x")
    output = out(network)
    detach(network, "x")
    return output


@pytest.mark.parametrize("form", FILES)
def test_scale_0_is_bitwise_the_base(form: str, network: Flux1, base: Callable[[], bool]) -> None:
    plain = out(network)
    attach(network, FILES[form](network), scale=0.0, name="x")
    assert torch.equal(out(network, wider(network)), plain)
    set_scale(network, "x", 0.5)
    assert not torch.equal(out(network, wider(network)), plain)
    set_scale(network, "x", 0)
    assert torch.equal(out(network, wider(network)), plain)
    detach(network, "x")
    assert base()


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_several_come_off_in_any_order(order: tuple[int, ...], network: Flux1, base: Callable[[], bool]) -> None:
    names = ("style", "subject", "speed")
    for i, name in enumerate(names):
        attach(network, lora(network, QKV, LINEAR1, LINEAR2, seed=10 * i), name=name)
    assert list(attached(network)) == list(names)
    together = out(network)
    for i in order:
        detach(network, names[i])
    assert base()
    for i, name in enumerate(names):
        attach(network, lora(network, QKV, LINEAR1, LINEAR2, seed=10 * i), name=name)
    assert torch.equal(out(network), together)


@pytest.mark.parametrize("first", ["narrow", "wide"])
@pytest.mark.parametrize("leaving", ["narrow", "wide"])
def test_a_wider_input_beside_an_ordinary_adapter(
    first: str, leaving: str, network: Flux1, base: Callable[[], bool]
) -> None:
    """Both change `img_in`: an ordinary LoRA sees the inputs that it was made for, whichever comes or goes first."""
    files = {"narrow": lora(network, "img_in"), "wide": control(network)}
    second = "wide" if first == "narrow" else "narrow"
    attach(network, files[first], name=first)
    alone = out(network, wider(network))
    attach(network, files[second], name=second)
    both = out(network, wider(network))
    assert torch.isfinite(both).all() and not torch.equal(both, alone)
    detach(network, leaving)
    staying = "wide" if leaving == "narrow" else "narrow"
    left = out(network, wider(network))
    detach(network, staying)
    assert base()
    attach(network, files[staying], name=staying)
    torch.testing.assert_close(left, out(network, wider(network)))


def test_two_that_replace_the_same_norm_are_refused(network: Flux1) -> None:
    """One of them would silently lose."""
    attach(network, control(network), name="canny")
    with pytest.raises(LoraError, match=r"key_norm is replaced by LoRA 'canny' already"):
        attach(network, control(network, seed=5), name="depth")
    assert list(attached(network)) == ["canny"]


def test_control_lora_of_the_original_release(golden: Callable[[str], Golden]) -> None:
    """Output of BFL's own wrapper, biases and norms and the wider input included."""
    data = golden("flux1_control_lora")
    network, tensors = control_base(data)
    attach(network, tensors, scale=0.85, name="control")
    told = [data[name] for name in ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")]
    with torch.inference_mode():
        torch.testing.assert_close(
            network(*told), data["output"], rtol=0, atol=2e-5 + of_exponentials(lambda: network(*told))
        )


def control_base(data: Golden) -> tuple[Flux1, dict[str, Tensor]]:
    """The base and the LoRA of the golden file."""
    from miniflux.checkpoints import load_into
    from miniflux.models.flux1 import Flux1Config

    with torch.device("meta"):
        network = Flux1(Flux1Config(**data.about["base_config"]))
    load_into(network, {k.removeprefix("base."): t for k, t in data.weights.items() if k.startswith("base.")})
    return network, {k.removeprefix("lora."): t for k, t in data.weights.items() if k.startswith("lora.")}


# Names


@pytest.mark.parametrize(
    "name", ["v1.5", "a.b.c", "keys", "half", "train", "pop", "type", "with space", "Stil-Größe 2"]
)
def test_any_string_is_a_name(name: str, network: Flux1, base: Callable[[], bool]) -> None:
    """Files are called all sorts of things."""
    attach(network, lora(network, QKV), name=name)
    assert attached(network) == {name: 1.0}
    set_scale(network, name, 0.5)
    detach(network, name)
    assert base()


def test_the_name_is_the_stem_of_the_file(network: Flux1, tmp_path: Path) -> None:
    save_file(lora(network, QKV), tmp_path / "realism.v2.safetensors")
    receipt = attach(network, tmp_path / "realism.v2.safetensors")
    assert receipt.name == "realism.v2" and list(attached(network)) == ["realism.v2"]
    assert attach(network, lora(network, LINEAR1)).name == "lora"


@pytest.mark.parametrize("name", ["", 3])
def test_other_names_are_refused(name: Any, network: Flux1, base: Callable[[], bool]) -> None:
    with pytest.raises(InputError, match="name of a LoRA"):
        attach(network, lora(network, QKV), name=name)
    assert base()


def test_a_name_is_taken_once(network: Flux1) -> None:
    attach(network, lora(network, QKV), name="x")
    before = out(network)
    with pytest.raises(LoraError, match="'x' is attached already"):
        attach(network, lora(network, LINEAR1), name="x")
    assert torch.equal(out(network), before)


@pytest.mark.parametrize(
    "act", [detach, lambda n, x: set_scale(n, x, 1.0), lambda n, x: set_schedule(n, x, None), merge]
)
def test_unknown_names_are_refused(act: Callable[[Flux1, str], object], network: Flux1) -> None:
    attach(network, lora(network, QKV), name="here")
    with pytest.raises(LoraError, match="no LoRA named 'gone'"):
        act(network, "gone")


def test_what_cannot_be_changed_is_refused() -> None:
    with pytest.raises(InputError, match="got Linear"):
        attach(nn.Linear(2, 2), {"a.lora_A.weight": torch.ones(1, 2)})


def test_a_missing_file_names_the_bundled_ones(network: Flux1, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="nothing.safetensors: no such file"):
        attach(network, tmp_path / "nothing.safetensors")


# Scales


def test_scale_is_linear(network: Flux1) -> None:
    """What is added to a layer's output is proportional to the scale."""
    layer = network.get_submodule(QKV)
    x = randn(4, HIDDEN)
    attach(network, lora(network, QKV), name="x")
    plain, whole = layer.forward(x), layer(x)
    for scale in (2, 0.5, -1.5):
        set_scale(network, "x", scale)
        torch.testing.assert_close(layer(x) - plain, scale * (whole - plain), rtol=1e-4, atol=1e-5)


def test_scales_of_parts(network: Flux1) -> None:
    """Numbers by the beginning of a name: the longest wins, the rest is 1. A function is asked for each layer."""
    receipt = attach(network, lora(network, QKV, "double_blocks.1.img_attn.proj", LINEAR1, alpha=None), name="x")

    def scales() -> dict[str, float]:
        return {module.target: module.scale for module in receipt.modules}

    set_scale(network, "x", {"double_blocks": 0.5, "double_blocks.1": 0.25})
    assert scales() == {QKV: 0.5, "double_blocks.1.img_attn.proj": 0.25, LINEAR1: 1.0}
    set_scale(network, "x", lambda layer: 0.0 if layer.startswith("single") else 2.0)
    assert scales() == {QKV: 2.0, "double_blocks.1.img_attn.proj": 2.0, LINEAR1: 0.0}
    function = out(network)
    detach(network, "x")
    attach(
        network, lora(network, QKV, "double_blocks.1.img_attn.proj", LINEAR1, alpha=None), {"single": 0, "double": 2}
    )
    torch.testing.assert_close(out(network), function)


BAD_SCALES = [float("nan"), float("inf"), "1", True, None, {"double_blocks": float("nan")}, {"nowhere": 1.0},
              lambda _: float("nan")]  # fmt: skip


@pytest.mark.parametrize("scale", BAD_SCALES, ids=lambda scale: "function" if callable(scale) else str(scale))
def test_bad_scales_are_refused(scale: Any, network: Flux1, base: Callable[[], bool]) -> None:
    """When attaching, the network stays plain; later, the old scale stays."""
    with pytest.raises(InputError, match="scale|begins with"):
        attach(network, lora(network, QKV, LINEAR1), scale=scale, name="x")
    assert base()
    attach(network, lora(network, QKV, LINEAR1), scale=0.5, name="x")
    before = out(network)
    with pytest.raises(InputError, match="scale|begins with"):
        set_scale(network, "x", scale)
    assert torch.equal(out(network), before) and attached(network) == {"x": 0.5}


@pytest.mark.parametrize("form", [np.float32, np.int64, lambda x: np.array(x, np.float32), torch.tensor])
def test_scales_may_be_numbers_of_numpy_and_torch(form: Any, network: Flux1) -> None:
    attach(network, lora(network, QKV, LINEAR1), scale=form(2), name="x")
    kept = attached(network)["x"]
    assert kept == 2 and type(kept) in (int, float)  # as settings write it
    expected = out(network)
    for scale in ({"double": form(2), "single": 2.0}, lambda _: form(2)):
        set_scale(network, "x", scale)
        assert torch.equal(out(network), expected)
    set_scale(network, "x", 1)
    set_schedule(network, "x", lambda _: form(2))
    assert torch.equal(out(network), expected)


@pytest.mark.parametrize("factor", [math.nan, None, "1"])
def test_a_schedule_that_returns_nonsense_is_refused(factor: Any, network: Flux1) -> None:
    """By name; and the network works again when it is gone."""
    attach(network, lora(network, QKV), name="x")
    expected = out(network)
    set_schedule(network, "x", lambda _: factor)
    with pytest.raises(InputError, match="schedule of LoRA 'x' returns must be a finite number, got"):
        out(network)
    set_schedule(network, "x", None)
    assert torch.equal(out(network), expected)


def test_a_schedule_follows_the_noise(network: Flux1, base: Callable[[], bool]) -> None:
    """Times the scale; called with the noise level of each step; undone by None."""
    attach(network, lora(network, QKV, LINEAR1), scale=0.8, name="x")
    seen: list[float] = []

    def half(sigma: float) -> float:
        seen.append(sigma)
        return 0.5

    expected = {}
    for scale in (0.8, 0.4):
        set_scale(network, "x", scale)
        expected[scale] = out(network)
    set_scale(network, "x", 0.8)
    set_schedule(network, "x", half)
    torch.testing.assert_close(out(network), expected[0.4])
    arguments = [INPUTS[name] for name in ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")]
    with torch.inference_mode():
        torch.testing.assert_close(network(*arguments), expected[0.4])
    assert seen == pytest.approx([float(INPUTS["timesteps"][0])] * 2)
    set_schedule(network, "x", lambda sigma: 0.0)
    with_none = out(network)
    set_schedule(network, "x", None)
    assert torch.equal(out(network), expected[0.8])
    set_schedule(network, "x", half)
    detach(network, "x")
    assert base() and torch.equal(with_none, out(network))


def test_threads_with_schedules_equal_one_after_the_other(network: Flux1) -> None:
    """The scale of one call is not that of another at the same time; an error in one does not stop the others."""
    attach(network, lora(network, QKV), name="x")
    attach(network, lora(network, LINEAR1), name="y")
    set_schedule(network, "x", lambda sigma: sigma)
    set_schedule(network, "y", lambda sigma: 1 - sigma)

    def at(level: float) -> Tensor:
        with torch.inference_mode():
            return network(**{**INPUTS, "timesteps": torch.full_like(INPUTS["timesteps"], level)})

    levels = [i / 24 for i in range(24)]
    expected = [at(level) for level in levels]
    with pytest.raises(RuntimeError):
        network(**{**INPUTS, "img": randn(2, 12, 5)})
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(at, levels))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_merged_adapter_has_no_schedule(network: Flux1) -> None:
    """What is in the weights cannot follow the noise: refused, and not computed a second time."""
    attach(network, lora(network, QKV), name="x")
    merge(network, "x")
    before = out(network)
    with pytest.raises(LoraError, match="merged"):
        set_schedule(network, "x", lambda sigma: sigma)
    assert torch.equal(out(network), before)


def test_a_scheduled_adapter_is_not_merged(network: Flux1) -> None:
    attach(network, lora(network, QKV), name="x")
    set_schedule(network, "x", lambda sigma: sigma)
    before = out(network)
    with pytest.raises(LoraError, match="schedule"):
        merge(network, "x")
    assert torch.equal(out(network), before)


# Receipts


def test_receipt_says_what_was_done(network: Flux1) -> None:
    """Rank, scale and norms, against the numbers of the file."""
    tensors = lora(network, QKV, LINEAR2, rank=4, alpha=2.0)
    receipt = attach(network, tensors, scale=0.5, name="x")
    assert (receipt.name, receipt.dialect, receipt.applied, receipt.expected) == ("x", "BFL", 2, 2)
    for module in receipt.modules:
        weight = network.get_submodule(module.target).weight.detach()
        delta = 0.5 * tensors[f"{module.target}.lora_up.weight"] @ tensors[f"{module.target}.lora_down.weight"]
        assert (module.kind, module.rank, module.blocks, module.scale) == ("LoRA", 4, 1, 0.25)
        assert module.rows == (0, len(weight))
        assert module.norm == pytest.approx(float(delta.norm()), rel=1e-4)
        assert module.relative == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
    lines = str(receipt).splitlines()
    assert lines[0] == "the given tensors: BFL, 2 of 2 modules applied"
    assert QKV in lines[2] and "0.25" in lines[2] and len(lines) == 4


def test_receipt_of_a_layer_of_zeros(network: Flux1) -> None:
    """Fresh networks have them; the relative norm is infinite then, not a fault."""
    nn.init.zeros_(network.get_submodule(QKV).weight)
    receipt = attach(network, lora(network, QKV), name="x")
    assert QKV in str(receipt)


def test_split_qkv_of_kohya_is_reported(network: Flux1) -> None:
    """Separate LoRAs for q, k and v in one block-diagonal tensor."""
    ups = [randn(HIDDEN, 2, seed=i) for i in range(3)]
    downs = [randn(2, HIDDEN, seed=5 + i) for i in range(3)]
    prefix = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{prefix}.lora_down.weight": torch.cat(downs), f"{prefix}.lora_up.weight": torch.block_diag(*ups)}
    receipt = attach(network, tensors, name="x")
    assert receipt.modules[0].blocks == 3 and "split_qkv" in str(receipt)
    expected = torch.cat([up @ down for up, down in zip(ups, downs, strict=True)])
    torch.testing.assert_close(receipt.modules[0].change.delta(), expected)
    detach(network, "x")
    tensors[f"{prefix}.lora_up.weight"] = torch.cat([torch.cat(ups, dim=1)] * 3)
    assert attach(network, tensors, name="x").modules[0].blocks == 1


# Alphas


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha(dtype: torch.dtype, shape: tuple[int, ...], network: Flux1) -> None:
    """alpha / rank, whatever dtype it is stored in."""
    tensors = lora(network, QKV, rank=4, alpha=None)
    tensors[f"{QKV}.alpha"] = torch.full(shape, 6.0, dtype=dtype)
    assert attach(network, tensors, name="x").modules[0].scale == 1.5


def test_without_alpha_it_is_the_rank(network: Flux1) -> None:
    assert attach(network, lora(network, QKV, rank=4, alpha=None), name="x").modules[0].scale == 1.0


PEFT = "transformer.single_transformer_blocks.0.proj_out", "transformer.single_transformer_blocks.1.proj_out"
CONFIGS: list[tuple[dict[str, Any], tuple[float, float]]] = [
    ({"r": 4, "lora_alpha": 2}, (0.5, 0.5)),
    ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"single_transformer_blocks.1.proj_out": 6.0}}, (0.5, 1.5)),
    ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"proj_out": 1, "1.proj_out": 8}}, (0.25, 0.25)),
    ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"1.proj_out": 8, "proj_out": 1}}, (0.25, 2.0)),
    ({"r": 4, "lora_alpha": 2, "use_rslora": True}, (1.0, 1.0)),
    ({"r": 9, "lora_alpha": 2, "rank_pattern": {"proj_out": 4}, "use_rslora": True}, (1.0, 1.0)),
    ({"r": 4, "lora_alpha": 2, "use_rslora": False, "alpha_pattern": {}}, (0.5, 0.5)),
    ({"r": 4}, (1.0, 1.0)),
]


def peft_tensors() -> dict[str, Tensor]:
    return {
        f"{prefix}.lora_{half}.weight": randn(*shape, seed=i)
        for i, prefix in enumerate(PEFT)
        for half, shape in (("A", (4, 5 * HIDDEN)), ("B", (HIDDEN, 4)))
    }


@pytest.mark.parametrize(("config", "scales"), CONFIGS)
def test_alphas_of_the_header(
    config: dict[str, Any], scales: tuple[float, float], network: Flux1, tmp_path: Path
) -> None:
    """As newer diffusers writes them: PEFT's config per network, as JSON."""
    header = {f"transformer.{key}": value for key, value in config.items()}
    save_file(peft_tensors(), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    receipt = attach(network, tmp_path / "a.safetensors")
    assert tuple(module.scale for module in receipt.modules) == pytest.approx(scales)


@pytest.mark.parametrize("whole_folder", [True, False])
@pytest.mark.parametrize(("config", "scales"), CONFIGS[:3])
def test_alphas_of_a_config_beside_the_file(
    config: dict[str, Any], scales: tuple[float, float], whole_folder: bool, network: Flux1, tmp_path: Path
) -> None:
    """As PEFT itself saves an adapter."""
    tensors = {key.replace("transformer.", "base_model.model.", 1): tensor for key, tensor in peft_tensors().items()}
    file = tmp_path / "adapter_model.safetensors"
    save_file(tensors, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    receipt = attach(network, tmp_path if whole_folder else file)
    assert tuple(module.scale for module in receipt.modules) == pytest.approx(scales)


def test_alphas_in_the_file_win_over_its_header(network: Flux1, tmp_path: Path) -> None:
    tensors = {**peft_tensors(), **{f"{prefix}.alpha": torch.tensor(8.0) for prefix in PEFT}}
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    save_file(tensors, tmp_path / "a.safetensors", header)
    assert [group.factor for group in read(tmp_path / "a.safetensors").groups] == [2.0, 2.0]


# The pipeline


PROMPT, QUICK = "a red circle on a blue background", {"steps": 1, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.load("nano")


def encoder_lora(pipe: Pipeline) -> dict[str, Tensor]:
    """For both text encoders, in kohya's names."""
    layers = {
        "lora_te1_text_model_encoder_layers_1_mlp_fc1": pipe.text.clip.text_model.encoder.layers[1].mlp.fc1,
        "lora_te3_encoder_block_0_layer_0_SelfAttention_v": pipe.text.t5.encoder.block[0].layer[0].SelfAttention.v,
    }
    made: dict[str, Tensor] = {}
    for i, (prefix, module) in enumerate(layers.items()):
        made[f"{prefix}.lora_down.weight"] = randn(2, module.in_features, seed=i) / 4
        made[f"{prefix}.lora_up.weight"] = randn(module.out_features, 2, seed=i + 5)
    return made


def test_prompts_are_encoded_again_after_their_encoders_changed(pipe: Pipeline) -> None:
    """A cached prompt of another encoder would hide the LoRA."""
    plain = pipe.text.encode([PROMPT])
    receipt = attach(pipe, encoder_lora(pipe), name="words")
    assert [m.target.partition(":")[0] for m in receipt.modules] == ["clip", "t5"]
    seen = [plain]
    for scale in (1.0, 0.5):
        set_scale(pipe, "words", scale)
        seen.append(pipe.text.encode([PROMPT]))
    assert not any(torch.equal(a.txt, b.txt) or torch.equal(a.vec, b.vec) for a, b in pairwise(seen))
    detach(pipe, "words")
    again = pipe.text.encode([PROMPT])
    assert torch.equal(again.txt, plain.txt) and torch.equal(again.vec, plain.vec)


def test_pictures_say_what_was_attached(pipe: Pipeline) -> None:
    """Name, source and scale of each, in plain JSON; the pictures without are bitwise as before."""
    plain = pipe.generate(PROMPT, **QUICK)
    assert plain.settings[0]["loras"] == []
    layer = "double_blocks.0.img_attn.qkv"
    attach(pipe, lora(pipe.transformer, layer), scale=0.5, name="style")
    attach(pipe, encoder_lora(pipe), name="words")
    set_schedule(pipe, "style", lambda sigma: sigma)
    set_scale(pipe, "words", lambda name: 0.25)
    result = pipe.generate(PROMPT, **QUICK)
    style, words = json.loads(json.dumps(result.settings[0]["loras"]))
    assert style == {"name": "style", "source": "the given tensors", "scale": 0.5, "scheduled": True}
    assert (words["name"], words["scheduled"], set(words["scale"].values())) == ("words", False, {0.25})
    assert len(words["scale"]) == 2
    assert not torch.equal(result.latents, plain.latents)
    detach(pipe, "style")
    detach(pipe, "words")
    assert torch.equal(pipe.generate(PROMPT, **QUICK).latents, plain.latents)


def control_lora(config: Any, seed: int = 0) -> dict[str, Tensor]:
    """One that widens the input of a network by a picture's channels."""
    return {
        "img_in.lora_A.weight": randn(2, 2 * config.in_channels, seed=seed) / 8,
        "img_in.lora_B.weight": randn(config.hidden_size, 2, seed=seed + 1) / 8,
    }


def test_a_control_lora_wants_a_control_picture() -> None:
    """It makes the network read channels that somebody must give; without it the pipeline draws as before."""
    pipe = miniflux.tiny()
    plain, config = pipe.generate("x", steps=1).latents, pipe.transformer.config
    attach(pipe, control_lora(config), name="edges")
    with pytest.raises(InputError, match=f"LoRA 'edges' is a control LoRA: .* reads {config.in_channels} channels"):
        pipe.generate("x", steps=1)
    assert not torch.equal(pipe.generate("x", steps=1, conditions=[Control(torch.zeros(3, 64, 64))]).latents, plain)
    detach(pipe, "edges")
    assert torch.equal(pipe.generate("x", steps=1).latents, plain)
    with pytest.raises(InputError, match="gives 64 channels, and this network reads 0 beside"):
        pipe.generate("x", steps=1, conditions=[Control(torch.zeros(3, 64, 64))])
