"""The four-bit formats of bitsandbytes, NF4 and FP4, read without bitsandbytes and without CUDA.

NF4: QLoRA, arXiv 2305.14314, section 3 and appendix E (the table). The tables and the names of the parts are those that
bitsandbytes writes (`bitsandbytes/functional.py`, QuantState.as_dict). Two codes a byte, the first in the high half;
blocks of 64 numbers, counted through the flattened weight, share a scale (`absmax`), which may itself be stored in
eight bits (nested statistics).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from miniflux.checkpoints.files import fresh
from miniflux.checkpoints.formats.base import FLOATS, WEIGHT, Format, Get, Kind, Stored, misshapen, need, pieces
from miniflux.checkpoints.formats.scaled import parsed_json
from miniflux.errors import CheckpointError

BLOCK = 64
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ),
    "fp4": tuple(
        sign * value for sign in (1, -1) for value in (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
    ),
}
ABSMAX, MAP = "weight.absmax", "weight.quant_map"
NESTED, NESTED_MAP = "weight.nested_absmax", "weight.nested_quant_map"
STATE = "weight.quant_state.bitsandbytes__"  # + nf4 or fp4


class FourBit(Format):
    """W = quant_map[code] * absmax[block]."""

    whole = BLOCK
    shared = (MAP,)

    def __init__(self, name: str) -> None:
        self.name, self.label, self.state = name, f"bitsandbytes {name}", STATE + name

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        weight = self.checked(weight)
        blocks = weight.reshape(-1, BLOCK)
        table = torch.tensor(TABLES[self.name], device=weight.device)
        ranked = torch.tensor(TABLES[self.name]).sort(stable=True)
        bounds = torch.tensor([(a + b) / 2 for a, b in pairwise(ranked.values.tolist())], device=weight.device)
        order = ranked.indices.to(weight.device)
        codes = fresh((len(blocks) * BLOCK // 2, 1), torch.uint8, weight.device)
        absmax = torch.empty(len(blocks), device=weight.device)
        for piece in pieces(len(blocks), BLOCK):
            some = blocks[piece].float()
            top = some.abs().amax(dim=1)
            scaled = some / torch.where(top > 0, top, torch.ones_like(top))[:, None]
            pairs = order[torch.bucketize(scaled, bounds)].to(torch.uint8).reshape(-1, 2)
            absmax[piece] = top
            codes[piece.start * BLOCK // 2 : piece.stop * BLOCK // 2] = pairs[:, :1] << 4 | pairs[:, 1:]
        return {WEIGHT: codes, ABSMAX: absmax, MAP: table, **self.constants(tuple(weight.shape))}

    def constants(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        state = {"quant_type": self.name, "blocksize": BLOCK, "dtype": "float32", "shape": list(shape)}
        return {self.state: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}

    def read(self, kinds: Mapping[str, Kind], get: Get) -> Stored:
        packed = need(kinds, WEIGHT, torch.uint8)
        need(kinds, self.state, torch.uint8)
        about = _State(self.state, parsed_json(self.state, get(self.state)))
        if about.value("quant_type", str) != self.name:
            raise CheckpointError(f"{self.state} says quant_type {about.value('quant_type', str)!r}")
        shape = tuple(about.value("shape", list))
        if len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
            raise CheckpointError(f"{self.state} says shape {list(shape)!r:.80}, expected [rows, columns]")
        total, block = math.prod(shape), about.size("blocksize")
        if math.prod(packed) != (total + 1) // 2:
            raise misshapen(WEIGHT, packed, f"[{(total + 1) // 2}, 1] for a weight of {list(shape)}")
        count = -(-total // block)
        facts: dict[str, Any] = {"block": block}
        parts = [WEIGHT, ABSMAX, MAP]
        if NESTED in kinds or NESTED_MAP in kinds or "nested_blocksize" in about.content:
            nested = about.size("nested_blocksize")
            facts |= {"nested": nested, "offset": float(about.value("nested_offset", (int, float)))}
            if not math.isfinite(facts["offset"]):
                raise CheckpointError(f"{self.state} says nested_offset {facts['offset']}")
            expected = {ABSMAX: ((torch.uint8,), count), NESTED: (FLOATS, -(-count // nested))}
            expected[NESTED_MAP] = (FLOATS, 256)
            parts += [NESTED, NESTED_MAP]
        else:
            expected = {ABSMAX: (FLOATS, count)}
        expected[MAP] = (FLOATS, 16)
        for name, (dtypes, size) in expected.items():
            found = need(kinds, name, *dtypes)
            if math.prod(found) != size:
                raise misshapen(name, found, f"[{size}]")
        return Stored(self, shape, {name: kinds[name] for name in parts}, facts, (self.state,))

    def plain(self, stored: Stored, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Without nested statistics: the scales themselves."""
        absmax = parts[ABSMAX].reshape(-1)
        if "nested" in stored.facts:
            nested = parts[NESTED].float().reshape(-1).repeat_interleave(stored.facts["nested"])[: len(absmax)]
            absmax = parts[NESTED_MAP].float().reshape(-1)[absmax.int()] * nested + stored.facts["offset"]
        return {WEIGHT: parts[WEIGHT], ABSMAX: absmax.float(), MAP: parts[MAP]}

    def fill(self, stored: Stored, parts: Mapping[str, Tensor], out: Tensor) -> None:
        codes, flat, size = parts[WEIGHT].reshape(-1), out.view(-1), stored.facts["block"]
        absmax = self.plain(stored, parts)[ABSMAX]
        # Both numbers of a byte at once: 256 pairs.
        table, byte = parts[MAP].float().reshape(-1), torch.arange(256, device=codes.device)
        pairs = torch.stack((table[byte >> 4], table[byte & 15]), dim=1)
        for piece in pieces(len(absmax), size):
            start, end = piece.start * size, min(piece.stop * size, len(flat))
            values = pairs.index_select(0, codes[start // 2 : (end + 1) // 2].int()).view(-1)[: end - start]
            scale = absmax[piece]
            if len(values) == len(scale) * size:
                flat[start:end] = (values.view(-1, size) * scale[:, None]).view(-1)
            else:  # the last block is not full
                flat[start:end] = values * scale.repeat_interleave(size)[: end - start]


class _State:
    """The JSON of a weight's `quant_state`, read strictly."""

    def __init__(self, name: str, content: object) -> None:
        if not isinstance(content, dict):
            raise CheckpointError(f"{name} is no JSON object: {content!r:.80}")
        self.name, self.content = name, content

    def value(self, key: str, kind: Any) -> Any:
        value = self.content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{self.name} says {key} {value!r:.80}")
        return value

    def size(self, key: str) -> int:
        value = self.value(key, int)
        if value < 2 or value % 2:
            raise CheckpointError(f"{self.name} says {key} {value}, expected an even number")
        return value
