"""Capture: changes nothing, and keeps what hooks, another implementation and the formula say."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import miniflux
from miniflux import lora, study
from miniflux.cache import ResultCache
from miniflux.conditions import Reference
from miniflux.errors import CheckpointError, InputError, OutputError
from miniflux.pipeline import Pipeline
from miniflux.sampling import SOLVERS
from miniflux.sampling.guidance import Cfg, Nag, PerpNeg, SkipLayer
from miniflux.study.values import growing, tapping
from miniflux.study.values.kept import Kept
from miniflux.testing import tiny as fresh
from tests.small_models import lora as small_lora

SMALL: dict[str, Any] = {"seed": 3, "width": 64, "height": 32, "steps": 2}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
tiny = cache(fresh)  # nobody changes them
FAMILIES = ("flux1-dev", "flux1-schnell", "flux2-dev", "flux2-klein-4b", "flux3-klein")


def same(pipe: Pipeline, points: str | list[str] = "**", **asked: Any) -> study.Kept:
    """Draws with and without a capture; both must be the same to the last bit, settings included."""
    asked = {**SMALL, **asked}
    plain = pipe.generate("a red circle", **asked)
    with study.capture(pipe, points) as seen:
        drawn = pipe.generate("a red circle", **asked)
        assert pipe.changed() == ()
    assert torch.equal(plain.latents, drawn.latents)
    assert [each.tobytes() for each in plain.images] == [each.tobytes() for each in drawn.images]
    assert plain.settings == drawn.settings
    assert len(seen) > 0
    return seen


@pytest.mark.parametrize("variant", FAMILIES)
def test_families(variant: str) -> None:
    same(tiny(variant), images=2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers(solver: str) -> None:
    seen = same(tiny("flux1-dev"), "*.*.z", solver=solver, steps=3, width=32)
    assert {record.step for record in seen.records} == {0, 1, 2}


@pytest.mark.parametrize(
    "asked",
    [
        {"guide": Cfg(scale=2.0), "negative": "a square"},
        {"guide": PerpNeg(scale=2.0)},
        {"guide": Nag(scale=3.0), "negative": "a square"},
        {"guide": SkipLayer(skip_scale=2.0, skip_window=(0.0, 1.0)), "steps": 3},
        {"cache": "first-block", "steps": 4},
        {"cache": "tea", "steps": 4},
        {"padding": "trimmed"},
        {"padding": "masked"},
        {"batch": 2, "images": 2},
        {"image": PHOTO, "strength": 0.6, "steps": 4, "height": 64},
    ],
)
def test_ways_to_draw(asked: dict[str, Any]) -> None:
    same(tiny("flux1-dev"), **asked)


def test_references() -> None:
    same(tiny("flux1-kontext-dev"), conditions=[Reference(PHOTO)])
    seen = same(tiny("flux3-klein"), conditions=[Reference(PHOTO)])
    assert seen.get("content_mode_blocks.image_cond.0.out", step=0).shape == (16, 64)
    once = same(tiny("flux2-klein-4b"), conditions=[Reference(PHOTO, once=True)])
    weights = once.get("double_blocks.0.attn_weights", step=0)
    assert weights.shape[2] == weights.shape[1] + 16  # keys of the references, which ask nothing
    assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))


@pytest.mark.parametrize("memory", ["resident", "text-freed", "offload", "stream"])
def test_memory_modes(memory: str) -> None:
    pipe = miniflux.load("nano", memory=memory)
    plain = pipe.generate("a red circle", **SMALL)
    with study.capture(pipe, "**") as seen:
        drawn = pipe.generate("a red circle", **SMALL)
    assert torch.equal(plain.latents, drawn.latents) and plain.settings == drawn.settings
    with study.capture(miniflux.load("nano"), "double_blocks.1.**") as resident:
        pass
    assert not len(resident)
    assert pipe.changed() == ()
    assert "double_blocks.1.q_rope" in {record.point for record in seen.records}


@pytest.mark.parametrize("variant", ["flux2-klein-4b", "flux3-klein"])
def test_loras(variant: str, tmp_path: Path) -> None:
    """Hooks of a LoRA that is attached inside of the `with` come before those of the capture."""
    pipe = fresh(variant)
    layer = "single_blocks.0.linear2" if variant.startswith("flux2") else "single_blocks.0.attn_out"
    file = small_lora(tmp_path / "small.safetensors", variant)
    with study.capture(pipe, f"{layer}.out") as inside:
        lora.attach(pipe, file)
        pipe.generate("a red circle", **SMALL)
    seen = same(pipe, "**")
    assert_close(inside[f"{layer}.out"], seen[f"{layer}.out"], rtol=0, atol=0)
    lora.detach(pipe, "small")
    without = same(pipe, "**")
    assert not torch.equal(without[f"{layer}.out"], seen[f"{layer}.out"])


@pytest.mark.parametrize("variant", FAMILIES)
def test_values_are_those_of_plain_hooks(variant: str) -> None:
    """Every point that is what a module of the transformer gives, against a hook of the test's own."""
    pipe = tiny(variant)
    chosen = [point for point in study.points(pipe) if point.network == "transformer" and point.site == "out"]
    found: dict[str, list[Tensor]] = {point.name: [] for point in chosen}

    def hook(name: str, view: Any) -> Any:
        def told(module: Any, inputs: Any, output: Any) -> None:
            found[name].append(view(output)[0].clone())

        return told

    handles = [pipe.transformer.get_submodule(p.path).register_forward_hook(hook(p.name, p.view)) for p in chosen]
    pipe.generate("a red circle", **SMALL)
    for handle in handles:
        handle.remove()
    with study.capture(pipe, [point.name for point in chosen]) as seen:
        pipe.generate("a red circle", **SMALL)
    for name, values in found.items():
        if values:
            assert torch.equal(seen[name], torch.stack(values)), name


