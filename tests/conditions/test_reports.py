"""What users of other programs reported of FLUX.2's references and guidance, asked here: each test names the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from miniflux.conditions import Reference
from miniflux.pipeline import Pipeline
from miniflux.plan import Plan
from miniflux.sampling import guide
from miniflux.testing import tiny

SMALL: dict[str, Any] = {"steps": 2, "width": 64, "height": 64}


def photo(width: int, height: int, seed: int = 0, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze())


@pytest.fixture(scope="module")
def klein() -> Pipeline:
    return tiny("flux2-klein-4b")


@pytest.mark.parametrize("once", [False, True])
def test_a_part_is_drawn_anew_beside_references(klein: Pipeline, once: bool) -> None:
    """InvokeAI#8796, utensils/mold#1572: a mask and references together failed, or were refused."""
    mask = torch.zeros(64, 64)
    mask[16:48, 16:48] = 1
    image = photo(64, 64)
    seen = [Reference(photo(70, 66, 1), once=once), Reference(photo(66, 90, 2), index=2, once=once)]
    made = klein.generate("a", image=image, mask=mask, strength=0.8, conditions=seen, steps=4)
    other = klein.generate("a", image=image, mask=mask, strength=0.8, steps=4)
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(made.images[0])[kept], np.asarray(image)[kept])
    assert not torch.equal(made.latents, other.latents)


def test_references_of_any_size(klein: Pipeline) -> None:
    """sglang#17302: 504x512 was no multiple of 16, and the server went down. Also grey, transparent, of another size
    than the picture."""
    for picture in (photo(63 * 2, 64), photo(71, 93, channels=1), photo(65, 64, channels=4)):
        made = klein.generate("a", conditions=[Reference(picture)], **SMALL)
        assert made.images[0].size == (64, 64) and torch.isfinite(made.latents).all()


def test_as_many_pictures_as_were_asked_for(klein: Pipeline) -> None:
    """diffusers#13350: 7 prompts with a reference gave 28 pictures; forge-classic#775: of several pictures only the
    first saw it."""
    seen = [Reference(photo(64, 64))]
    many = klein.generate(["a", "b"], images=2, conditions=seen, seed=5, **SMALL)
    assert len(many.images) == len(many.latents) == 4
    for i, prompt in enumerate(("a", "a", "b", "b")):
        alone = klein.generate(prompt, conditions=seen, seed=5 + i, **SMALL)
        assert torch.equal(alone.latents[0], many.latents[i])


def test_references_keep_their_shape(klein: Pipeline) -> None:
    """mflux#518, koboldcpp#2001: they were brought to the size of the picture that is drawn, or to 512x512."""
    wide, plan = Reference(photo(160, 64)), klein.variant
    for size in ((64, 64), (64, 160), (160, 64)):
        (seen,) = Plan.of(plan, "a", conditions=[wide], width=size[0], height=size[1]).conditions
        assert isinstance(seen, Reference) and seen.shown_at == (160, 64)
        assert np.array_equal(np.asarray(seen.picture), np.asarray(wide.picture))


def test_the_order_of_references_counts(klein: Pipeline) -> None:
    """InvokeAI#8923: "image 1" of a prompt was not the first one. Here the index says it, not the place in the list."""
    one, two = photo(64, 64, 1), photo(64, 64, 2)
    first = klein.generate("a", conditions=[Reference(one), Reference(two, index=2)], **SMALL)
    other = klein.generate("a", conditions=[Reference(two), Reference(one, index=2)], **SMALL)
    turned = klein.generate("a", conditions=[Reference(two, index=2), Reference(one)], **SMALL)
    assert not torch.equal(first.latents, other.latents)
    assert torch.allclose(first.latents, turned.latents, atol=1e-4)


def test_many_references(klein: Pipeline) -> None:
    """ComfyUI#10905: their memory was not counted. Here the plan has every token of ten of them."""
    seen = [Reference(photo(80, 64, i), index=i + 1) for i in range(10)]
    plan = Plan.of(klein.variant, "a", conditions=seen, width=64, height=64)
    assert plan.needs().more_tokens == 10 * 5 * 4
    assert torch.isfinite(klein.generate("a", conditions=seen, **SMALL).latents).all()


def test_guidance_reaches_flux2_dev() -> None:
    """vllm-omni#2433: whatever was asked for, the network was told None."""
    pipe = tiny("flux2-dev")
    made = [pipe.generate("a", guidance=strength, **SMALL) for strength in (None, 4.0, 1.0)]
    assert torch.equal(made[0].latents, made[1].latents) and not torch.equal(made[1].latents, made[2].latents)


@pytest.mark.parametrize("name", ["flux2-klein-4b", "flux3-klein"])
def test_distilled_models_take_a_second_text(name: str) -> None:
    """mflux#421: guidance by a second text was refused for models without "base" in their names. Here it is not their
    usual way, and they are drawn with it if somebody asks."""
    pipe = tiny(name)
    seen = [Reference(photo(64, 64))]
    plain = pipe.generate("a", conditions=seen, **SMALL)
    assert plain.settings[0]["guide"] is None
    guided = pipe.generate("a", conditions=seen, guide=guide("cfg", scale=2), negative="b", **SMALL)
    assert not torch.equal(guided.latents, plain.latents)
