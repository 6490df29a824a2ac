"""The tiny decoder for previews: a few plain convolutions that stand in for the autoencoder's decoder.

Architecture and keys: TAESD (https://github.com/madebyollin/taesd, `taesd.py`), whose file for the latents of FLUX.1 is
`taef1_decoder.safetensors`; diffusers calls the network `AutoencoderTiny`.
Letters in shapes: B batch, C channels, h w rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniflux.errors import ConfigError

BOUND = 3.0  # of what the decoder sees: latents are bent to stay within


@dataclass(frozen=True, kw_only=True)
class TinyDecoderConfig:
    """Sizes of a tiny decoder.

    Attributes:
        z_channels: channels of the latent.
        out_ch: channels of the picture.
        width: channels in between, the same everywhere.
        blocks: residual blocks per level, the smallest first; each level but the last doubles rows and columns.
    """

    z_channels: int
    out_ch: int
    width: int
    blocks: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks or min(self.blocks) < 0:
            raise ConfigError(f"blocks must be numbers of at least 0, one per level, got {self.blocks!r}")

    @property
    def upscale(self) -> int:
        """Rows and columns of the picture per latent row or column."""
        return 2 ** (len(self.blocks) - 1)


class Clamp(nn.Module):
    """A soft bound: the identity near 0, never beyond `BOUND`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / BOUND) * BOUND


class Block(nn.Module):
    """Three convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def _conv(before: int, after: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=bias)


class TinyDecoder(nn.Sequential):
    """Latent (B, z_channels, h, w), as the transformer knows it, -> pixels (B, out_ch, h * upscale, w * upscale), about
    [-1, 1]; not clamped. Its `state_dict()` has exactly the keys of `taef1_decoder.safetensors`."""

    def __init__(self, config: TinyDecoderConfig) -> None:
        layers: list[nn.Module] = [Clamp(), _conv(config.z_channels, config.width), nn.ReLU()]
        for blocks in config.blocks[:-1]:
            layers += [Block(config.width) for _ in range(blocks)]
            layers += [nn.Upsample(scale_factor=2), _conv(config.width, config.width, bias=False)]
        layers += [Block(config.width) for _ in range(config.blocks[-1])]
        layers.append(_conv(config.width, config.out_ch))
        super().__init__(*layers)
        self.config = config

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input) - 1  # the layers give [0, 1]
