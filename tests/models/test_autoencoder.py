"""The autoencoder against outputs of the original release, the published key list and closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from miniflux.errors import ConfigError, InputError
from miniflux.models.autoencoder import Autoencoder, AutoencoderConfig
from tests.tiny import AUTOENCODER, randn, randomise, shapes


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    return randomise(Autoencoder(AUTOENCODER))


def config(params: dict) -> AutoencoderConfig:
    return AutoencoderConfig(**{k: v for k, v in params.items() if k != "resolution"})  # nobody reads `resolution`


@torch.inference_mode()
def test_encode_and_decode_equal_the_release(golden) -> None:
    """Latent, posterior moments, reconstruction, and a decoded latent of odd size."""
    case = golden("flux1_autoencoder")
    model = Autoencoder(config(case.about["config"]))
    model.load_state_dict(case.weights)
    assert_close(model.encoder(case["pixels"]), case["moments"], rtol=0, atol=2e-5)
    assert_close(model.encode(case["pixels"]), case["latent"], rtol=0, atol=2e-5)
    assert_close(model.decode(case["latent"]), case["reconstruction"], rtol=0, atol=2e-5)
    assert_close(model(case["pixels"]), case["reconstruction"], rtol=0, atol=2e-5)
    assert_close(model.decode(case["random_latent"]), case["random_decoded"], rtol=0, atol=2e-5)


def test_keys_are_those_of_the_published_file(published, manifest) -> None:
    """A renamed attribute or a wrong width would make `ae.safetensors` unloadable."""
    with torch.device("meta"):
        model = Autoencoder(config(published["vae"]["flux1-ae"]["params"]))
    assert shapes(model) == manifest("bfl-flux1-ae")


@pytest.mark.parametrize(("mult", "factor"), [((1,), 1), ((1, 2), 2), ((1, 2, 4, 4), 8)])
@torch.inference_mode()
def test_downscale(mult: tuple[int, ...], factor: int) -> None:
    """Every level but the last halves the sides, and the decoder doubles them again."""
    model = randomise(Autoencoder(replace(AUTOENCODER, ch_mult=mult)))
    assert model.config.downscale == factor
    latent = model.encode(randn(1, 3, 16, 24))
    assert latent.shape == (1, 4, 16 // factor, 24 // factor)
    assert model.decode(latent).shape == (1, 3, 16, 24)


@torch.inference_mode()
def test_latent_is_the_scaled_mean(model: Autoencoder) -> None:
    """encode = scale * (mean - shift): deterministic, and blind to the log-variance."""
    pixels = randn(2, 3, 8, 12)
    mean = model.encoder(pixels)[:, :4]
    latent = model.encode(pixels)
    assert_close(latent, (mean - 0.1159) * 0.3611)
    assert torch.equal(model.encode(pixels), latent)
    assert_close(model.decode(latent), model.decoder(mean), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_picture_of_a_batch_equals_it_alone(model: Autoencoder) -> None:
    """Group norms and attention must not look across the batch."""
    pixels = randn(2, 3, 8, 8)
    latents = model.encode(pixels)
    assert_close(latents[1:], model.encode(pixels[1:]), rtol=0, atol=1e-5)
    assert_close(model.decode(latents)[1:], model.decode(latents[1:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(8, 10), (9, 8), (2, 8)])
def test_encode_refuses_sizes_that_do_not_divide(model: Autoencoder, height: int, width: int) -> None:
    """The strided convolutions would cut rows off without a word."""
    with pytest.raises(InputError, match=f"{height}x{width}.*multiples of 4"):
        model.encode(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 3}, "8 channels do not divide into num_groups 3"),
        ({"ch_mult": (1, 2), "ch": 6}, "6 channels do not divide into num_groups 4"),
        ({"ch_mult": (2, 4), "ch": 6}, "6 channels do not divide into num_groups 4"),  # the first convolution
        ({"ch_mult": ()}, r"ch_mult \(\)"),
    ],
)
def test_config_refuses_contradictions(change: dict, message: str) -> None:
    """The message names the value and what was expected."""
    with pytest.raises(ConfigError, match=message):
        replace(AUTOENCODER, **change)


def test_config_from_lists_is_hashable() -> None:
    """Configs read from JSON hold lists; the frozen config must not."""
    assert hash(replace(AUTOENCODER, ch_mult=[1, 2, 2])) == hash(AUTOENCODER)
