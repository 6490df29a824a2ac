"""Compiled blocks: as few programs as there are kinds of blocks, and the numbers of the forward that is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import miniflux
from miniflux import assembly, lora
from miniflux.cache import ResultCache
from miniflux.errors import InputError
from miniflux.models import compiling
from miniflux.models.attention import attention_by
from miniflux.models.compiler import check_compiler
from miniflux.models.flux1 import Flux1
from miniflux.models.layers import attention
from miniflux.pipeline import Pipeline
from miniflux.replay import replay
from miniflux.settings.record import record_of
from tests import tiny

FAMILIES = ("flux1-dev", "flux2-klein-4b", "flux3-klein")
SIZES = ((64, 64), (96, 48), (112, 128))
PROMPTS = ["a red star!"[:i] for i in range(1, 11)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Every test begins and ends without compiled programs."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(name: str, backend: Any) -> tuple[Pipeline, Pipeline]:
    """The same pipeline as it is, and compiled by a backend."""
    plain, fast = (miniflux.tiny(name, seed=1) for _ in range(2))
    compiling.compile_blocks(fast.transformer, backend)
    return plain, fast


def check_same(pipes: tuple[Pipeline, Pipeline], **options: Any) -> None:
    """Both draw the same, and the compiled one is no other than it was."""
    plain, fast = (pipe.generate(**{"prompt": "a", "steps": 1, **options}).latents for pipe in pipes)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-4)
    assert pipes[1].changed() == ()


@pytest.mark.parametrize("name", FAMILIES)
def test_one_program_of_each_kind_for_all_prompts_and_sizes(name: str) -> None:
    """Kinds are double and single blocks; of FLUX.3, blocks of one stream and of two."""
    counter = CompileCounter()
    pipes = pair(name, counter)
    check_same(pipes)
    assert counter.frame_count == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, prompt in enumerate(PROMPTS):
            width, height = SIZES[i % len(SIZES)]
            check_same(pipes, prompt=prompt, width=width, height=height)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_programs_of_the_usual_backend_compute_the_same(name: str) -> None:
    pipes = pair(name, "inductor")
    check_same(pipes, steps=2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, prompt in enumerate(PROMPTS):
            width, height = SIZES[i % len(SIZES)]
            check_same(pipes, prompt=prompt, width=width, height=height)


def test_sizes_that_are_equal_at_first_may_differ_later() -> None:
    counter = CompileCounter()
    pipes = pair("flux1-dev", counter)
    for tokens, width in ((16, 64), (16, 128), (32, 64)):  # 16 image tokens, and as many of text
        check_same(pipes, t5_length=tokens, width=width, height=64)
    assert counter.frame_count == 2


@torch.inference_mode()
def test_pictures_at_once_and_masks_are_compiled_once_more() -> None:
    counter = CompileCounter()
    plain, fast = (tiny.randomise(Flux1(replace(tiny.FLUX1, depth_single_blocks=0))) for _ in range(2))
    compiling.compile_blocks(fast, counter)

    def programs(batch: int, masked: bool = False) -> int:
        inputs = tiny.flux1_inputs(tiny.FLUX1, batch=batch, text=4 + batch)
        if masked:
            inputs["txt_mask"] = torch.arange(4 + batch) < torch.full((batch, 1), 3)
        torch.testing.assert_close(fast(**inputs), plain(**inputs), rtol=0, atol=1e-4)
        return counter.frame_count

    assert [programs(batch) for batch in (1, 2, 3, 5, 1)] == [1, 2, 2, 2, 2]
    assert [programs(batch, masked=True) for batch in (2, 3)] == [3, 3]


def test_what_is_changed_later_counts() -> None:
    """A LoRA that comes, changes and goes; a hook; attention of others."""
    counter = CompileCounter()
    pipes = pair("flux1-dev", counter)
    check_same(pipes)
    layers = [f"double_blocks.{i}.img_attn.qkv" for i in range(2)]
    for pipe in pipes:
        tensors = {
            f"transformer.{layer}.lora_{half}.weight": tiny.randn(*shape)
            for layer in layers
            for half, shape in (("A", (2, 64)), ("B", (192, 2)))
        }
        lora.attach(pipe, tensors, name="x")
    check_same(pipes)
    assert counter.frame_count == 3  # one more for both of the blocks
    for scale in (0.0, -1.0):
        for pipe in pipes:
            lora.set_scale(pipe, "x", scale)
        check_same(pipes)
    for pipe in pipes:
        lora.detach(pipe, "x")
    check_same(pipes, guide="nag")
    check_same(pipes, attend=lambda *inputs: 2 * attention(*inputs))
    assert counter.frame_count == 3
    check_same(pipes, attend=attention_by("sdpa"))
    assert counter.frame_count == 5
    for pipe in pipes:
        pipe.transformer.double_blocks[0].img_mlp.register_forward_hook(lambda *given: 2 * given[-1])
    plain, fast = (pipe.generate("a", steps=1).latents for pipe in pipes)
    torch.testing.assert_close(fast, plain)


def test_a_block_that_cannot_be_compiled_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    counter = CompileCounter()
    pipes = pair("flux1-dev", counter)
    for pipe in pipes:
        mlp = pipe.transformer.double_blocks[0].img_mlp
        mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    for _ in range(2):
        plain, fast = (pipe.generate("a", steps=1).latents for pipe in pipes)
        torch.testing.assert_close(fast, plain)
    assert caplog.text.count("a DoubleStreamBlock cannot be compiled and runs as it is") == 1


@pytest.fixture
def eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines are compiled, but to no code."""
    monkeypatch.setattr(assembly, "check_compile", lambda *_: None)
    monkeypatch.setattr(assembly, "compile_blocks", partial(compiling.compile_blocks, backend="eager"))


