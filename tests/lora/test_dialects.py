"""Every way of naming a LoRA file: each tensor finds its place, and does there what its paper says."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miniflux.errors import LoraError
from miniflux.lora import attach, detach, read
from miniflux.lora.dialects import DIALECTS, MISPRINTS, RULES, Dialect, Place, recognise, split
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.variants import CLIP_L, FLUX1_DEV, T5_XXL
from tests import reference
from tests.lora.made import (
    FLUX1_DIALECTS,
    FLUX2_DIALECTS,
    Encoders,
    Networks,
    changed,
    empty_tensors_of,
    lora,
    networks_of,
    relative,
    swap,
    tensors_of,
)
from tests.tiny import FLUX1, randn, randomise

MODELS = {"flux2-klein-4b": "flux2-klein-4b or flux2-klein-base-4b", "flux2-dev": "flux2-dev"}
FIRST = (".lora_A.weight", ".lora_down.weight", ".down.weight", ".hada_w1_a", ".lokr_w1", ".scale")  # one per module


@pytest.fixture(scope="module")
def full_size() -> Networks:
    """FLUX.1 dev without numbers."""
    with torch.device("meta"):
        return Networks(Flux1(FLUX1_DEV), Encoders(ClipTextEncoder(CLIP_L), T5Encoder(T5_XXL)))


def tiny(name: str) -> tuple[Networks, dict[str, Tensor], list[dict[str, Any]]]:
    """Networks with random weights, a file for them, and what the reference data say that it changes."""
    about = reference.dialect(f"flux1-{name}")["tiny"]
    config = dict(about["config"])
    if name == "bfl-control":
        config["in_channels"] //= 2  # the base is narrower than what such a file makes of it
    return networks_of(config), tensors_of(about["tensors"]), about["modules"]


def padded(weight: Tensor, width: int) -> Tensor:
    """A weight for more inputs, which do not count yet: what control LoRAs make of `img_in`."""
    return torch.cat([weight, weight.new_zeros(len(weight), width - weight.shape[1])], dim=1)


def changed_layers(found: Networks) -> list[str]:
    """Layers whose forward is not plain."""
    everything = (found.transformer, found.text.clip, found.text.t5)
    return [name for network in everything for name, module in network.named_modules() if module._forward_hooks]


def test_every_reference_dialect_is_listed() -> None:
    """So that a file added to the reference data is a test that fails, not one that nobody wrote."""
    names = reference.names("lora_dialects")
    assert names == {f"flux1-{n}" for n in FLUX1_DIALECTS} | {f"flux2-{n}" for n in FLUX2_DIALECTS}


@pytest.mark.parametrize("name", FLUX1_DIALECTS)
@torch.inference_mode()
def test_flux1(name: str) -> None:
    """Every module of the file is applied, to the rows and by the numbers that the reference data say."""
    found, tensors, modules = tiny(name)
    before = {m["target"]: found.layer(m["target"]).weight.clone() for m in modules if "prefix" in m}
    receipt = attach(found, tensors, name="x")
    assert receipt.applied == receipt.expected == len(modules) and receipt.unmatched == []
    given = {(m.target, m.rows): m for m in receipt.modules}
    totals = {target: padded(weight.double(), found.layer(target).in_features) for target, weight in before.items()}
    biases: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for module in modules:
        if "replace" in module:
            norm = module["target"].removesuffix(".scale")
            assert (norm, None) in given and torch.equal(found.layer(norm).scale, tensors[module["replace"]])
            continue
        target, (start, end) = module["target"], module["rows"]
        weight = padded(before[target], found.layer(target).in_features)[start:end]
        expected = changed(weight, tensors, module["prefix"], module.get("swap_halves_of_up_rows", False))
        delta = given[target, (start, end)].change.delta(weight)
        assert relative(delta, expected - weight.double()) < 1e-5
        totals[target][start:end] = expected
        if "bias" in module:
            biases[target] = tensors[module["bias"]].double()
    for target, total in totals.items():
        layer = found.layer(target)
        x = randn(2, 3, total.shape[1], seed=5)
        bias = torch.zeros(()) if layer.bias is None else layer.bias.double()
        assert relative(layer(x), x.double() @ total.T + bias + biases[target]) < 1e-5


@pytest.mark.parametrize("name", FLUX1_DIALECTS)
@torch.inference_mode()
def test_one_module_alone(name: str) -> None:
    """A file with a single module attaches, and changes that slice of that layer and nothing else."""
    found, tensors, modules = tiny(name)
    probes = [modules[0], modules[len(modules) // 2], modules[-1]]
    probes += [m for m in modules if m.get("swap_halves_of_up_rows")]
    for module in probes:
        if "replace" in module:
            receipt = attach(found, {module["replace"]: tensors[module["replace"]]}, name="x")
            assert [m.kind for m in receipt.modules] == ["replace"] and changed_layers(found) == []
            detach(found, "x")
            continue
        prefix, (start, end) = module["prefix"], module["rows"]
        layer = found.layer(module["target"])
        before = layer.weight
        receipt = attach(found, {k: t for k, t in tensors.items() if k.startswith(f"{prefix}.")}, name="x")
        assert (receipt.applied, receipt.expected) == (1, 1)
        assert (receipt.modules[0].target, receipt.modules[0].rows) == (module["target"], (start, end))
        assert changed_layers(found) == [module["target"].partition(":")[2] or module["target"]]
        x = randn(4, layer.in_features, seed=6)
        plain, y = layer.forward(x), layer(x)
        outside = [row for row in range(len(before)) if not start <= row < end]
        assert torch.equal(y[:, outside], plain[:, outside])
        expected = changed(layer.weight[start:end], tensors, prefix, module.get("swap_halves_of_up_rows", False))
        rest = 0 if layer.bias is None else layer.bias[start:end].double()
        rest = rest + (tensors[module["bias"]].double() if "bias" in module else 0)
        assert relative(y[:, start:end], x.double() @ expected.T + rest) < 1e-5
        detach(found, "x")
        assert layer.weight is before and changed_layers(found) == []


@pytest.mark.parametrize(
    "name", [n for n in FLUX1_DIALECTS if n not in ("dora-kohya-per-input", "xlabs-diffusion-model-prefix")]
)
def test_flux1_full_size(name: str, full_size: Networks) -> None:
    """Every tensor of a file of full size finds a place in FLUX.1 dev, CLIP-L and T5-XXL."""
    listed = reference.dialect(f"flux1-{name}")["full"]["tensors"]
    receipt = attach(full_size, empty_tensors_of(listed), name="x")
    detach(full_size, "x")
    assert receipt.applied == receipt.expected == sum(key.endswith(FIRST) for key in listed)
    assert receipt.unmatched == []


@pytest.mark.parametrize("name", FLUX2_DIALECTS)
def test_flux2_is_understood(name: str) -> None:
    """Every key of a FLUX.2 file means something, and what the reference data say."""
    about = reference.dialect(f"flux2-{name}")
    for size in ("tiny", "full"):
        if size not in about:
            continue
        file = read(empty_tensors_of(about[size]["tensors"]))
        assert file.unmatched == []
        assert sum(len(group.keys) for group in file.groups) == len(about[size]["tensors"])
    places = {group.module: group.place for group in read(tensors_of(about["tiny"]["tensors"])).groups}
    for wrong, right in MISPRINTS.items():
        places |= {module.replace(right, wrong): place for module, place in places.items()}
    for module in about["tiny"]["modules"]:
        place = places[module["prefix"]]
        assert (place.target, place.swap) == (module["target"], module.get("swap_halves_of_up_rows", False))


@pytest.mark.parametrize("name", FLUX2_DIALECTS)
def test_flux2_is_refused_by_name(name: str, full_size: Networks) -> None:
    """A FLUX.2 file on FLUX.1: the message says which model it was made for."""
    about = reference.dialect(f"flux2-{name}")
    if "full" not in about:
        found = networks_of({**about["tiny"]["config"], "axes_dim": (4, 6, 6), "out_channels": 16, "vec_in_dim": 32,
                             "guidance_embed": True})  # fmt: skip
        with pytest.raises(LoraError, match="find no use"):
            attach(found, tensors_of(about["tiny"]["tensors"]), name="x")
        return
    model = next(said for start, said in MODELS.items() if about["full"]["model"].startswith(start))
    with pytest.raises(LoraError, match=model) as caught:
        attach(full_size, empty_tensors_of(about["full"]["tensors"]), name="x")
    assert model in str(caught.value).splitlines()[0]
    assert changed_layers(full_size) == []


# norm_out.linear of diffusers is our last modulation with its halves exchanged; every form must follow.
HIDDEN = FLUX1.hidden_size
SWAPPED: dict[str, dict[str, list[int]]] = {
    "LoRA": {"lora_down.weight": [3, HIDDEN], "lora_up.weight": [2 * HIDDEN, 3]},
    "LoHa": {"hada_w1_a": [2 * HIDDEN, 2], "hada_w1_b": [2, HIDDEN],
             "hada_w2_a": [2 * HIDDEN, 2], "hada_w2_b": [2, HIDDEN]},
    "LoKr": {"lokr_w1": [8, 4], "lokr_w2": [HIDDEN // 4, HIDDEN // 4]},
    "LoKr of a product first": {"lokr_w1_a": [8, 2], "lokr_w1_b": [2, 4], "lokr_w2": [HIDDEN // 4, HIDDEN // 4]},
    "LoKr of a product last": {"lokr_w1": [8, 4], "lokr_w2_a": [HIDDEN // 4, 2], "lokr_w2_b": [2, HIDDEN // 4]},
    "LoKr of one row first": {"lokr_w1": [1, 4], "lokr_w2": [2 * HIDDEN, HIDDEN // 4]},
    "DoRA by row": {"lora_down.weight": [3, HIDDEN], "lora_up.weight": [2 * HIDDEN, 3], "dora_scale": [2 * HIDDEN, 1]},
    "DoRA by column": {"lora_down.weight": [3, HIDDEN], "lora_up.weight": [2 * HIDDEN, 3], "dora_scale": [1, HIDDEN]},
}  # fmt: skip


@pytest.mark.parametrize("form", SWAPPED)
@torch.inference_mode()
def test_swapped_halves(form: str) -> None:
    network = randomise(Flux1(FLUX1))
    prefix = "lora_transformer_norm_out_linear"
    tensors = {f"{prefix}.{name}": randn(*shape, seed=i) / 4 for i, (name, shape) in enumerate(SWAPPED[form].items())}
    if f"{prefix}.dora_scale" in tensors:
        tensors[f"{prefix}.dora_scale"] = tensors[f"{prefix}.dora_scale"].abs() + 0.5
    tensors[f"{prefix}.diff_b"] = randn(2 * HIDDEN, seed=9)
    attach(network, tensors, name="x")
    layer = network.final_layer.adaLN_modulation[1]
    x = randn(5, HIDDEN, seed=7)
    bias = layer.bias.double() + swap(tensors[f"{prefix}.diff_b"].double())
    assert relative(layer(x), x.double() @ changed(layer.weight, tensors, prefix, swapped=True).T + bias) < 1e-5


def numbered(name: str, *numbers: int) -> str:
    for number in numbers:
        name = name.replace("{i}", str(number), 1)
    return name


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: f"{d.name}/{d.network}")
@pytest.mark.parametrize("number", [0, 7, 18, 37])
def test_names_go_there_and_back(dialect: Dialect, number: int) -> None:
    """Every module that a dialect can name is found by that name, whatever its block number."""
    for rule in RULES[dialect.spelling]:
        theirs = numbered(rule.theirs, number)
        name = dialect.prefix + (theirs.replace(".", "_") if dialect.flat else theirs) + dialect.tail
        place = dialect.place(name)
        expected = rule.place
        assert place == Place(expected.network, numbered(expected.target, number), expected.first, expected.last,
                              expected.parts, expected.swap)  # fmt: skip
        again = dialect.module(place, flux2=rule.flux2)
        assert again is not None and dialect.place(again) == place


@pytest.mark.parametrize("spelling", RULES)
def test_no_two_modules_share_a_name(spelling: str) -> None:
    """Also not where underscores stand for dots."""
    for flat in (False, True):
        seen: dict[str, Place] = {}
        for rule in RULES[spelling]:  # type: ignore[index]
            name = rule.theirs.replace(".", "_") if flat else rule.theirs
            assert seen.setdefault(name, rule.place) == rule.place, name


def test_every_linear_has_a_name_in_every_whole_spelling() -> None:
    """A layer that no file can name would be a row that somebody forgot."""
    network = Flux1(FLUX1)
    linears = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    for spelling in ("original", "diffusers"):
        named = {numbered(rule.place.target, i) for rule in RULES[spelling] for i in range(2)}  # type: ignore[index]
        assert linears <= named


@pytest.mark.parametrize(
    ("ending", "what"),
    [
        (".lora_A.default.weight", "down"),
        (".lora_B.default.weight", "up"),
        (".lora_A", "down"),
        (".lora_linear_layer.up.weight", "up"),
        (".lora.down.weight", "down"),
        (".lora_magnitude_vector", "magnitude"),
        (".lora_magnitude_vector.default.weight", "magnitude"),
        (".diff_b", "bias"),
        (".w_norm", "diff"),
        (".set_weight", "replace"),
    ],
)
def test_endings(ending: str, what: str) -> None:
    assert split(f"double_blocks.0.img_attn.qkv{ending}") == ("double_blocks.0.img_attn.qkv", what)


def test_onetrainer_numbers_the_parts_of_a_fused_layer() -> None:
    """`qkv.1` is the second third; of `linear1` the fourth part is the MLP."""
    modules = ("double_blocks.1.img_attn.qkv", "single_blocks.0.linear1")
    keys = [f"transformer.{module}.{part}.lora_down.weight" for module in modules for part in (1, 2)]
    places = [place for place, _ in recognise(keys).groups.values()]
    assert [(p.target, p.first, p.last, p.parts) for p in places] == [
        ("double_blocks.1.img_attn.qkv", 1, 2, 3),
        ("double_blocks.1.img_attn.qkv", 2, 3, 3),
        ("single_blocks.0.linear1", 1, 2, 4),
        ("single_blocks.0.linear1", 2, 3, 4),
    ]


def test_trailing_axes_of_a_convolution_are_dropped() -> None:
    """Some writers store matrices as 1x1 convolutions."""
    network = randomise(Flux1(FLUX1))
    plain = lora(network, "img_in", "single_blocks.1.linear2")
    convolved = {key: t[:, :, None, None] if t.ndim == 2 else t for key, t in plain.items()}
    deltas = []
    for tensors in (plain, convolved):
        deltas.append([m.change.delta() for m in attach(network, tensors, name="x").modules])
        detach(network, "x")
    assert all(torch.equal(a, b) for a, b in zip(*deltas, strict=True))
