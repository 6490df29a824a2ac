"""Conditions that are made directly: as `image=` and `mask=`, or refused in words before anything is computed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import miniflux
from miniflux.conditions import Control, ControlNet, Fill, Img2Img, Inpaint, Redux, Reference
from miniflux.conditions.masks import Closeup, grown, hardened, outpainted
from miniflux.errors import InputError
from miniflux.families.flux1 import FLUX1
from miniflux.pipeline import Pipeline
from tests.steered import network, photo


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.load("nano", dtype="float32")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "a.png"
    Image.effect_noise((96, 64), 60).convert("RGB").save(path)
    return str(path)


def half(width: int = 96, height: int = 64) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[:, : width // 2] = 1
    return mask


def test_changes_given_as_conditions_are_those_of_the_arguments(pipe: Pipeline, picture: str) -> None:
    """By path, with the size of the picture."""
    for changed, options in (
        (Img2Img(picture, 0.5), {"image": picture, "strength": 0.5}),
        (Inpaint(picture, 0.5, half()), {"image": picture, "strength": 0.5, "mask": half()}),
    ):
        given = pipe.generate("a star", steps=2, conditions=[changed])
        assert torch.equal(given.latents, pipe.generate("a star", steps=2, **options).latents)
        assert given.images[0].size == (96, 64)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda a: Inpaint(a, 0.5), "a mask must be a tensor"),
        (lambda a: Inpaint(a, 0.5, Image.new("L", (96, 64), 255)), "a mask must be a tensor"),  # type: ignore
        (lambda a: Inpaint(a, 0.5, half(64)), "the mask is 64x64, the image 96x64"),
        (lambda a: Inpaint(a, 0.5, half() * 2), "numbers from 0 to 1"),
        (lambda a: Img2Img(torch.full((3, 64, 64), 3.0)), "must lie in"),
        (lambda a: Img2Img("nothing.png"), "nothing.png"),
        (lambda a: Reference(torch.zeros(3, 64, 64), size=(32, 32)), "is for pictures"),
        (lambda a: Reference(torch.zeros(3, 64, 64, dtype=torch.int32)), "floating-point"),
        (lambda a: Reference(torch.full((3, 64, 64), float("nan"))), "finite"),
        (lambda a: Reference(a, size=(0, 0)), "a side of a reference"),
        (lambda a: Reference(a, size=(-5, 5)), "a side of a reference"),
        (lambda a: Reference(a, size=(20.5, 30)), "a side of a reference"),
        (lambda a: Reference(a, size=(10**6, 16)), "a side of a reference"),
        (lambda a: Reference(a, size=(1, 2, 3)), r"\(width, height\)"),
        (lambda a: Reference(a, size="ab"), r"\(width, height\)"),
        (lambda a: Redux(ControlNet, a), "must be a Redux"),
        (lambda a: outpainted(a, left=99999984), "outpaint left"),
        (lambda a: outpainted(a, left=8192), "sides of at most 8192"),
        (lambda a: grown(Image.new("L", (9, 9)), 3), "must be a tensor"),
        (lambda a: hardened(half() * 3), "numbers from 0 to 1"),
        (lambda a: Closeup(a, Image.new("L", (96, 64), 255)), "must be a tensor"),
    ],
)
def test_what_is_none_is_refused_when_it_is_made(picture: str, make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(picture)


def test_what_does_not_go_together_is_refused_before_drawing(pipe: Pipeline, picture: str) -> None:
    with pytest.raises(InputError, match="this network reads no mask"):
        pipe.generate("a star", steps=2, conditions=[Fill(picture, 1.0, half())])
    with pytest.raises(InputError, match="two references have index 1"):
        pipe.generate("a star", steps=2, conditions=[Reference(picture), Reference(picture)])
    wide = {"img_in.lora_A.weight": torch.full((1, 128), 0.01), "img_in.lora_B.weight": torch.ones(192, 1)}
    miniflux.lora.attach(pipe, wide, name="edges")
    try:
        with pytest.raises(InputError, match="reads 64 channels .* tokens of references have none"):
            pipe.generate("a star", steps=2, conditions=[Control(picture), Reference(picture)])
    finally:
        miniflux.lora.detach(pipe, "edges")


def test_rounding_a_reference_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (100, 70)).save(tmp_path / "a.png")
    with caplog.at_level(logging.WARNING):
        assert Reference(str(tmp_path / "a.png")).framed(FLUX1, 1).shown_at == (96, 64)
    assert "100x70 is seen at 96x64" in caplog.text
    caplog.clear()
    assert Reference(photo(tmp_path / "b.png")).framed(FLUX1, 1).shown_at == (64, 64) and not caplog.text


def test_a_tower_that_is_not_needed_is_refused_alone_and_passed_over_among_several(tmp_path: Path) -> None:
    file = network(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="sees control pictures by itself"):
        miniflux.conditions.load(file, vision="tower")
    assert miniflux.conditions.load(file, vision=["tower"]).vision is None