@pytest.mark.usefixtures("eagerly")
def test_settings_say_it_and_replay_does_it_again(tmp_path: Any) -> None:
    pipe = miniflux.load("nano", compile=True)
    result = pipe.generate("a red circle", steps=1, width=64, height=64)
    assert result.settings[0]["compiled"] is True
    assert "compiled" not in miniflux.load("nano").generate("a", steps=1, width=64, height=64).settings[0]
    result.save(tmp_path / "x.png")
    made = replay(tmp_path / "x.png")
    assert made.same and made.differences == () and made.result.settings[0]["compiled"] is True


@pytest.mark.usefixtures("eagerly")
def test_where_replay_cannot_compile_it_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    miniflux.load("nano", compile=True).generate("a", steps=1, width=64, height=64).save(tmp_path / "x.png")

    def refuse(*_: Any) -> None:
        raise InputError("no compiler")

    monkeypatch.setattr(assembly, "check_compile", refuse)
    assert replay(tmp_path / "x.png").differences == ("made with compiled blocks, and this is not",)


@pytest.mark.usefixtures("eagerly")
def test_settings_and_replay_tell_cuda_graphs_apart(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept by the way to compile, which a CPU does not have: what is shown here is what is said."""
    pipe = miniflux.load("nano", compile="graphs", cache=ResultCache())
    result = pipe.generate("a red circle", steps=1, width=64, height=64)
    assert result.settings[0]["compiled"] == "graphs" and record_of(result.settings[0]).compiled == "graphs"
    plain = miniflux.load("nano", compile=True, cache=pipe.results)
    assert plain.generate("a red circle", steps=1, width=64, height=64).settings[0]["cached"] is False
    result.save(tmp_path / "x.png")
    made = replay(tmp_path / "x.png")
    assert made.same and made.differences == () and made.result.settings[0]["compiled"] == "graphs"
    monkeypatch.undo()
    assert replay(tmp_path / "x.png").differences == ("made with blocks as CUDA graphs, and this is not",)


def test_what_a_graph_says_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is written to by the next one; and the mode is the one that keeps them."""
    asked: list[Any] = []

    def compiled(forward: Any, **options: Any) -> Any:
        asked.append(options["mode"])
        return lambda *_, **__: kept

    kept = (torch.ones(2), torch.zeros(3))
    monkeypatch.setattr(torch, "compile", compiled)
    for graphs in (True, False):
        transformer = miniflux.tiny("flux1-dev").transformer
        compiling.compile_blocks(transformer, graphs=graphs)
        out = transformer.double_blocks[0](torch.ones(1))
        assert all(torch.equal(a, b) for a, b in zip(out, kept, strict=True))
        assert [a is b for a, b in zip(out, kept, strict=True)] == [not graphs] * 2
    assert asked == ["reduce-overhead"] * 2 + [None] * 2


@pytest.mark.slow
def test_the_mode_of_graphs_computes_the_same_without_them() -> None:
    """On a CPU the usual backend takes the mode, and keeps none."""
    plain, fast = (miniflux.tiny("flux1-dev", seed=1) for _ in range(2))
    compiling.compile_blocks(fast.transformer, graphs=True)
    check_same((plain, fast), steps=2)


@pytest.mark.parametrize(
    ("compile", "message"),
    [
        ("graphs", "compile='graphs' keeps CUDA graphs, and the device is cpu: use compile=True"),
        ("graph", "compile must be True, False or 'graphs', got 'graph'"),
        (2, "compile must be True, False or 'graphs', got 2"),
    ],
)
def test_other_ways_to_compile_are_refused(compile: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        miniflux.load("nano", compile=compile, device="cpu")


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_weights_that_come_and_go_are_refused(memory: str) -> None:
    with pytest.raises(InputError, match=f"memory resident or text-freed, got {memory}"):
        miniflux.load("nano", compile=True, memory=memory)


def test_a_missing_compiler_is_told_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(InputError, match="compile=True is not possible here.* cpu and needs a C.. compiler .*No g.."):
        miniflux.load("nano", compile=True, device="cpu")


def broken(*_: Any) -> Any:
    raise torch._dynamo.exc.BackendCompilerFailed(check_compiler, RuntimeError("No g++ found"), None)


@pytest.mark.slow
def test_torch_reports_a_missing_compiler_as_expected() -> None:
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    missing = config.patch({"cpp.cxx": ("/nowhere/g++",)})
    with fresh_cache(), missing, pytest.raises(InputError, match=r"needs a C\+\+ compiler .*No working C\+\+ compiler"):
        check_compiler("compile=True", CPU)
