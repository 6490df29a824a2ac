"""NVFP4: four-bit floats (E2M1) in blocks of 16 that share an E4M3 scale, and one float32 scale for the whole weight.

W = value * weight_scale[row, block] * weight_scale_2. Two ways to lay it out are in use:

* as NVIDIA's ModelOpt and Black Forest Labs' loader in diffusers (`quantizers/bfl`) have it: the first number of a byte
  in its low half, scales in plain rows;
* as ComfyUI and the published FLUX.2 files have it, which say so in `_quantization_metadata` or `comfy_quant`: the
  first number in the high half, scales in tiles of 128 rows x 4 blocks, cuBLAS' "block scaling factors layout".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from miniflux.checkpoints.formats.base import WEIGHT, Format, Get, Kind, Stored, misshapen, need, pieces
from miniflux.checkpoints.formats.scaled import comfy_header, largest

BLOCK = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits of the code; the fourth is the sign
SCALE, GLOBAL = "weight_scale", "weight_scale_2"
TILE_ROWS, TILE_COLUMNS = 128, 4


class Nvfp4(Format):
    """Either layout; `comfy`: high half first and tiled scales."""

    multiple = BLOCK
    shared = (GLOBAL,)

    def __init__(self, name: str, label: str, comfy: bool) -> None:
        self.name, self.label, self.comfy = name, label, comfy

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        weight = self.checked(weight).float()
        top = largest(torch.float8_e4m3fn)
        whole = weight.abs().amax() / (top * E2M1[-1])
        whole = torch.where(whole > 0, whole, torch.ones_like(whole))
        blocks = weight.reshape(len(weight), -1, BLOCK)
        scale = (blocks.abs().amax(dim=2) / E2M1[-1] / whole).clamp(max=top).to(torch.float8_e4m3fn)
        step = (scale.float() * whole)[..., None]
        scaled = torch.where(step > 0, blocks / step, torch.zeros_like(blocks)).reshape(weight.shape)
        # Round to nearest; the ties between two codes go to the even code, as in IEEE 754.
        grid = torch.tensor(E2M1, device=weight.device)
        middle = (grid[1:] + grid[:-1]) / 2
        size = scaled.abs().contiguous()
        up = torch.bucketize(size, middle, right=True)  # a tie counts as above
        codes = torch.where((up > 0) & (size == middle[(up - 1).clamp(min=0)]) & (up % 2 == 1), up - 1, up)
        codes = (codes | (scaled < 0).long() << 3).to(torch.uint8)
        first, second = codes[:, 0::2], codes[:, 1::2]
        packed = first << 4 | second if self.comfy else second << 4 | first
        return {WEIGHT: packed, SCALE: to_tiles(scale) if self.comfy else scale, GLOBAL: whole}

    def read(self, kinds: Mapping[str, Kind], get: Get) -> Stored:
        packed = need(kinds, WEIGHT, torch.uint8)
        if len(packed) != 2 or packed[1] * 2 % BLOCK:
            raise misshapen(WEIGHT, packed, f"[rows, columns / 2] with columns in blocks of {BLOCK}")
        rows, blocks = packed[0], packed[1] * 2 // BLOCK
        found = need(kinds, SCALE, torch.float8_e4m3fn)
        expected = tiled(rows, blocks) if self.comfy else (rows, blocks)
        if found != expected and not (self.comfy and found == (expected[0] * expected[1],)):
            raise misshapen(SCALE, found, f"{list(expected)}")
        if need(kinds, GLOBAL, torch.float32) not in ((), (1,)):
            raise misshapen(GLOBAL, kinds[GLOBAL][1], "[]")
        return Stored(self, (rows, packed[1] * 2), {name: kinds[name] for name in (WEIGHT, SCALE, GLOBAL)})

    def fill(self, stored: Stored, parts: Mapping[str, Tensor], out: Tensor) -> None:
        packed, scale = parts[WEIGHT], parts[SCALE]
        rows, columns = stored.shape
        if self.comfy:
            scale = from_tiles(scale, rows, columns // BLOCK)
        table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)
        byte = torch.arange(256, device=packed.device)
        halves = (byte >> 4, byte & 15) if self.comfy else (byte & 15, byte >> 4)
        pairs = torch.stack([table[half] for half in halves], dim=1)
        for piece in pieces(rows, columns):
            values = pairs.index_select(0, packed[piece].reshape(-1).int()).view(-1, columns // BLOCK, BLOCK)
            step = (scale[piece].float() * parts[GLOBAL].reshape(()))[..., None]
            out[piece] = (values * step).view(-1, columns)

    def header(self, layers: Iterable[str]) -> dict[str, str]:
        return comfy_header(layers, "nvfp4") if self.comfy else {}


def tiled(rows: int, blocks: int) -> tuple[int, int]:
    """The shape of scales in tiles: both sides rounded up."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-blocks // TILE_COLUMNS) * TILE_COLUMNS


def to_tiles(scale: Tensor) -> Tensor:
    """(rows, blocks) in plain rows -> cuBLAS' order: tiles one after the other, in each the four blocks of rows r,
    r + 32, r + 64 and r + 96 side by side."""
    height, width = tiled(*scale.shape)
    padded = torch.zeros(height, width, dtype=torch.uint8, device=scale.device)
    padded[: scale.shape[0], : scale.shape[1]] = scale.view(torch.uint8)
    tiles = padded.view(height // TILE_ROWS, 4, 32, width // TILE_COLUMNS, TILE_COLUMNS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(height, width).view(scale.dtype)


def from_tiles(scale: Tensor, rows: int, blocks: int) -> Tensor:
    """The inverse of `to_tiles`."""
    height, width = tiled(rows, blocks)
    tiles = scale.view(torch.uint8).view(height // TILE_ROWS, width // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(height, width)
    return plain[:rows, :blocks].contiguous().view(scale.dtype)
