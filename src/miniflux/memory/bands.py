"""Large pictures through an autoencoder in bounded memory: layer by layer, a band of rows at a time.

Tiles that are decoded by themselves and blended are another picture, because group norms look at all of it. Here every
norm gets the statistics of the whole: they are summed up over the bands first. Beside weights and bands, two tensors of
the size of the largest layer's output are in memory; what a doubling of rows and columns makes is never held whole
before that layer, but made band by band when it is asked for. The result differs by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniflux.models.autoencoder import AutoencoderSizes, Decoder, Encoder, ResnetBlock

WHOLE = 3 * 2**19  # pixels up to which a picture goes through at once: 1.5 times 1024 x 1024
BAND = 2**16  # pixels of a band, about


def through(network: Encoder | Decoder, x: Tensor) -> Tensor:
    """What `network(x)` is: in bands, if the picture is large."""
    grows = isinstance(network, Decoder)
    pixels = x.shape[-2] * x.shape[-1] * (4 ** (len(network.up) - 1) if grows else 1)
    if pixels <= WHOLE:
        return network(x)
    return decoded(network, x) if isinstance(network, Decoder) else encoded(network, x)


def activations(config: AutoencoderSizes, pixels: int, itemsize: int) -> int:
    """Bytes at the worst moment of decoding a large picture: at the last level what it is made from, and two tensors of
    its output; before it what comes in, and two of those; and the bands at work."""
    widths = [config.ch * mult for mult in config.ch_mult]
    before = [*widths[1:], widths[-1]]
    last = before[0] * pixels / 4 + 2 * widths[0] * pixels
    others = [(before[i] + 2 * widths[i]) * pixels / 4**i for i in range(1, len(widths))]
    return int((max([last, *others]) + 6 * before[0] * BAND) * itemsize)


class Field(Protocol):
    """A tensor (B, C, H, W) of which rows can be had."""

    @property
    def height(self) -> int: ...

    def rows(self, first: int, last: int) -> Tensor:
        """Rows from `first` up to, not including, `last`."""
        ...


@dataclass
class Held:
    """One that is in memory."""

    tensor: Tensor

    @property
    def height(self) -> int:
        return self.tensor.shape[2]

    def rows(self, first: int, last: int) -> Tensor:
        return self.tensor[:, :, first:last]


@dataclass
class Doubled:
    """What an `Upsample` makes of one: each pixel four times, then a convolution."""

    conv: nn.Conv2d
    source: Field

    @property
    def height(self) -> int:
        return 2 * self.source.height

    def rows(self, first: int, last: int) -> Tensor:
        return _convolved(self.conv, self.height, first, last, self._doubled)

    def _doubled(self, first: int, last: int) -> Tensor:
        small = self.source.rows(first // 2, -(-last // 2))
        x = F.interpolate(small, scale_factor=2.0, mode="nearest")
        return x[:, :, first % 2 : first % 2 + last - first]


@dataclass
class Halved:
    """What a `Downsample` makes of one: a strided convolution, padded right and below only."""

    conv: nn.Conv2d
    source: Field

    @property
    def height(self) -> int:
        return self.source.height // 2

    def rows(self, first: int, last: int) -> Tensor:
        below = min(self.source.height, 2 * last + 1)
        x = F.pad(self.source.rows(2 * first, below), (0, 1, 0, 2 * last + 1 - below))
        return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2)


@dataclass
class Statistics:
    """What a group norm makes of every channel of a whole tensor: x * scale + shift, each (B, C, 1, 1)."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, norm: nn.GroupNorm, field: Field) -> Statistics:
        total = square = torch.zeros(())
        count = 0
        for x in (field.rows(first, last) for first, last in _bands(field)):
            groups = x.reshape(len(x), norm.num_groups, -1).double()
            total, square = total + groups.sum(-1), square + groups.square().sum(-1)
            count += groups.shape[-1]
        mean = total / count
        deviation = (square / count - mean.square() + norm.eps).sqrt()
        each = norm.num_channels // norm.num_groups
        scale = norm.weight.double() / deviation.repeat_interleave(each, dim=1)
        shift = norm.bias.double() - mean.repeat_interleave(each, dim=1) * scale
        return cls(scale[..., None, None].to(norm.weight), shift[..., None, None].to(norm.weight))

    def active(self, x: Tensor) -> Tensor:
        """SiLU of the normalised rows."""
        return F.silu(torch.addcmul(self.shift, x, self.scale), inplace=True)


