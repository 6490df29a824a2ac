"""The result cache: the same picture, drawn once; another one as soon as anything that makes it differs."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import miniflux
from miniflux import lora
from miniflux.cache import Drawn, ResultCache
from miniflux.errors import InputError, OutputError
from miniflux.pipeline import Pipeline
from miniflux.result import Result
from miniflux.sampling import cache, guide
from miniflux.weights.finding import BUNDLED

SMALL: dict[str, Any] = {"steps": 2, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def plain() -> Pipeline:
    return miniflux.load("nano")


@pytest.fixture
def pipe(plain: Pipeline) -> Pipeline:
    """nano-dev with an empty cache in memory."""
    return Pipeline(
        plain.variant, plain.transformer, plain.autoencoder, plain.text, plain.origin, results=ResultCache()
    )


def draw(pipe: Pipeline, prompt: str = "a star", **options: Any) -> Result:
    return pipe.generate(prompt, **{**SMALL, **options})


def made(value: int, size: int = 8) -> Drawn:
    """A picture of one colour."""
    return Drawn(Image.new("RGB", (size, size), (value, 0, 0)), torch.full((1, 4, 2, 2), float(value)), {"bill": value})


@pytest.mark.parametrize("folder", [False, True])
def test_there_and_back(tmp_path: Path, folder: bool) -> None:
    """Pixels, latents and facts are bitwise what was kept; changing what came out does not change what is kept."""
    kept = ResultCache(tmp_path / "cache" if folder else None)
    picture = Drawn(Image.effect_noise((24, 16), 90).convert("RGB"), torch.randn(1, 4, 2, 3), {"cache": {"skipped": 3}})
    kept.put("a" * 64, picture)
    for _ in range(2):
        found = kept.get("a" * 64)
        assert found is not None and found.about == picture.about
        assert found.image.tobytes() == picture.image.tobytes() and found.image.size == (24, 16)
        assert torch.equal(found.latents, picture.latents)
        found.image.paste("white", (0, 0, 24, 16))
        found.latents.zero_()
    assert kept.get("b" * 64) is None
    kept.clear()
    assert kept.keys() == [] and kept.get("a" * 64) is None


def test_a_repeated_request_is_not_drawn_again(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call, and each of its pictures alone; the network is not called; the settings say so."""
    first = draw(pipe, seed=5, images=2)
    assert not first.cached and [about["cached"] for about in first.settings] == [False, False]
    calls: list[int] = []
    monkeypatch.setattr(miniflux.drawing, "denoise", lambda *_, **__: calls.append(1))
    steps: list[tuple[int, int]] = []
    again = draw(pipe, seed=5, images=2, progress=lambda done, total: steps.append((done, total)))
    second = draw(pipe, seed=6)
    assert not calls and again.cached and second.cached and again.settings[0]["cached"] is True
    assert torch.equal(again.latents, first.latents) and torch.equal(second.latents, first.latents[1:])
    assert again.images[0].tobytes() == first.images[0].tobytes()
    assert steps == [(2, 4), (4, 4)]
    strip = ("cached",)
    assert [{k: v for k, v in about.items() if k not in strip} for about in again.settings] == [
        {k: v for k, v in about.items() if k not in strip} for about in first.settings
    ]
    assert pipe.results is not None and (pipe.results.hits, pipe.results.misses) == (3, 2)


def test_a_new_seed_encodes_nothing(pipe: Pipeline) -> None:
    draw(pipe, "never seen before")
    before = pipe.text.encoded
    assert not draw(pipe, "never seen before", seed=1).cached
    assert pipe.text.encoded == before


DIFFERENT: list[dict[str, Any]] = [
    {"prompt": "a ring"},
    {"seed": 1},
    {"steps": 3},
    {"guidance": 2.0},
    {"guidance": lambda sigma: 2.0 + sigma},
    {"width": 48},
    {"height": 48},
    {"t5_length": 20},
    {"padding": "masked"},
    {"solver": "heun"},
    {"solver": "euler-ancestral"},
    {"schedule": "beta"},
    {"schedule": [1.0, 0.4, 0.0], "steps": None},
    {"shift": 2.0},
    {"guide": guide("cfg", scale=2.0)},
    {"guide": guide("cfg", scale=2.0), "negative": "a ring"},
    {"guide": guide("cfg", scale=2.0, window=(0.0, 0.5))},
    {"guide": guide("apg", scale=2.0)},
    {"variation": (3, 0.2)},
    {"cache": "tea"},
    {"cache": cache("tea", threshold=0.5)},
    {"image": Image.new("RGB", (32, 32), "red"), "strength": 0.5},
    {"image": Image.new("RGB", (32, 32), "blue"), "strength": 0.5},
    {"image": Image.new("RGB", (32, 32), "blue"), "strength": 0.6},
    {"restart": (0.2, 0.6, 1), "steps": 4},
]


