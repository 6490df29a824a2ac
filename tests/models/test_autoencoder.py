"""The autoencoder against outputs of the original release, the published key list and closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from miniflux.checkpoints import save
from miniflux.errors import ConfigError, InputError
from miniflux.models import autoencoder
from miniflux.models.autoencoder import Autoencoder, AutoencoderConfig, Upsample, normalised, pointwise, side_by_side
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


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 5),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    places=st.sampled_from([1, 8, 512]),
)
def test_doubling_with_a_quarter_of_the_products(
    batch: int, channels: int, height: int, width: int, places: int
) -> None:
    """It is the convolution of the doubled tensor, of which the plain way is taken in float64."""
    upsample = Upsample(channels)
    x = torch.randn(batch, channels, height, width)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(autoencoder, "PLACES", places)
        found = upsample(x)
    enlarged = x.repeat_interleave(2, 2).repeat_interleave(2, 3).double()
    weight, bias = upsample.conv.weight.detach().double(), upsample.conv.bias
    assert bias is not None
    assert_close(found, F.conv2d(enlarged, weight, bias.detach().double(), padding=1).float(), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_norms_of_many_places_are_exact() -> None:
    """As exact with the channels of a place side by side as otherwise, where torch's own is a hundred times less so."""
    norm = nn.GroupNorm(4, 8, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 512, 512) + 3
    expected = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), eps=1e-6).float()
    found = normalised(norm, side_by_side(x))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, expected, atol=2e-6, rtol=0)


@torch.inference_mode()
def test_a_convolution_of_one_place_is_a_linear() -> None:
    conv, x = nn.Conv2d(6, 5, 1), torch.randn(2, 6, 3, 4)
    assert_close(pointwise(conv, x), conv(x))


def test_ways_of_inference_are_those_of_training(model: Autoencoder) -> None:
    """Where autograd records, every operation is torch's own; the results are the same, and in whatever order in memory
    the input lies, the output lies as everybody expects."""
    pixels = randn(2, 3, 16, 24)
    recorded = model(pixels)
    with torch.inference_mode():
        found = model(pixels)
        assert torch.equal(model(pixels.contiguous(memory_format=torch.channels_last)), found)
    assert_close(found, recorded.detach(), rtol=0, atol=1e-5)
    assert found.is_contiguous() and recorded.is_contiguous()
    recorded.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    model.zero_grad()


def test_gradients_are_those_of_numbers() -> None:
    """What is added in place and activated in place must not spoil what autograd remembers."""
    tiny = replace(AUTOENCODER, ch=4, ch_mult=(1, 2), z_channels=1, num_groups=2)
    model = randomise(Autoencoder(tiny)).double().requires_grad_(False)
    pixels = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (pixels,))


def test_working_leaves_the_weights_and_their_file_as_they_were(tmp_path: Path) -> None:
    """The order in memory is that of what flows through; a file of the weights knows nothing of it."""
    model = randomise(Autoencoder(AUTOENCODER))
    save(model, tmp_path / "before.safetensors")
    with torch.inference_mode():
        model(randn(1, 3, 16, 16))
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    save(model, tmp_path / "after.safetensors")
    assert (tmp_path / "after.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()
