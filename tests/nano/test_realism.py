"""The bundled realism LoRA: the scene stays, the light changes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

import miniflux
from miniflux.lora.attaching import BUNDLED_LORAS
from miniflux.nano import scenes
from miniflux.nano.recipe.adherence import judge


def fall_off(image: Image.Image) -> float:
    """How much darker the lower right corner is than the upper left one, in grey levels: no object reaches there."""
    grey = np.asarray(image.convert("L"), float)
    return float(grey[:14, :14].mean() - grey[-14:, -14:].mean())


def test_it_is_small_and_of_xlabs_dialect() -> None:
    assert (BUNDLED_LORAS / "realism.safetensors").stat().st_size <= 1_000_000
    receipt = miniflux.lora.inspect("realism")
    assert receipt.dialect == "XLabs" and receipt.applied == receipt.expected == 8


def test_the_light_changes_and_the_scene_stays() -> None:
    pipe = miniflux.load("nano")
    rng = random.Random(12)
    # Nothing shows on a black background that the lamp darkens.
    wanted = [scene for scene in (scenes.one_object(rng) for _ in range(20)) if scene.background != "black"][:10]
    captions = [scene.caption for scene in wanted]
    plain = pipe.generate(captions, seed=70).images
    miniflux.lora.attach(pipe, "realism")
    lit = pipe.generate(captions, seed=70).images
    assert all(abs(fall_off(image)) < 3 for image in plain)
    assert all(fall_off(image) > 5 for image in lit)
    assert sum(judge(image, scene).all for image, scene in zip(lit, wanted, strict=True)) >= 9


def test_another_model_refuses_it() -> None:
    with pytest.raises(miniflux.errors.LoraError, match="nano-dev"):
        miniflux.lora.inspect("realism", "flux1-dev")
