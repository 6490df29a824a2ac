"""What a model drew, and the clean drawing that it meant."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import miniflux
from miniflux.nano import scenes
from miniflux.nano.recipe.pairs import Pairs, nominal, snapped
from miniflux.nano.recipe.polish import clean_error, dev_loss, share_of
from miniflux.nano.recipe.realism import encoders_of
from miniflux.pipeline import Pipeline

SIZE = (96, 64)


def moved(scene: scenes.Scene, rng: random.Random) -> scenes.Scene:
    """The scene with shapes that are off by as much as training pictures may be."""
    jitter, sizes = scenes.CENTRE_JITTER, scenes.RADIUS_JITTER
    return replace(
        scene,
        shapes=tuple(
            replace(
                shape,
                x=shape.x + rng.uniform(-jitter, jitter),
                y=shape.y + rng.uniform(-jitter, jitter),
                radius=shape.radius * rng.uniform(*sizes),
            )
            for shape in scene.shapes
        ),
    )


@pytest.mark.parametrize("size", [(128, 128), (64, 64), (192, 96)])
def test_places_and_sizes_are_read_from_the_picture(size: tuple[int, int]) -> None:
    """Of clean drawings they are known: to half a pixel, whatever the shape."""
    rng = random.Random(0)
    for _ in range(40):
        scene = nominal(rng)
        drawn = moved(scene, rng)
        found = snapped(np.asarray(scenes.render(drawn, *size), float), scene)
        assert found is not None
        for shape, true in zip(found.shapes, drawn.shapes, strict=True):
            assert abs(shape.x - true.x) * size[0] < 0.5 and abs(shape.y - true.y) * size[1] < 0.5
            assert abs(shape.radius - true.radius) * min(size) < 0.5


def test_what_is_not_the_scene_is_left_out() -> None:
    rng = random.Random(1)
    scene = scenes.Scene("blue", (scenes.Shape("circle", "red", 0.5, 0.5, 0.2),), "a red circle on a blue background")

    def drawn(**changes: object) -> np.ndarray:
        shape = replace(scene.shapes[0], **changes)
        return np.asarray(scenes.render(replace(scene, shapes=(shape,)), 128, 128), float)

    assert snapped(drawn(), scene) is not None
    for changes in ({"kind": "star"}, {"kind": "ring"}, {"colour": "yellow"}, {"x": 0.73}, {"radius": 0.35}):
        assert snapped(drawn(**changes), scene) is None, changes
    noise = np.random.default_rng(rng.randrange(9)).uniform(0, 255, (128, 128, 3))
    assert snapped(noise, scene) is None


def test_scenes_without_jitter_stand_where_the_caption_says() -> None:
    rng = random.Random(2)
    for _ in range(30):
        for shape in nominal(rng).shapes:
            places = [*scenes.POSITIONS.values(), *(at for pair in scenes.RELATIONS.values() for at in pair)]
            assert min(abs(shape.x - x) + abs(shape.y - y) for x, y in places) < 1e-9


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.load("nano-dev", dtype="float32")


@pytest.fixture(scope="module")
def pool(pipe: Pipeline) -> Pairs:
    torch.manual_seed(0)
    made = Pairs(pipe.autoencoder, pipe.transformer, encoders_of(pipe.text), SIZE, seed=3, guidance=(3.0, 3.0))
    made.renew(6, most=4)
    return made


def test_pairs_are_renewed_and_bounded(pool: Pairs) -> None:
    assert len(pool) <= 4 and pool.made == 6 and pool.kept >= 4
    pair = pool.draw(1)[0]
    assert pair.states.shape == (8, 24, 64) and pair.clean.shape == (24, 64) and len(pair.levels) == 9


def test_what_is_meant_is_the_renderers_drawing(pipe: Pipeline, pool: Pairs) -> None:
    pair = pool.pairs[0]
    pixels = torch.from_numpy(np.array(scenes.render(pair.scene, *SIZE))).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = miniflux.sampling.pack(pipe.autoencoder.encode(pixels))[0]
    torch.testing.assert_close(pair.clean, latents, atol=0.1, rtol=0)  # mixed precision


def test_nothing_is_lost_by_the_clean_picture_itself(pool: Pairs) -> None:
    """The error in latents is 0 there; in pixels what the autoencoder leaves, and less than for any other picture."""
    pairs = pool.pairs
    clean, sigmas = torch.stack([pair.clean for pair in pairs]), torch.full((len(pairs),), 0.75)
    assert clean_error(clean, sigmas, pool, pairs) == 0  # above the level at which pictures are decoded
    low = torch.full((len(pairs),), 0.2)
    assert 0 < clean_error(clean, low, pool, pairs) < 0.1 < clean_error(clean + 0.5, low, pool, pairs)


def test_while_nothing_is_decided_the_network_keeps_to_what_it_was(pipe: Pipeline, pool: Pairs) -> None:
    at_start = [replace(pair, states=pair.states[:1]) for pair in pool.pairs]  # pure noise only
    rng = random.Random(0)
    rng.random = lambda: 0.99  # pyright: ignore  # no rounded weights, the usual padding
    torch.manual_seed(0)
    encoders = encoders_of(pipe.text)
    loss = dev_loss(pipe.transformer, pipe.transformer, encoders, pool, at_start, rng)
    assert loss.item() < 1e-9


def test_small_canvases_fill_large_batches() -> None:
    assert share_of(24, (128, 128), (128, 128)) == 24
    assert share_of(24, (64, 64), (128, 128)) == 48 and share_of(24, (192, 192), (128, 128)) == 10
    assert share_of(1, (192, 192), (128, 128)) == 1
