"""Flux1 against FluxTransformer2DModel of diffusers: the same random weights, the same velocity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.parity.peers import flux1_pair
from tests.tiny import FLUX1, flux1_inputs

VARIANTS = {
    "dev": FLUX1,
    "schnell": replace(FLUX1, guidance_embed=False),
    "fill": replace(FLUX1, in_channels=96),
    "deep": replace(FLUX1, hidden_size=48, num_heads=3, axes_dim=(2, 8, 6), depth=1, depth_single_blocks=4),
    "wide": replace(FLUX1, hidden_size=24, num_heads=1, axes_dim=(8, 12, 4), depth=3, depth_single_blocks=1),
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_velocity(name: str) -> None:
    """Every weight has its place and every operation its order."""
    config = VARIANTS[name]
    reference, model = flux1_pair(config)
    inputs = flux1_inputs(config)
    expected = reference(
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["y"],
        timestep=inputs["timesteps"],
        img_ids=inputs["img_ids"][0],
        txt_ids=inputs["txt_ids"][0],
        guidance=inputs["guidance"] if config.guidance_embed else None,
        return_dict=False,
    )[0]
    assert_close(model(**inputs), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
