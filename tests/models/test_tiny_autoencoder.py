"""The tiny decoder: sizes, bounds, where its file is found, and what is refused. Numbers: tests/parity."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import miniflux
from miniflux.checkpoints import save
from miniflux.errors import CheckpointError, ConfigError, WeightsNotFoundError
from miniflux.models.tiny_autoencoder import BOUND, Clamp, TinyDecoder
from miniflux.nano.recipe.tiny import examples, loss_of, train
from miniflux.variants import FLUX1_TINY, VARIANTS
from tests.tiny import TINY, randn, randomise

NANO = VARIANTS["nano-dev"]


def test_sizes() -> None:
    """Each level but the last doubles; the published one is 8 times larger than its latents, as the autoencoder."""
    assert randomise(TinyDecoder(TINY))(randn(2, 4, 3, 5)).shape == (2, 3, 12, 20)
    assert FLUX1_TINY.upscale == VARIANTS["flux1-dev"].autoencoder.downscale
    for blocks in ((), (1, -1)):
        with pytest.raises(ConfigError, match="blocks must be numbers of at least 0"):
            replace(TINY, blocks=blocks)


def test_latents_are_bounded() -> None:
    x = torch.tensor([0.0, 0.01, 100.0, -100.0])
    assert Clamp()(x).tolist() == pytest.approx([0.0, 0.01, BOUND, -BOUND], abs=1e-6)


def test_where_it_is_found(tmp_path: Path) -> None:
    """Bundled with nano; given as a file or a folder, in either layout; and refused if it is another network's."""
    ours = randomise(TinyDecoder(NANO.tiny))
    assert miniflux.load("nano").tiny is not None
    for layout, name in (("original", "tiny.safetensors"), ("diffusers", "taef1/model.safetensors")):
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        save(ours, place, layout=layout)
        given = place if layout == "original" else place.parent
        loaded = miniflux.load("nano", weights={"tiny": given}).tiny
        assert loaded is not None
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), ours.parameters(), strict=True))
    save_file({"1.weight": randn(2, 2)}, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        miniflux.load("nano", weights={"tiny": tmp_path / "bad.safetensors"})
    with pytest.raises(WeightsNotFoundError, match="tiny"):
        miniflux.load("nano", weights={"tiny": tmp_path / "nowhere.safetensors"})


def test_recipe(tmp_path: Path) -> None:
    """It trains, and the network that ships was trained: far better than one that was not."""
    pipe = miniflux.load("nano", dtype="float32")
    assert pipe.tiny is not None
    begun = train(tmp_path, pipe.autoencoder, steps=2, count=2)
    latents, pixels = examples(pipe.autoencoder, 3, random.Random(1), 2)
    assert latents.shape == (3, 16, 16, 16) and pixels.shape == (3, 3, 64, 64)
    torch.manual_seed(0)
    assert loss_of(pipe.tiny, latents, pixels)[1] < loss_of(begun, latents, pixels)[1] / 20
