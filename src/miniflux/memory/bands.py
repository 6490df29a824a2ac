"""Large pictures through an autoencoder in bounded memory: layer by layer, a band of rows at a time.

Tiles that are decoded by themselves and blended are another picture, because group norms look at all of it. Here every
norm gets the statistics of the whole: they are summed up over the bands first. Between those passes a layer runs over
the bands as they come, each convolution a row behind what it reads, so that it can write over what it has read. Beside
weights and bands, two tensors of the size of the largest layer's output are in memory; what the last doubling of rows
and columns makes is never held whole, but made band by band when asked for. The result differs by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniflux.models.autoencoder import (
    AutoencoderSizes,
    Decoder,
    Encoder,
    ResnetBlock,
    Upsample,
    doubled,
    lean,
    pointwise,
    scale_and_shift,
    side_by_side,
    sums,
)

WHOLE = 2**18  # pixels up to which a picture goes through at once: 512 x 512. Larger ones are as fast in bands
BAND = 2**14  # pixels of a band, about


def through(network: Encoder | Decoder, x: Tensor) -> Tensor:
    """What `network(x)` is: in bands, if the picture is large."""
    grows = isinstance(network, Decoder)
    pixels = x.shape[-2] * x.shape[-1] * (4 ** (len(network.up) - 1) if grows else 1)
    if pixels <= WHOLE:
        return network(x)
    return decoded(network, x) if isinstance(network, Decoder) else encoded(network, x)


def activations(config: AutoencoderSizes, pixels: int, itemsize: int) -> int:
    """Bytes at the worst moment of decoding a large picture: two tensors of the last level's output, or what comes
    into an earlier level and two of its output; and the bands at work."""
    widths = [config.ch * mult for mult in config.ch_mult]
    before = [*widths[1:], widths[-1]]
    first = [before[0] / 4 + widths[0], *((before[i] + 2 * widths[i]) / 4**i for i in range(1, len(widths)))]
    worst = max([2 * widths[0], *first])
    return int((worst * pixels + 6 * before[0] * BAND) * itemsize)


class Field(Protocol):
    """A tensor (B, C, H, W) that can be had in bands, from above."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def bands(self) -> Iterator[Tensor]: ...


