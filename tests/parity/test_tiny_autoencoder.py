"""The tiny decoder against AutoencoderTiny of diffusers: the same random weights, the same pixels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from miniflux.checkpoints import load_into, to_layout
from miniflux.models.tiny_autoencoder import TinyDecoder, TinyDecoderConfig
from miniflux.variants import FLUX1_TINY, VARIANTS
from tests.tiny import randn, randomise, shapes

diffusers = pytest.importorskip("diffusers")

CONFIGS = {
    "published blocks": replace(FLUX1_TINY, width=8, z_channels=5),
    "nano": VARIANTS["nano-dev"].tiny,
    "one level": TinyDecoderConfig(z_channels=4, out_ch=2, width=6, blocks=(1,)),
}


def peer(config: TinyDecoderConfig):
    widths = (config.width,) * len(config.blocks)
    return diffusers.AutoencoderTiny(
        latent_channels=config.z_channels,
        out_channels=config.out_ch,
        decoder_block_out_channels=widths,
        num_decoder_blocks=config.blocks,
        encoder_block_out_channels=(8, 8, 8, 8),
    )


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_pixels(name: str) -> None:
    """Their whole file loads: the decoder is used, the encoder is named as not needed; pixels are the same."""
    config = CONFIGS[name]
    theirs, ours = randomise(peer(config)), TinyDecoder(config)
    report = load_into(ours, dict(theirs.state_dict()))
    assert report.layout == "diffusers" and all(key.startswith("encoder.") for key in report.redundant)
    latent = 4 * randn(2, config.z_channels, 3, 5)  # beyond the bound as well
    expected = theirs.decode(latent).sample
    assert_close(ours(latent), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    back = to_layout(ours, ours.state_dict(), "diffusers")
    assert all(torch.equal(theirs.state_dict()[key], tensor) for key, tensor in back.items())


def test_full_size() -> None:
    """The published network: keys count up from the convolution after the clamp; 2,458,886 bytes in float16."""
    with torch.device("meta"):
        ours, theirs = TinyDecoder(FLUX1_TINY), diffusers.AutoencoderTiny(latent_channels=16)
    report = load_into(TinyDecoder(FLUX1_TINY).to("meta"), dict(theirs.state_dict()))
    assert len(report.redundant) == sum(key.startswith("encoder.") for key in theirs.state_dict())
    keys = shapes(ours)
    assert keys["1.weight"] == [64, 16, 3, 3] and keys["3.conv.0.weight"] == [64, 64, 3, 3]
    assert keys["7.weight"] == [64, 64, 3, 3] and "7.bias" not in keys and keys["19.weight"] == [3, 64, 3, 3]
    assert 2 * sum(p.numel() for p in ours.parameters()) == 2_458_886
