"""What a model costs, against torch's own counter of operations and the memory that its profiler sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from miniflux import study
from miniflux.apps.cli import main
from miniflux.checkpoints.files import open_tensors
from miniflux.checkpoints.loading import bare
from miniflux.checkpoints.networks import networks_of
from miniflux.conversion.converting import convert
from miniflux.errors import InputError
from miniflux.study.sizes import counting
from miniflux.study.sizes.activations import Moved
from miniflux.study.sizes.flops import Work, encoding_flops, flops_of
from miniflux.testing import randomise, tiny
from miniflux.variants import VARIANTS, Variant
from miniflux.weights.finding import BUNDLED

SMALL = ("flux1-dev", "flux1-schnell", "flux2-dev", "flux2-klein-4b", "flux3-klein")
WORK = Work(width=96, height=64, text=32, references=48, unit=16)


def small(name: str) -> Variant:
    """A released model at sizes that can be computed."""
    return tiny(name).variant


def networks(variant: Variant) -> dict[str, Any]:
    return {part: bare(record.kind, record.of(variant)).eval() for part, record in networks_of(variant).items()}


def run_of(variant: Variant, part: str, work: Work) -> Callable[[nn.Module], object]:
    return counting._calls(variant, part, work, 1, 1)[2]  # pyright: ignore[reportPrivateUsage]


def angles(variant: Variant, part: str, work: Work) -> int:
    """Of rotary positions: a small product of matrices that the counter sees, and that is no module's."""
    config = variant.transformer
    width = config.hidden_size // config.num_heads
    return (work.image + work.text + work.references) * len(config.axes_dim) * width if part == "transformer" else 0


