"""Files of tensors, written: what comes before the data, where each tensor lies, and all of it in one go."""

from __future__ import annotations

import json
import math
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniflux.checkpoints.files import DTYPES
from miniflux.checkpoints.formats.base import Kind
from miniflux.errors import MissingExtraError

ALIGNMENT = 32  # bytes, of tensors in GGUF files (its default)
GGUF_NUMBERS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Frame:
    """A file that is to be written: what comes before the data, and where each tensor lies.

    Attributes:
        name: of the file, within its folder.
        head: the first bytes.
        places: first byte of each tensor.
        kinds: dtype and shape of each.
        size: of the whole file, in bytes.
    """

    name: str
    head: bytes
    places: dict[str, int]
    kinds: dict[str, Kind]
    size: int


def safetensors_frame(name: str, kinds: Mapping[str, Kind], metadata: Mapping[str, str]) -> Frame:
    """A safetensors file, as `files.write_tensors` writes it."""
    head, places = header(kinds, metadata)
    return Frame(name, head, places, dict(kinds), len(head) + size_of(list(kinds.values())))


def gguf_frame(
    name: str, kinds: Mapping[str, Kind], blocks: Mapping[str, str], metadata: Mapping[str, str], about: tuple[str, str]
) -> Frame:
    """A GGUF file. The package `gguf` writes its head.

    Args:
        blocks: types of the packed tensors.
        about: the architecture, and the name of the file's type (`MOSTLY_Q8_0`).

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        import gguf
        import numpy as np
    except ImportError as error:
        raise MissingExtraError(
            f"{name}: GGUF files are written with the extra: pip install 'miniflux[gguf]'"
        ) from error
    architecture, kind = about
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[kind])
    for key, value in metadata.items():
        writer.add_string(key, value)
    for key, (dtype, shape) in kinds.items():
        raw = gguf.GGMLQuantizationType[blocks.get(key) or GGUF_NUMBERS[dtype]]
        layout = np.dtype(np.uint8 if key in blocks else np.float32)  # of bytes, or as they are
        writer.add_tensor_info(key, shape, layout, size_of([(dtype, shape)]), raw_dtype=raw)
    head = _gguf_head(writer)
    places: dict[str, int] = {}
    end = len(head)
    for key, described in kinds.items():
        places[key] = end
        end += -(-size_of([described]) // ALIGNMENT) * ALIGNMENT
    return Frame(name, head, places, dict(kinds), end)


def write_frame(path: Path, frame: Frame, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file in one go.

    Args:
        tensors: every one of the frame's, in any order; each is let go of before the next is asked for.
    """
    with path.open("wb") as file:
        file.write(frame.head)
        file.truncate(frame.size)
        left = set(frame.kinds)
        for key, tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == frame.kinds[key], f"{key} is not what was announced"
            file.seek(frame.places[key])
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            left.remove(key)
        assert not left, f"{sorted(left)[0]} was announced and not written"


def _gguf_head(writer: Any) -> bytes:
    """What the package writes before the data, up to where they begin. It writes to files of its own alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = path.read_bytes()
    return head + bytes(-len(head) % ALIGNMENT)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: the same tensors always give the same bytes.

    Not by the safetensors library, which shuffles the metadata and makes files that only their owner may read.
    """
    kinds = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    frame = safetensors_frame(path.name, kinds, metadata)
    write_frame(path, frame, ((key, tensors[key]) for key in frame.places))


def header(
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file begins with, and the first byte of each tensor, in the order in which they lie there."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    about: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    end = 0
    for key in sorted(kinds, key=lambda key: (-kinds[key][0].itemsize, key)):  # large items first: all are aligned
        dtype, shape = kinds[key]
        offsets[key], end = end, end + math.prod(shape) * dtype.itemsize
        about[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offsets[key], end]}
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {key: 8 + len(text) + start for key, start in offsets.items()}


def size_of(parts: Sequence[Kind]) -> int:
    """Bytes of tensors."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in parts)