def turned(x: Tensor, pe: Tensor) -> Tensor:
    """Pairs of channels, turned by matrices, in float64."""
    cos, sin = pe.double()[0, 0].unbind(-1)
    a, b = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos * a - sin * b, sin * a + cos * b), dim=-1).flatten(-2)


@pytest.mark.parametrize("variant", ["flux1-dev", "flux2-klein-4b", "flux3-klein"])
@pytest.mark.parametrize("padding", ["released", "masked"])
def test_attention_weights_are_the_softmax(variant: str, padding: Any) -> None:
    """In float64, from queries and keys before they are rotated; hidden keys have none."""
    if padding == "masked" and variant != "flux1-dev":
        pytest.skip("language models have no padding that could be hidden")
    pipe = tiny(variant)
    rotations: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}

    def wrap(run: Any) -> Any:
        def beside(name: str, block: Any, streams: Any, context: Any) -> Any:
            pe = next(x for x in context if isinstance(x, Tensor) and x.ndim == 5)
            rotations[name] = pe.clone()
            masks.update((name, x.clone()) for x in context if isinstance(x, Tensor) and x.dtype == torch.bool)
            return run(name, block, streams, context)

        return beside

    asked = {**SMALL, "steps": 1, "padding": padding}
    with study.capture(pipe, ["**.q", "**.k", "**.attn_weights", "**.v", "**.z"]) as seen:
        pipe.generate("a red circle", **asked, wraps=[wrap])
    blocks = [name for name in pipe.transformer.config.blocks if "image_cond" not in name]
    for name in blocks:
        q, k = (turned(seen.get(f"{name}.{x}"), rotations[name]) for x in "qk")
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if name in masks:
            scores = scores.masked_fill(~masks[name][0], -torch.inf)
        expected = scores.softmax(-1)
        weights = seen.get(f"{name}.attn_weights")
        assert_close(weights.double(), expected, rtol=0, atol=1e-5)
        assert_close(seen.get(f"{name}.z").double(), expected @ seen.get(f"{name}.v").double(), rtol=0, atol=1e-5)
    if padding == "masked":
        assert (expected == 0).any()
    # What is made of them, head by head.
    name = blocks[-1] + ".attn_weights"
    text = seen.get(f"{blocks[-1]}.q").shape[1] - 8
    picture = list(range(text, text + 8))
    for options, wanted in [
        ({"reduce": "heads"}, expected.mean(0)),
        ({"reduce": "heads", "tokens": "image", "keys": "text"}, expected.mean(0)[picture][:, :text]),
        ({"reduce": "mean", "tokens": "text"}, expected[:, :text].mean(1)),
        ({"heads": [2, 0], "tokens": [3, 1]}, expected[[2, 0]][:, [3, 1]]),
        ({"reduce": lambda x: x.amax(1), "heads": 1}, expected[[1]].amax(1)),
    ]:
        with study.capture(pipe, name, **options) as part:
            pipe.generate("a red circle", **asked)
        assert_close(part.get(name).double(), wanted, rtol=0, atol=1e-5)


