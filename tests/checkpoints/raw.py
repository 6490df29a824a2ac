"""Safetensors files byte by byte: broken ones, and full-size ones that take no room on the disk."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miniflux.checkpoints.files import DTYPES


def raw(header: object, data: bytes = b"", pad: int = 8) -> bytes:
    """A file with this header, as JSON or as bytes, whose data begin at a multiple of `pad`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % pad)
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, end: int, dtype: object = "F32", shape: object = (2,)) -> dict[str, Any]:
    """A tensor's line of the header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def sparse(path: Path, shapes: Mapping[str, list[int]], dtype: str = "BF16") -> Path:
    """A file of full size whose tensors are all zero: a hole on the disk behind a true header."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[key] = entry(start, end, dtype, shape)
    with path.open("wb") as file:
        file.write(raw(header))
        file.truncate(file.tell() + end)
    return path
