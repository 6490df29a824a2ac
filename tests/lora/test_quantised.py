"""Adapters on packed layers: the same as on the weights they unpack to, and the packed bytes are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from miniflux.checkpoints import from_layout, load_into
from miniflux.checkpoints.formats.base import Stored
from miniflux.checkpoints.quantized import packed_layers
from miniflux.errors import CheckpointError
from miniflux.lora import attach, detach, extract, merge, unmerge
from miniflux.models.flux1 import Flux1
from miniflux.training.lora import TrainableLora
from tests import reference
from tests.checkpoints.formats.made import SMALL, WIDE, WRITERS, empty, network, write_file, write_gguf
from tests.lora.made import lora, networks_of, tensors_of
from tests.tiny import flux1_inputs, randn

LAYERS = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.2", "single_blocks.0.linear1", "img_in")
QKV = LAYERS[0]


def out(model: Flux1) -> Tensor:
    with torch.inference_mode():
        return model(**flux1_inputs(model.config))


def pair(path: Path, model: Flux1, name: str, layout: str = "original") -> tuple[Flux1, Flux1]:
    """A network with packed layers, and one with the same weights unpacked."""
    dense = write_file(path, model, name, layout) if name in WRITERS else write_gguf(path, model, name, layout)
    packed, plain = empty(model.config), empty(model.config)
    load_into(packed, path, dtype=torch.float32)
    plain.load_state_dict(from_layout(plain, dense, layout), assign=True)
    return packed, plain.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "original") for name in (*WRITERS, "Q8_0", "Q4_K", "IQ4_XS")]
    + [(name, "diffusers") for name in ("scaled fp8, old", "nf4, nested", "Q4_K")],
)
def test_attach_and_detach(name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is unpacked to attach; outputs and norms are those on dense weights; detaching gives back the base."""
    path = tmp_path / ("a.safetensors" if name in WRITERS else "a.gguf")
    packed, plain = pair(path, network(SMALL if name in WRITERS else WIDE), name, layout)
    bytes_before = {key: tensor.clone() for key, tensor in packed.state_dict().items()}
    before, tensors = out(packed), lora(plain, *LAYERS)
    with monkeypatch.context() as patch:
        patch.setattr(Stored, "unpack", lambda *_: pytest.fail("the base was unpacked"))
        receipt = attach(packed, tensors, scale=0.7)
    expected = attach(plain, tensors, scale=0.7)
    assert torch.equal(out(packed), out(plain)) and not torch.equal(out(packed), before)
    assert [m.norm for m in receipt.modules] == [m.norm for m in expected.modules]
    assert [m.relative for m in receipt.modules] == [m.relative for m in expected.modules]
    detach(packed, "lora")
    assert torch.equal(out(packed), before)
    raw = {key: tensor.view(-1).view(torch.uint8) for key, tensor in packed.state_dict().items()}
    assert all(torch.equal(raw[key], tensor.view(-1).view(torch.uint8)) for key, tensor in bytes_before.items())


@pytest.mark.parametrize("name", ["fp8 by rows", "nf4, nested", "nvfp4"])
@pytest.mark.parametrize(
    "dialect", ["kohya-all-linears", "loha-kohya", "lokr-kohya", "dora-kohya-per-input", "dora-peft", "bfl-control"]
)
def test_dialects(name: str, dialect: str, tmp_path: Path) -> None:
    """LoHa, LoKr, DoRA (which looks at the weight), and a control LoRA, which widens the input and changes norms."""
    about = reference.dialect(f"flux1-{dialect}")["tiny"]
    packed, plain = pair(tmp_path / "a.safetensors", networks_of(about["config"]).transformer, name)
    before, tensors = out(packed), tensors_of(about["tensors"])
    attach(packed, tensors), attach(plain, tensors)
    assert packed.config == plain.config
    torch.testing.assert_close(out(packed), out(plain), rtol=1e-5, atol=1e-5)
    assert not torch.equal(out(plain)[..., : before.shape[-1]], before)
    detach(packed, "lora")
    assert torch.equal(out(packed), before)


def test_packed_files_are_compared(tmp_path: Path) -> None:
    """What a packed file differs in can be taken out as a LoRA."""
    model = network(SMALL)
    write_file(tmp_path / "a.safetensors", model, "nf4", "original")
    dense = write_file(tmp_path / "c.safetensors", model, "fp8 e4m3", "original")
    found = extract(tmp_path / "a.safetensors", tmp_path / "c.safetensors", tmp_path / "d.safetensors", rank=2)
    loaded = empty(SMALL)
    load_into(loaded, tmp_path / "a.safetensors")
    difference = dense[f"{QKV}.weight"] - packed_layers(loaded)[QKV].dense()
    norm = next(change.norm for change in found if change.target == QKV)
    assert norm == pytest.approx(float(difference.norm()), rel=1e-5)


def test_originals_are_not_taken_from_a_packed_file(tmp_path: Path) -> None:
    """Its numbers are others, and without their scales they would be nonsense."""
    model = network(SMALL)
    write_file(tmp_path / "a.safetensors", model, "scaled fp8, old", "original")
    attach(model, lora(model, QKV))
    merge(model, keep=False)
    with pytest.raises(CheckpointError, match=f"{QKV}.weight is quantised: {QKV}.weight cannot be restored from it"):
        unmerge(model, base=tmp_path / "a.safetensors")


def test_training_on_packed_layers(tmp_path: Path) -> None:
    """Gradients of a LoRA are those on dense weights, though the memory for unpacking is used again and again."""
    packed, plain = pair(tmp_path / "a.safetensors", network(SMALL), "nf4")
    grads: list[list[Tensor]] = []
    for model in (packed, plain):
        torch.manual_seed(0)
        trained = TrainableLora(model, LAYERS, rank=2)
        for i, parameter in enumerate(trained.parameters()):
            parameter.data.copy_(randn(*parameter.shape, seed=i))
        model(**flux1_inputs(SMALL)).square().sum().backward()
        grads.append([p.grad for p in trained.parameters() if p.grad is not None])
    assert len(grads[0]) == 2 * len(LAYERS)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