def test_what_is_selected() -> None:
    pipe = tiny("flux1-dev")
    asked = {**SMALL, "steps": 4, "guide": Cfg(scale=2.0)}
    with study.capture(pipe, ["single_blocks.1.z", "single_blocks.1.q"]) as whole:
        pipe.generate("a red circle", **asked)
    with study.capture(pipe, "single_blocks.1.z", steps=[2, 1], heads=[3, 0], tokens="image", texts="negative") as seen:
        pipe.generate("a red circle", **asked)
    assert [(record.step, record.text) for record in seen.records] == [(1, "negative"), (2, "negative")]
    expected = whole.get("single_blocks.1.z", step=2, text="negative")[[3, 0], -8:]
    assert torch.equal(seen.get("single_blocks.1.z", step=2), expected)
    for reduce, made in [
        ("mean", lambda x: x.mean(1)),
        ("heads", lambda x: x.mean(0)),
        ("norm", lambda x: x.norm(dim=-1)),
    ]:
        with study.capture(pipe, "single_blocks.1.z", 0, reduce=reduce, texts="positive") as seen:
            pipe.generate("a red circle", **asked)
        value = whole.get("single_blocks.1.z", step=0, text="positive")
        assert_close(seen.get("single_blocks.1.z"), made(value))


def test_values_can_be_learned_from() -> None:
    """They are plain tensors: gradients go through them, as they would not through those of inference."""
    pipe = tiny("flux1-dev")
    with study.capture(pipe, "double_blocks.0.img_out") as seen:
        pipe.generate("a red circle", **SMALL)
    value = seen["double_blocks.0.img_out"]
    probe = torch.zeros(64, requires_grad=True)
    (value @ probe).sum().backward()
    assert probe.grad is not None and probe.grad.abs().sum() > 0


def test_prompts_that_were_read_before_are_read_again() -> None:
    pipe = tiny("flux1-dev")
    pipe.generate("a red circle", **SMALL)
    with study.capture(pipe, ["t5.encoder.block.0.out", "clip.pooled", "autoencoder.decoder.conv_out.out"]) as seen:
        for _ in range(2):
            pipe.generate("a red circle", **SMALL)
    ids = pipe.text.t5_tokenizer("a red circle", pipe.text.length)
    found: list[Tensor] = []
    handle = pipe.text.t5.encoder.block[0].register_forward_hook(lambda *told: found.append(told[2]))
    pipe.text.t5(ids)
    handle.remove()
    assert [record.run for record in seen.find("t5.encoder.block.0.out")] == [0, 1]
    assert torch.equal(seen.get("t5.encoder.block.0.out", run=1), found[0][0])
    assert seen.get("clip.pooled", run=0).shape == (16,)
    assert seen.get("autoencoder.decoder.conv_out.out", run=0, picture=0).shape == (3, 32, 64)


PLANNED: list[tuple[str, dict[str, Any]]] = [
    ("flux1-dev", {}),
    ("flux1-dev", {"guide": PerpNeg(scale=2.0, window=(0.0, 0.5)), "steps": 4, "solver": "heun"}),
    ("flux1-dev", {"padding": "trimmed", "images": 2, "solver": "dpmpp-2s", "steps": 3}),
    ("flux2-klein-4b", {"conditions": [Reference(PHOTO)]}),
    ("flux3-klein", {"conditions": [Reference(PHOTO)], "stop": 1}),
]


@pytest.mark.parametrize(("variant", "asked"), PLANNED)
def test_what_is_planned_is_what_is_kept(variant: str, asked: dict[str, Any]) -> None:
    pipe, asked = tiny(variant), {**SMALL, **asked}
    inside = [point.name for point in study.points(pipe) if point.network == "transformer"]
    for names, options in [
        (inside, {}),
        ("*.*.z", {"heads": [0, 1], "tokens": [1, 2, 3]}),
        ("*.*.attn_weights", {"reduce": "heads", "keys": "text", "steps": 0}),
        ("*.*.attn_weights", {"reduce": lambda x: x.sum(-1)}),
    ]:
        capture = study.capture(pipe, names, **options)
        planned = capture.planned("a red circle", **asked)
        with capture as seen:
            pipe.generate("a red circle", **asked)
        assert planned.values == len(seen)
        assert planned.bytes == capture.size("a red circle", **asked) == seen.held
        assert planned.largest == max(seen.value(record).nbytes for record in seen.records)


