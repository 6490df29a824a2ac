"""The bundled ControlNet and Canny LoRA, and their recipe: what they learn from, what they begin as, and their judge
held against true pictures."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import miniflux
from miniflux.checkpoints.writing import write_tensors
from miniflux.conditions import Control
from miniflux.nano import scenes
from miniflux.nano.recipe import editing
from miniflux.nano.recipe.edges import (
    LIKE,
    aside,
    beginning,
    bfl_tensors,
    changed_layers,
    control_loss,
    judged,
    lora_loss,
)
from miniflux.nano.recipe.flow import noise_levels, velocity
from miniflux.nano.recipe.realism import encoders_of
from miniflux.pipeline import Pipeline
from miniflux.sampling import image_ids, text_ids
from miniflux.training.flow import mix
from miniflux.training.lora import TrainableLora


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.load("nano", dtype="float32")


def test_shapes_stand_inside_and_beside_their_captions() -> None:
    rng, moved = random.Random(3), 0
    for i in range(200):
        scene = aside(rng, held_out=i % 2 == 0)
        assert any((shape.colour, shape.kind) in scenes.HELD_OUT for shape in scene.shapes) == (i % 2 == 0)
        for shape in scene.shapes:
            assert shape.radius <= shape.x <= 1 - shape.radius and shape.radius <= shape.y <= 1 - shape.radius
        moved += any(abs(shape.x - at[0]) > 0.05 for shape in scene.shapes for at in [scenes.POSITIONS[""]])
    assert moved > 50


def test_it_begins_as_nothing_with_the_weights_of_the_first_block(pipe: Pipeline) -> None:
    """What it adds is zero, so its loss is that of nano-dev (arXiv 2302.05543); its gradient is not."""
    net, dev = beginning(pipe.transformer).requires_grad_(True), pipe.transformer
    assert torch.equal(net.double_blocks[0].img_attn.qkv.weight, dev.double_blocks[0].img_attn.qkv.weight)
    words, x0, seen = ["a red star", "a blue ring"], torch.randn(2, 64, 64), torch.randn(2, 64, 64)
    encoders = encoders_of(pipe.text)
    torch.manual_seed(1)
    loss = control_loss(net, dev, encoders, words, x0, seen)
    loss.backward()
    torch.manual_seed(1)
    sigmas, noise = noise_levels(2, 64), torch.randn(2, 64, 64)
    text, strength = encoders(words, 32), torch.empty(2).uniform_(1.0, 6.0)
    told: tuple[Any, ...] = (text.txt, text_ids(2, 32), sigmas, text.vec, strength)
    x = (1 - sigmas[:, None, None]) * x0 + sigmas[:, None, None] * noise
    with torch.no_grad():
        plain = (dev(x, image_ids(2, 8, 8), *told) - (noise - x0)).square().mean()
    torch.testing.assert_close(loss.detach(), plain)
    assert net.controlnet_blocks[0].weight.grad.abs().sum() > 0  # type: ignore


def test_the_judge_agrees_with_true_pictures(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture whose edges were given is right; that of the caption alone lies elsewhere."""
    pytest.importorskip("cv2")
    rng = random.Random(5)
    wanted = [aside(rng, held_out=i % 3 == 0) for i in range(12)]
    shown = iter([scenes.render(scene, 128, 128) for scene in wanted] * 2)
    fake: Any = SimpleNamespace(generate=lambda *_, **__: SimpleNamespace(images=[next(shown)]))
    assert all(ok and overlap == 1 for ok, overlap in judged(fake, Control, 12, 5))
    next(shown)
    assert not any(overlap >= LIKE for _, overlap in judged(fake, Control, 11, 5))


def test_the_lora_begins_as_nothing_and_is_read_as_a_control_lora(pipe: Pipeline, tmp_path: Path) -> None:
    """Its first loss is that of nano-dev, every matrix learns, and the file widens the input of a nano-dev."""
    dev = pipe.transformer
    wide = editing.beginning(dev, 64).requires_grad_(False)
    lora = TrainableLora(wide, changed_layers(wide), 4)
    words, x0, seen = ["a red star", "a blue ring"], torch.randn(2, 64, 64), torch.randn(2, 64, 64)
    encoders = encoders_of(pipe.text)
    torch.manual_seed(1)
    loss = lora_loss(wide, encoders, words, x0, seen)
    loss.backward()
    torch.manual_seed(1)
    sigmas, noise = noise_levels(2, 64), torch.randn(2, 64, 64)
    strength = torch.empty(2).uniform_(1.0, 6.0)
    with torch.no_grad():
        v = velocity(dev, mix(x0, noise, sigmas), (128, 128), sigmas, encoders(words, 32), guidance=strength)
    torch.testing.assert_close(loss.detach(), (v - (noise - x0)).square().mean())
    ups = [change.up for change in lora.changes]
    assert all(up.grad is not None and up.grad.abs().sum() > 0 for up in ups)
    with torch.no_grad():
        for up in ups:
            up.normal_(std=0.02)
    write_tensors(tmp_path / "canny.safetensors", bfl_tensors(lora), {})
    fresh = miniflux.load("nano", dtype="float32")
    receipt = miniflux.lora.attach(fresh, tmp_path / "canny.safetensors")
    assert fresh.transformer.config.in_channels == 128 and receipt.dialect == "BFL"
    edges = scenes.render(scenes.one_object(random.Random(1)), 64, 64)
    drawn = fresh.generate("a red star", width=64, height=64, steps=2, conditions=[Control(edges)])
    assert drawn.images[0].size == (64, 64)


def test_the_bundled_controlnet_draws_along_edges(pipe: Pipeline) -> None:
    """By its name; nine of ten scenes beside the places that their captions say are drawn where their edges are."""
    pytest.importorskip("cv2")
    net = miniflux.conditions.load("canny")
    told = judged(pipe, lambda edges: miniflux.conditions.ControlNet(net, edges), 10, 7)
    assert sum(ok and overlap >= LIKE for ok, overlap in told) >= 9
    with pytest.raises(miniflux.errors.CheckpointError, match=r"no bundled ControlNet of this name \(canny\)"):
        miniflux.conditions.load("cany")
    seen = miniflux.conditions.ControlNet(net, scenes.render(scenes.one_object(random.Random(1)), 64, 64))
    other = miniflux.tiny("flux1-dev")
    with pytest.raises(miniflux.errors.InputError, match="192"):
        other.generate("a star", conditions=[seen], steps=1)


def test_the_bundled_canny_lora_draws_along_edges() -> None:
    """nano-dev reads a control picture with it, and is as before without."""
    pytest.importorskip("cv2")
    pipe = miniflux.load("nano", dtype="float32")
    before = pipe.generate("a red star", width=64, height=64, steps=2).latents
    receipt = miniflux.lora.attach(pipe, "canny")
    assert receipt.dialect == "BFL" and receipt.applied == receipt.expected == 23
    told = judged(pipe, Control, 10, 7)
    assert sum(ok and overlap >= LIKE for ok, overlap in told) >= 9
    with pytest.raises(miniflux.errors.InputError, match="control"):
        pipe.generate("a red star", steps=1)
    miniflux.lora.detach(pipe, "canny")
    assert torch.equal(pipe.generate("a red star", width=64, height=64, steps=2).latents, before)