def decoded(decoder: Decoder, latent: Tensor) -> Tensor:
    """What `decoder(latent)` is, in bands."""
    field: Field = Held(decoder.mid(decoder.beginning(latent)))
    levels = list(reversed(list(decoder.up)))
    for i, level in enumerate(levels):
        for block in cast(Any, level).block:
            field = _through(block, field)
        if hasattr(level, "upsample"):
            grown = Doubled(cast(Any, level).upsample.conv, field)
            field = grown if i + 2 == len(levels) else Held(_held(grown))  # before the last level it would be largest
    return _ended(decoder, field)


def encoded(encoder: Encoder, pixels: Tensor) -> Tensor:
    """What `encoder(pixels)` is, in bands."""
    field: Field = Held(encoder.conv_in(pixels))
    for level in encoder.down:
        for block in cast(Any, level).block:
            field = _through(block, field)
        if hasattr(level, "downsample"):
            field = Held(_held(Halved(cast(Any, level).downsample.conv, field)))
    return encoder.ending(_ended(encoder, Held(encoder.mid(_held(field)))))


def _through(block: ResnetBlock, field: Field) -> Held:
    """A residual block. It writes into what it is given where it can."""
    if block.same_width and not isinstance(field, Held):
        field = Held(_held(field))
    height, first = field.height, Statistics.of(block.norm1, field)
    inner, beside = _Filled(height), _Filled(height)
    for start, end in _bands(field):
        above, below = max(0, start - 1), min(height, end + 1)
        x = field.rows(above, below)  # once for both, because it may have to be made
        if not block.same_width:
            beside.put(start, block.nin_shortcut(x[:, :, start - above : end - above]))
        inner.put(start, _convolved(block.conv1, height, start, end, lambda *_, x=x: first.active(x)))
    result = field.tensor if isinstance(field, Held) and block.same_width else beside.tensor
    h = Held(inner.tensor)
    second = Statistics.of(block.norm2, h)
    for start, end in _bands(h):
        result[:, :, start:end] += _convolved(block.conv2, height, start, end, lambda a, b: second.active(h.rows(a, b)))
    return Held(result)


def _ended(network: Decoder | Encoder, field: Field) -> Tensor:
    """The last norm and convolution."""
    statistics, found = Statistics.of(network.norm_out, field), _Filled(field.height)
    for start, end in _bands(field):
        rows = _convolved(network.conv_out, field.height, start, end, lambda a, b: statistics.active(field.rows(a, b)))
        found.put(start, rows)
    return found.tensor


class _Filled:
    """A tensor that is filled band by band."""

    def __init__(self, height: int) -> None:
        self.height, self.tensor = height, torch.empty(0)

    def put(self, start: int, rows: Tensor) -> None:
        if not start:
            self.tensor = rows.new_empty(rows.shape[0], rows.shape[1], self.height, rows.shape[3])
        self.tensor[:, :, start : start + rows.shape[2]] = rows


def _held(field: Field) -> Tensor:
    """All of its rows."""
    if isinstance(field, Held):
        return field.tensor
    found = _Filled(field.height)
    for start, end in _bands(field):
        found.put(start, field.rows(start, end))
    return found.tensor


def _convolved(conv: nn.Conv2d, height: int, first: int, last: int, rows: Callable[[int, int], Tensor]) -> Tensor:
    """Rows of a 3x3 convolution, from those before and behind them, too: `rows` gives what it is made of."""
    above, below = max(0, first - 1), min(height, last + 1)
    x = F.pad(rows(above, below), (0, 0, above - (first - 1), last + 1 - below))
    return F.conv2d(x, conv.weight, conv.bias, padding=(0, 1))


def _bands(field: Field) -> Iterator[tuple[int, int]]:
    """(first, last) of every band."""
    width = field.rows(0, 1).shape[3]
    rows = max(2, BAND // width // 2 * 2)
    return ((start, min(field.height, start + rows)) for start in range(0, field.height, rows))