def test_beyond_the_bound_it_goes_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than the bound is held; what is read back, also before the end, is the same."""
    pipe = tiny("flux1-dev")
    with study.capture(pipe, "**") as held:
        pipe.generate("a red circle", **SMALL)
    assert held.held > 500_000
    most: list[int] = []
    add = Kept.add

    def noted(self: Kept, *given: Any) -> None:
        add(self, *given)
        most.append(sum(value.nbytes for value in self._values.values() if isinstance(value, Tensor)))

    monkeypatch.setattr(Kept, "add", noted)
    with study.capture(pipe, "**", max_bytes=200_000) as seen:
        pipe.generate("a red circle", **SMALL)
        early = seen.value(seen.records[0])
    assert 100_000 < max(most) <= 200_000 and seen.held == 0
    assert torch.equal(early, held.value(held.records[0]))
    assert seen.records == held.records
    assert all(torch.equal(seen.value(record), held.value(record)) for record in held.records)


@pytest.mark.parametrize("header", [4096, growing.HEADER])
def test_a_file_of_ones_own(header: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program reads it; so do we; and room for names that is too small is made larger."""
    monkeypatch.setattr(growing, "HEADER", header)
    pipe, path = tiny("flux1-dev", dtype="bfloat16"), tmp_path / "seen.safetensors"
    asked: dict[str, Any] = {**SMALL, "guide": Cfg(scale=2.0)}
    with study.capture(pipe, ["**.z", "**.attn_weights", "t5.**.out"]) as held:
        pipe.generate("a red circle", **asked)
    with study.capture(pipe, ["**.z", "**.attn_weights", "t5.**.out"], file=path) as seen:
        pipe.generate("a red circle", **asked)
        assert not path.exists()
    tensors, again = load_file(path), study.opened(path)
    assert list(tmp_path.iterdir()) == [path]
    assert len(tensors) == len(held) > 20 and again.records == seen.records == held.records and again.whole
    for record in held.records:
        value = held.value(record)
        for other in (tensors[record.key], again.value(record), seen.value(record)):
            assert other.dtype == value.dtype and torch.equal(other, value)
    assert "single_blocks.0.z/0/0/1/1/negative/0" in tensors
    assert "single_blocks.0.z" in str(again) and "step 0 ... 1 (2)" in str(again)


def test_what_goes_wrong_leaves_no_file(tmp_path: Path) -> None:
    pipe = tiny("flux1-dev")
    capture = study.capture(pipe, "**.z", file=tmp_path / "a.safetensors")

    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), capture as seen:
        pipe.generate("a red circle", **SMALL, watch=fail)
    assert list(tmp_path.iterdir()) == [] and len(seen) == 0
    with pytest.raises(OutputError):
        study.capture(pipe, "**.z", file=tmp_path / "no" / "a.safetensors")
    with pytest.raises(OutputError):
        study.capture(pipe, "**.z", file=tmp_path / "a.png")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no file of a capture"):
        study.opened(tmp_path / "b.safetensors")


def test_other_threads_are_not_looked_at() -> None:
    pipe = tiny("flux1-dev")
    plain = pipe.generate("a blue square", **{**SMALL, "seed": 9})
    drawn: list[Any] = []
    other = threading.Thread(target=lambda: drawn.append(pipe.generate("a blue square", **{**SMALL, "seed": 9})))
    with study.capture(pipe, "**") as seen, study.edit(pipe, {"single_blocks.0.out": study.zero}):
        other.start()
        other.join()
        assert len(seen) == 0
        pipe.generate("a red circle", **SMALL)
    assert torch.equal(plain.latents, drawn[0].latents) and plain.settings == drawn[0].settings
    assert {record.run for record in seen.records} == {0}


def test_two_at_once_see_the_same() -> None:
    """One inside of the other; the inner one goes first, and leaves the hooks of the other."""
    pipe = tiny("flux2-klein-4b")
    with study.capture(pipe, "**") as outer:
        with study.capture(pipe, "**") as inner:
            pipe.generate("a red circle", **SMALL)
        pipe.generate("a red circle", **SMALL)
    first = [record for record in outer.records if record.run == 0]
    assert first == inner.records and len(outer) == 2 * len(inner)
    assert all(torch.equal(outer.value(record), inner.value(record)) for record in first)


