"""Modulations of all steps in one product, where weights stay: the same bits, and nothing that hangs on a linear is
passed over."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import miniflux
from miniflux import drawing
from miniflux.models.rows import ROWS, by_row, known
from miniflux.pipeline import Pipeline
from miniflux.sampling.guidance import Cfg

PROMPT = "a red circle on a blue background"


def drawn(pipe: Pipeline, **options: Any) -> torch.Tensor:
    return pipe.generate(PROMPT, seed=1, width=64, height=64, **{"steps": 3, **options}).latents


@pytest.fixture
def as_they_come(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switches to modulations that are computed in each step."""
    return lambda: monkeypatch.setattr(drawing, "foreseen", lambda *_: nullcontext())


@pytest.mark.parametrize("name", ["nano", "nano-schnell", "nano-kontext"])
def test_latents_are_the_same_bit_for_bit(name: str, as_they_come: Any) -> None:
    """A picture alone, a pair of CFG, and a solver that asks twice a step."""
    pipe = miniflux.load(name)
    ways: list[dict[str, Any]] = [{}, {"solver": "heun"}]
    ways += [] if name == "nano-schnell" else [{"guide": Cfg(scale=2.0), "negative": "a blue square"}]
    ahead = [drawn(pipe, **way) for way in ways]
    as_they_come()
    assert all(torch.equal(drawn(pipe, **way), latents) for way, latents in zip(ways, ahead, strict=True))


@pytest.mark.parametrize("name", ["flux1-dev", "flux2-dev", "flux2-klein-4b", "flux3-klein"])
def test_every_family_is_the_same_bit_for_bit(name: str, as_they_come: Any) -> None:
    pipe = miniflux.tiny(name)
    ahead = pipe.generate("a cat", seed=1, steps=2).latents
    as_they_come()
    assert torch.equal(pipe.generate("a cat", seed=1, steps=2).latents, ahead)


def test_few_products_are_made_ahead_and_none_later() -> None:
    pipe = miniflux.load("nano")
    lin = pipe.transformer.double_blocks[0].img_mod.lin
    rows: list[int] = []
    forward = type(lin).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(lin), "forward", lambda self, x: rows.append(len(x)) or forward(self, x) if self is lin
                      else forward(self, x))  # fmt: skip
        drawn(pipe, steps=6)
    assert rows == [8]  # six, up to a multiple of ROWS


def test_what_hangs_on_a_linear_is_asked_in_every_step() -> None:
    """And for no other: a hook of the user's on a modulation's linear, on the module around it, on the last layer's
    chain, and on an embedder."""
    pipe = miniflux.load("nano")
    network = pipe.transformer
    last = network.single_blocks[1].modulation
    for module in (network.double_blocks[0].img_mod.lin, last, network.final_layer.adaLN_modulation, network.time_in):
        seen: list[int] = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        drawn(pipe, steps=5)
        handle.remove()
        assert len(seen) == 5, module


def test_a_lora_on_modulations_is_added(as_they_come: Any) -> None:
    pipe, name = miniflux.load("nano"), "single_blocks.0.modulation.lin"
    out, width = pipe.transformer.get_submodule(name).weight.shape
    change = {f"{name}.lora_A.weight": torch.randn(2, width), f"{name}.lora_B.weight": torch.randn(out, 2) * 0.1}
    plain = drawn(pipe)
    miniflux.lora.attach(pipe, change, name="mod")
    ahead = drawn(pipe)
    assert not torch.equal(plain, ahead)
    as_they_come()
    assert torch.equal(drawn(pipe), ahead)


def test_weights_that_change_within_a_run_count(as_they_come: Any) -> None:
    """A callback that edits a modulation after the first step."""

    def run() -> torch.Tensor:
        pipe = miniflux.load("nano")

        def edit(_: int, moment: Any) -> None:
            if moment.step == 1:
                pipe.transformer.double_blocks[0].img_mod.lin.weight.mul_(1.5)

        return drawn(pipe, callback=edit)

    ahead = run()
    as_they_come()
    assert torch.equal(run(), ahead)


def test_rows_are_looked_up_only_where_they_are_known() -> None:
    """Others are multiplied; more than a few at once as well; outside, nothing is remembered."""
    linear, x = miniflux.load("nano").transformer.time_in.in_layer, torch.randn(2 * ROWS, 256)
    with torch.inference_mode():
        alone = [by_row(linear, row[None]) for row in x]
        with known(lambda: by_row(linear, x[:ROWS])):
            inside = [by_row(linear, row[None]) for row in x]
            assert torch.equal(by_row(linear, x), torch.cat(alone))
            inside[0].zero_()
            assert torch.equal(by_row(linear, x[:1]), alone[0])
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], inside[1:], strict=True))
