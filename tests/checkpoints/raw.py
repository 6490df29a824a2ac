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


def sparse(
    path: Path, shapes: Mapping[str, list[int]], dtype: str = "BF16", metadata: Mapping[str, str] | None = None
) -> Path:
    """A file of full size whose tensors are all zero: a hole on the disk behind a true header. Counts of batches, which
    FLUX.2's autoencoder has, are whole numbers in any file."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, shape in shapes.items():
        kind = "I64" if key.endswith("num_batches_tracked") else dtype
        start, end = end, end + math.prod(shape) * DTYPES[kind].itemsize
        header[key] = entry(start, end, kind, shape)
    with path.open("wb") as file:
        file.write(raw(header))
        file.truncate(file.tell() + end)
    return path
