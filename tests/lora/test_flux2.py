"""LoRAs on FLUX.2 and FLUX.3: every dialect of the reference data does what its paper says, module by module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miniflux.checkpoints import to_layout
from miniflux.errors import LoraError
from miniflux.lora import attach, detach, merge, unmerge
from miniflux.models.flux2 import Flux2, Flux2Config
from miniflux.models.flux3 import Flux3, Flux3Config
from tests import reference
from tests.lora.made import FLUX2_DIALECTS, changed, relative, tensors_of
from tests.tiny import randn, randomise

SMALL_FLUX3 = Flux3Config(
    in_channels=16,
    out_channels=16,
    cond_in_channels=16,
    context_in_dim=48,
    hidden_size=64,
    num_heads=4,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 4, 4, 4),
    flow_map=True,
)


def tiny(name: str) -> tuple[Flux2, dict[str, Tensor], list[dict[str, Any]]]:
    """A network with random weights, a file for it, and what the reference data say that it changes."""
    about = reference.dialect(f"flux2-{name}")["tiny"]
    guided = any(module["target"].startswith("guidance_in.") for module in about["modules"])
    config = Flux2Config(**{**about["config"], "guidance_embed": guided})
    return randomise(Flux2(config)), tensors_of(about["tensors"]), about["modules"]


def changed_layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if module._forward_hooks]


@pytest.mark.parametrize("name", FLUX2_DIALECTS)
@torch.inference_mode()
def test_every_module_of_a_file(name: str) -> None:
    """Applied equals expected; each dW against float64."""
    network, tensors, modules = tiny(name)
    before = {m["target"]: network.get_submodule(m["target"]).get_parameter("weight").clone() for m in modules}
    receipt = attach(network, tensors, name="x")
    assert receipt.applied == receipt.expected == len(modules) and receipt.unmatched == []
    given = {(m.target, m.rows): m for m in receipt.modules}
    totals = {target: weight.double() for target, weight in before.items()}
    for module in modules:
        target, (start, end) = module["target"], module["rows"]
        weight = before[target][start:end]
        expected = changed(weight, tensors, module["prefix"], module.get("swap_halves_of_up_rows", False))
        delta = given[target, (start, end)].change.delta(weight)
        assert relative(delta, expected - weight.double()) < 1e-5
        totals[target][start:end] = expected
    for target, total in totals.items():
        x = randn(2, 3, total.shape[1], seed=5)
        assert relative(network.get_submodule(target)(x), x.double() @ total.T) < 1e-5


@pytest.mark.parametrize("name", FLUX2_DIALECTS)
@torch.inference_mode()
def test_one_module_alone(name: str) -> None:
    """A file with a single module attaches, and changes that slice of that layer and nothing else."""
    network, tensors, modules = tiny(name)
    for module in modules:
        prefix, (start, end) = module["prefix"], module["rows"]
        layer: Any = network.get_submodule(module["target"])
        receipt = attach(network, {k: t for k, t in tensors.items() if k.startswith(f"{prefix}.")}, name="x")
        assert (receipt.applied, receipt.expected) == (1, 1)
        assert (receipt.modules[0].target, receipt.modules[0].rows) == (module["target"], (start, end))
        assert changed_layers(network) == [module["target"]]
        x = randn(4, layer.in_features, seed=6)
        plain, y = layer.forward(x), layer(x)
        outside = [row for row in range(layer.out_features) if not start <= row < end]
        assert torch.equal(y[:, outside], plain[:, outside])
        expected = changed(layer.weight[start:end], tensors, prefix, module.get("swap_halves_of_up_rows", False))
        assert relative(y[:, start:end], x.double() @ expected.T) < 1e-5
        detach(network, "x")
        assert changed_layers(network) == []


@pytest.mark.parametrize("name", FLUX2_DIALECTS)
@torch.inference_mode()
def test_merged_is_attached_and_back(name: str) -> None:
    network, tensors, _ = tiny(name)
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    inputs = [randn(1, 6, 16), torch.zeros(1, 6, 4), randn(1, 3, 48, seed=1), torch.zeros(1, 3, 4), torch.tensor([0.5])]
    guidance = torch.tensor([3.0])
    attach(network, tensors, name="x")
    attached = network(*inputs, guidance)
    merge(network, "x")
    assert relative(network(*inputs, guidance), attached) < 1e-5
    unmerge(network, "x")
    detach(network, "x")
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


def test_a_file_of_flux1_is_refused() -> None:
    """It names modules that are not there, or widths that are not these."""
    network, _, _ = tiny("kohya")
    about = reference.dialect("flux1-kohya")["tiny"]
    with pytest.raises(LoraError):
        attach(network, tensors_of(about["tensors"]), name="x")
    assert changed_layers(network) == []


def lora_of(network: nn.Module, names: dict[str, str], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file that changes every linear, by the names that a layout gives them; and each change by our name."""
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for seed, (ours, theirs) in enumerate(names.items()):
        layer: Any = network.get_submodule(ours)
        up, down = 0.1 * randn(layer.out_features, 2, seed=seed), 0.1 * randn(2, layer.in_features, seed=seed + 1)
        tensors |= {f"{prefix}{theirs}.lora_A.weight": down, f"{prefix}{theirs}.lora_B.weight": up}
        changes[ours] = (up.double() @ down.double()).float()
    return tensors, changes


@pytest.mark.parametrize(("layout", "prefix"), [("original", "diffusion_model."), ("diffusers", "transformer.")])
@torch.inference_mode()
def test_flux3(layout: str, prefix: str) -> None:
    """Both spellings: the release's, and diffusers', whose last modulation has scale before shift."""
    network = randomise(Flux3(SMALL_FLUX3))
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    marks = {f"{name}.weight": torch.full((1, 1), float(i)) for i, name in enumerate(linears)}
    named = {name: name for name in linears}
    if layout == "diffusers":
        state = {key: marks.get(key, tensor) for key, tensor in network.state_dict().items()}
        state = {key: tensor.expand(2, 1) if key in marks else tensor for key, tensor in state.items()}
        moved = to_layout(network, state, layout)
        theirs = {int(tensor[0, 0]): key for key, tensor in moved.items() if tensor.ndim == 2}
        named = {name: theirs[i].removesuffix(".weight") for i, name in enumerate(linears)}
    tensors, changes = lora_of(network, named, prefix)
    before = {name: network.get_submodule(name).get_parameter("weight").clone() for name in linears}
    receipt = attach(network, tensors, name="x")
    assert receipt.applied == receipt.expected == len(linears) and receipt.unmatched == []
    merge(network, "x")
    for name, change in changes.items():
        swapped = layout == "diffusers" and name == "final_layer.image.adaLN_modulation.1"
        expected = torch.cat(change.chunk(2)[::-1]) if swapped else change
        found = network.get_submodule(name).get_parameter("weight") - before[name]
        assert relative(found, expected) < 1e-4, name
