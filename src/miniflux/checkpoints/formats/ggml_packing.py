"""Weights into the blocks of GGUF files: the old types as ggml's reference rounds them, K and IQ4 types by a search.

Source of the old types: `quantize_row_q*_ref` in `ggml-quants.c`. The others leave the choice of scales to the writer;
here each group of numbers is fitted by weighted least squares from several starts (the idea of `make_qkx2_quants` and
`make_qx_quants`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pack = Callable[[Tensor], Tensor]
"""Numbers (n, numbers a block) in float32 -> blocks of bytes (n, bytes a block)."""

Nearest = Callable[[Tensor], Tensor]
"""Numbers -> the nearest of those that codes stand for."""

STARTS = 21  # tries for the scale of a group, from one level less to one more than its range asks for
# What four bits stand for in IQ4_NL and IQ4_XS (`kvalues_iq4nl`).
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _halves(*numbers: Tensor) -> list[Tensor]:
    """Columns (n, 1) as the bytes of float16."""
    return [number.to(torch.float16).view(torch.uint8) for number in numbers]


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, torch.zeros_like(d), 1 / d)


def _packed(q: Tensor, width: int, run: int) -> Tensor:
    """Numbers of `width` bits into bytes: the inverse of `ggml.bits`."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=q.device)
    spread = q.to(torch.uint8).reshape(len(q), -1, 8 // width, run) << shifts[:, None]
    return spread.sum(2, dtype=torch.uint8).reshape(len(q), -1)


def _signed(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The number of largest size becomes the lowest of the levels: (scale, codes)."""
    largest = x.gather(1, x.abs().argmax(dim=1, keepdim=True))
    d = largest / -(levels // 2)
    codes = (x * _inverse(d) + (levels // 2 + 0.5)).trunc().clamp(0, levels - 1)
    return d, codes.to(torch.uint8)


def _ranged(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels from the least to the largest number: (scale, least, codes)."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    d = (high - low) / (levels - 1)
    codes = ((x - low) * _inverse(d) + 0.5).trunc().clamp(0, levels - 1)
    return d, low, codes.to(torch.uint8)


def _q4_0(x: Tensor) -> Tensor:
    d, q = _signed(x, 16)
    return torch.cat([*_halves(d), _packed(q, 4, 16)], dim=1)


def _q4_1(x: Tensor) -> Tensor:
    d, low, q = _ranged(x, 16)
    return torch.cat([*_halves(d, low), _packed(q, 4, 16)], dim=1)


def _q5_0(x: Tensor) -> Tensor:
    d, q = _signed(x, 32)
    return torch.cat([*_halves(d), _packed(q >> 4, 1, 1), _packed(q & 15, 4, 16)], dim=1)


def _q5_1(x: Tensor) -> Tensor:
    d, low, q = _ranged(x, 32)
    return torch.cat([*_halves(d, low), _packed(q >> 4, 1, 1), _packed(q & 15, 4, 16)], dim=1)


def _q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    q = scaled.sign() * (scaled.abs() + 0.5).floor()  # halves away from zero, as C's roundf
    return torch.cat([*_halves(d), q.to(torch.int8).view(torch.uint8)], dim=1)


def fitted_groups(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """For groups (..., numbers): the scale and the minimum (both >= 0, (...)) whose `scale * q - minimum`, with whole q
    from 0 to levels - 1, comes close; large numbers count for more."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    weight = x.square().mean(-1, keepdim=True).sqrt() + x.abs()
    span = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    total, wx = weight.sum(-1), (weight * x).sum(-1)
    scale, minimum = span[..., 0] / (levels - 1), -low[..., 0]
    best = _weighted_error(x, weight, scale, minimum, levels)
    for step in torch.linspace(-1, 1, STARTS).tolist():
        q = ((x - low) * ((levels - 1 + step) / span)).round().clamp(0, levels - 1)
        wq, wqq, wqx = (weight * q).sum(-1), (weight * q * q).sum(-1), (weight * q * x).sum(-1)
        det = total * wqq - wq * wq
        solvable = det > 0
        det = torch.where(solvable, det, torch.ones_like(det))
        slope, offset = (total * wqx - wx * wq) / det, (wqq * wx - wq * wqx) / det
        # A minimum above zero cannot be said: then the line goes through zero.
        positive = offset > 0
        slope = torch.where(positive, wqx / wqq.clamp(min=torch.finfo(torch.float32).tiny), slope)
        offset = torch.where(positive, torch.zeros_like(offset), offset)
        error = _weighted_error(x, weight, slope, -offset, levels)
        better = solvable & (slope > 0) & (error < best)
        scale, minimum = torch.where(better, slope, scale), torch.where(better, -offset, minimum)
        best = torch.where(better, error, best)
    return scale, minimum


def _weighted_error(x: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor, levels: int) -> Tensor:
    q = _codes(x, scale, minimum, levels)
    return (weight * (scale[..., None] * q - minimum[..., None] - x).square()).sum(-1)


def _codes(x: Tensor, scale: Tensor, minimum: Tensor, levels: int) -> Tensor:
    return ((x + minimum[..., None]) * _inverse(scale)[..., None]).round().clamp(0, levels - 1)


def _six_bit_pairs(scales: Tensor, lows: Tensor) -> Tensor:
    """Eight scales and eight minima of six bits into twelve bytes: the inverse of `ggml.six_bit_pairs`."""
    first = (scales[:, :4] & 63) | (scales[:, 4:] >> 4) << 6
    second = (lows[:, :4] & 63) | (lows[:, 4:] >> 4) << 6
    return torch.cat((first, second, (scales[:, 4:] & 15) | (lows[:, 4:] & 15) << 4), dim=1)


def _ranges(x: Tensor, group: int, levels: int, top: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Of blocks whose groups have a scale and a minimum each: two float16, by which both are stored as whole numbers up
    to `top`; those numbers (n, groups); the codes (n, 256)."""
    groups = x.view(len(x), -1, group)
    scale, minimum = fitted_groups(groups, levels)
    d, low = (t.amax(1, keepdim=True) / top for t in (scale, minimum))
    rounded = [t.to(torch.float16) for t in (d, low)]
    scales, lows = (
        (t * _inverse(r.float())).round().clamp(0, top) for t, r in zip((scale, minimum), rounded, strict=True)
    )
    q = _codes(groups, scales * rounded[0].float(), lows * rounded[1].float(), levels)
    halves = [r.view(torch.uint8) for r in rounded]
    return halves, scales.to(torch.uint8), lows.to(torch.uint8), q.to(torch.uint8).view(len(x), -1)


def _q2_k(x: Tensor) -> Tensor:
    halves, scales, lows, q = _ranges(x, 16, 4, 15)
    return torch.cat([scales | lows << 4, _packed(q, 2, 32), *halves], dim=1)


def _q4_k(x: Tensor) -> Tensor:
    halves, scales, lows, q = _ranges(x, 32, 16, 63)
    return torch.cat([*halves, _six_bit_pairs(scales, lows), _packed(q, 4, 32)], dim=1)


def _q5_k(x: Tensor) -> Tensor:
    halves, scales, lows, q = _ranges(x, 32, 32, 63)
    return torch.cat([*halves, _six_bit_pairs(scales, lows), _packed(q >> 4, 1, 32), _packed(q & 15, 4, 32)], dim=1)


def fitted_scales(x: Tensor, nearest: Nearest, end: int) -> Tensor:
    """For groups (..., numbers): the scale (...), of either sign, whose `scale * nearest(x / scale)` comes close; large
    numbers count for more. It is looked for where the number of largest size becomes about `end`."""
    weight = x.square().mean(-1, keepdim=True).sqrt() + x.abs()
    largest = x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))
    scale = best = torch.empty(0)
    for step in torch.linspace(-1, 1, STARTS).tolist():
        q = nearest(x * _inverse(largest / (end + step)))
        found = (weight * q * x).sum(-1, keepdim=True) * _inverse((weight * q * q).sum(-1, keepdim=True))
        error = (weight * (found * nearest(x * _inverse(found)) - x).square()).sum(-1, keepdim=True)
        if not len(scale):
            scale, best = found, error
        scale, best = torch.where(error < best, found, scale), torch.minimum(error, best)
    return scale[..., 0]


def _scaled(x: Tensor, group: int, nearest: Nearest, end: int, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of blocks whose groups have a scale each: a float16, by which the scales are stored as whole numbers from -top to
    top - 1; those numbers (n, groups); the values (n, 256) that the scales are multiplied with."""
    groups = x.view(len(x), -1, group)
    scale = fitted_scales(groups, nearest, end)
    d = (scale.gather(1, scale.abs().argmax(dim=1, keepdim=True)) / -top).to(torch.float16)
    scales = (scale * _inverse(d.float())).round().clamp(-top, top - 1)
    values = nearest(groups * _inverse(d.float() * scales)[..., None])
    return d.view(torch.uint8), scales, values.view(len(x), -1)


def _q3_k(x: Tensor) -> Tensor:
    d, scales, values = _scaled(x, 16, lambda y: y.round().clamp(-4, 3), -4, 32)
    q, scales = (values + 4).to(torch.uint8), (scales + 32).to(torch.uint8)
    sixes = (_packed(scales & 15, 4, 8), _packed(scales >> 4, 2, 4))
    return torch.cat([_packed(q >> 2, 1, 32), _packed(q & 3, 2, 32), *sixes, d], dim=1)


def _q6_k(x: Tensor) -> Tensor:
    d, scales, values = _scaled(x, 16, lambda y: y.round().clamp(-32, 31), -32, 128)
    q, scales = (values + 32).to(torch.uint8), scales.to(torch.int8).view(torch.uint8)
    return torch.cat([_packed(q & 15, 4, 64), _packed(q >> 4, 2, 32), scales, d], dim=1)


def _iq4_codes(x: Tensor) -> Tensor:
    """Which of the sixteen values is nearest: looked up in half steps, on which all changes lie."""
    values = torch.tensor(IQ4_VALUES)
    steps = torch.arange(-256, 256) / 2  # each stands for the numbers from it to the next
    codes = torch.bucketize(steps, (values[1:] + values[:-1]) / 2, right=True).to(torch.uint8)
    at = (x * 2).floor().clamp(-256, 255).int() + 256
    return codes.to(x.device).index_select(0, at.view(-1)).view(x.shape)


def _iq4_nearest(x: Tensor) -> Tensor:
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=x.device)
    return values.index_select(0, _iq4_codes(x).view(-1).int()).view(x.shape)


def _iq4_nl(x: Tensor) -> Tensor:
    d = fitted_scales(x, _iq4_nearest, IQ4_VALUES[0])[:, None].to(torch.float16)
    return torch.cat([d.view(torch.uint8), _packed(_iq4_codes(x * _inverse(d.float())), 4, 16)], dim=1)


def _iq4_xs(x: Tensor) -> Tensor:
    d, scales, values = _scaled(x, 32, _iq4_nearest, IQ4_VALUES[0], 32)
    scales = (scales + 32).to(torch.uint8)
    sixes = (_packed(scales >> 4, 2, 1), _packed(scales & 15, 4, 1))
    return torch.cat([d, *sixes, _packed(_iq4_codes(values), 4, 16)], dim=1)


PACKERS: dict[str, Pack] = {
    "Q8_0": _q8_0,
    "Q6_K": _q6_k,
    "Q5_1": _q5_1,
    "Q5_0": _q5_0,
    "Q5_K": _q5_k,
    "Q4_1": _q4_1,
    "Q4_0": _q4_0,
    "Q4_K": _q4_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "Q3_K": _q3_k,
    "Q2_K": _q2_k,
}
