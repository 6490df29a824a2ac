"""Edit: what is changed is what was asked for, everything behind it sees that, and the settings say so."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import miniflux
from miniflux import lora, study
from miniflux.conditions import Reference
from miniflux.errors import InputError
from miniflux.pipeline import Pipeline
from miniflux.sampling.guidance import Cfg, Nag, SkipLayer
from miniflux.testing import tiny as fresh
from tests.small_models import lora as small_lora

SMALL: dict[str, Any] = {"seed": 3, "width": 64, "height": 32, "steps": 2}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
FAMILIES = ("flux1-dev", "flux2-dev", "flux3-klein")
tiny = cache(fresh)  # nobody changes them


def drawn(pipe: Pipeline, **asked: Any) -> Tensor:
    return pipe.generate("a red circle", **{**SMALL, **asked}).latents


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_same_again_changes_nothing(variant: str) -> None:
    """At all points at once, to the last bit; attention weights meet the values in another order of sums."""
    pipe = tiny(variant)
    plain = drawn(pipe)
    points = [point for point in study.points(pipe) if not point.name.startswith("autoencoder.encoder")]
    for weights in (False, True):
        chosen = [point.name for point in points if point.weights == weights]
        with study.edit(pipe, dict.fromkeys(chosen, lambda value, at: value)):
            same = drawn(pipe)
        assert_close(same, plain, rtol=0, atol=2e-5 if weights else 0)


@pytest.mark.parametrize("variant", ["flux1-dev", pytest.param("flux2-dev", marks=pytest.mark.slow), "flux3-klein"])
def test_the_network_sees_every_change(variant: str) -> None:
    """At each point of the first block of a kind, and at those around the blocks."""
    pipe = tiny(variant)
    asked = {**SMALL, "steps": 1, "width": 32}
    plain = pipe.generate("a red circle", **asked)
    last = pipe.transformer.config.blocks[-1]
    for point in study.points(pipe):
        within = point.block is None or point.block.endswith(".0")
        if point.network != "transformer" or point.only_with_references or not within or point.block == last:
            continue
        with study.edit(pipe, {point.name: lambda value, at: value.flip(-1) * 0.5}):
            other = pipe.generate("a red circle", **asked)
        assert other.settings[0]["wrapped"] == [f"study.edit: {point.name} lambda"]
        assert not torch.equal(other.latents, plain.latents), point.name
    assert torch.equal(pipe.generate("a red circle", **asked).latents, plain.latents)


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_change_is_where_it_was_asked_for(variant: str) -> None:
    """These steps, heads and tokens, and no other numbers."""
    pipe, point = tiny(variant), "single_blocks.1.z"
    with study.capture(pipe, point) as before:
        drawn(pipe)
    with (
        study.edit(pipe, {point: study.scale(3)}, steps=1, heads=[0, 2], tokens="image"),
        study.capture(pipe, point) as seen,
    ):
        drawn(pipe)
    assert torch.equal(seen.get(point, step=0), before.get(point, step=0))
    old, new = before.get(point, step=1), seen.get(point, step=1)
    expected = old.clone()
    expected[[0, 2], -8:] *= 3
    assert torch.equal(new, expected)


def test_kinds_of_changes() -> None:
    pipe, point = tiny("flux1-dev"), "double_blocks.1.img_out"
    with study.capture(pipe, point) as before:
        drawn(pipe)
    vector = torch.arange(64.0)
    old = before.get(point, step=0)
    for change, expected in [
        (study.zero, torch.zeros_like(old)),
        (study.scale(-1), -old),
        (study.add(vector), old + vector),
        (study.add(vector, 0.5), old + 0.5 * vector),
        (study.replace(0.25), torch.full_like(old, 0.25)),
        (study.replace(vector), vector.expand_as(old)),
        ([study.scale(2), study.add(vector)], 2 * old + vector),
        (lambda value, at: value - value.mean(1, keepdim=True), old - old.mean(0, keepdim=True)),
    ]:
        with study.edit(pipe, {point: change}), study.capture(pipe, point, steps=0) as seen:
            drawn(pipe)
        assert_close(seen.get(point), expected)


@pytest.mark.parametrize("variant", FAMILIES)
def test_blocks_and_heads_are_ablated(variant: str) -> None:
    """A block that is skipped is one that a `run` of the caller's leaves out."""
    pipe = tiny(variant)
    block = pipe.transformer.config.blocks[-2]

    def run(name: str, module: Any, streams: Any, context: Any) -> Any:
        out = streams if name == block else module(*streams, *context)
        return out if isinstance(out, tuple) else (out,)

    with study.edit(pipe, {block: study.skip}):
        skipped = drawn(pipe)
    assert torch.equal(skipped, drawn(pipe, run=run))

    def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
        v = v.clone()
        v[:, 3] = 0
        return miniflux.models.layers.attention(q, k, v, pe, mask)

    with study.edit(pipe, {"single_blocks.*.z": study.zero}, heads=3):
        ablated = drawn(pipe)

    def wrap(run: Any) -> Any:
        def beside(name: str, module: Any, streams: Any, context: Any) -> Any:
            return run(name, module, streams, (*context[:-1], attend) if name.startswith("single") else context)

        return beside

    assert_close(ablated, drawn(pipe, wraps=[wrap]))