@dataclass
class Held:
    """One that is in memory."""

    tensor: Tensor

    @property
    def height(self) -> int:
        return self.tensor.shape[2]

    @property
    def width(self) -> int:
        return self.tensor.shape[3]

    def bands(self, places: int | None = None) -> Iterator[Tensor]:
        """Views of it, of about so many places each."""
        return iter(self.tensor.split(max(1, (places or BAND) // self.width), dim=2))


@dataclass
class Doubled:
    """What an `Upsample` makes of one: each pixel four times, then a convolution."""

    upsample: Upsample
    source: Held

    @property
    def height(self) -> int:
        return 2 * self.source.height

    @property
    def width(self) -> int:
        return 2 * self.source.width

    def bands(self) -> Iterator[Tensor]:
        for x in _windows(self.source.bands(BAND // 4), self.source.height):
            yield doubled(self.upsample.conv, x) if lean(x) else self.upsample(x)[:, :, 2:-2]


@dataclass
class Halved:
    """What a `Downsample` makes of one: a strided convolution, padded right and below only."""

    conv: nn.Conv2d
    source: Held

    @property
    def height(self) -> int:
        return self.source.height // 2

    @property
    def width(self) -> int:
        return self.source.width // 2

    def bands(self) -> Iterator[Tensor]:
        rows = max(2, BAND // self.source.width // 2 * 2)
        for start in range(0, 2 * self.height, rows):
            x = self.source.tensor[:, :, start : start + rows + 1]
            x = F.pad(x, (0, 1, 0, 1 - x.shape[2] % 2))  # the last band has no row below it
            yield F.conv2d(x, self.conv.weight, self.conv.bias, stride=2)


@dataclass
class Statistics:
    """What a group norm makes of every channel of a whole tensor: x * scale + shift, each (B, C, 1, 1)."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, norm: nn.GroupNorm, field: Field) -> Statistics:
        total, square = (torch.stack(each).sum(0) for each in zip(*map(sums, field.bands()), strict=True))
        return cls(*scale_and_shift(norm, total, square, field.height * field.width))

    def active(self, field: Field) -> Iterator[Tensor]:
        """SiLU of the normalised, band by band."""
        return (F.silu(torch.addcmul(self.shift, x, self.scale), inplace=True) for x in field.bands())


def decoded(decoder: Decoder, latent: Tensor) -> Tensor:
    """What `decoder(latent)` is, in bands."""
    field: Field = Held(decoder.mid(decoder.beginning(side_by_side(latent))))
    levels = list(reversed(list(decoder.up)))
    for i, level in enumerate(levels):
        for block in cast(Any, level).block:
            field = _through(block, field)
        if hasattr(level, "upsample"):
            field = Doubled(cast(Any, level).upsample, _held(field))
        if i + 2 < len(levels):  # before the last level it would be largest
            field = _held(field)
    return _ended(decoder, field)


def encoded(encoder: Encoder, pixels: Tensor) -> Tensor:
    """What `encoder(pixels)` is, in bands."""
    field = Held(encoder.conv_in(side_by_side(pixels)))
    for level in encoder.down:
        for block in cast(Any, level).block:
            field = _through(block, field)
        if hasattr(level, "downsample"):
            field = _held(Halved(cast(Any, level).downsample.conv, field))
    return encoder.ending(_ended(encoder, Held(encoder.mid(field.tensor))))


def _through(block: ResnetBlock, field: Field) -> Held:
    """A residual block. Where the width stays it is added to what is given, else it takes the place of its middle."""
    field = _held(field) if block.same_width else field
    inner = _gathered(_normed(block.norm1, block.conv1, field), field.height)
    results = _normed(block.norm2, block.conv2, inner)
    if isinstance(field, Held) and block.same_width:
        return _added(results, field)
    _written(results, inner.tensor)
    return _added((pointwise(block.nin_shortcut, x) for x in field.bands()), inner)


def _ended(network: Decoder | Encoder, field: Field) -> Tensor:
    """The last norm and convolution."""
    return _gathered(_normed(network.norm_out, network.conv_out, field), field.height).tensor.contiguous()


def _held(field: Field) -> Held:
    """All of its rows."""
    return field if isinstance(field, Held) else _gathered(field.bands(), field.height)


def _gathered(bands: Iterator[Tensor], height: int) -> Held:
    """Bands, one below the other."""
    first = next(bands)
    order = torch.channels_last if lean(first) else torch.contiguous_format
    shape = (first.shape[0], first.shape[1], height, first.shape[3])
    whole = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=order)
    _written(chain((first,), bands), whole)
    return Held(whole)


def _written(bands: Iterator[Tensor], whole: Tensor) -> None:
    """Bands into the rows of a tensor."""
    start = 0
    for x in bands:
        whole[:, :, start : start + x.shape[2]] = x
        start += x.shape[2]


def _added(bands: Iterator[Tensor], to: Held) -> Held:
    """Bands onto the rows of a tensor."""
    start = 0
    for x in bands:
        to.tensor[:, :, start : start + x.shape[2]] += x
        start += x.shape[2]
    return to


def _normed(norm: nn.GroupNorm, conv: nn.Conv2d, field: Field) -> Iterator[Tensor]:
    """Norm, SiLU and a 3x3 convolution, a row behind what is read of the field."""
    active = Statistics.of(norm, field).active(field)
    return (F.conv2d(x, conv.weight, conv.bias, padding=(0, 1)) for x in _windows(active, field.height))


def _windows(bands: Iterator[Tensor], height: int) -> Iterator[Tensor]:
    """For convolutions: the rows of all bands, and those above and below, which are shared; zeros at top and bottom."""
    kept, seen = None, 0
    for x in bands:
        seen += x.shape[2]
        above, below = x[:, :, :1], x[:, :, :1] if seen == height else x[:, :, :0]
        x = torch.cat((torch.zeros_like(above) if kept is None else kept, x, torch.zeros_like(below)), dim=2)
        kept = x[:, :, -2:]
        if x.shape[2] > 2:
            yield x
