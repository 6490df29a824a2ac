"""The bundled models: official layouts, small files, and pictures that show what was asked for."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

import miniflux
from miniflux.checkpoints import inspect, open_tensors
from miniflux.nano import scenes
from miniflux.nano.recipe import edited, edits, successors
from miniflux.nano.recipe.adherence import judge
from miniflux.pipeline import Pipeline
from miniflux.weights.finding import BUNDLED


@pytest.fixture(scope="module", params=["nano-dev", "nano-schnell"])
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return miniflux.load(request.param)


@pytest.fixture(scope="module")
def editor() -> Pipeline:
    return miniflux.load("nano-kontext")


def test_all_files_together_are_at_most_72_megabytes() -> None:
    """Nearly a fifth of which the wheel's compression takes away again."""
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()) <= 72_000_000


def test_every_file_is_an_official_layout_without_problems() -> None:
    found = inspect(BUNDLED).parts
    networks = {"Flux1", "Autoencoder", "ClipTextEncoder", "T5Encoder", "TinyDecoder"}
    networks |= {"Flux2", "Flux2Autoencoder", "Flux3", "CausalLm"}
    others = {("LoRA", "XLabs"), ("LoRA", "BFL"), ("ControlNet", "XLabs")}
    assert {(part.network, part.layout) for part in found} == {(name, "original") for name in networks} | others
    assert not any(part.problems for part in found)
    for file in BUNDLED.rglob("*.safetensors"):
        entries = open_tensors(file).entries
        counted = {"bn.num_batches_tracked"} & set(entries)  # by the autoencoder of FLUX.2
        assert {entry.dtype for key, entry in entries.items() if key not in counted} == {torch.bfloat16}


def right(pipe: Pipeline, wanted: list[scenes.Scene], **options: int) -> int:
    """How many scenes are drawn with the right background, colours, shapes and places."""
    result = pipe.generate([scene.caption for scene in wanted], seed=1000, **options)
    return sum(judge(image, scene).all for image, scene in zip(result.images, wanted, strict=True))


def test_one_object(pipe: Pipeline) -> None:
    """With pairs of colour and shape that training never showed among them."""
    rng = random.Random(5)
    assert right(pipe, [scenes.one_object(rng, held_out=i % 4 == 0) for i in range(24)]) >= 22


def test_two_objects(pipe: Pipeline) -> None:
    rng = random.Random(6)
    assert right(pipe, [scenes.two_objects(rng, held_out=i % 4 == 0) for i in range(16)]) >= 13


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (192, 128), (192, 64), (64, 192), (192, 192)])
def test_other_sizes(pipe: Pipeline, size: tuple[int, int]) -> None:
    rng = random.Random(7)
    wanted = [(scenes.two_objects if i % 2 else scenes.one_object)(rng) for i in range(12)]
    assert right(pipe, wanted, width=size[0], height=size[1]) >= 11


def test_unknown_words_do_no_harm(pipe: Pipeline) -> None:
    """Words the model never read leave the scene as asked for."""
    rng = random.Random(8)
    wanted = [scenes.one_object(rng) for _ in range(8)]
    prompts = [f"Please, a splendid picture of {scene.caption}, 8k, bokeh" for scene in wanted]
    result = pipe.generate(prompts)
    verdicts = [judge(image, scene) for image, scene in zip(result.images, wanted, strict=True)]
    assert sum(v.all for v in verdicts) >= 7


def test_seeds_give_different_pictures_of_the_same_thing(pipe: Pipeline) -> None:
    images = [np.asarray(image, float) for image in pipe.generate("a red circle on a blue background", images=3).images]
    for i in range(3):
        for j in range(i):
            assert np.abs(images[i] - images[j]).mean() > 0.3


def test_flat_means_flat(pipe: Pipeline) -> None:
    """The background is one colour, close to the palette's, clean enough to print."""
    image = np.asarray(pipe.generate("a white square on a green background").images[0], float)
    edge = np.concatenate([image[:10].reshape(-1, 3), image[-10:].reshape(-1, 3)])
    assert np.abs(edge.mean(axis=0) - scenes.PALETTE["green"]).max() < 16 and edge.std(axis=0).max() < 5


@pytest.mark.parametrize("kind", edits.KINDS)
def test_instructions_are_followed(kind: str, editor: Pipeline) -> None:
    """nano-kontext, on pictures it has not seen, a quarter of the results with pairs that training never shows."""
    outcomes = [outcome for _, outcome in edited.kontext(editor, 8, 77, kind)]
    assert sum(outcome.good for outcome in outcomes) >= 6


def test_holes_are_filled_as_the_words_say() -> None:
    """nano-fill: a shape in another colour, as another shape, or not at all; every pixel beside the hole is kept."""
    outcomes = [outcome for _, outcome in edited.fill(miniflux.load("nano-fill"), 24, 77)]
    assert sum(outcome.good for outcome in outcomes) >= 20 and all(outcome.kept == math.inf for outcome in outcomes)


@pytest.mark.parametrize("name", ["nano2", "nano3"])
def test_successors_draw_what_captions_and_references_say(name: str) -> None:
    """FLUX.2 and FLUX.3 at nano's size: of 8 captions of each kind, and of 12 pairs of pictures, a quarter with
    held-out results."""
    pipe = miniflux.load(name)
    assert pipe.variant.family == f"flux{name[-1]}" and pipe.variant.steps == (20 if name == "nano2" else 4)
    told = successors.captioned(pipe, 8, 77)
    assert sum(told["one object"]) >= 7 and sum(told["held-out pairs"]) >= 6 and sum(told["two objects"]) >= 5, told
    assert sum(successors.blended(pipe, 12, 78)) >= 10


def test_successors_share_an_autoencoder_and_refuse_what_is_not_theirs() -> None:
    two, three = miniflux.load("nano2"), miniflux.load("nano3")
    assert two.origin is not None and three.origin is not None
    places = [next(stamp.path for part, stamp in pipe.origin.files if part == "autoencoder") for pipe in (two, three)]
    assert places[0] == places[1]
    with pytest.raises(miniflux.errors.InputError, match="guidance"):
        three.generate("a red circle", guidance=2.0)