@pytest.mark.parametrize("variant", FAMILIES)
def test_rotated_queries_and_weights(variant: str) -> None:
    """With keys of nothing every key has the same weight; so it has where the weights are made equal."""
    pipe, block = tiny(variant), "single_blocks.0"
    with study.edit(pipe, {f"{block}.k_rope": study.zero}), study.capture(pipe, f"{block}.*") as keys:
        first = drawn(pipe)
    weights = keys.get(f"{block}.attn_weights", step=0)
    assert_close(weights, torch.full_like(weights, 1 / weights.shape[-1]))
    equal = study.replace(1 / weights.shape[-1])
    with study.edit(pipe, {f"{block}.attn_weights": equal}), study.capture(pipe, f"{block}.*") as seen:
        second = drawn(pipe)
    assert_close(first, second)
    assert_close(seen.get(f"{block}.z", step=0), keys.get(f"{block}.z", step=0))
    assert_close(seen.get(f"{block}.attn_weights", step=0), weights)


def test_patched_from_another_run() -> None:
    """All of a stream brings the other picture back; what was there already changes nothing."""
    pipe = tiny("flux1-dev")
    points = ["single_blocks.0.in", "vector_in.out", "double_blocks.0.z", "single_blocks.1.attn_weights"]
    asked = {**SMALL, "guide": Cfg(scale=2.0)}
    with study.capture(pipe, points) as kept:
        clean = pipe.generate("a red circle", **asked)
    other = pipe.generate("a blue square", **asked)
    with study.edit(pipe, dict.fromkeys(points[:2], study.patch(kept))):
        back = pipe.generate("a blue square", **asked)
    assert torch.equal(back.latents, clean.latents) and not torch.equal(other.latents, clean.latents)
    with study.edit(pipe, dict.fromkeys(points, study.patch(kept)), heads=None):
        again = pipe.generate("a red circle", **asked)
    assert_close(again.latents, clean.latents, rtol=0, atol=1e-5)
    for options in ({"heads": [1]}, {"tokens": "text"}, {"heads": [1], "tokens": [0, 2]}):
        with study.edit(pipe, dict.fromkeys(points[2:], study.patch(kept)), **options):
            again = pipe.generate("a red circle", **asked)
        assert_close(again.latents, clean.latents, rtol=0, atol=1e-5)


def test_order() -> None:
    """The outer one comes first: a capture inside sees the edit, one around it does not; edits follow each other."""
    pipe, point = tiny("flux1-dev"), "double_blocks.0.img_out"
    with (
        study.capture(pipe, point, 0) as around,
        study.edit(pipe, {point: study.scale(2)}),
        study.capture(pipe, point, 0) as between,
        study.edit(pipe, {point: study.add(torch.ones(64))}),
        study.capture(pipe, point, 0) as inside,
    ):
        drawn(pipe)
    assert torch.equal(between[point], 2 * around[point])
    assert torch.equal(inside[point], 2 * around[point] + 1)
    for which in ("q", "q_rope", "attn_weights"):
        point = f"double_blocks.0.{which}"
        with (
            study.capture(pipe, point, 0) as around,
            study.edit(pipe, {point: study.scale(0.5)}),
            study.capture(pipe, point, 0) as inside,
        ):
            drawn(pipe)
        assert_close(inside[point], 0.5 * around[point])


def test_with_loras(tmp_path: Path) -> None:
    pipe, point = fresh("flux2-klein-4b"), "single_blocks.0.linear2.out"
    lora.attach(pipe, small_lora(tmp_path / "small.safetensors", "flux2-klein-4b"))
    with study.capture(pipe, point, 0) as before:
        drawn(pipe)
    with study.edit(pipe, {point: study.scale(2)}), study.capture(pipe, point, 0) as seen:
        result = pipe.generate("a red circle", **SMALL)
    assert torch.equal(seen[point], 2 * before[point])
    assert result.settings[0]["loras"] and result.settings[0]["wrapped"] == [f"study.edit: {point} scale(2)"]


def test_text_encoders() -> None:
    """A prompt that was read before is read again; what was read with the edit is not kept."""
    pipe = tiny("flux1-dev")
    plain = drawn(pipe)
    with study.edit(pipe, {"t5.**.z": study.zero}, heads=1):
        edited = drawn(pipe)
    assert not torch.equal(edited, plain)
    assert torch.equal(drawn(pipe), plain)


