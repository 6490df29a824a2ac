"""References: tokens with positions of their own, sizes, several at once, every memory mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import miniflux
from miniflux.apps.cli import main
from miniflux.conditions import Reference, kontext_size
from miniflux.errors import InputError
from miniflux.families.flux1 import FLUX1
from miniflux.pictures import from_image
from miniflux.pipeline import Pipeline
from miniflux.plan import Plan
from miniflux.sampling import denoise, image_ids, initial_noise, pack

PHOTO = Image.effect_noise((48, 32), 90).convert("RGB")
SIZE = {"width": 64, "height": 48, "steps": 2, "seed": 3, "guidance": 2.0}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.tiny()


def test_tokens_behind_those_that_are_drawn(pipe: Pipeline) -> None:
    """The same as `denoise` told by hand: two pictures, with the first position 1 and 2."""
    other = PHOTO.rotate(180)
    told = [Reference(PHOTO), Reference(other, index=2)]
    result = pipe.generate("a star", conditions=told, **SIZE)
    text = pipe.text.encode(["a star"], 32)
    latents = [pack(pipe.autoencoder.encode(from_image(picture)[None])) for picture in (PHOTO, other)]
    x = denoise(
        pipe.transformer, pack(initial_noise(48, 64, 3)), image_ids(1, 3, 4), text.txt, torch.zeros(1, 32, 3), text.vec,
        result.settings[0]["sigmas"], 2.0, img_cond_seq=torch.cat(latents, dim=1),
        img_cond_seq_ids=torch.cat([image_ids(1, 2, 3, index) for index in (1, 2)], dim=1),
    )  # fmt: skip
    assert torch.equal(pack(result.latents), x)
    assert [about["index"] for about in result.settings[0]["conditions"]] == [1, 2]
    assert Plan.of(pipe.variant, "x", conditions=told).needs().more_tokens == 2 * 6


@pytest.mark.parametrize("memory", ["stream", "offload"])
def test_every_memory_mode_draws_the_same(memory: str) -> None:
    options: dict[str, Any] = {"conditions": [Reference(PHOTO)], "guide": "cfg", "cache": "taylor", **SIZE}
    plain = miniflux.load("nano-dev").generate("a star", **options)
    assert torch.equal(miniflux.load("nano-dev", memory=memory).generate("a star", **options).latents, plain.latents)


def test_sizes(tmp_path: Path) -> None:
    """Its own, to whole tokens; one that is given; and that of the release, nearest in shape."""
    odd = Image.new("RGB", (50, 37))
    odd.save(tmp_path / "o.png")
    for given in (odd, str(tmp_path / "o.png")):
        picture = Reference(given).framed(FLUX1, 1).picture
        assert isinstance(picture, Image.Image) and picture.size == (48, 32)
    sized = Reference(odd, size=(64, 128)).framed(FLUX1, 1).picture
    assert isinstance(sized, Image.Image) and sized.size == (64, 128)
    assert [kontext_size(*size) for size in ((1000, 1000), (1920, 1080), (10, 4000), (1248, 832))] == [
        (1024, 1024), (1392, 752), (672, 1568), (1248, 832),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"picture": torch.zeros(3, 40, 64)}, r"multiples of 16, got a tensor \(3, 40, 64\)"),
        ({"picture": torch.zeros(1, 16, 4, 4)}, r"\(3, H, W\)"),
        ({"picture": PHOTO, "index": 0}, "index of a reference"),
        ({"picture": "no.png"}, "no.png"),
    ],
)
def test_bad_references_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Reference(**given)


def test_on_the_command_line(tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "p.png")
    told = ["--reference", str(tmp_path / "p.png"), "--reference", str(tmp_path / "p.png"), "--steps", "1"]
    assert main(["generate", "a star", *told, "-o", str(tmp_path / "o.png")]) == 0
