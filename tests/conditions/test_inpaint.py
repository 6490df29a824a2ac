"""Inpainting: outside of the mask nothing changes, a white mask is image to image, a grey one a share of the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import miniflux
from miniflux.apps.cli import main
from miniflux.arguments import mask_for
from miniflux.conditions.inpaint import ALWAYS, NEVER, let_go
from miniflux.errors import InputError, ReplayError
from miniflux.pipeline import Pipeline
from miniflux.replay import replay
from miniflux.sampling import custom_schedule
from miniflux.settings import Request, read_picture

PICTURE = Image.effect_noise((64, 48), 90).convert("RGB")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.tiny()


def half(value: float = 1.0) -> Tensor:
    """The right half, but for a column that no place of the latent ends at."""
    mask = torch.zeros(48, 64)
    mask[:, 37:] = value
    return mask


def drawn(pipe: Pipeline, **options: Any) -> miniflux.Result:
    return pipe.generate("a star", seed=3, **{"image": PICTURE, "steps": 4, **options})


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp-2m", "unipc", "lcm", "ipndm"])
def test_outside_of_the_mask_not_a_bit_changes(solver: str, pipe: Pipeline) -> None:
    """Pixels, and the places of the latent that lie wholly outside."""
    result = drawn(pipe, mask=half(), solver=solver)
    before, after = np.asarray(PICTURE), np.asarray(result.images[0])
    assert np.array_equal(before[:, :37], after[:, :37]) and not np.array_equal(before[:, 37:], after[:, 37:])
    start = drawn(pipe, mask=half(), steps=1, stop=1).latents  # of one step: outside it is the picture itself
    assert torch.equal(result.latents[..., :4], start[..., :4])
    assert not torch.equal(result.latents[..., 4:], start[..., 4:])


def test_a_white_mask_is_image_to_image(pipe: Pipeline) -> None:
    white = torch.ones(48, 64)
    for strength in (1.0, 0.6):
        ours = drawn(pipe, mask=white, strength=strength)
        plain = drawn(pipe, strength=strength)
        assert torch.equal(ours.latents, plain.latents) and ours.images[0].tobytes() == plain.images[0].tobytes()


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_an_even_grey_mask_is_a_strength(share: float, pipe: Pipeline) -> None:
    """At levels that steps end at: what is let go there is what image to image begins with there."""
    grey = drawn(pipe, mask=torch.full((48, 64), share))
    assert torch.equal(grey.latents, drawn(pipe, strength=share).latents)


def test_levels_that_places_are_let_go_at() -> None:
    """By hand: of four steps, and between two levels."""
    levels = custom_schedule([1.0, 0.8, 0.5, 0.1, 0.0])
    shares = torch.tensor([0.0, 0.25, 0.5, 0.625, 1.0])
    found = let_go(shares, levels).tolist()
    assert found == [NEVER, pytest.approx(0.1), pytest.approx(0.5), pytest.approx(0.65), ALWAYS]


def test_masks_in_every_form_are_one(pipe: Pipeline, tmp_path: Path) -> None:
    picture = Image.fromarray((half().numpy() * 255).astype(np.uint8))
    picture.save(tmp_path / "m.png")
    results = [drawn(pipe, mask=mask) for mask in (half(), picture, picture.convert("RGB"), str(tmp_path / "m.png"))]
    assert all(torch.equal(result.latents, results[0].latents) for result in results)
    assert len({result.settings[0]["mask"] for result in results}) == 1


def test_latents_may_be_inpainted_too(pipe: Pipeline) -> None:
    """There are no pixels to put back; the latents outside are those that were given."""
    given = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(0))
    result = drawn(pipe, image=given, mask=half())
    assert torch.equal(result.latents[..., :4], given[..., :4])


@pytest.mark.parametrize("memory", ["stream", "offload"])
def test_every_memory_mode_draws_the_same(memory: str) -> None:
    told = {"mask": half(), "cache": "first-block", "guide": "cfg"}
    plain = drawn(miniflux.load("nano-dev"), **told)
    assert torch.equal(drawn(miniflux.load("nano-dev", memory=memory), **told).latents, plain.latents)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(64, 48), "the mask is 48x64, the image 64x48"),
        (torch.full((48, 64), 1.5), "numbers from 0 to 1"),
        (torch.full((48, 64), float("nan")), "numbers from 0 to 1"),
        (torch.ones(1, 48, 64), r"\(H, W\)"),
        (torch.ones(48, 64, dtype=torch.int64), r"\(H, W\)"),
        (torch.zeros(48, 64), "black everywhere"),
        (Image.new("RGBA", (64, 48), (255, 255, 255, 9)), "transparent"),
        ("no.png", "no.png"),
        (5, "a picture is a path"),
    ],
)
def test_bad_masks_are_refused_by_name(mask: Any, said: str, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=said):
        drawn(pipe, mask=mask)


def test_a_mask_without_a_picture_is_refused(pipe: Pipeline) -> None:
    for given in (lambda: pipe.generate("x", mask=half()), lambda: Request(prompt="x", mask="0" * 64)):
        with pytest.raises(InputError, match="no image is given"):
            given()
    assert mask_for(None, None) is None


def test_command_line_settings_and_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mask by its hash in the settings; replay wants picture and mask, those and no others."""
    PICTURE.save(tmp_path / "p.png")
    Image.fromarray((half().numpy() * 255).astype(np.uint8)).save(tmp_path / "m.png")
    image, mask, out = (str(tmp_path / name) for name in ("p.png", "m.png", "o.png"))
    assert main(["generate", "a star", "--image", image, "--mask", mask, "--steps", "2", "-o", out]) == 0
    (request,) = read_picture(out).requests
    assert request.mask is not None and Request.from_json(request.as_json()) == request
    assert replay(out, image=image, mask=mask).same
    with pytest.raises(ReplayError, match="give --mask FILE"):
        replay(out, image=image)
    with pytest.raises(ReplayError, match="the mask is not the one"):
        replay(out, image=image, mask=Image.new("L", (64, 48), 255))
    assert main(["replay", out, "--image", image, "--mask", mask]) == 0
    assert "the same pixels" in capsys.readouterr().out
    assert main(["generate", "a star", "--mask", mask, "-o", out]) == 2
    assert "no image is given" in capsys.readouterr().err
