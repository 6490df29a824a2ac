"""Conditions: what one adds reaches the network, several are joined or refused, memory and settings know of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import miniflux
from miniflux.conditions import Added, Img2Img, Scene, joined
from miniflux.errors import InputError
from miniflux.families import FAMILIES, Family
from miniflux.memory.ledger import predict
from miniflux.models.flux1 import Flux1Config, RunBlock, run_block
from miniflux.models.layers import attention
from miniflux.pipeline import Pipeline
from miniflux.plan import Plan
from miniflux.replay import replay
from miniflux.sampling import Schedule, Wrap, denoise, image_ids, initial_noise, pack
from miniflux.settings.reading import read_picture
from tests.tiny import randn

SIZE = {"width": 64, "height": 48, "steps": 2}


@dataclass(frozen=True)
class Beside:
    """A picture of noise in the sequence, as Kontext has it, and a wrap that counts blocks."""

    count: int
    seen: list[str]

    def check(self, family: Family, config: Flux1Config) -> None:
        if self.count > 99:
            raise InputError(f"{self.count} tokens are too many")

    def levels(self, levels: Schedule) -> Schedule:
        return levels

    def described(self) -> dict[str, Any]:
        return {"beside": self.count}

    def tokens(self, rows: int, columns: int) -> int:
        return self.count

    def added(self, scene: Scene) -> Added:
        def counting(inner: RunBlock) -> RunBlock:
            def run(name: str, block: Any, streams: Any, context: Any) -> Any:
                self.seen.append(name)
                return inner(name, block, streams, context)

            return run

        return Added(tokens=randn(1, self.count, 64), ids=torch.ones(1, self.count, 3), wraps=(counting,))


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.tiny()


def test_what_is_added_reaches_the_network(pipe: Pipeline) -> None:
    """Tokens, positions and wraps: the same as `denoise` told by hand."""
    beside = Beside(5, [])
    result = pipe.generate("a star", seed=3, guidance=2.0, conditions=[beside], **SIZE)
    assert result.settings[0]["conditions"] == [{"kind": "Beside", "beside": 5}] and len(beside.seen) == 2 * 4
    text = pipe.text.encode(["a star"], 32)
    x = denoise(
        pipe.transformer, pack(initial_noise(48, 64, 3)), image_ids(1, 3, 4), text.txt, torch.zeros(1, 32, 3), text.vec,
        result.settings[0]["sigmas"], 2.0, img_cond_seq=randn(1, 5, 64), img_cond_seq_ids=torch.ones(1, 5, 3),
    )  # fmt: skip
    assert torch.equal(pack(result.latents), x)
    assert not torch.equal(result.latents, pipe.generate("a star", seed=3, guidance=2.0, **SIZE).latents)


@pytest.mark.parametrize("memory", ["stream", "offload"])
def test_tokens_beside_streamed_weights(memory: str) -> None:
    """The rehearsal of a run knows of them, and every mode draws the same."""
    told = {"conditions": [Beside(7, [])], "guidance": 3.0, **SIZE}
    plain = miniflux.load("nano-dev").generate("a red star", **told)
    assert torch.equal(miniflux.load("nano-dev", memory=memory).generate("a red star", **told).latents, plain.latents)


def test_image_and_strength_are_a_condition(pipe: Pipeline) -> None:
    picture = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    ours = pipe.generate("a star", image=picture, strength=0.6, **SIZE)
    given = pipe.generate("a star", conditions=[Img2Img(picture, 0.6)], **SIZE)
    assert torch.equal(ours.latents, given.latents) and ours.settings == given.settings
    assert (ours.settings[0]["strength"], len(ours.settings[0]["image"])) == (0.6, 64)


def test_a_steered_picture_can_be_read_and_says_so(tmp_path: Path) -> None:
    """What replay cannot give again is a doubt, not a loss; all functions of a caller's are told, too."""
    pipe = miniflux.load("nano-dev")
    options = {"conditions": [Beside(3, [])], "wraps": [first], "run": run_block, "attend": attention, **SIZE}
    pipe.generate("a star", **options).save(tmp_path / "x.png")
    reading = read_picture(tmp_path / "x.png")
    assert "it was steered by Beside, which is not given again" in reading.records[0].doubts
    assert len(reading.records[0].doubts) == 4
    again = replay(tmp_path / "x.png")
    assert not again.same and "it was steered by Beside, which is not given again" in again.differences


def test_memory_counts_tokens_of_conditions(pipe: Pipeline) -> None:
    loaded = miniflux.load("nano-dev", memory="stream")
    assert loaded.memory is not None
    runs = [Plan.of(loaded.variant, "x", conditions=[Beside(n, [])], **SIZE).needs() for n in (0, 50)]
    less, more = (
        predict("stream", loaded.memory.parts, run, torch.device("cpu"), torch.float32, 0).phases["denoising"]
        for run in runs
    )
    assert sum(line.ram for line in more) - sum(line.ram for line in less) > 50 * 192 * 4


def test_several_are_joined() -> None:
    a = Added(tokens=randn(1, 2, 4), ids=randn(1, 2, 3), wraps=(first,))
    b = Added(tokens=randn(1, 3, 4, seed=1), ids=randn(1, 3, 3, seed=1), wraps=(second,), start=randn(1, 1, 2, 2))
    both = joined([a, Added(), b])
    assert isinstance(both.tokens, Tensor) and torch.equal(both.tokens, torch.cat((a.tokens, b.tokens), dim=1))
    assert isinstance(both.ids, Tensor) and both.ids.shape == (1, 5, 3)
    assert both.wraps == (first, second) and both.start is b.start and both.channels is None
    assert joined([]) == Added()


def first(inner: RunBlock) -> RunBlock:
    return inner


def second(inner: RunBlock) -> RunBlock:
    return inner


WRAPS: tuple[Wrap, ...] = (first, second)


@pytest.mark.parametrize("name", ["start", "channels"])
def test_two_in_one_place_are_refused(name: str, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=f"two conditions give {name}"):
        joined([Added(**{name: randn(1, 1)}), Added(**{name: randn(1, 1)})])
    picture = torch.zeros(3, 48, 64)
    with pytest.raises(InputError, match="two conditions give start"):
        pipe.generate("x", image=picture, conditions=[Img2Img(picture)], **SIZE)


def test_a_condition_may_refuse_before_anything_is_computed(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="100 tokens are too many"):
        pipe.generate("x", conditions=[Beside(100, [])], **SIZE)


def test_the_first_family() -> None:
    family = FAMILIES["flux1"]
    x = randn(1, 16, 6, 8)
    assert torch.equal(family.unpack(family.pack(x), 48, 64), x)
    assert family.image_ids(1, 3, 4).shape == (1, 12, 3) and not family.text_ids(1, 5).any()