def by_module(network: nn.Module, run: Callable[[], object]) -> tuple[int, dict[str, int]]:
    """What FlopCounterMode counts: in all, and by the name of a module."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"), Moved(), counter:
        run()
    root = type(network).__name__
    counts = {name.removeprefix(f"{root}."): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return counter.get_total_flops(), counts


@pytest.mark.parametrize("name", [*SMALL, "flux1-fill-dev"])
def test_operations_of_small_models(name: str) -> None:
    """Every network of every family: in all, and of each block, linear and convolution; with references and without."""
    variant = small(name)
    for work in (WORK, replace(WORK, references=0, height=80)):
        for part, network in networks(variant).items():
            found = flops_of(network, work)
            total, counts = by_module(network, lambda n=network, p=part, w=work: run_of(variant, p, w)(n))
            assert total and sum(found.values()) == total - angles(variant, part, work), part
            half = "decoder." if part == "autoencoder" else ""
            for module in found:
                inside = sum(n for one, n in found.items() if f"{one}.".startswith(f"{module}."))
                expected = counts.get(module.removeprefix(half), counts.get("Decoder." + module, 0))
                called = module.removeprefix(half) in counts
                assert not called or inside == expected, f"{part}: {module}"


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-fill-dev", "flux2-dev", "flux2-klein-9b", "flux3-klein"])
def test_operations_of_released_models(name: str) -> None:
    """At their real widths, which nobody has to have; with one block of each kind, and one model with all of them."""
    variant = VARIANTS[name]
    if name != "flux3-klein":
        variant = replace(variant, transformer=replace(variant.transformer, depth=1, depth_single_blocks=1))
    work = Work(width=1024, height=1024, text=512, references=0, unit=16)
    network = networks(variant)["transformer"]
    total, _ = by_module(network, lambda: run_of(variant, "transformer", work)(network))
    assert sum(flops_of(network, work).values()) == total - angles(variant, "transformer", work)


def test_operations_of_encoding() -> None:
    for name in ("flux1-dev", "flux2-dev"):
        network = networks(small(name))["autoencoder"]
        total, _ = by_module(network, lambda n=network: n.encode(torch.empty(1, 3, 64, 96)))
        assert sum(encoding_flops(network, 96, 64).values()) == total


def test_what_is_known_of_flux1() -> None:
    """Parameters of the published file; about 74.3 T operations of a call with 512 tokens of text; halves of a line
    that are counted by hand."""
    found = study.count("flux1-dev", width=1024, height=1024)
    transformer = found.of("transformer")
    assert transformer.parameters == 11_901_408_320 and transformer.bytes == 23_802_816_640
    assert 74.3e12 < transformer.flops < 74.4e12
    assert (transformer.calls, found.step_flops) == (50, transformer.flops)
    single = next(line for line in transformer.lines if line.kind == "single_blocks")
    tokens, width = 4096 + 512, 3072
    linears = 2 * tokens * (width * 7 * width + 5 * width * width) + 2 * width * 3 * width
    assert single.flops == 38 * (linears + 4 * width * tokens**2)
    assert found.flops == 50 * transformer.flops + sum(one.flops for one in found.networks if one.part != "transformer")


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_exact(name: str) -> None:
    """Against the modules themselves, of every model; and against what its release says of its files."""
    variant = VARIANTS[name]
    for part, network in networks(variant).items():
        empty = counting.bare(type(network), network.config)
        numbers = {key: p.numel() for key, p in empty.named_parameters()}
        lines = counting._lines(empty, counting._sizes(network, torch.bfloat16), {}, {})  # pyright: ignore[reportPrivateUsage]
        assert sum(line.parameters for line in lines) == sum(numbers.values()), part


MIDDLE = {"hidden_size": 128, "num_heads": 4}


def middle(name: str) -> Variant:
    """Wide enough for the kernels that large linears take."""
    variant = small(name)
    axes = (8, 12, 12) if len(variant.transformer.axes_dim) == 3 else (8, 8, 8, 8)
    sizes = replace(variant.transformer, axes_dim=axes, **MIDDLE)
    lm = variant.lm
    if lm is not None and variant.chat is not None:
        heads = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        lm = replace(lm, hidden_size=128, intermediate_size=512, **heads)
        sizes = replace(sizes, context_in_dim=128 * len(variant.chat.layers))
    return replace(variant, transformer=sizes, autoencoder=replace(variant.autoencoder, ch=16), lm=lm)


def measured(run: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had lent at once, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = run()
    events: Any = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for event in sorted((one for one in events if one.name() == "[memory]"), key=lambda one: one.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux1-dev", "flux2-klein-4b", "flux3-klein"])
@torch.inference_mode()
def test_activations(name: str) -> None:
    """Of every network, within a tenth of what a run on this CPU takes."""
    variant = middle(name)
    work = Work(width=512, height=512, text=160, references=0, unit=16)
    for part, empty in networks(variant).items():
        run = run_of(variant, part, work)
        found = counting._peaks(empty.config, torch.float32, run, work, True)  # pyright: ignore[reportPrivateUsage]
        network = randomise(empty.to_empty(device="cpu")).requires_grad_(False)
        run(network)  # what is made once
        expected = measured(lambda n=network, r=run: r(n))
        assert found[""] == pytest.approx(expected, rel=0.1), part


@pytest.mark.slow
@torch.inference_mode()
def test_activations_of_a_large_picture() -> None:
    """It is decoded in bands."""
    variant = middle("flux1-dev")
    work = Work(width=704, height=640, text=8, references=0, unit=16)
    empty = networks(variant)["autoencoder"]
    run = run_of(variant, "autoencoder", work)
    found = counting._peaks(empty.config, torch.float32, run, work, True)[""]  # pyright: ignore[reportPrivateUsage]
    network = randomise(empty.to_empty(device="cpu")).requires_grad_(False)
    assert found == pytest.approx(measured(lambda: run(network)), rel=0.1)


@pytest.mark.parametrize("form", ["Q8_0", "Q4_K", "fp8_scaled", "bfloat16"])
def test_bytes_are_those_of_files(tmp_path: Path, form: str) -> None:
    """Of a file that `convert` writes, without its header."""
    source = BUNDLED / "flux1-nano-dev.safetensors"
    made = tmp_path / f"x.{'gguf' if form.startswith('Q') else 'safetensors'}"
    convert(source, made, format=form)
    stored = sum(entry.size for entry in open_tensors(made).entries.values())
    counted = study.count("nano", dtype=form).of("transformer").bytes
    assert counted == pytest.approx(stored, rel=0.02)


def test_steps_texts_and_references() -> None:
    """Classifier-free guidance calls the transformer for two texts; references are tokens of every call."""
    one, two = (
        study.count("flux2-klein-4b", width=64, height=64),
        study.count("flux2-klein-base-4b", width=64, height=64),
    )
    assert (two.rows, two.step_flops) == (2, 2 * two.of("transformer").flops) and one.rows == 1
    assert two.of("transformer").flops == one.of("transformer").flops and two.of("lm").calls == 2
    seen = study.count("flux3-klein", width=64, height=64, references=2, steps=3, text_tokens=80)
    assert seen.reference_tokens == 32 and seen.of("transformer").calls == 3
    idle = study.count("flux3-klein", width=64, height=64, text_tokens=80)
    kinds = {line.kind: line.flops for line in idle.of("transformer").lines}
    assert kinds["content_mode_blocks.image_cond"] == 0 < kinds["content_mode_blocks.image"]
    assert seen.of("autoencoder").flops > idle.of("autoencoder").flops


def test_a_pipeline_is_counted_as_it_is() -> None:
    pipe = tiny("flux1-dev")
    found = study.count(pipe, steps=2)
    for part, network in {"transformer": pipe.transformer, "autoencoder": pipe.autoencoder}.items():
        assert found.of(part).parameters == sum(p.numel() for p in network.parameters())
        assert found.of(part).bytes == sum(t.numel() * t.itemsize for t in network.state_dict().values())
    assert not any(module._forward_hooks for module in pipe.transformer.modules())
    with pytest.raises(InputError, match="has no part 'lm'; its parts are clip, t5, transformer, autoencoder"):
        found.of("lm")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "count", "nano", "--size", "64x48", "--steps", "3", "--text-length", "9"]) == 0
    said = capsys.readouterr().out
    found = study.count("nano", width=64, height=48, steps=3, text_tokens=9)
    assert said == f"{found}\n"
    assert "64x48, 12 tokens of the picture, 9 of the text; 3 steps" in said
    row = next(line for line in said.splitlines() if line.startswith("  double_blocks"))
    assert f"{found.of('transformer').lines[5].parameters:,}" in row


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["flux9"], "unknown model 'flux9'; known: "),
        (["nano", "--size", "0x64"], "width must be a whole number from 16 to 8192, got 0"),
        (["nano", "--size", "big"], "a size looks like 1024x768"),
        (["nano", "--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
        (["nano", "--text-length", "-3"], "text_tokens must be a whole number from 1"),
        (["nano", "--references", "-1"], "references must be a whole number from 0 to 10, got -1"),
        (["nano", "--dtype", "int3"], "unknown format 'int3'; written are float32"),
    ],
)
def test_bad_input_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    """Exit code 2, and one line."""
    try:
        code = main(["study", "count", *words])
    except SystemExit as exit_:
        code = exit_.code  # of words that are none
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1
