"""A picture of FLUX.3 cut back to its only reference, which was mirrored around itself up to whole tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import miniflux
from miniflux.apps.cli import main
from miniflux.conditions import Reference
from miniflux.errors import InputError
from miniflux.families.family import Frame
from miniflux.families.flux3 import reference_frame
from miniflux.plan import Plan
from miniflux.testing import tiny
from miniflux.variants import variant
from tests.small_models import model

WIDE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (67, 90, 3), np.uint8), "RGB")


@pytest.mark.parametrize(
    ("frame", "inside"),
    [
        (Frame((90, 67), (96, 80)), (3, 6, 93, 73)),
        (Frame((96, 64), (96, 64)), None),
        (Frame((100, 64), (96, 64)), None),  # the middle
        (Frame((9, 9), (64, 64)), (27, 27, 36, 36)),
    ],
)
def test_where_the_picture_is(frame: Frame, inside: Any) -> None:
    assert frame.inside == inside


@pytest.mark.parametrize("size", [(90, 67), (64, 64), (2999, 1501), (17, 5000), (8, 9), (4096, 4096)])
def test_the_box_equals_that_of_diffusers(size: tuple[int, int]) -> None:
    """`reference_crop` of its processor."""
    processor = pytest.importorskip("diffusers.modular_pipelines.flux3.image_processor").Flux3ImageProcessor
    _, about = processor(vae_scale_factor=16).preprocess(Image.new("RGB", size), resize_mode="fill")
    frame = reference_frame(*size, 1)
    assert about["reference_crop"] == (frame.inside or (0, 0, *frame.resized))


def test_cut_back_unless_a_size_is_asked_for() -> None:
    """The middle of what is drawn; latents are all of it. Settings say so, or the size that they state would be one
    that somebody asked for."""
    pipe = tiny("flux3-klein")
    cut = pipe.generate("a cat", conditions=[Reference(WIDE)], steps=1)
    whole = pipe.generate("a cat", conditions=[Reference(WIDE, crop=False)], steps=1)
    assert cut.images[0].size == WIDE.size and whole.images[0].size == (96, 80)
    assert np.array_equal(np.asarray(cut.images[0]), np.asarray(whole.images[0])[6:73, 3:93])
    assert cut.latents.shape == whole.latents.shape == (1, 128, 5, 6)
    about = cut.settings[0]
    assert (about["width"], about["height"], about["conditions"][0]["crop"]) == (96, 80, True)
    asked: dict[str, Any] = {"width": 96, "height": 80, "steps": 1}
    assert pipe.generate("a cat", conditions=[Reference(WIDE)], **asked).images[0].size == (96, 80)
    again = pipe.generate("a cat", conditions=[Reference(WIDE, crop=True)], **asked)
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(cut.images[0]))


def test_what_there_is_nothing_to_cut_of() -> None:
    """A reference of whole tokens, several of them, a size of its own, and families that see the middle."""
    one = variant("flux3-klein")
    two = [Reference(WIDE), Reference(WIDE, index=2)]
    for conditions in ([Reference(WIDE.resize((96, 64)))], two, [Reference(WIDE, size=(96, 64))]):
        plan = Plan.of(one, "a", conditions=conditions)
        assert plan.crop is None and not any("crop" in use for use in plan.described()["conditions"])
    assert Plan.of(variant("flux2-dev"), "a", conditions=[Reference(WIDE)]).crop is None
    sure = Reference(WIDE, crop=True)
    assert Plan.of(one, "a", conditions=[Reference(WIDE.resize((96, 64)), crop=True)]).crop is None
    for name, conditions, size, said in (
        ("flux2-dev", [sure], None, "models of this family see a part of it"),
        ("flux3-klein", [sure, two[1]], None, "back to its only reference, and there are 2"),
        ("flux3-klein", [sure], 64, "a picture of 96x80 back to its reference, and it is drawn at 64x"),
    ):
        with pytest.raises(InputError, match=said):
            Plan.of(variant(name), "a", conditions=conditions, width=size)
    with pytest.raises(InputError, match="crop must be True, False or None, got 1"):
        Reference(WIDE, crop=1)  # pyright: ignore


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is named by the size that it has; it is made again, and answered from the cache."""
    WIDE.save(tmp_path / "wide.png")
    folder = model(tmp_path / "m", "flux3-klein")
    seen = ("--reference", str(tmp_path / "wide.png"))
    command = ("generate", "a cat", "--model", str(folder), "--steps", "1", *seen, "-o")
    assert main([*command, str(tmp_path / "{width}x{height}.png")]) == 0
    assert main([*command, str(tmp_path / "whole.png"), "--no-crop-back"]) == 0
    assert Image.open(tmp_path / "90x67.png").size == (90, 67)
    assert Image.open(tmp_path / "whole.png").size == (96, 80)
    capsys.readouterr()
    for name in ("90x67.png", "whole.png"):
        assert main(["replay", str(tmp_path / name), "--picture", seen[1]]) == 0
        assert "the same pixels" in capsys.readouterr().out
    assert main([*command[:2], "-o", str(tmp_path / "x.png"), "--no-crop-back"]) == 2
    assert "--no-crop-back is for references, and no --reference is given" in capsys.readouterr().err
    cached = miniflux.load(folder, device="cpu", cache=str(tmp_path / "cache"))
    first, second = (cached.generate("a cat", conditions=[Reference(WIDE)], steps=1) for _ in range(2))
    assert second.cached and second.images[0].size == (90, 67)
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(second.images[0]))
