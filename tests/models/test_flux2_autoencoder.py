"""The FLUX.2 autoencoder against outputs of the original release and published key lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from miniflux.errors import InputError
from miniflux.models.autoencoder import (
    Flux2Autoencoder,
    Flux2AutoencoderConfig,
    Normalised,
    Patchified,
    Raw,
    patchified,
    unpatchified,
)
from tests.tiny import randn, shapes

SIZES: dict[str, Any] = {"in_channels": 3, "out_ch": 3, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2, "z_channels": 32}


def load(case: Any) -> Flux2Autoencoder:
    about = {name: x for name, x in case.about["config"].items() if name != "resolution"}
    model = Flux2Autoencoder(Flux2AutoencoderConfig(**about))
    model.load_state_dict(case.weights)
    return model


@torch.inference_mode()
def test_encode_and_decode_equal_the_release(golden) -> None:
    """In both modes of the module: the statistics are those of the file."""
    case = golden("flux2_autoencoder")
    model = load(case)
    for mode in (model.train(), model.eval()):
        assert_close(mode.encode(case["pixels"]), case["latent"], rtol=0, atol=2e-5)
        assert_close(mode(case["pixels"]), case["reconstruction"], rtol=0, atol=2e-5)
        assert_close(mode.decode(case["random_latent"]), case["random_decoded"], rtol=0, atol=2e-5)
    assert torch.equal(model.bn.running_mean, case.weights["bn.running_mean"])  # type: ignore


def test_keys_are_those_of_the_published_file(manifest) -> None:
    with torch.device("meta"):
        model = Flux2Autoencoder(Flux2AutoencoderConfig(ch=128, **SIZES))
    assert shapes(model) == manifest("bfl-flux2-ae")
    assert model.config.downscale == 16


def test_the_small_decoder_is_narrower_and_the_encoder_is_the_same() -> None:
    """FLUX.2-small-decoder: widths 96, 192, 384, 384."""
    with torch.device("meta"):
        whole, small = (Flux2Autoencoder(Flux2AutoencoderConfig(ch=128, decoder_ch=ch, **SIZES)) for ch in (None, 96))
    widths = [level.block[0].conv2.weight.shape[0] for level in small.decoder.up]  # type: ignore
    assert widths == [96, 192, 384, 384] and shapes(small.encoder) == shapes(whole.encoder)


def test_folding_and_normalising_are_undone(golden) -> None:
    model, latent = load(golden("flux2_autoencoder")), Raw(randn(2, 4, 6, 8))
    folded = patchified(latent)
    assert folded.shape == (2, 16, 3, 4) and torch.equal(unpatchified(folded), latent)
    assert_close(model.denormalise(model.normalise(folded)), folded)
    mean, deviation = model.moments()
    assert_close(model.normalise(Patchified(mean + deviation)), Normalised(torch.ones(1, 16, 1, 1)))


def test_sides_that_do_not_fit_are_refused(golden) -> None:
    with pytest.raises(InputError, match="multiples of 4"):
        load(golden("flux2_autoencoder")).encode(torch.zeros(1, 3, 30, 32))
