"""Large pictures through an autoencoder in bounded memory: layer by layer, a band of rows at a time.

Tiles that are decoded by themselves and blended are another picture, because group norms look at all of it. Here every
norm gets the statistics of the whole first. Then its convolution runs over bands of rows, each with the row above and
the row below it. What a layer makes is written where nothing is needed any more: into what it was given, or into what
the block before it worked in. So beside weights and bands two tensors of the size of the last level are in memory.
Nothing is computed twice, and the result differs by rounding alone. All tensors have the channels of a place side by
side, so that rows that follow each other do so in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

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
    sums,
)

WHOLE = 2**18  # pixels up to which a picture goes through at once: 512 x 512. Larger ones are as fast in bands
BAND = 2**14  # places of a band, about


def through(network: Encoder | Decoder, x: Tensor) -> Tensor:
    """What `network(x)` is: in bands, if the picture is large."""
    grows = isinstance(network, Decoder)
    pixels = x.shape[-2] * x.shape[-1] * (4 ** (len(network.up) - 1) if grows else 1)
    if pixels <= WHOLE:
        return network(x)
    return decoded(network, x) if isinstance(network, Decoder) else encoded(network, x)


def activations(config: AutoencoderSizes, pixels: int, itemsize: int, *, reserved: bool = False) -> int:
    """Bytes at the worst moment of decoding a large picture: in a level what comes in or two tensors of its width,
    whichever is more (both, where they do not fit into what comes in); or a level and what is moved on to the next;
    and the bands at work.

    Args:
        reserved: count memory that is there and not written to yet, as devices do; else that which has been used.
    """
    widths = [config.ch * mult for mult in config.ch_mult]
    before = [*widths[1:], widths[-1]]
    levels = [2 * b if a == b else a if a >= 2 * b else a + 2 * b for a, b in zip(before, widths, strict=True)]
    room = 4 if reserved else 1
    moved = [(below + room * a) / 4 for below, a in zip(levels[1:], before, strict=False)]
    working = max(level / 4**i for i, level in enumerate(levels)) * pixels
    moving = max((each / 4**i for i, each in enumerate(moved)), default=0) * pixels
    bands = 6 * before[0] * BAND
    return int((max(working + bands, moving) if reserved else max(working, moving) + bands) * itemsize)


def decoded(decoder: Decoder, latent: Tensor) -> Tensor:
    """What `decoder(latent)` is, in bands."""
    x = decoder.mid(decoder.beginning(latent.contiguous(memory_format=torch.channels_last)))
    for level in reversed(decoder.up):
        x = _through(level, x)
        if hasattr(level, "upsample"):
            room = _empty(x, height=2 * x.shape[2], width=2 * x.shape[3])
            x = _at_end(room, x)  # and no longer where it was
            x = _doubled(cast(Any, level).upsample, x, room)
    return _convolved(decoder.conv_out, x, decoder.norm_out).contiguous()


def encoded(encoder: Encoder, pixels: Tensor) -> Tensor:
    """What `encoder(pixels)` is, in bands."""
    x = _convolved(encoder.conv_in, pixels)
    for level in encoder.down:
        x = _through(level, x)
        if hasattr(level, "downsample"):
            x = _halved(cast(Any, level).downsample.conv, x)
    x = _convolved(encoder.conv_out, encoder.mid(x), encoder.norm_out)
    return encoder.ending(x).contiguous()


def _through(level: nn.Module, x: Tensor) -> Tensor:
    """The residual blocks of a level, written over x where they fit."""
    spare = None  # what the blocks of a level work in, one after the other
    for block in cast(Any, level).block:
        if block.same_width:
            spare = _empty(x) if spare is None else spare
            _convolved(block.conv1, x, block.norm1, into=spare)
        else:
            spare, x = _narrowed(block, x)
        for rows, window in _windows(spare, block.norm2):
            x[:, :, rows] += _inner(block.conv2, window)
    return x


def _narrowed(block: ResnetBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the first convolution of a block makes of x, and what the shortcut makes of it: in the place of x, if both
    have room there."""
    channels = block.conv1.out_channels
    if 2 * channels <= x.shape[1]:
        inner, short = x[:, :channels], x[:, channels : 2 * channels]
    else:
        inner, short = _empty(x, channels), _empty(x, channels)
    for rows, window in _windows(x, block.norm1):
        shortcut = pointwise(block.nin_shortcut, x[:, :, rows])
        inner[:, :, rows] = _inner(block.conv1, window)
        short[:, :, rows] = shortcut
    return inner, short


