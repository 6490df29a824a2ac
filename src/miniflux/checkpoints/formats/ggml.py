"""The block formats of GGUF files, in torch, on any device.

Layouts of the blocks: `ggml-common.h` and `ggml-quants.c` of ggml; the Python package `gguf` holds the same in numpy,
and tests compare with it bit for bit. The numbers of a row are cut into blocks of 32 or 256; a block is a run of bytes
that holds its own scales in float16. Beside the old types (Q4_0 ...) the K types cut their 256 numbers into groups of
16 or 32, whose scales are themselves stored in 4, 6 or 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from miniflux.checkpoints.formats.base import WEIGHT, Format, Get, Kind, Stored, misshapen, need, pieces
from miniflux.checkpoints.formats.ggml_packing import IQ4_VALUES, PACKERS

Unpack = Callable[[Tensor], Tensor]
"""Blocks of bytes (n, bytes a block) -> numbers (n, numbers a block), float32."""

SUPER = 256  # numbers in a block of the K types


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte of every block: (n, 1) in float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def bits(bytes_: Tensor, width: int, run: int) -> Tensor:
    """Small numbers out of bytes: every run of `run` bytes gives first the lowest `width` bits of each of its bytes,
    then the next: (n, bytes) -> (n, bytes * 8 / width)."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=bytes_.device)
    spread = bytes_.reshape(len(bytes_), -1, 1, run) >> shifts[:, None]
    return (spread & ((1 << width) - 1)).reshape(len(bytes_), -1)


def _q4_0(blocks: Tensor) -> Tensor:
    return half(blocks, 0) * (bits(blocks[:, 2:], 4, 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return half(blocks, 0) * bits(blocks[:, 4:], 4, 16).float() + half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    q = bits(blocks[:, 6:], 4, 16) | bits(blocks[:, 2:6], 1, 1) << 4
    return half(blocks, 0) * (q.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    q = bits(blocks[:, 8:], 4, 16) | bits(blocks[:, 4:8], 1, 1) << 4
    return half(blocks, 0) * q.float() + half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _grouped(q: Tensor, scale: Tensor, low: Tensor | None = None) -> Tensor:
    """scale * q - low, for groups: q (n, 256), scale and low (n, groups)."""
    grouped = q.view(len(q), scale.shape[1], -1).float() * scale[:, :, None]
    if low is not None:
        grouped -= low[:, :, None]
    return grouped.view(len(q), -1)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, q = blocks[:, :16], bits(blocks[:, 16:80], 2, 32)
    return _grouped(q, half(blocks, 80) * (scales & 15).float(), half(blocks, 82) * (scales >> 4).float())


def _q3_k(blocks: Tensor) -> Tensor:
    high = bits(blocks[:, :32], 1, 32)  # where it is 0, 4 is to be subtracted
    q = bits(blocks[:, 32:96], 2, 32).to(torch.int8) - ((high ^ 1) << 2).to(torch.int8)
    scales = bits(blocks[:, 96:104], 4, 8) | bits(blocks[:, 104:108], 2, 4) << 4  # six bits: four here, two there
    return _grouped(q, half(blocks, 108) * (scales.float() - 32))


def six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of six bits in twelve bytes (n, 12), as Q4_K and Q5_K have them: each (n, 8)."""
    scale, low, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((scale & 63, (rest & 15) | (scale >> 6) << 4), dim=1)
    lows = torch.cat((low & 63, (rest >> 4) | (low >> 6) << 4), dim=1)
    return scales, lows


def _with_minima(blocks: Tensor, q: Tensor) -> Tensor:
    scales, lows = six_bit_pairs(blocks[:, 4:16])
    return _grouped(q, half(blocks, 0) * scales.float(), half(blocks, 2) * lows.float())


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, bits(blocks[:, 16:], 4, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, bits(blocks[:, 48:], 4, 32) | bits(blocks[:, 16:48], 1, 32) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    q = bits(blocks[:, :128], 4, 64) | bits(blocks[:, 128:192], 2, 32) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _grouped(q.float() - 32, half(blocks, 208) * scales)


def _iq4_values(codes: Tensor) -> Tensor:
    table = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return half(blocks, 0) * _iq4_values(bits(blocks[:, 2:], 4, 16))


def _iq4_xs(blocks: Tensor) -> Tensor:
    scales = (bits(blocks[:, 4:8], 4, 1) | bits(blocks[:, 2:4], 2, 1) << 4).float() - 32
    return _grouped(_iq4_values(bits(blocks[:, 8:], 4, 16)), half(blocks, 0) * scales)


@dataclass(frozen=True)
class Block:
    """One type of block: how many numbers in how many bytes, where its float16 scales are, and how it is read."""

    numbers: int
    bytes: int
    unpack: Unpack
    halves: tuple[int, ...] = (0,)


BLOCKS: dict[str, Block] = {
    "Q4_0": Block(32, 18, _q4_0),
    "Q4_1": Block(32, 20, _q4_1, (0, 2)),
    "Q5_0": Block(32, 22, _q5_0),
    "Q5_1": Block(32, 24, _q5_1, (0, 2)),
    "Q8_0": Block(32, 34, _q8_0),
    "Q2_K": Block(SUPER, 84, _q2_k, (80, 82)),
    "Q3_K": Block(SUPER, 110, _q3_k, (108,)),
    "Q4_K": Block(SUPER, 144, _q4_k, (0, 2)),
    "Q5_K": Block(SUPER, 176, _q5_k, (0, 2)),
    "Q6_K": Block(SUPER, 210, _q6_k, (208,)),
    "IQ4_NL": Block(32, 18, _iq4_nl),
    "IQ4_XS": Block(SUPER, 136, _iq4_xs),
}


class Ggml(Format):
    """A type of block. The one part, `weight`, holds the bytes: (rows, bytes of a row)."""

    def __init__(self, name: str) -> None:
        self.name, self.label, self.block = name, f"GGUF {name}", BLOCKS[name]
        self.multiple = self.block.numbers

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        weight, packer = self.checked(weight), PACKERS[self.name]
        numbers = weight.reshape(-1, self.block.numbers)
        made = [packer(numbers[piece].float()) for piece in pieces(len(numbers), 8 * self.block.numbers)]
        return {WEIGHT: torch.cat(made).view(len(weight), -1)}

    def read(self, kinds: Mapping[str, Kind], get: Get) -> Stored:
        packed = need(kinds, WEIGHT, torch.uint8)
        if len(packed) != 2 or packed[1] % self.block.bytes:
            raise misshapen(WEIGHT, packed, f"[rows, a multiple of {self.block.bytes} bytes]")
        return Stored(self, (packed[0], packed[1] // self.block.bytes * self.block.numbers), {WEIGHT: kinds[WEIGHT]})

    def fill(self, stored: Stored, parts: Mapping[str, Tensor], out: Tensor) -> None:
        blocks, into = parts[WEIGHT].reshape(-1, self.block.bytes), out.view(-1, self.block.numbers)
        for piece in pieces(len(blocks), self.block.numbers):
            into[piece] = self.block.unpack(blocks[piece])

    def sound(self, stored: Stored, parts: Mapping[str, Tensor]) -> bool:
        blocks = parts[WEIGHT].reshape(-1, self.block.bytes)
        return all(bool(half(blocks, start).isfinite().all()) for start in self.block.halves)
