"""Pictures that are decoded while the next one is denoised: the same, in the same order, with the same errors. What can
do two things at a time is here a thread of the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import miniflux
from miniflux import pipeline
from miniflux.cache import ResultCache
from miniflux.errors import MinifluxError, OutOfMemoryError
from miniflux.memory import lanes, shortage
from miniflux.memory.ledger import Run
from miniflux.pipeline import Pipeline
from miniflux.sampling import Moment

SMALL: dict[str, Any] = {"prompt": "a star", "steps": 2, "width": 64, "height": 64}
ALONE: dict[str, Any] = {**SMALL, "images": 3, "batch": 1}


class Beside(lanes.Lane):
    beside = True


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device can do two things at a time; no thread is left of it."""
    monkeypatch.setattr(pipeline, "lane_of", Beside)
    yield
    assert not [thread for thread in threading.enumerate() if "aside" in thread.name]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.load("nano", device="cpu")


@pytest.fixture(scope="module")
def plain(pipe: Pipeline) -> miniflux.Result:
    return pipe.generate(**ALONE)


def same(one: miniflux.Result, other: miniflux.Result) -> bool:
    images = [a.tobytes() == b.tobytes() for a, b in zip(one.images, other.images, strict=True)]
    return torch.equal(one.latents, other.latents) and all(images) and one.settings == other.settings


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("batch", [1, 2, None])
def test_the_same_pictures_are_drawn(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, batch: int | None) -> None:
    options: dict[str, Any] = {**SMALL, "images": 5, "batch": batch, "solver": "heun"}
    found = pipe.generate(**options)
    monkeypatch.setattr(pipeline, "lane_of", lanes.lane_of)
    assert same(found, pipe.generate(**options))


@pytest.mark.usefixtures("beside")
def test_a_step_cache_that_is_checked(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {**SMALL, "images": 2, "cache": "first-block", "check_cache": True, "steps": 4}
    found = pipe.generate(**options)
    monkeypatch.setattr(pipeline, "lane_of", lanes.lane_of)
    assert same(found, pipe.generate(**options)) and "psnr" in found.settings[1]["cache"]


@pytest.mark.usefixtures("beside")
def test_the_next_picture_is_begun_before_the_last_is_decoded(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the one after it; callbacks are called in their usual order."""
    begun = [threading.Event() for _ in range(3)]
    decode, order, decoded = pipe.autoencoder.decode, list[tuple[int, int]](), list[int]()

    def late(*given: Any) -> Any:
        i = len(decoded)
        decoded.append(i)
        if i < 2:
            assert begun[i + 1].wait(60)
        assert not any(event.is_set() for event in begun[i + 3 :])
        return decode(*given)

    def watch(i: int, moment: Moment) -> None:
        order.append((i, moment.step))
        begun[i].set()

    monkeypatch.setattr(pipe.autoencoder, "decode", late)
    pipe.generate(**ALONE, watch=watch)
    assert decoded == [0, 1, 2] and order == [(i, step) for i in range(3) for step in (1, 2)]


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("error", [MinifluxError, KeyboardInterrupt])
def test_who_stops_at_a_picture_has_those_before_it(
    pipe: Pipeline, error: type[BaseException], plain: miniflux.Result
) -> None:
    """Cancelling is an error of ours; the keyboard stops at once."""
    cached = miniflux.load("nano", device="cpu", cache=ResultCache())

    def stop(i: int, moment: Moment) -> None:
        if i == 1:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        cached.generate(**ALONE, watch=stop)
    found = cached.generate(**ALONE)
    assert [said["cached"] for said in found.settings] == [error is MinifluxError, False, False]
    assert torch.equal(found.latents, plain.latents)


@pytest.mark.usefixtures("beside")
def test_what_goes_wrong_in_decoding_is_told(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, seen = pipe.autoencoder.decode, list[int]()

    def fail(*given: Any) -> Any:
        seen.append(1)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.nan * decode(*given)

    monkeypatch.setattr(pipe.autoencoder, "decode", fail)
    with pytest.raises(MinifluxError, match="the picture is not finite"):
        pipe.generate(**ALONE)
    seen[:] = [1]
    with pytest.raises(OutOfMemoryError, match=r"decoding ran out of memory: it needs .*; try"):
        pipe.generate(**ALONE)


@pytest.mark.usefixtures("beside")
def test_where_memory_is_short_they_are_decoded_first(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, plain: miniflux.Result
) -> None:
    """It never makes a picture too large, nor a batch that is asked for."""
    used: list[int] = []

    class Counted(lanes.Aside):
        def __init__(self, *given: Any) -> None:
            used.append(1)
            super().__init__(*given)

    monkeypatch.setattr(pipeline, "Aside", Counted)
    fits = pipe._fits()  # pyright: ignore[reportPrivateUsage]
    run = Run(width=64, height=64, text_tokens=48, calls=2)
    alone, more = (fits.needs(replace(run, decoding=decoding))[0] for decoding in (False, True))
    assert alone < more
    for free, times in ((0.99 * more, 0), (1.2 * more, 1)):
        monkeypatch.setattr(shortage, "free_ram", lambda free=free: int(free / 0.9))
        assert same(pipe.generate(**ALONE), plain)
        assert len(used) == times
    assert same(pipe.generate(**SMALL, batch=1), pipe.generate(**SMALL)) and len(used) == 1
