"""The autoencoder of FLUX.2 and FLUX.3: that of FLUX.1 with more channels, whose latents are folded and normalised.

A latent has three states, and each has a type, so that mixing them up is a type error: `Raw` as the encoder's mean
gives it; `Patchified`, 2x2 places folded into channels; `Normalised`, with the statistics that the file holds, which is
what the transformer sees. Source: `flux2/autoencoder.py` of the original release (black-forest-labs/flux2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NewType

from einops import rearrange
from torch import Tensor, nn

from miniflux.errors import InputError
from miniflux.models.autoencoder import AutoencoderSizes, Decoder, Encoder

Raw = NewType("Raw", Tensor)
"""The encoder's mean, (B, z_channels, h, w)."""
Patchified = NewType("Patchified", Tensor)
"""(B, 4 * z_channels, h / 2, w / 2); channel (c, row, column) of a place."""
Normalised = NewType("Normalised", Tensor)
"""Patchified, each channel with mean 0 and variance 1 over the pictures that the model learned."""

FOLD = 2
EPS = 1e-4  # beside the variances that the file holds


@dataclass(frozen=True, kw_only=True)
class Flux2AutoencoderConfig(AutoencoderSizes):
    """The FLUX.2 autoencoder.

    Attributes:
        decoder_ch: `ch` of the decoder, where it is another (the small decoder); None if it is the same.
    """

    decoder_ch: int | None = None

    @property
    def downscale(self) -> int:
        """Pixels per row or column of patchified latents."""
        return FOLD * super().downscale


class QuantEncoder(Encoder):
    """An encoder with a 1x1 convolution behind it."""

    def __init__(self, config: AutoencoderSizes) -> None:
        super().__init__(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_conv(super().forward(x))


class QuantDecoder(Decoder):
    """A decoder with a 1x1 convolution before it."""

    def __init__(self, config: AutoencoderSizes) -> None:
        super().__init__(config)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(self.post_quant_conv(z))


class Flux2Autoencoder(nn.Module):
    """The FLUX.2 autoencoder. Its `state_dict()` has exactly the keys of the published file."""

    def __init__(self, config: Flux2AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = QuantEncoder(config)
        self.decoder = QuantDecoder(replace(config, ch=config.decoder_ch or config.ch))
        # Holds the statistics; they are applied below, in float32, whatever mode the module is in.
        self.bn = nn.BatchNorm2d(FOLD * FOLD * config.z_channels, eps=EPS, affine=False)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every patchified channel, (1, C, 1, 1)."""
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None and variance is not None
        return mean[None, :, None, None], (variance + EPS).sqrt()[None, :, None, None]

    def normalise(self, latent: Patchified) -> Normalised:
        mean, deviation = self.moments()
        return Normalised((latent - mean.to(latent)) / deviation.to(latent))

    def denormalise(self, latent: Normalised) -> Patchified:
        mean, deviation = self.moments()
        return Patchified(latent * deviation.to(latent) + mean.to(latent))

    def encode(self, pixels: Tensor) -> Normalised:
        """Pixels (B, 3, H, W) in [-1, 1], sides multiples of `downscale` -> (B, 4 * z_channels, H / 16, W / 16).

        Takes the mean of the posterior, so the same picture always gives the same latent.

        Raises:
            InputError: a side is not a multiple of `downscale`; the convolutions would cut rows off without a word.
        """
        (height, width), unit = pixels.shape[-2:], self.config.downscale
        if height % unit or width % unit:
            raise InputError(f"a picture of {height}x{width} pixels: sides must be multiples of {unit}")
        mean, _log_variance = self.encoder(pixels).chunk(2, dim=1)
        return self.normalise(patchified(Raw(mean)))

    def decode(self, latent: Normalised) -> Tensor:
        """(B, 4 * z_channels, h, w) -> pixels (B, 3, H, W), about [-1, 1]; not clamped."""
        return self.decoder(unpatchified(self.denormalise(latent)))

    def forward(self, pixels: Tensor) -> Tensor:
        """There and back."""
        return self.decode(self.encode(pixels))


def patchified(latent: Raw) -> Patchified:
    """2x2 places folded into channels."""
    return Patchified(rearrange(latent, "B C (h py) (w px) -> B (C py px) h w", py=FOLD, px=FOLD))


def unpatchified(latent: Patchified) -> Raw:
    """The inverse of `patchified`."""
    return Raw(rearrange(latent, "B (C py px) h w -> B C (h py) (w px)", py=FOLD, px=FOLD))