def test_texts() -> None:
    pipe, asked = tiny("flux1-dev"), {"guide": Cfg(scale=2.0), "negative": "a square"}
    point = "txt_in.out"
    with study.edit(pipe, {point: study.zero}, texts="negative"), study.capture(pipe, point) as seen:
        drawn(pipe, **asked)
    assert not seen.get(point, step=0, text="negative").any() and seen.get(point, step=0, text="positive").any()
    with study.edit(pipe, {point: study.zero}, texts="negative"), study.capture(pipe, point) as seen:
        drawn(pipe, guide=Nag(scale=2.0), negative="a square")  # both in one batch
    assert not seen.get(point, step=0, text="negative").any() and seen.get(point, step=0, text="positive").any()


def test_what_would_lie_is_refused() -> None:
    pipe = tiny("flux1-dev")
    edit: dict[str, Any] = {"double_blocks.0.img_out": study.scale(2)}
    with pytest.raises(InputError, match="img_out scale.*a step cache leaves blocks out"), study.edit(pipe, edit):
        drawn(pipe, cache="first-block")
    klein = tiny("flux2-klein-4b")
    with pytest.raises(InputError, match="looked at once are not altered"), study.edit(klein, edit):
        drawn(klein, conditions=[Reference(PHOTO, once=True)])
    with study.edit(klein, edit):
        drawn(klein, conditions=[Reference(PHOTO, once=False)])
    guide = SkipLayer(skip_window=(0.0, 1.0), layers=("double_blocks.0",))
    with pytest.raises(InputError, match="img_out was left out in step 1"), study.edit(pipe, edit):
        drawn(pipe, steps=3, guide=guide)
    with pytest.raises(InputError, match="NAG"), study.edit(pipe, {"double_blocks.0.attn_weights": study.scale(2)}):
        drawn(pipe, guide=Nag(scale=2.0))
    for changes, options in [(edit, {"texts": "negative"}), ({"autoencoder.encoder.conv_in.out": study.zero}, {})]:
        with pytest.raises(InputError, match="never computed as asked"), study.edit(pipe, changes, **options):
            drawn(pipe)
    assert not pipe.transformer._forward_hooks


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, {}, "at least one point"),
        ({"double_blocks.0.img_ouch": study.zero}, {}, "near it: double_blocks.0.img_out"),
        ({"double_blocks.9": study.skip}, {}, "no block 'double_blocks.9'"),
        ({"double_blocks.0": study.skip}, {"heads": 0}, "no heads"),
        ({"double_blocks.0.z": 3}, {}, "changes|a change is a function"),
        ({"double_blocks.0.z": [3]}, {}, "a change is a function"),
        ({"double_blocks.0.z": study.zero}, {"heads": 9}, "heads must be from 0 to 3"),
        ({"double_blocks.0.img_out": study.zero}, {"tokens": "text"}, "no text tokens"),
        ({"double_blocks.0.img_out": study.zero}, {"tokens": [99]}, "tokens must be from 0 to 7"),
        ({"double_blocks.0.img_out": study.zero}, {"steps": [2]}, "steps must be from 0 to 1"),
        ({"double_blocks.0.img_out": study.add(torch.ones(3))}, {}, "does not fit the chosen part"),
        ({"double_blocks.0.img_out": lambda value, at: value[:, :1]}, {}, "must give a tensor of"),
        ({"double_blocks.0.img_out": lambda value, at: 3}, {}, "must give a tensor of"),
    ],
)
def test_bad_input_is_refused(changes: Any, options: dict[str, Any], said: str) -> None:
    pipe = tiny("flux1-dev")
    with pytest.raises(InputError, match=said), study.edit(pipe, changes, **options):
        drawn(pipe)


def test_patches_that_do_not_fit_are_refused() -> None:
    pipe, point = tiny("flux1-dev"), "double_blocks.0.txt_out"
    with study.capture(pipe, point, heads=None, tokens=[0]) as part:
        drawn(pipe)
    with pytest.raises(InputError, match="capture whole values"):
        study.patch(part)
    with study.capture(pipe, point, steps=0) as kept:
        drawn(pipe)
    with (
        pytest.raises(InputError, match="step 1, .*there is run 0, step 0"),
        study.edit(pipe, {point: study.patch(kept)}),
    ):
        drawn(pipe)
    with pytest.raises(InputError, match="must have as many tokens"), study.edit(pipe, {point: study.patch(kept)}, 0):
        drawn(pipe, t5_length=7)
    for wrong in ("much", float("nan")):
        with pytest.raises(InputError, match="factor"):
            study.scale(wrong)  # type: ignore