def test_results_are_not_taken_from_the_cache() -> None:
    pipe = miniflux.load("nano", cache=ResultCache())
    pipe.generate("a red circle", **SMALL)
    with study.capture(pipe, "final_layer.out") as seen:
        pipe.generate("a red circle", **SMALL)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("points", "options", "said"),
    [
        ("double_blocks.7.z", {}, "no point"),
        ("**.z", {"steps": -1}, "steps"),
        ("**.z", {"steps": []}, "at least one"),
        ("**.z", {"steps": 1.5}, "steps"),
        ("*.*.z", {"heads": 4}, "from 0 to 3"),
        ("*.*.img_out", {"heads": 0}, "no heads"),
        ("*.*.img_out", {"tokens": "text"}, "no text tokens"),
        ("*.*.img_out", {"tokens": "pictures"}, "one of text, image, reference"),
        ("*.*.img_out", {"keys": "text"}, "keys are of attention weights"),
        ("time_in.out", {"tokens": [0]}, "no tokens"),
        ("time_in.out", {"reduce": "mean"}, "mean over tokens"),
        ("*.*.img_out", {"reduce": "heads"}, "mean over heads"),
        ("*.*.img_out", {"reduce": "sum"}, "one of mean, heads, norm"),
        ("*.*.img_out", {"texts": "both"}, "texts must be of"),
        ("*.*.img_out", {"max_bytes": 0}, "max_bytes"),
    ],
)
def test_bad_input_is_refused(points: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        study.capture(tiny("flux1-dev"), points, **options)


@pytest.mark.parametrize(
    ("points", "options", "said"),
    [
        ("*.*.z", {"steps": [0, 2]}, "steps must be from 0 to 1 in this run, got 2"),
        ("*.*.img_out", {"tokens": [8]}, "tokens must be from 0 to 7 at double_blocks.0.img_out"),
        ("*.*.img_out", {"tokens": "reference"}, "no reference tokens in this run"),
        ("*.*.img_out", {"max_bytes": 2047}, "less than one value of double_blocks.0.img_out takes: 2048"),
        ("**.z", {"reduce": lambda x: 3}, "reduce must give a tensor"),
    ],
)
def test_what_a_run_has_not_is_refused(points: str, options: dict[str, Any], said: str) -> None:
    """As soon as it is known, and without a hook left."""
    pipe = tiny("flux1-dev")
    with pytest.raises(InputError, match=said), study.capture(pipe, points, **options) as seen:
        pipe.generate("a red circle", **SMALL)
    assert len(seen) == 0 and not pipe.transformer._forward_hooks


def test_what_is_asked_of_it() -> None:
    pipe = tiny("flux1-dev")
    capture = study.capture(pipe, "*.*.img_out")
    with capture as seen:
        pipe.generate("a red circle", **SMALL)
    assert seen["double_blocks.0.img_out"].shape == (2, 8, 64)
    for which, said in [
        ({}, "say which, by step"),
        ({"step": 5}, "there is step 0 ... 1"),
        ({"level": 1}, "tells no values apart"),
    ]:
        with pytest.raises(InputError, match=said):
            seen.get("double_blocks.0.img_out", **which)
    with pytest.raises(InputError, match="nothing was kept of 'single_blocks.0.out'"):
        seen["single_blocks.0.out"]
    with pytest.raises(InputError, match="used before"), capture:
        pass
    capture, attend = study.capture(pipe, "**.attn_weights"), lambda q, *_: q.transpose(1, 2).flatten(2)
    with pytest.raises(InputError, match="a function of the caller's attends"), capture:
        pipe.generate("a red circle", **SMALL, attend=attend)


def test_compiled_blocks_have_no_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapping, "is_compiled", lambda _: True)
    pipe = tiny("flux1-dev")
    for points in ("*.*.z", "*.*.img_mlp.out"):
        with pytest.raises(InputError, match="compiled block, which has no inside"), study.capture(pipe, points):
            pass
    with study.capture(pipe, ["*.*.img_out", "*.*.txt_in", "final_layer.out"]):
        pass