def test_everything_that_makes_a_picture_is_in_its_key(pipe: Pipeline) -> None:
    """No two of these calls are answered with each other's pictures; each is answered with its own."""
    fresh = [draw(pipe, **options) for options in ({}, *DIFFERENT)]
    assert not any(result.cached for result in fresh)
    again = [draw(pipe, **options) for options in ({}, *DIFFERENT)]
    assert all(result.cached for result in again)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(fresh, again, strict=True))


def test_loras_and_their_scales_are_in_the_key(pipe: Pipeline, tmp_path: Path) -> None:
    """By the content of their files, not by names; scale, order and a changed file all count."""
    other = tmp_path / "other.safetensors"
    shutil.copy(BUNDLED / "loras" / "realism.safetensors", other)
    base = draw(pipe)
    try:
        lora.attach(pipe, "realism", 0.5, "a")
        half = draw(pipe)
        lora.set_scale(pipe, "a", 0.8)
        assert not half.cached and not draw(pipe).cached
        lora.detach(pipe, "a")
        lora.attach(pipe, other, 0.5, "another name")
        assert draw(pipe).cached and draw(pipe).settings[0]["loras"][0]["name"] == "another name"
        lora.detach(pipe, "another name")
        lora.attach(pipe, other, lambda _: 0.5, "a")
        assert not draw(pipe).cached  # a scale of its own for every module
        lora.set_schedule(pipe, "a", lambda sigma: sigma)
        assert "LoRA a is a function" in draw(pipe).settings[0]["not_cached"]
        lora.set_schedule(pipe, "a", None)
        lora.set_scale(pipe, "a", 0.7)
        os.utime(other, ns=(1, 1))  # touched: what is attached can no longer be told from the file
        said = draw(pipe).settings[0]
        assert "has changed since it was loaded" in said["not_cached"] and "cached" not in said
    finally:
        for name in list(lora.attached(pipe)):
            lora.detach(pipe, name)
    assert draw(pipe).cached and torch.equal(draw(pipe).latents, base.latents)


def test_what_cannot_be_keyed_goes_by_and_says_why(pipe: Pipeline) -> None:
    draw(pipe)
    moment = draw(pipe, stop=1).moment
    for options, why in (
        ({"callback": lambda i, moment: None}, "callback may replace"),
        ({"callback": lambda i, moment: torch.zeros_like(moment.x)}, "callback may replace"),
        ({"resume": moment}, "goes on from a moment"),
        ({"stop": 1}, "stops early"),
        ({"cache": "tea", "check_cache": True}, "compared with the run without"),
        ({"solver": "midpoint", "guidance": lambda sigma: 1 + sigma}, "midpoint asks it between"),
        ({"guide": guide("cfg", scale=lambda sigma: 1 + sigma), "solver": "rk4"}, "rk4 asks it between"),
    ):
        for _ in range(2):
            result = draw(pipe, **options)
            assert not result.cached and why in result.settings[0]["not_cached"]
    assert draw(pipe, callback=lambda i, moment: torch.zeros_like(moment.x)).settings[0]["replaced"] is True
    lora_tensors = dict(miniflux.checkpoints.files.open_tensors(BUNDLED / "loras" / "realism.safetensors"))
    lora.attach(pipe, lora_tensors, 0.5, "x")
    assert "did not come from a file" in draw(pipe).settings[0]["not_cached"]
    lora.detach(pipe, "x")
    bare = Pipeline(pipe.variant, pipe.transformer, pipe.autoencoder, pipe.text, results=pipe.results)
    assert "not loaded from files" in draw(bare).settings[0]["not_cached"]
    seen: list[int] = []
    assert draw(pipe, watch=lambda i, moment: seen.append(moment.step)).cached and not seen
    assert not draw(pipe, seed=9, watch=lambda i, moment: seen.append(moment.step)).cached and seen == [1, 2]


def test_functions_are_kept_by_their_values(pipe: Pipeline) -> None:
    """Two functions of the same values at the noise levels are the same; also where heun asks at the next level."""
    for solver in ("euler", "heun"):
        assert not draw(pipe, guidance=lambda sigma: 2.0 + sigma, solver=solver).cached
        assert draw(pipe, guidance=lambda sigma: 1.0 + sigma + 1.0, solver=solver).cached
        assert not draw(pipe, guidance=lambda sigma: 2.0 + 2 * sigma, solver=solver).cached


def test_damaged_and_half_written_entries_are_drawn_anew(plain: Pipeline, tmp_path: Path) -> None:
    """A byte changed anywhere, a cut file, an empty one, another file altogether."""
    pipe = Pipeline(
        plain.variant, plain.transformer, plain.autoencoder, plain.text, plain.origin, results=ResultCache(tmp_path)
    )
    first = draw(pipe)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    for damage in (
        b"",
        whole[:100],
        whole[:-1],
        b"x" + whole[1:],
        whole[:60] + b"!" + whole[61:],
        whole[:-5] + b"!" + whole[-4:],
        b"\x89PNG",
    ):
        entry.write_bytes(damage)
        again = draw(pipe)
        assert not again.cached and torch.equal(again.latents, first.latents)
        assert entry.read_bytes() == whole and [path.name for path in tmp_path.iterdir()] == [entry.name]
    assert draw(pipe).cached


