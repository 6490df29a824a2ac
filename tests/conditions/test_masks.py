"""Masks grown and feathered, pictures enlarged, parts drawn closely: against scipy, closed forms, and byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

import miniflux
from miniflux.conditions.masks import Closeup, feathered, grown, hardened, outpainted
from miniflux.errors import InputError
from miniflux.pipeline import Pipeline

PHOTO = Image.effect_noise((96, 64), 90).convert("RGB")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.tiny()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(-5, 5))
def test_growth_is_that_of_a_disc(seed: int, pixels: int) -> None:
    """As scipy dilates and erodes grey values with a disc."""
    mask = torch.rand(17, 23, generator=torch.Generator().manual_seed(seed))
    reach = np.arange(-abs(pixels), abs(pixels) + 1)
    disc = reach[:, None] ** 2 + reach[None] ** 2 <= pixels**2
    if pixels >= 0:
        expected = ndimage.grey_dilation(mask.numpy(), footprint=disc, mode="constant", cval=0)
    else:
        expected = ndimage.grey_erosion(mask.numpy(), footprint=disc, mode="constant", cval=1)
    np.testing.assert_array_equal(grown(mask, pixels).numpy(), expected if pixels >= 0 else 1 - (1 - expected))


def test_a_feather_keeps_what_lay_inside() -> None:
    """1 there, falling outwards, 0 further away than it says; half way out, half."""
    mask = torch.zeros(80, 80)
    mask[20:60, 20:60] = 1
    soft = feathered(mask, 12)
    assert bool((soft[20:60, 20:60] == 1).all()) and torch.equal(feathered(mask, 0), mask)
    edge = soft[40, 60:75].tolist()
    assert edge == sorted(edge, reverse=True) and edge[0] > 0.9 and 0.4 < edge[6] < 0.6 and edge[13] == 0
    assert torch.equal(hardened(soft), grown(hardened(soft), 0)) and set(hardened(soft).unique().tolist()) == {0.0, 1.0}
    for wrong in (lambda: grown(mask, 5000), lambda: feathered(mask, -1), lambda: hardened(mask, 2)):
        with pytest.raises(InputError, match=r"growth of a mask|feather of a mask|threshold of a mask"):
            wrong()


def test_outpainting_keeps_every_byte_of_the_picture(pipe: Pipeline) -> None:
    """A photo in the middle of a larger one, on any side; smeared outwards only to begin with."""
    picture, mask = outpainted(PHOTO, left=16, bottom=32)
    assert picture.size == (112, 96) and mask.shape == (96, 112) and float(mask.sum()) == 112 * 96 - 96 * 64
    drawn = pipe.generate("a star", image=picture, mask=mask, steps=2).images[0]
    assert np.array_equal(np.asarray(drawn)[:64, 16:], np.asarray(PHOTO))
    assert not np.array_equal(np.asarray(drawn)[64:], np.asarray(picture)[64:])
    assert np.array_equal(np.asarray(picture)[64, 16:], np.asarray(PHOTO)[63])
    with pytest.raises(InputError, match="be 101x64, no multiples of 16: add 11 more pixels on the left or right"):
        outpainted(PHOTO, right=5)
    with pytest.raises(InputError, match="all of left, top, right and bottom are 0"):
        outpainted(PHOTO)
    with pytest.raises(InputError, match="outpaint top must be"):
        outpainted(PHOTO, top=-16)


def test_a_part_drawn_closely(pipe: Pipeline) -> None:
    """The part has the shape that is drawn, holds the mask and its margin, and changes nothing outside of the mask."""
    photo = Image.effect_noise((400, 300), 90).convert("RGB")
    where = torch.zeros(300, 400)
    where[200:240, 300:320] = 1
    part = Closeup(photo, where, margin=10, size=(96, 64))
    left, top, right, bottom = part.box
    assert left <= 290 and right >= 330 and top <= 190 and bottom >= 250
    assert abs((right - left) / (bottom - top) - 96 / 64) < 0.03
    assert part.picture.size == (96, 64) and part.mask.shape == (64, 96)
    drawn = pipe.generate("a star", image=part.picture, mask=part.mask, steps=2).images[0]
    whole = np.asarray(part.pasted(drawn))
    assert np.array_equal(whole[where.numpy() == 0], np.asarray(photo)[where.numpy() == 0])
    assert not np.array_equal(whole[200:240, 300:320], np.asarray(photo)[200:240, 300:320])
    corner = torch.zeros(300, 400)
    corner[0, 0] = corner[299, 399] = 1
    assert Closeup(photo, corner).box == (0, 0, 400, 300)
    for wrong, said in (((photo, torch.zeros(3, 3)), "the mask is 3x3, the image 400x300"),
                        ((photo, torch.zeros(300, 400)), "black everywhere")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            Closeup(*wrong)
    with pytest.raises(InputError, match="size must be multiples of 16"):
        Closeup(photo, where, size=(100, 100))
