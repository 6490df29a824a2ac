"""Weights into the blocks of GGUF files: the old types as ggml's reference rounds them, Q4_K and Q5_K by a search.

Source of the old types: `quantize_row_q*_ref` in `ggml-quants.c`. The K types leave the choice of scales to the writer;
here each group of 32 numbers is fitted by weighted least squares from several starts (the idea of `make_qkx2_quants`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pack = Callable[[Tensor], Tensor]
"""Numbers (n, numbers a block) in float32 -> blocks of bytes (n, bytes a block)."""

GROUP = 32  # numbers of a Q4_K or Q5_K block that share a scale and a minimum
STARTS = 21  # tries for the scale of a group, from one level less to one more than its range asks for


def _halves(*numbers: Tensor) -> list[Tensor]:
    """Columns (n, 1) as the bytes of float16."""
    return [number.to(torch.float16).view(torch.uint8) for number in numbers]


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, torch.zeros_like(d), 1 / d)


def _nibbles(q: Tensor, run: int) -> Tensor:
    """Numbers below 16 into bytes: of each run of twice `run` the first half low, the second half high."""
    low, high = q.view(len(q), -1, 2, run).unbind(2)
    return (low | high << 4).reshape(len(q), -1)


def _bit_planes(bit: Tensor) -> Tensor:
    """32 bits (n, 32) into four bytes, lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bit.device)
    return (bit.view(len(bit), 4, 8) << shifts).sum(2, dtype=torch.uint8)


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
    return torch.cat([*_halves(d), _nibbles(q, 16)], dim=1)


def _q4_1(x: Tensor) -> Tensor:
    d, low, q = _ranged(x, 16)
    return torch.cat([*_halves(d, low), _nibbles(q, 16)], dim=1)


def _q5_0(x: Tensor) -> Tensor:
    d, q = _signed(x, 32)
    return torch.cat([*_halves(d), _bit_planes(q >> 4), _nibbles(q & 15, 16)], dim=1)


def _q5_1(x: Tensor) -> Tensor:
    d, low, q = _ranged(x, 32)
    return torch.cat([*_halves(d, low), _bit_planes(q >> 4), _nibbles(q & 15, 16)], dim=1)


def _q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    q = scaled.sign() * (scaled.abs() + 0.5).floor()  # halves away from zero, as C's roundf
    return torch.cat([*_halves(d), q.to(torch.int8).view(torch.uint8)], dim=1)


def fitted_groups(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """For groups (..., GROUP): the scale and the minimum (both >= 0, (...)) whose `scale * q - minimum`, with whole q
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


def _k(x: Tensor, levels: int) -> tuple[list[Tensor], Tensor]:
    """The head of a Q4_K or Q5_K block (two float16, twelve bytes) and its codes (n, 256)."""
    groups = x.view(len(x), -1, GROUP)
    scale, minimum = fitted_groups(groups, levels)
    d, low = (t.amax(1, keepdim=True) / 63 for t in (scale, minimum))
    rounded = [t.to(torch.float16) for t in (d, low)]
    scales, lows = (
        (t * _inverse(r.float())).round().clamp(0, 63) for t, r in zip((scale, minimum), rounded, strict=True)
    )
    q = _codes(groups, scales * rounded[0].float(), lows * rounded[1].float(), levels)
    head = [*(r.view(torch.uint8) for r in rounded), _six_bit_pairs(scales.to(torch.uint8), lows.to(torch.uint8))]
    return head, q.to(torch.uint8).view(len(x), -1)


def _q4_k(x: Tensor) -> Tensor:
    head, q = _k(x, 16)
    return torch.cat([*head, _nibbles(q, GROUP)], dim=1)


def _q5_k(x: Tensor) -> Tensor:
    head, q = _k(x, 32)
    planes = torch.arange(8, dtype=torch.uint8, device=x.device)[:, None]
    high = ((q >> 4).view(len(x), 8, GROUP) << planes).sum(1, dtype=torch.uint8)
    return torch.cat([*head, high, _nibbles(q & 15, GROUP)], dim=1)


PACKERS: dict[str, Pack] = {
    "Q8_0": _q8_0,
    "Q5_1": _q5_1,
    "Q5_0": _q5_0,
    "Q4_1": _q4_1,
    "Q4_0": _q4_0,
    "Q5_K": _q5_k,
    "Q4_K": _q4_k,
}
