"""Inpainting, control pictures and references against the pipelines of diffusers: the same latents from the same noise.

Theirs draw a sample of the autoencoder's posterior where ours, as the release, take its mean: so theirs get the mean.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders import vae as their_vae
from PIL import Image

import miniflux
from miniflux.conditions import Control, Reference
from miniflux.errors import InputError
from miniflux.sampling import initial_noise, pack
from tests.parity.peers import autoencoder_pair, clip_pair, diffusers, flux1_pair, t5_pair
from tests.parity.test_pipeline import CLIP_SIZES, HEIGHT, LENGTH, LEVELS, PROMPT, SHIFT, SIZES, STEPS, T5_SIZES, WIDTH
from tests.parity.test_pipeline import tokenizers as tokenizers

PHOTO = Image.effect_noise((WIDTH, HEIGHT), 90).convert("RGB")
OTHER = Image.effect_noise((WIDTH, HEIGHT), 50).convert("RGB")
GUIDANCE = 2.5


@pytest.fixture(autouse=True)
def mean_of_the_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(their_vae.DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)


def models(channels: int, folder: Path) -> tuple[dict[str, Any], miniflux.Pipeline]:
    """Random networks of diffusers, with a transformer that reads so many channels, and ours from their files."""
    plain = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **SHIFT),
        vae=autoencoder_pair(LEVELS)[0],
        text_encoder=clip_pair(CLIP_SIZES)[0],
        text_encoder_2=t5_pair(T5_SIZES)[0],
        **tokenizers(),
        transformer=flux1_pair(replace(SIZES, guidance_embed=True, in_channels=channels))[0],
    )
    plain.save_pretrained(folder)
    parts = {
        name: part for name, part in plain.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    return parts, miniflux.load(folder, device="cpu")


def theirs(pipe: Any, **options: Any) -> torch.Tensor:
    """The latents after their last step, from our noise."""
    pipe.set_progress_bar_config(disable=True)
    steps: list[torch.Tensor] = []
    size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "max_sequence_length": LENGTH}
    noise = {"latents": pack(initial_noise(HEIGHT, WIDTH, 3))}
    seen = lambda _pipe, _i, _t, kept: steps.append(kept["latents"]) or {}  # noqa: E731
    told = {**size, **noise, "guidance_scale": GUIDANCE, "output_type": "latent", "callback_on_step_end": seen}
    pipe(**{"prompt": PROMPT, **told, **options})
    return steps[-1]


def ours(pipe: miniflux.Pipeline, **options: Any) -> torch.Tensor:
    size = {"width": WIDTH, "height": HEIGHT, "steps": STEPS, "t5_length": LENGTH, "guidance": GUIDANCE}
    return pack(pipe.generate(PROMPT, seed=3, **{**size, **options}).latents)


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


def test_inpainting(tmp_path: Path) -> None:
    """A hard mask along whole places of the latent; theirs leaves the last step to the network, ours puts back."""
    parts, pipe = models(64, tmp_path)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[16:, 32:] = 255
    expected = theirs(
        diffusers.FluxInpaintPipeline(**parts),
        image=PHOTO,
        mask_image=Image.fromarray(mask),
        strength=1.0,
        latents=initial_noise(HEIGHT, WIDTH, 3),
    )
    assert_same(ours(pipe, image=PHOTO, mask=Image.fromarray(mask)), expected)


def test_fill(tmp_path: Path) -> None:
    """A Fill network: the same call as inpainting with any other, which then says what is there by channels."""
    parts, pipe = models(384, tmp_path)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[13:40, 21:] = 255
    told = {"image": PHOTO, "mask_image": Image.fromarray(mask)}
    expected = theirs(diffusers.FluxFillPipeline(**parts), **told)
    assert_same(ours(pipe, image=PHOTO, mask=Image.fromarray(mask)), expected)
    pixels = pipe.generate(PROMPT, steps=1, image=PHOTO, mask=Image.fromarray(mask), t5_length=LENGTH).images[0]
    assert np.array_equal(np.asarray(pixels)[mask == 0], np.asarray(PHOTO)[mask == 0])
    with pytest.raises(InputError, match="this is a Fill model: it completes pictures"):
        pipe.generate(PROMPT, steps=1)


# Pipeline of diffusers, its module, channels that the network reads, what both are told beside the picture.
OVER_A_PICTURE = {
    "img2img": ("FluxImg2ImgPipeline", "img2img", 64, {}, ()),
    "inpaint": ("FluxInpaintPipeline", "inpaint", 64, {}, ("mask",)),
    "control, img2img": ("FluxControlImg2ImgPipeline", "control_img2img", 128, {"control_image": OTHER}, ("control",)),
    "control, inpaint": ("FluxControlInpaintPipeline", "control_inpaint", 128, {"control_image": OTHER},
                         ("control", "mask")),
    "kontext, inpaint": ("FluxKontextInpaintPipeline", "kontext_inpaint", 64,
                         {"_auto_resize": False, "max_area": WIDTH * HEIGHT}, ("reference", "mask")),
}  # fmt: skip


@pytest.mark.parametrize("strength", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("name", OVER_A_PICTURE)
def test_strengths(name: str, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture changed in part, with noise from our seed where theirs would draw its own."""
    kind, module, channels, told, with_what = OVER_A_PICTURE[name]
    parts, pipe = models(channels, tmp_path)
    their_module = import_module(f"diffusers.pipelines.flux.pipeline_flux_{module}")
    monkeypatch.setattr(their_module, "randn_tensor", lambda *_, **__: initial_noise(HEIGHT, WIDTH, 3))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[16:, 32:] = 255
    masked = {"mask_image": Image.fromarray(mask)} if "mask" in with_what else {}
    expected = theirs(getattr(diffusers, kind)(**parts), image=PHOTO, strength=strength, latents=None, **masked, **told)
    conditions = [*([Control(OTHER)] if "control" in with_what else []),
                  *([Reference(PHOTO)] if "reference" in with_what else [])]  # fmt: skip
    given = {"mask": Image.fromarray(mask)} if "mask" in with_what else {}
    assert_same(ours(pipe, image=PHOTO, strength=strength, conditions=conditions, **given), expected)


def test_control_pictures(tmp_path: Path) -> None:
    parts, pipe = models(128, tmp_path)
    expected = theirs(diffusers.FluxControlPipeline(**parts), control_image=PHOTO)
    assert_same(ours(pipe, conditions=[Control(PHOTO)]), expected)


def test_references(tmp_path: Path) -> None:
    parts, pipe = models(64, tmp_path)
    expected = theirs(diffusers.FluxKontextPipeline(**parts), image=PHOTO, _auto_resize=False, max_area=WIDTH * HEIGHT)
    assert_same(ours(pipe, conditions=[Reference(PHOTO)]), expected)