def _at_end(room: Tensor, x: Tensor) -> Tensor:
    """x, moved to the end of memory that is larger."""
    end = room.movedim(1, 3).flatten(1)[:, -x[0].numel() :]
    return end.unflatten(1, (*x.shape[2:], -1)).movedim(3, 1).copy_(x)


def _doubled(upsample: Upsample, x: Tensor, into: Tensor) -> Tensor:
    """What an `Upsample` makes: each pixel four times, then a convolution. x may be at the end of what that is written
    into, which fills four times as fast as x is read, and is full when all of x has been read."""
    for rows, window in _windows(x, places=BAND // 4):
        made = doubled(upsample.conv, window) if lean(window) else upsample(window)[:, :, 2:-2]
        into[:, :, 2 * rows.start : 2 * rows.stop] = made
    return into


def _halved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What a `Downsample` makes: a strided convolution, padded right and below only."""
    result = _empty(x, height=x.shape[2] // 2, width=x.shape[3] // 2)
    for rows, window in _windows(x, places=max(BAND, 2 * x.shape[3])):
        made = F.conv2d(F.pad(window[:, :, 1:], (0, 1)), conv.weight, conv.bias, stride=2)
        result[:, :, rows.start // 2 : rows.stop // 2] = made
    return result


def _convolved(conv: nn.Conv2d, x: Tensor, norm: nn.GroupNorm | None = None, into: Tensor | None = None) -> Tensor:
    """What a 3x3 convolution makes of x, or of SiLU of the normalised."""
    result = _empty(x, conv.out_channels) if into is None else into
    for rows, window in _windows(x, norm):
        result[:, :, rows] = _inner(conv, window)
    return result


def _inner(conv: nn.Conv2d, window: Tensor) -> Tensor:
    """What a 3x3 convolution makes of a window: of all of its rows but the first and the last."""
    return F.conv2d(window, conv.weight, conv.bias, padding=(0, 1))


def _windows(x: Tensor, norm: nn.GroupNorm | None = None, places: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """For convolutions: which rows, of about so many places, and these with the row above and the row below, or zeros
    at top and bottom; SiLU of the normalised, if a norm is given. A window is overwritten by the next one, and reads
    nothing of rows that were in those before: they may have been overwritten too."""
    height, width = x.shape[2:]
    number = min(height, max(1, (places or BAND) // width // 2 * 2))  # even: for `_halved`
    scale, shift = (None, None) if norm is None else scale_and_shift(norm, *sums(x), height * width)
    room = _empty(x, height=number + 2)
    for start in range(0, height, number):
        rows = slice(start, min(start + number, height))
        window = room[:, :, : rows.stop - start + 2]
        window[:, :, :1] = room[:, :, number : number + 1] if start else 0
        read = x[:, :, start : rows.stop + 1]
        place = window[:, :, 1 : 1 + read.shape[2]]
        if scale is None or shift is None:
            place.copy_(read)
        else:
            F.silu(torch.addcmul(shift, read, scale, out=place), inplace=True)
        if rows.stop == height:
            window[:, :, -1:] = 0
        yield rows, window


def _empty(x: Tensor, channels: int = 0, height: int = 0, width: int = 0) -> Tensor:
    """Memory for a tensor like x, but for the sizes that are given."""
    shape = (x.shape[0], channels or x.shape[1], height or x.shape[2], width or x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
