"""Large pictures through an autoencoder band by band: the same result, in less memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from miniflux.memory import bands
from miniflux.models import autoencoder
from miniflux.models.autoencoder import Autoencoder, Flux2Autoencoder, Flux2AutoencoderConfig
from miniflux.variants import VARIANTS
from tests.tiny import AUTOENCODER, randomise

FLUX2 = Flux2AutoencoderConfig(
    in_channels=3, ch=8, out_ch=3, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, num_groups=4, decoder_ch=4
)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    band=st.sampled_from([1, 64, 200, 1000]),
    levels=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4),
    batch=st.integers(1, 2),
)
def test_bands_change_nothing_but_rounding(height: int, width: int, band: int, levels: list[int], batch: int) -> None:
    """Any number of levels, any widths, bands that end anywhere: decoder and encoder, norms over the whole picture."""
    network = randomise(Autoencoder(replace(AUTOENCODER, ch_mult=levels)))
    latent = torch.randn(batch, AUTOENCODER.z_channels, height, width)
    side = 2 ** (len(levels) - 1)
    pixels = torch.randn(batch, 3, height * side, width * side)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(bands, "BAND", band)
        assert_close(bands.decoded(network.decoder, latent), network.decoder(latent), atol=2e-5, rtol=1e-5)
        assert_close(bands.encoded(network.encoder, pixels), network.encoder(pixels), atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_bands_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is rounded there is no difference; float64 takes the same ways as devices other than CPUs."""
    network = randomise(Autoencoder(AUTOENCODER)).double()
    pixels = torch.randn(2, 3, 24, 20, dtype=torch.float64)
    monkeypatch.setattr(bands, "WHOLE", 0)
    for band in (1, 60, 200):
        monkeypatch.setattr(bands, "BAND", band)
        latent = network.encode(pixels, bands.through)
        assert_close(latent, network.encode(pixels), atol=1e-11, rtol=0)
        assert_close(network.decode(latent, bands.through), network.decode(latent), atol=1e-11, rtol=0)


def test_the_autoencoder_of_flux2(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its convolutions of 1x1 at both ends, and a narrower decoder; what is small goes through at once."""
    network = randomise(Flux2Autoencoder(FLUX2))
    pixels = torch.rand(1, 3, 48, 80) * 2 - 1
    with torch.inference_mode():
        latent = network.encode(pixels)
        whole = network.decode(latent)
        assert torch.equal(network.decode(latent, bands.through), whole)
        monkeypatch.setattr(bands, "WHOLE", 100)
        monkeypatch.setattr(bands, "BAND", 300)
        assert_close(network.encode(pixels, bands.through), latent, atol=2e-5, rtol=1e-5)
        found = network.decode(latent, bands.through)
    assert_close(found, whole, atol=2e-5, rtol=1e-5)
    assert not torch.equal(found, whole)  # the bands were at work


def test_the_ledger_knows_of_bands() -> None:
    """Four megapixels by the official autoencoders take less than 6 GiB with everything."""
    for name in ("flux1-dev", "flux2-dev"):
        config = VARIANTS[name].autoencoder
        assert (
            2 * 128 * 2048**2 * 4 < bands.activations(config, 2048 * 2048, 4) < 6.2e9
        )  # two tensors of the last level


@torch.inference_mode()
def test_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions make as many numbers as they do of the whole."""
    network = randomise(Autoencoder(AUTOENCODER))
    latent, pixels = torch.randn(1, AUTOENCODER.z_channels, 7, 5), torch.randn(1, 3, 24, 20)
    monkeypatch.setattr(bands, "BAND", 60)
    made: list[int] = []

    def counted(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*arguments: Any, **named: Any) -> torch.Tensor:
            result = function(*arguments, **named)
            made.append(result.numel())
            return result

        return call

    monkeypatch.setattr(torch.nn.functional, "conv2d", counted(torch.nn.functional.conv2d))
    for room in (bands, autoencoder):
        monkeypatch.setattr(room, "doubled", counted(autoencoder.doubled))
        monkeypatch.setattr(room, "pointwise", counted(autoencoder.pointwise))
    for in_bands, whole, x in (
        (bands.decoded, network.decoder, latent),
        (bands.encoded, network.encoder, pixels),
    ):
        made.clear()
        whole(x)
        calls, expected = len(made), sum(made)
        made.clear()
        in_bands(cast(Any, whole), x)
        assert sum(made) == expected and len(made) > calls


MEASURE = """
import sys, torch
from miniflux.checkpoints.loading import bare
from miniflux.memory import bands
from miniflux.memory.ledger import peak_size
from miniflux.models.autoencoder import Autoencoder, AutoencoderConfig
torch.set_num_threads(1)
config = AutoencoderConfig(in_channels=3, ch=32, out_ch=3, ch_mult=(1, 2, 2, 2), num_res_blocks=1, z_channels=4,
    scale_factor=1.0, shift_factor=0.0, num_groups=4)
network = Autoencoder(config).requires_grad_(False)
latent = torch.randn(1, 4, 96, 96)
bands.BAND = 2**14
bands.WHOLE = 10**9 if sys.argv[1] == "whole" else 0
with torch.inference_mode():
    network.decode(latent[..., :16, :16])
    before = peak_size()
    network.decode(latent, bands.through)
print(peak_size() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_less_memory() -> None:
    """Peaks of whole processes: of 768 x 768 pixels of 32 channels, 75 MB each."""

    def peak(how: str) -> int:
        told = subprocess.run([sys.executable, "-c", MEASURE, how], check=True, capture_output=True, text=True)
        return int(told.stdout)

    assert peak("bands") < 0.65 * peak("whole")