def test_a_folder_outlives_the_process_and_is_shared(plain: Pipeline, tmp_path: Path) -> None:
    first = draw(miniflux.load("nano", cache=tmp_path / "pictures"))
    again = draw(miniflux.load("nano", cache=str(tmp_path / "pictures")))
    assert again.cached and np.array_equal(np.asarray(again.images[0]), np.asarray(first.images[0]))
    assert not draw(plain).cached and "cached" not in draw(plain).settings[0]


@pytest.mark.parametrize("folder", [False, True])
def test_bytes_are_bounded_and_the_least_recently_used_goes(tmp_path: Path, folder: bool) -> None:
    where = tmp_path / "cache" if folder else None
    probe = ResultCache()
    probe.put("x", made(1))
    size = sum(map(len, probe._memory.values()))
    kept = ResultCache(where, max_bytes=3 * size + 10)
    for i, name in enumerate("abc"):
        kept.put(name, made(i))
        if folder:
            os.utime(tmp_path / "cache" / f"{name}.picture", (i, i))
    assert kept.get("a") is not None  # used: b is the oldest now
    kept.put("d", made(3))
    assert sorted(kept.keys()) == ["a", "c", "d"]
    kept.put("large", made(4, size=200))
    assert sorted(kept.keys()) == ["a", "c", "d"]
    if folder:
        stale = tmp_path / "cache" / "e.123.part"
        stale.write_bytes(b"half")
        os.utime(stale, (1, 1))
        kept.put("c", made(2))
        assert not stale.exists()


def test_equal_requests_at_the_same_time_are_drawn_once() -> None:
    kept, calls = ResultCache(), list[int]()

    def slow() -> Drawn:
        calls.append(1)
        time.sleep(0.05)
        return made(7)

    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(kept.once, "a", slow) for _ in range(8)]
    assert len(calls) == 1 and sorted(run.result()[1] for run in runs) == [False] + [True] * 7


@pytest.mark.parametrize("reason", [ValueError("failed"), KeyboardInterrupt()])
def test_if_the_first_fails_the_second_draws(reason: BaseException) -> None:
    kept, started = ResultCache(), threading.Event()

    def fails() -> Drawn:
        started.set()
        time.sleep(0.05)
        raise reason

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(kept.once, "a", fails)
        started.wait()
        second = pool.submit(kept.once, "a", lambda: made(1))
        assert second.result()[1] is False
        with pytest.raises(type(reason)):
            first.result()
    assert kept.keys() == ["a"]


def test_who_waits_can_give_up() -> None:
    kept, started, go = ResultCache(), threading.Event(), threading.Event()

    def slow() -> Drawn:
        started.set()
        go.wait()
        return made(1)

    def stop() -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(kept.once, "a", slow)
        started.wait()
        with pytest.raises(KeyboardInterrupt):
            kept.once("a", lambda: made(2), stop)
        go.set()
        assert first.result()[1] is False


def test_equal_calls_of_generate_at_the_same_time(pipe: Pipeline) -> None:
    """Four threads, two kinds of request: every one gets its picture, each kind is drawn once."""
    expected = {
        seed: draw(Pipeline(pipe.variant, pipe.transformer, pipe.autoencoder, pipe.text), seed=seed).latents
        for seed in (1, 2)
    }
    with ThreadPoolExecutor(4) as pool:
        runs = [(seed, pool.submit(draw, pipe, seed=seed)) for seed in (1, 2, 1, 2, 1, 2)]
    assert all(torch.equal(run.result().latents, expected[seed]) for seed, run in runs)
    assert pipe.results is not None and pipe.results.misses == 2 and pipe.results.hits == 4


def test_a_full_disk_costs_the_cache_and_not_the_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = ResultCache(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    assert kept.once("a", lambda: made(1))[1] is False
    assert "could not be kept" in caplog.text


def test_bad_caches_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: ResultCache(max_bytes=0), InputError, "max_bytes must be a whole number"),
        (lambda: ResultCache(tmp_path / "file" / "cache"), OutputError, "no folder for a cache"),
        (lambda: miniflux.load("nano", cache=tmp_path / "file"), OutputError, "no folder for a cache"),
    ]
    for make, kind, message in refused:
        with pytest.raises(kind, match=message):
            make()


def test_folder_that_others_write_to_answers_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is found, what is damaged is passed over; neither can be marked nor removed there."""
    kept = ResultCache(tmp_path)
    for key in ("a", "b"):
        kept.put(key, Drawn(Image.new("RGB", (4, 4)), torch.zeros(1, 1, 1, 1), {}))
    (tmp_path / "b.picture").write_bytes(b"damaged")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert kept.get("a") is not None and kept.get("b") is None
