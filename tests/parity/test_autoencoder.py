"""Autoencoder against AutoencoderKL of diffusers: the same random weights, the same latents and pixels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.parity.peers import autoencoder_pair
from tests.tiny import AUTOENCODER, randn

VARIANTS = {
    "tiny": AUTOENCODER,
    "four levels": replace(AUTOENCODER, ch_mult=(1, 2, 4, 4), num_res_blocks=2),
    "one level": replace(AUTOENCODER, ch_mult=(1,), num_groups=2, z_channels=3, scale_factor=2.0, shift_factor=-0.5),
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_latents_and_pixels(name: str) -> None:
    """Both directions, with the scale and shift that the pipeline of diffusers applies around them."""
    config = VARIANTS[name]
    reference, model = autoencoder_pair(config)
    pixels, latent = randn(2, 3, 16, 24).clamp(-1, 1), randn(2, config.z_channels, 3, 2)
    expected = (reference.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scale_factor
    assert_close(model.encode(pixels), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    expected = reference.decode(latent / config.scale_factor + config.shift_factor).sample
    assert_close(model.decode(latent), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
