"""LoRAs of each picture of a batch: every picture is the one that is drawn alone with its own LoRAs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import miniflux
from miniflux.cache import ResultCache
from miniflux.errors import InputError, LoraError
from miniflux.lora import attach, detach, merge, per_picture, set_schedule
from miniflux.lora.layer import add_changes, of_pictures
from miniflux.lora.pictures import shared
from miniflux.pipeline import Pipeline
from tests.lora.made import lora
from tests.lora.test_attach import encoder_lora
from tests.lora.test_layer import FORMS, WIDTH, form, linear
from tests.reference import alike
from tests.tiny import randn

SMALL: dict[str, Any] = {"steps": 2, "width": 64, "height": 64}
LAYER = "double_blocks.0.img_attn.qkv"
BATCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cfg": {"guide": "cfg", "negative": "a star"},
    "nag": {"guide": "nag"},
    "skip-layer": {"guide": "skip-layer"},
    "heun": {"solver": "heun"},
}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.load("nano", device="cpu")


def files(pipe: Pipeline) -> dict[str, Mapping[str, Tensor]]:
    """One of each kind, and one on everything that sees the conditioning vector: a row a picture."""
    network = pipe.transformer
    vectors = (
        "double_blocks.1.img_mod.lin",
        "single_blocks.0.modulation.lin",
        "time_in.in_layer",
        "vector_in.out_layer",
    )
    made = {
        "LoRA": lora(network, LAYER, "single_blocks.1.linear1", "txt_in", "img_in", "final_layer.linear"),
        "vectors": lora(network, *vectors, "final_layer.adaLN_modulation.1", seed=30),
        "LoHa": {
            f"{LAYER}.hada_w{i}_{half}": randn(*shape, seed=i) / 4
            for i in (1, 2)
            for half, shape in (("a", (576, 2)), ("b", (2, 192)))
        },
        "LoKr": {
            "single_blocks.0.linear2.lokr_w1": randn(4, 5) / 8,
            "single_blocks.0.linear2.lokr_w2": randn(48, 192) / 8,
        },
        "DoRA": {**lora(network, LAYER, seed=5), f"{LAYER}.dora_scale": randn(576, 1, seed=3).abs() + 0.1},
        "DoRA by column": {**lora(network, LAYER, seed=6), f"{LAYER}.dora_scale": randn(1, 192, seed=3).abs() + 0.1},
        "diff": {f"{LAYER}.diff": randn(576, 192) / 8, f"{LAYER}.diff_b": randn(576)},
        "bias": {"txt_in.diff_b": randn(192)},
    }
    return made


@pytest.mark.parametrize("name", FORMS)
@torch.inference_mode()
def test_a_row_is_computed_as_alone(name: str) -> None:
    """Of every kind of change, bit for bit: neighbours of other strengths, of none, and of numbers that overflow."""
    layer = linear()
    change, _ = form(name, layer.weight, (4, 8))
    add_changes(layer, "x", [change])
    strengths = [0.0, 1.0, 1.0, -0.5, 0.0, 0.25]
    x = randn(6, 16, WIDTH, seed=7)
    x[3] = 3e38
    with of_pictures({change: strengths}):
        found = layer(x)
        twice = layer(torch.cat((x, x)))  # two texts of a guide
    for i, strength in enumerate(strengths):
        with of_pictures({change: [strength]}):
            alone = layer(x[i : i + 1])[0]
        assert torch.equal(found[i].nan_to_num(), alone.nan_to_num())
        assert torch.equal(twice[i].nan_to_num(), alone.nan_to_num()) and torch.equal(
            twice[6 + i].nan_to_num(), alone.nan_to_num()
        )
        change.scale.fill_(strength)
        change.active = strength != 0
        assert torch.equal(layer(x[i : i + 1])[0].nan_to_num(), alone.nan_to_num())


@pytest.mark.parametrize("options", BATCHES.values(), ids=BATCHES)
def test_pictures_of_a_batch_have_loras_of_their_own(pipe: Pipeline, options: dict[str, Any]) -> None:
    """Bit for bit as drawn alone, whatever guides and solves: all kinds at once, in the order of attaching, two on a
    picture, strengths by module, none at all."""
    made = files(pipe)
    uses: list[dict[str, Any]] = [
        {},
        {"LoRA": 1.0},
        {"vectors": 0.7, "LoRA": 1.0},
        {"LoHa": 0.5, "DoRA": 0.3},
        {"LoKr": 1, "diff": -0.25},
        {"DoRA by column": 0.8, "bias": 2.0},
        {"LoRA": {"single_blocks": 0.5, LAYER: 0.0}},
        {"vectors": 0.0},
    ]
    seeds = [9, 3, 3, 5, 6, 7, 8, 1]
    for name, file in made.items():
        attach(pipe, file, 0.0, name)
    try:
        with per_picture(pipe, uses):
            together = pipe.generate([f"a star {i}" for i in range(8)], seed=seeds, **SMALL, **options)
        nothing = pipe.generate("a star 1", seed=3, **SMALL, **options)  # outside of it, all are at 0
    finally:
        for name in made:
            detach(pipe, name)
    assert [about["batch"] for about in together.settings] == [8] * 8
    for i, own in enumerate(uses):
        for name in made:
            if name in own:
                attach(pipe, made[name], own[name], name)
        alone = pipe.generate(f"a star {i}", seed=seeds[i], **SMALL, **options)
        assert alike(together.latents[i], alone.latents[0]), own
        assert together.settings[i]["loras"] == alone.settings[0]["loras"]
        for name in own:
            detach(pipe, name)
        if i == 1:
            assert not torch.equal(nothing.latents, alone.latents)
    assert not torch.equal(together.latents[1], together.latents[2])


@pytest.mark.parametrize("name", ["flux1-dev", "flux2-klein-4b", "flux3-klein"])
def test_every_family(name: str) -> None:
    """Up to rounding, where the words are of a length that does not divide."""
    pipe = miniflux.tiny(name)
    layer = next(n for n, m in pipe.transformer.named_modules() if hasattr(m, "in_features") and "blocks.0" in n)
    for i in range(2):
        attach(pipe, lora(pipe.transformer, layer, seed=i), 0.0, str(i))
    options: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}
    uses = [{"0": 1.0}, {}, {"1": 0.5}]
    with per_picture(pipe, uses):
        together, apart = (pipe.generate("a cat", images=3, seed=[4, 4, 4], batch=n, **options) for n in (3, 1))
    assert together.settings[0]["batch"] == 3
    torch.testing.assert_close(together.latents, apart.latents, rtol=0, atol=1e-4)
    assert torch.equal(apart.latents[1:2], pipe.generate("a cat", seed=4, **options).latents)
    assert not torch.equal(apart.latents[0], apart.latents[1]) and not torch.equal(apart.latents[2], apart.latents[1])


def test_what_no_picture_names_counts_for_all(pipe: Pipeline) -> None:
    attach(pipe, "realism", 0.5, "all")
    attach(pipe, "realism", 0.0, "one")
    try:
        with per_picture(pipe, [{}, {"one": 0.25}]):
            result = pipe.generate("a star", images=2, **SMALL)
    finally:
        detach(pipe, "one")
        first = pipe.generate("a star", **SMALL)
        detach(pipe, "all")
    assert torch.equal(result.latents[:1], first.latents)
    assert [[about["name"] for about in said["loras"]] for said in result.settings] == [["all"], ["all", "one"]]


def test_other_threads_see_nothing_of_it(pipe: Pipeline) -> None:
    """They may draw meanwhile, with the LoRAs as they were attached."""
    plain = pipe.generate("a star", seed=4, **SMALL).latents
    attach(pipe, "realism", 0.0, "r")
    found: list[Tensor] = []
    told = threading.Event()

    def watch(*_: Any) -> None:
        if not told.is_set():
            told.set()
            thread = threading.Thread(target=lambda: found.append(pipe.generate("a star", seed=4, **SMALL).latents))
            thread.start()
            thread.join(60)

    try:
        with per_picture(pipe, [{"r": 1.0}]):
            lit = pipe.generate("a star", seed=4, watch=watch, **SMALL).latents
    finally:
        detach(pipe, "r")
    assert torch.equal(found[0], plain) and not torch.equal(lit, plain)


def test_a_picture_is_kept_under_its_own_loras(tmp_path: Any) -> None:
    """The result cache finds it alone, and its file claims only what it was made from."""
    pipe = miniflux.load("nano", cache=ResultCache())
    attach(pipe, "realism", 0.0, "r")
    with per_picture(pipe, [{}, {"r": 0.5}]):
        both = pipe.generate("a star", images=2, seed=[2, 2], **SMALL)
    both.hash_files()
    assert ["lora r" in {file["part"] for file in said["files"]} for said in both.settings] == [False, True]
    detach(pipe, "r")
    assert pipe.generate("a star", seed=2, **SMALL).settings[0]["cached"]
    attach(pipe, "realism", 0.5, "another name")
    again = pipe.generate("a star", seed=2, **SMALL)
    assert again.settings[0]["cached"] and torch.equal(again.latents, both.latents[1:])


def test_what_cannot_differ_is_refused_by_name(pipe: Pipeline) -> None:
    """Text encoders, replaced parameters, what is merged or follows the noise: with the reason, and nothing changes."""
    network = pipe.transformer
    norm = {"double_blocks.0.txt_attn.norm.query_norm.diff": randn(32) / 4}
    for name, file in (("words", encoder_lora(pipe)), ("norm", norm), ("r", "realism"), ("late", lora(network, LAYER))):
        attach(pipe, file, 0.0, name)
    set_schedule(pipe, "late", lambda sigma: sigma)
    merge(pipe, "r")
    try:
        for name, reason in (
            ("words", "'words' .*: it changes the clip network"),
            ("norm", r"'norm' .*: it replaces parameters \(double_blocks.0.txt_attn.norm.query_norm.scale\)"),
            ("r", "'r' .*: it is merged"),
            ("late", "'late' .*: its strength follows the noise level"),
            ("gone", "no LoRA named 'gone' is attached"),
        ):
            with pytest.raises(LoraError, match=reason), per_picture(pipe, [{name: 1.0}, {}]):
                pytest.fail("it was taken")
        assert shared(pipe, "norm") is not None
    finally:
        miniflux.lora.unmerge(pipe, "r")
        for name in ("late", "r", "norm", "words"):
            detach(pipe, name)


@pytest.mark.parametrize("scale", [float("nan"), "1", None, {"single_blocks.9": 1.0}])
def test_bad_strengths_are_refused(pipe: Pipeline, scale: Any) -> None:
    attach(pipe, "realism", 0.0, "r")
    try:
        with pytest.raises(InputError, match="scale of a LoRA|begins with"), per_picture(pipe, [{"r": scale}]):
            pytest.fail("it was taken")
        with per_picture(pipe, [{"r": 1.0}, {}]), pytest.raises(InputError, match=r"for 2 pictures, and 3 are"):
            pipe.generate("a star", images=3, **SMALL)
    finally:
        detach(pipe, "r")


def test_references_that_are_looked_at_once_are_refused() -> None:
    """One look is for all pictures of a call, with one set of LoRAs."""
    pipe = miniflux.tiny("flux2-klein-9b-kv")
    layer = "single_blocks.0.linear1"
    attach(pipe, lora(pipe.transformer, layer), 0.0, "x")
    reference = miniflux.conditions.Reference(miniflux.tiny().generate("x", steps=1).images[0])
    with per_picture(pipe, [{"x": 1.0}, {}]), pytest.raises(InputError, match="references that are looked at once"):
        pipe.generate("a cat", images=2, conditions=[reference])
