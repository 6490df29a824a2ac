"""The convolutional autoencoders between pixels and latents: that of FLUX.1, and that of FLUX.2 and FLUX.3.

Architecture: the KL autoencoder of latent diffusion (arXiv 2112.10752, appendix E), 8 times smaller in each direction
with the published four levels. Source: `flux/modules/autoencoder.py` of the original release; `flux2/autoencoder.py` of
black-forest-labs/flux2, whose latents are folded and normalised. Such a latent has three states, and each has a type,
so that mixing them up is a type error: `Raw`, `Patchified`, and `Normalised`, which is what the transformer sees.
Letters in shapes: B batch, C channels, h w rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NewType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from miniflux.errors import ConfigError, InputError
from miniflux.models.linear import linear


@dataclass(frozen=True, kw_only=True)
class AutoencoderSizes:
    """Sizes of encoder and decoder; field names as in `flux/modules/autoencoder.py` (AutoEncoderParams).

    Attributes:
        in_channels, out_ch: channels of the picture, in and out.
        ch, ch_mult: channels of level i are ch * ch_mult[i]; each level but the last halves rows and columns.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        z_channels: channels of the latent.
        num_groups: groups of the group norms. Each must span several channels, or the norm wipes out flat colours.
    """

    in_channels: int
    ch: int
    out_ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    z_channels: int
    num_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        if not self.ch_mult:
            raise ConfigError("ch_mult () has no level: expected at least one number")
        for mult in (1, *self.ch_mult):  # 1: the first convolution
            if self.ch * mult % self.num_groups:
                raise ConfigError(f"{self.ch * mult} channels do not divide into num_groups {self.num_groups}")

    @property
    def downscale(self) -> int:
        """Pixels per latent row or column."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that `encode` gives."""
        return self.z_channels

    @property
    def patch(self) -> int:
        """Rows and columns of those latents that are one token of the transformer."""
        return 2

    @property
    def unit(self) -> int:
        """Pixels along a side of a token."""
        return self.downscale * self.patch


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(AutoencoderSizes):
    """The FLUX.1 autoencoder.

    Attributes:
        scale_factor, shift_factor: latent = scale_factor * (encoder's mean - shift_factor), about unit variance.
    """

    scale_factor: float
    shift_factor: float


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def lean(x: Tensor) -> bool:
    """Whether a tensor takes the shorter ways below: on CPUs, because GPUs want few large calls; in float32, because
    narrower numbers would round their sums; and where no gradient is wanted, because they overwrite what it needs."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad


def side_by_side(x: Tensor) -> Tensor:
    """(B, C, h, w) with the channels of a place side by side in memory: convolutions read it so without a copy, and 1x1
    convolutions are linears. What is computed from it lies likewise."""
    return x.contiguous(memory_format=torch.channels_last) if lean(x) else x


PIECE = 2**12  # places at a time in `sums`, and
PLACES = 2**9  # in `doubled`: what is made of them stays in the cache


def sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of x (B, C, h, w) the sum and the sum of squares, (B, C) in float64 (which Apple's GPUs lack)."""
    total = square = x.new_zeros(x.shape[:2], dtype=torch.float32 if x.device.type == "mps" else torch.float64)
    for piece in x.split(max(1, PIECE // x.shape[3]), dim=2):
        piece = piece.to(torch.promote_types(piece.dtype, torch.float32))
        total, square = total + piece.sum((2, 3)), square + piece.square().sum((2, 3))
    return total, square


def scale_and_shift(norm: nn.GroupNorm, total: Tensor, square: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """A group norm as x * scale + shift, each (B, C, 1, 1), from the `sums` of every channel over so many places."""
    each = norm.num_channels // norm.num_groups
    mean, squared = (x.unflatten(1, (-1, each)).mean(2).repeat_interleave(each, 1) / places for x in (total, square))
    scale = norm.weight / (squared - mean.square() + norm.eps).sqrt()
    shift = norm.bias - mean * scale
    return scale[..., None, None].to(norm.weight), shift[..., None, None].to(norm.weight)


def normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """A group norm. torch's own adds up float32 one by one where channels lie side by side: of 1024 x 1024 places it is
    8e-5 off."""
    if not lean(x):
        return norm(x)
    scale, shift = scale_and_shift(norm, *sums(x), x.shape[2] * x.shape[3])
    return torch.addcmul(shift, x, scale)


def active(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU of the normalised, in the place of that."""
    return F.silu(normalised(norm, x), inplace=lean(x))


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution: with channels side by side the linear of every place, which torch's convolution overlooks."""
    if not lean(x):
        return conv(x)
    return linear(x.movedim(1, 3), conv.weight.flatten(1), conv.bias).movedim(3, 1)


def doubled(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What a 3x3 convolution makes of x doubled by nearest neighbour, without the doubled tensor and with a quarter of
    its products. x (B, C, h + 2, w) has the rows above and below (zeros at the edge): (B, out, 2h, 2w).

    Of one row, with weights a b c and their sum s: the two places that x[i] becomes are a x[i-1] + (b + c) x[i], which
    is s x[i] - a (x[i] - x[i-1]), and s x[i] + c (x[i+1] - x[i]). These are three products instead of six; in both
    directions nine instead of thirty-six.
    """
    batch, height, width = x.shape[0], x.shape[2] - 2, x.shape[3]
    w = conv.weight.permute(2, 3, 0, 1)  # rows, columns, out, in
    w = torch.stack((w[0], w.sum(0), w[2]))
    w = torch.stack((w[:, 0], w.sum(1), w[:, 2]), 1)
    x = F.pad(x, (1, 1)).movedim(1, 3)
    result = x.new_empty(batch, 2 * height, 2 * width, w.shape[2])
    rows = max(1, PLACES // width)
    for first in range(0, height, rows):
        here = x[:, first : first + rows + 2]
        middle = here[:, 1:-1]
        seen = x.new_empty(3, 3, *middle[:, :, 1:-1].shape)
        for i, row in enumerate((middle - here[:, :-2], middle, here[:, 2:] - middle)):
            seen[i, 1] = middle_ = row[:, :, 1:-1]
            torch.sub(middle_, row[:, :, :-2], out=seen[i, 0])
            torch.sub(row[:, :, 2:], middle_, out=seen[i, 2])
        above, same, below = ([linear(seen[i, j], w[i, j]) for j in range(3)] for i in range(3))
        if conv.bias is not None:
            same[1] += conv.bias
        upper, lower = zip(*((b - a, b.add_(c)) for a, b, c in zip(above, same, below, strict=True)), strict=True)
        for i, row in enumerate((upper, lower)):
            places = result[:, 2 * first + i : 2 * (first + rows) : 2]
            torch.sub(row[1], row[0], out=places[:, :, 0::2])
            torch.add(row[1], row[2], out=places[:, :, 1::2])
    return result.movedim(3, 1)


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice; a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.same_width = in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(active(self.norm1, x))
        h = self.conv2(active(self.norm2, h))
        return h.add_(x if self.same_width else pointwise(self.nin_shortcut, x))  # nobody else has what conv2 made


class AttnBlock(nn.Module):
    """Single-head attention over all positions, in the middle of encoder and decoder."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = normalised(self.norm, x)
        q, k, v = (rearrange(pointwise(conv, normed), "B C h w -> B 1 (h w) C") for conv in (self.q, self.k, self.v))
        # The kernels that never form the scores of all pairs want channels that lie side by side.
        attn = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return x + pointwise(self.proj_out, rearrange(attn, "B 1 (h w) C -> B C h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halve rows and columns with a strided convolution; padded right and below only, as released."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double rows and columns: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if lean(x) and not self.conv.weight.requires_grad:
            return doubled(self.conv, F.pad(x, (0, 0, 1, 1)))
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """The lowest resolution: residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution and, except at the end, the step to the next one."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, groups: int, down: bool = False, up: bool = False
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        if down:
            self.downsample = Downsample(out_channels)
        if up:
            self.upsample = Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            return self.downsample(x)
        if hasattr(self, "upsample"):
            return self.upsample(x)
        return x


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] -> mean and log-variance of the latent, (B, 2 * z_channels, h, w)."""

    def __init__(self, config: AutoencoderSizes) -> None:
        super().__init__()
        groups, widths = config.num_groups, [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            before, last = widths[i - 1] if i else config.ch, i == len(widths) - 1
            self.down.append(Level(before, width, config.num_res_blocks, groups, down=not last))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(side_by_side(x))
        for level in self.down:
            x = level(x)
        return self.ending(self.conv_out(active(self.norm_out, self.mid(x)))).contiguous()

    def ending(self, x: Tensor) -> Tensor:
        """What follows the last convolution: nothing."""
        return x


class Decoder(nn.Module):
    """Latent (B, z_channels, h, w) -> pixels (B, out_ch, H, W). `up[0]` is the highest resolution, so it runs last."""

    def __init__(self, config: AutoencoderSizes) -> None:
        super().__init__()
        groups, widths = config.num_groups, [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            before = width if i == len(widths) - 1 else widths[i + 1]
            self.up.append(Level(before, width, config.num_res_blocks + 1, groups, up=i > 0))
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def beginning(self, z: Tensor) -> Tensor:
        """What the middle gets."""
        return self.conv_in(z)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.beginning(side_by_side(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(active(self.norm_out, x)).contiguous()


Through = Callable[["Encoder | Decoder", Tensor], Tensor]


def run_network(network: Encoder | Decoder, x: Tensor) -> Tensor:
    """Just run it."""
    return network(x)


def check_sides(pixels: Tensor, unit: int) -> None:
    """Raises InputError unless both sides of pixels (..., H, W) are multiples of `unit`."""
    height, width = pixels.shape[-2:]
    if height % unit or width % unit:
        raise InputError(f"a picture of {height}x{width} pixels: sides must be multiples of {unit}")


class Autoencoder(nn.Module):
    """The FLUX.1 autoencoder. Its `state_dict()` has exactly the keys of `ae.safetensors`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor, through: Through = run_network) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], sides multiples of `downscale` -> latent (B, z_channels, h, w).

        Takes the mean of the posterior, so the same picture always gives the same latent.

        Args:
            through: runs the encoder, for those who want to do it in parts (`memory.bands`).

        Raises:
            InputError: a side is not a multiple of `downscale`; the convolutions would cut rows off without a word.
        """
        check_sides(pixels, self.config.downscale)
        mean, _log_variance = through(self.encoder, pixels).chunk(2, dim=1)
        return self.config.scale_factor * (mean - self.config.shift_factor)

    def decode(self, latent: Tensor, through: Through = run_network) -> Tensor:
        """Latent (B, z_channels, h, w) -> pixels (B, 3, H, W), about [-1, 1]; not clamped. `through` as of `encode`."""
        return through(self.decoder, latent / self.config.scale_factor + self.config.shift_factor)

    def forward(self, pixels: Tensor) -> Tensor:
        """There and back."""
        return self.decode(self.encode(pixels))


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

    @property
    def latent_channels(self) -> int:
        """Channels of patchified latents."""
        return FOLD * FOLD * self.z_channels

    @property
    def patch(self) -> int:
        """They are patchified already."""
        return 1


class QuantEncoder(Encoder):
    """An encoder with a 1x1 convolution behind it."""

    def __init__(self, config: AutoencoderSizes) -> None:
        super().__init__(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)

    def ending(self, x: Tensor) -> Tensor:
        return self.quant_conv(x)


class QuantDecoder(Decoder):
    """A decoder with a 1x1 convolution before it."""

    def __init__(self, config: AutoencoderSizes) -> None:
        super().__init__(config)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def beginning(self, z: Tensor) -> Tensor:
        return self.conv_in(self.post_quant_conv(z))


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

    def encode(self, pixels: Tensor, through: Through = run_network) -> Normalised:
        """Pixels (B, 3, H, W) in [-1, 1], sides multiples of `downscale` -> (B, 4 * z_channels, H / 16, W / 16).

        Takes the mean of the posterior, so the same picture always gives the same latent.

        Args:
            through: runs the encoder, for those who want to do it in parts (`memory.bands`).

        Raises:
            InputError: a side is not a multiple of `downscale`; the convolutions would cut rows off without a word.
        """
        check_sides(pixels, self.config.downscale)
        mean, _log_variance = through(self.encoder, pixels).chunk(2, dim=1)
        return self.normalise(patchified(Raw(mean)))

    def decode(self, latent: Normalised, through: Through = run_network) -> Tensor:
        """(B, 4 * z_channels, h, w) -> pixels (B, 3, H, W), about [-1, 1]; not clamped. `through`: as of `encode`."""
        return through(self.decoder, unpatchified(self.denormalise(latent)))

    def forward(self, pixels: Tensor) -> Tensor:
        """There and back."""
        return self.decode(self.encode(pixels))


def patchified(latent: Raw) -> Patchified:
    """2x2 places folded into channels."""
    return Patchified(rearrange(latent, "B C (h py) (w px) -> B (C py px) h w", py=FOLD, px=FOLD))


def unpatchified(latent: Patchified) -> Raw:
    """The inverse of `patchified`."""
    return Raw(rearrange(latent, "B (C py px) h w -> B C (h py) (w px)", py=FOLD, px=FOLD))
