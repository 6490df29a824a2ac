"""Observers: told of every call of the network and of every block, and never part of a picture unless they say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import miniflux
from miniflux.cache import ResultCache
from miniflux.models.flux1 import RunBlock
from miniflux.plan import Plan
from miniflux.sampling.observing import Call, observed, observers


class Notes:
    """Writes down what it is told; halves the streams of the last block if it alters."""

    def __init__(self, alters: str | None = None) -> None:
        self.alters = alters
        self.calls: list[Call] = []
        self.blocks: list[str] = []
        self.pictures: list[list[int]] = []

    def began(self, pictures: Sequence[int]) -> None:
        self.pictures.append(list(pictures))

    def calling(self, call: Call) -> None:
        self.calls.append(call)

    def wrap(self, run: RunBlock) -> RunBlock:
        def noted(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
            self.blocks.append(name)
            out = run(name, block, streams, context)
            return out if self.alters is None else tuple(stream / 2 for stream in out)

        return noted


@pytest.mark.parametrize("model", ["nano", "nano2", "nano3"])
def test_who_only_looks_on_changes_nothing(model: str) -> None:
    pipe = miniflux.load(model)
    asked: dict[str, Any] = {"seed": 3, "width": 64, "height": 64, "steps": 3, "images": 2}
    plain = pipe.generate("a red circle", **asked)
    notes = Notes()
    with observed(notes):
        seen = pipe.generate("a red circle", **asked)
    assert observers() == ()
    assert torch.equal(plain.latents, seen.latents)
    assert [each.tobytes() for each in plain.images] == [each.tobytes() for each in seen.images]
    assert notes.pictures == [[0], [1]]  # one at a time, as for all who look on
    plan = Plan.of(pipe.as_it_is(), "a red circle", **asked)
    assert sum(len(call.told.timesteps) for call in notes.calls) == 2 * plan.calls
    assert [call.step for call in notes.calls if call.number == 0] == [0, 1, 2, 0, 1, 2]
    blocks = [name for name in pipe.transformer.config.blocks if "image_cond" not in name]
    assert notes.blocks == blocks * len(notes.calls)
    assert "wrapped" not in seen.settings[0]


def test_what_is_altered_is_said_and_not_kept() -> None:
    pipe = miniflux.load("nano", cache=ResultCache())
    asked: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}
    plain = pipe.generate("a red circle", **asked)
    with observed(Notes(alters="half of everything")):
        altered = pipe.generate("a red circle", **asked)
    assert not torch.equal(plain.latents, altered.latents)
    assert altered.settings[0]["wrapped"] == ["half of everything"]
    assert "half of everything" in altered.settings[0]["not_cached"]
    with observed(Notes()):
        again = pipe.generate("a red circle", **asked)
    assert "somebody looks on" in again.settings[0]["not_cached"]
    assert torch.equal(plain.latents, again.latents)


def test_of_one_network_alone() -> None:
    """Another pipeline that draws meanwhile is none of its business, and says nothing of it."""
    pipe, other = miniflux.load("nano"), miniflux.load("nano2")
    asked: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}
    plain = other.generate("a red circle", **asked)
    with observed(notes := Notes(alters="half of everything"), pipe.transformer):
        beside = other.generate("a red circle", **asked)
        assert not notes.calls and not notes.pictures
        assert "wrapped" in pipe.generate("a red circle", **asked).settings[0]
    assert torch.equal(plain.latents, beside.latents) and "wrapped" not in beside.settings[0]
