"""The recipe runs from beginning to end, and can be stopped in between; at a size that takes seconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import miniflux
from miniflux.nano import scenes
from miniflux.nano.recipe import __main__ as recipe
from miniflux.nano.recipe import autoencoder as stage1
from miniflux.nano.recipe import distil, flow, pairs, polish
from miniflux.nano.recipe.flow import Phase
from miniflux.nano.recipe.text import train_tokenizers, varied
from miniflux.sampling import image_ids, text_ids
from miniflux.text import load_clip_tokenizer, load_t5_tokenizer
from miniflux.weights.finding import BUNDLED

SMALL = ((64, 64), (64, 96))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with a few steps per stage."""
    folder = tmp_path_factory.mktemp("nano")
    patch = pytest.MonkeyPatch()
    round_ = stage1.Round((stage1.Phase(32, 4, 1), stage1.Phase(48, 2, 1, focus=1.0)), 1e-3)
    patch.setattr(stage1, "ROUNDS", (round_,))
    for name, count in (("POOL", 4), ("MEASURED", 8), ("CHECKED", 2)):
        patch.setattr(stage1, name, count)
    for name in ("TEACHER", "DEV", "SCHNELL"):
        patch.setattr(recipe, name, [Phase(name.lower(), 2, SMALL, 2, 1e-3)])
    for name in ("OWN_DEV", "OWN_SCHNELL"):
        patch.setattr(recipe, name, polish.Phase(name.lower(), 2, SMALL, 2, 1e-3, kept=(2, 2)))
    # After two steps of training nothing is drawn as asked.
    patch.setattr(pairs, "snapped", lambda pixels, scene: scene)
    patch.setattr(flow, "COMPILE", False)
    patch.setattr(recipe, "POOL", 8)
    patch.setattr(recipe, "REPORT", {"teacher": 2, "dev": 2, "schnell": 2, "own": 2})
    patch.setattr(recipe, "SHEET", 2)
    recipe.make(folder)
    recipe.make(folder)  # finds everything done and only exports again
    patch.undo()
    return folder


def test_the_run_leaves_models_that_load_and_draw(made: Path) -> None:
    for name in ("nano-dev", "nano-schnell"):
        result = miniflux.load(name, weights=made / "weights").generate("a red circle", steps=1)
        assert result.images[0].size == (128, 128)


def test_every_stage_leaves_a_sheet(made: Path) -> None:
    assert {file.name.split("-")[0] for file in made.glob("*.png")} == {"teacher", "dev", "schnell"}
    assert {file.name.rsplit("-", 1)[0] for file in made.glob("*own*.png")} == {"dev-own", "schnell-own"}


def test_rounded_weights_are_those_that_an_nf4_file_holds(tmp_path: Path) -> None:
    """And what is learned from them reaches the weights that are rounded."""
    source = BUNDLED / "flux1-nano-dev.safetensors"
    miniflux.checkpoints.convert(source, tmp_path / "nf4.safetensors", format="nf4")
    packed = miniflux.load("nano-dev", weights={"transformer": tmp_path / "nf4.safetensors"}, dtype="float32")
    model = miniflux.load("nano-dev", dtype="float32").transformer.requires_grad_(True)
    config, rng = model.config, torch.Generator().manual_seed(0)
    x, txt, vec = (
        torch.randn(1, *shape, generator=rng)
        for shape in ((16, config.in_channels), (5, config.context_in_dim), (config.vec_in_dim,))
    )
    inputs = (x, image_ids(1, 4, 4), txt, text_ids(1, 5), torch.tensor([0.7]), vec, torch.tensor([3.0]))
    out = distil.rounded(model)(*inputs)
    with torch.inference_mode():
        torch.testing.assert_close(out, packed.transformer(*inputs), atol=1e-5, rtol=1e-5)
        assert (out - model(*inputs)).abs().max() > 1e-2
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.single_blocks.parameters())


def test_crops_around_edges_show_edges() -> None:
    phase = stage1.Phase(32, 1, 1, focus=1.0)
    rng = random.Random(0)
    pictures = [stage1.picture(random.Random(i), 128) for i in range(20)]
    assert sum(stage1.crop_of(picture, phase, rng).std() > 5 for picture in pictures) == 20


def test_captions_vary_but_keep_their_meaning() -> None:
    """However a caption is dressed up, colour and shape stay side by side unless a stray word came between."""
    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        scene = scenes.one_object(rng)
        text = varied(scene.caption, rng)
        seen.add(text == scene.caption)
        shape = scene.shapes[0]
        assert text.lower().index(shape.colour) < text.lower().rindex(shape.kind) + len(shape.kind)
        assert scene.background in text
    assert seen == {True, False}


def test_tokenizers_are_small_lossless_and_repeatable(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        train_tokenizers(tmp_path / folder)
    for file in ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    clip, t5 = load_clip_tokenizer(tmp_path / "a/tokenizer"), load_t5_tokenizer(tmp_path / "a/tokenizer_2")
    assert len(t5.tokens("a purple triangle left of a orange diamond on a gray background")) == 13
    assert t5.tokens("A RED circle") == t5.tokens("a red circle")
    assert clip.tokens("A RED circle") == clip.tokens("a red circle")
    assert torch.equal(clip("a red star", 77), clip("a  red star ", 77))
