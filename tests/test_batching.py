"""Pictures that are drawn together: the same as alone, and only where it pays and fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import miniflux
from miniflux import batching, conditions
from miniflux.batching import Batches, fitting
from miniflux.cache import ResultCache
from miniflux.conditions import ControlNet, Inpaint, Reference
from miniflux.errors import InputError, OutOfMemoryError
from miniflux.memory.ledger import Run
from miniflux.memory.shortage import Fits
from miniflux.pipeline import Pipeline
from miniflux.sampling import Moment
from miniflux.settings.record import record_of
from miniflux.testing import tiny
from tests.steered import network

PROMPTS = ["a red circle on a blue background", "two green squares"]
SMALL: dict[str, Any] = {"steps": 4, "width": 64, "height": 64}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "RGB")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.load("nano", device="cpu")


def batches(result: miniflux.Result) -> list[int | None]:
    return [said.get("batch") for said in result.settings]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guide": "cfg", "negative": "a star"},
        {"guide": "nag"},
        {"guide": "apg"},
        {"solver": "heun"},
        {"solver": "unipc"},
        {"solver": "ddim:0.5"},
        {"variation": (7, 0.4)},
        {"padding": "masked"},
        {"restart": (0.3, 0.6, 1)},
        {"stop": 2},
        {"image": PHOTO, "strength": 0.6},
        {"image": PHOTO, "strength": 0.7, "mask": Image.new("L", (64, 64), 128)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_picture_of_a_batch_is_the_one_alone(pipe: Pipeline, options: dict[str, Any]) -> None:
    """Bit for bit: two prompts, two seeds of each, with whatever guides, solves and starts them."""
    together = pipe.generate(PROMPTS, images=2, seed=5, **SMALL, **options)
    assert batches(together) == [4, 4, 4, 4]
    for i in range(4):
        alone = pipe.generate(PROMPTS[i // 2], seed=5 + i, **SMALL, **{**options, **_varied(options, i)})
        assert torch.equal(alone.latents[0], together.latents[i])
        assert alone.images[0].tobytes() == together.images[i].tobytes()
        assert batches(alone) == [None]


def _varied(options: dict[str, Any], i: int) -> dict[str, Any]:
    return {"variation": (options["variation"][0] + i, options["variation"][1])} if "variation" in options else {}


def test_conditions_steer_every_picture_of_a_batch(pipe: Pipeline, tmp_path: Path) -> None:
    """Tokens of references, channels of Fill, and networks around the blocks."""
    net = conditions.load(network(tmp_path / "control.safetensors"))
    hole = Image.new("L", (64, 64), 0)
    hole.paste(255, (16, 16, 48, 48))
    where = (torch.from_numpy(np.array(hole)) / 255).float()
    kontext, fill = miniflux.load("nano-kontext"), miniflux.load("nano-fill")
    for one, options in (
        (kontext, {"conditions": [Reference(PHOTO)]}),
        (fill, {"image": PHOTO, "mask": hole}),
        (pipe, {"conditions": [ControlNet(net, PHOTO)]}),
        (pipe, {"conditions": [Inpaint(PHOTO, 0.8, where)]}),
    ):
        together = one.generate("a red circle", images=3, batch=3, **SMALL, **options)
        apart = one.generate("a red circle", images=3, batch=1, **SMALL, **options)
        assert batches(together) == [3] * 3 and batches(apart) == [None] * 3
        assert torch.equal(together.latents, apart.latents)


@pytest.mark.parametrize("name", ["flux1-dev", "flux2-klein-4b", "flux2-klein-base-4b", "flux3-klein"])
def test_every_family_in_batches(name: str) -> None:
    """Up to rounding, where the words are of a length that does not divide."""
    one = tiny(name)
    together, apart = (one.generate("a cat", images=3, batch=n, **SMALL) for n in (3, 1))
    assert batches(together) == [3, 3, 3]
    torch.testing.assert_close(together.latents, apart.latents, rtol=0, atol=1e-4)
    assert not torch.equal(together.latents[0], together.latents[1])


def test_prompts_of_other_lengths_are_not_drawn_together(pipe: Pipeline) -> None:
    """Two of the same length are, if somebody asks for it."""
    result = pipe.generate(["a red circle", "a star", "a star"], padding="trimmed", batch=8, **SMALL)
    assert batches(result) == [None, 2, 2]
    assert batches(pipe.generate(["a star", "a star"], padding="trimmed", **SMALL)) == [None, None]


def test_large_pictures_are_drawn_one_after_the_other(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 16 + 48
    monkeypatch.setattr(batching, "PAYS", 2 * tokens * pipe.transformer.config.hidden_size)
    assert batches(pipe.generate("a star", images=5, **SMALL)) == [2, 2, 2, 2, None]
    assert batches(pipe.generate("a star", images=2, guide="cfg", **SMALL)) == [2, 2]
    assert batches(pipe.generate("a star", images=2, guide="nag", **SMALL)) == [None, None]  # two rows each
    assert batches(pipe.generate("a star", images=2, steps=1, width=128, height=128)) == [None, None]


def test_whoever_looks_on_sees_one_picture_at_a_time(pipe: Pipeline) -> None:
    """Unless a batch is asked for: then each picture of it, after every step."""
    seen: list[tuple[int, int]] = []

    def watch(index: int, moment: Moment) -> None:
        assert len(moment.x) == len(moment.picture) == 1
        seen.append((index, moment.step))

    options: dict[str, Any] = {**SMALL, "steps": 2}
    plain = pipe.generate("a star", images=2, watch=watch, **options)
    assert batches(plain) == [None, None] and seen == [(0, 1), (0, 2), (1, 1), (1, 2)]
    seen.clear()
    together = pipe.generate("a star", images=2, watch=watch, batch=2, **options)
    assert batches(together) == [2, 2] and seen == [(0, 1), (1, 1), (0, 2), (1, 2)]
    assert torch.equal(plain.latents, together.latents)

    seen.clear()
    fastest = pipe.generate("a star", images=2, watch=watch, batch="auto", **options)
    assert batches(fastest) == [2, 2] and len(seen) == 4 and torch.equal(plain.latents, fastest.latents)

    def turned(index: int, moment: Moment) -> torch.Tensor | None:
        return -moment.x if index == 1 and moment.step == 1 else None

    apart, changed = (pipe.generate("a star", images=3, callback=turned, batch=n, **options) for n in (1, 3))
    assert torch.equal(apart.latents, changed.latents)
    assert [said.get("replaced") for said in changed.settings] == [None, True, None]


def test_a_moment_of_a_batch_can_be_resumed(pipe: Pipeline) -> None:
    """Solvers that remember earlier steps go on from the row of one picture."""
    kept: dict[int, Moment] = {}

    def keep(index: int, moment: Moment) -> None:
        if moment.step == 2:
            kept[index] = moment

    options: dict[str, Any] = {**SMALL, "solver": "unipc"}
    whole = pipe.generate("a star", images=3, watch=keep, batch=3, **options)
    again = pipe.generate("a star", seed=2, resume=kept[2], **options)
    assert torch.equal(again.latents[0], whole.latents[2])


def test_progress_counts_all_steps_once(pipe: Pipeline) -> None:
    told: list[tuple[int, int]] = []
    pipe.generate("a star", images=3, batch=2, progress=lambda *done: told.append(done), **SMALL)
    assert told == [(i, 12) for i in range(1, 13)]


def test_a_function_that_raises_stops_a_batch(pipe: Pipeline) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.generate("a star", images=2, progress=stop, **SMALL)
    assert batches(pipe.generate("a star", images=2, **SMALL)) == [2, 2]


def test_pictures_that_are_kept_are_not_drawn_again() -> None:
    """Of four, those two that are new are drawn together, with the same keys as alone."""
    pipe = miniflux.load("nano", cache=ResultCache())
    for seed in (1, 2):
        pipe.generate("a star", seed=seed, **SMALL)
    result = pipe.generate("a star", images=4, **SMALL)
    assert [said["cached"] for said in result.settings] == [False, True, True, False]
    assert batches(result) == [2, None, None, 2]
    again = pipe.generate("a star", seed=3, **SMALL)
    assert again.settings[0]["cached"] and torch.equal(again.latents[0], result.latents[3])


def test_settings_of_a_batch_are_read_again(pipe: Pipeline) -> None:
    about = pipe.generate("a star", images=2, **SMALL).settings[0]
    record = record_of(about)
    assert record.doubts == ("it was drawn in one batch with 1 more, which may round otherwise",)


@pytest.mark.parametrize("batch", [0, -1, 1.5, "2", True])
def test_other_batches_are_refused(pipe: Pipeline, batch: Any) -> None:
    with pytest.raises(InputError, match=r"batch must be a whole number from 1 to .*, got"):
        pipe.generate("a star", batch=batch, **SMALL)


def test_a_step_cache_and_a_batch_are_refused(pipe: Pipeline) -> None:
    """Its decisions look at all pictures of a batch; without being asked, each is drawn by itself."""
    with pytest.raises(InputError, match=r"batch=2: a step cache decides for all pictures of a batch"):
        pipe.generate("a star", images=2, batch=2, cache="first-block", **SMALL)
    assert batches(pipe.generate("a star", images=2, cache="first-block", **SMALL)) == [None, None]


def test_a_batch_that_does_not_fit() -> None:
    """As many as fit; more that are asked for are refused, with a number that fits."""
    run = Run(width=64, height=64, text_tokens=16, calls=1)
    fits = Fits(lambda run: (1000 * run.batch, 0), torch.device("cpu"), 16, lambda run, free: [])
    fits.free = (4000, None)
    assert fitting(8, None, run, fits) == 3
    assert fitting(2, 2, run, fits) == 2
    with pytest.raises(OutOfMemoryError, match=r"8 pictures at once do not fit into memory: .*; batch=3 would"):
        fitting(8, 8, run, fits)


def test_batches_are_made_of_what_is_needed() -> None:
    """In order, each once, and of two at most."""
    made: list[list[int]] = []

    def draw(wanted: Any) -> list[Any]:
        made.append(list(wanted[:2]))
        return [lambda i=i: f"picture {i}" for i in wanted[:2]]

    together = Batches(6, draw, lambda i: i not in (1, 2))
    assert [together.picture(i) for i in (0, 3, 4, 5)] == [f"picture {i}" for i in (0, 3, 4, 5)]
    assert made == [[0, 3], [4, 5]] and not together.drawn


def test_a_batch_ahead_is_one_ahead() -> None:
    """Begun before the first of a batch is waited for; not where its first picture is there already. An error of it is
    told where it is asked for, and nothing is begun after it."""
    told: list[str] = []

    def draw(wanted: Any) -> list[Any]:
        if wanted[0] == 6:
            told.append("error")
            raise ValueError("6")
        told.append(f"begin {wanted[:2]}")
        return [lambda i=i: told.append(f"wait {i}") for i in wanted[:2]]

    batches = Batches(12, draw, lambda i: i != 8, ahead=True)
    for i in range(6):
        batches.picture(i)
    with pytest.raises(ValueError, match="6"):
        batches.picture(6)
    begun = ["begin [0, 1]", "begin [2, 3]", "wait 0", "wait 1", "begin [4, 5]", "wait 2", "wait 3"]
    assert told == [*begun, "error", "wait 4", "wait 5"]
    told.clear()
    kept = Batches(5, draw, lambda i: i != 2, ahead=True)
    for i in (0, 1, 3, 4):
        kept.picture(i)
    assert told == ["begin [0, 1]", "wait 0", "wait 1", "begin [3, 4]", "wait 3", "wait 4"]
