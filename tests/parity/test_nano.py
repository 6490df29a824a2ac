"""The bundled transformers run in diffusers too, with the same result."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.testing import assert_close

import miniflux
from miniflux.checkpoints import to_layout
from tests.tiny import flux1_inputs


@pytest.mark.parametrize("name", ["nano-dev", "nano-schnell"])
def test_bundled_weights_in_diffusers(name: str) -> None:
    """Real, trained weights through both implementations."""
    ours = miniflux.load(name).transformer
    c = ours.config
    theirs = FluxTransformer2DModel(
        in_channels=c.in_channels,
        num_layers=c.depth,
        num_single_layers=c.depth_single_blocks,
        attention_head_dim=c.hidden_size // c.num_heads,
        num_attention_heads=c.num_heads,
        joint_attention_dim=c.context_in_dim,
        pooled_projection_dim=c.vec_in_dim,
        guidance_embeds=c.guidance_embed,
        axes_dims_rope=tuple(c.axes_dim),
    ).eval()
    theirs.load_state_dict(to_layout(ours, ours.state_dict(), "diffusers"))
    x = flux1_inputs(c)
    with torch.inference_mode():
        found = ours(**x)
        peer = theirs(
            x["img"],
            x["txt"],
            x["y"],
            x["timesteps"],
            x["img_ids"][0],
            x["txt_ids"][0],
            x["guidance"] if c.guidance_embed else None,
            return_dict=False,
        )[0]
    assert_close(found, peer, atol=2e-5, rtol=2e-5)
