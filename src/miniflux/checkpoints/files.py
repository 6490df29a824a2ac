"""Tensors in safetensors files: one file, or the shards of a folder, as a lazy mapping.

Nothing is read before it is asked for. `source[key]` is a view into the memory-mapped file; `source.read(key, out)`
copies into memory that the caller owns, without leaving pages of the file behind.
Format: 8 bytes length, a JSON header, the data (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniflux.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its dtype, its shape and its place in the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class TensorFile:
    """One safetensors file: its header is read and checked now, its tensors when asked for.

    Raises:
        CheckpointError: the file is missing, empty, cut off, or its header contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                prefix = file.read(8)
                if len(prefix) < 8:
                    raise CheckpointError(f"{path}: {self.size} bytes are too few for a safetensors file")
                (length,) = struct.unpack("<Q", prefix)
                if length > min(MAX_HEADER, self.size - 8):
                    raise CheckpointError(
                        f"{path}: not a safetensors file, or cut off: its header claims {length} bytes, "
                        f"{self.size - 8} follow"
                    )
                header = json.loads(file.read(length))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: not a safetensors file: its header is no JSON") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: not a safetensors file: its header is no JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{path}: its __metadata__ is not a JSON object of strings")
        self.metadata: dict[str, str] = metadata
        self.entries = {key: self._entry(key, about, 8 + length) for key, about in header.items()}
        if not self.entries:
            raise CheckpointError(f"{path}: holds no tensors")
        self._check_order(8 + length)
        self._bytes: Tensor | None = None

    def _entry(self, key: str, about: Any, offset: int) -> Entry:
        try:
            name, shape, (start, end) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
        except (KeyError, TypeError, ValueError):
            name, shape, start, end = None, (), 0, 0
        whole = all(type(n) is int for n in (*shape, start, end))
        if not isinstance(name, str) or not whole or math.prod(max(n, 1) for n in shape) >= 2**63:
            raise CheckpointError(f"{self.path}: the header entry of {key!r} is malformed: {about!r:.200}")
        if name not in DTYPES:
            raise CheckpointError(f"{self.path}: {key!r} has the unknown dtype {name!r}")
        expected = math.prod(shape) * DTYPES[name].itemsize
        if min(shape, default=0) < 0 or start < 0 or end - start != expected:
            raise CheckpointError(
                f"{self.path}: {key!r} of shape {list(shape)} and dtype {name} needs {expected} bytes, "
                f"its header says {end - start}"
            )
        if offset + end > self.size:
            raise CheckpointError(
                f"{self.path}: cut off: {key!r} ends at byte {offset + end}, the file has {self.size}"
            )
        return Entry(DTYPES[name], shape, offset + start, expected)

    def _check_order(self, offset: int) -> None:
        """Tensors must fill the file from the header to its end, as the reference implementation demands."""
        end = offset
        for key, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].size)):
            if entry.start != end:
                what = "overlaps another tensor" if entry.start < end else "comes after bytes of no tensor"
                raise CheckpointError(f"{self.path}: {key!r} starts at byte {entry.start}, expected {end}: it {what}")
            end += entry.size
        if end != self.size:
            raise CheckpointError(f"{self.path}: {self.size - end} bytes too many: its tensors end at byte {end}")

    def view(self, key: str) -> Tensor:
        """The tensor as a view into the mapped file; writing to it does not change the file."""
        entry = self.entries[key]
        if self._bytes is None:
            try:
                self._bytes = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
            except RuntimeError as error:  # gone since, or larger than the memory of this machine
                raise CheckpointError(f"{self.path}: cannot be mapped into memory: {error}") from error
        raw = self._bytes[entry.start : entry.start + entry.size]
        if entry.start % entry.dtype.itemsize:  # old writers did not align the header
            raw = raw.clone()
        return raw.view(entry.dtype).view(entry.shape)

    def read(self, key: str, out: Tensor) -> None:
        """Copy the tensor into `out`: contiguous, of the same dtype and number of elements."""
        entry = self.entries[key]
        buffer: Any = out.view(-1).view(torch.uint8).numpy()  # a buffer, but not to type checkers before 3.12
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                done = 0
                while done < entry.size:
                    count = file.readinto(memoryview(buffer)[done:])
                    if not count:
                        raise CheckpointError(f"{self.path}: cut off while {key!r} was being read")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: the same tensors always give the same bytes.

    Not by the safetensors library, which shuffles the metadata and makes files that only their owner may read.
    """
    kinds = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    stream_tensors(path, kinds, tensors.__getitem__, metadata)


def stream_tensors(
    path: Path,
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file whose tensors are made one after the other, so that only one is in memory.

    Args:
        kinds: dtype and shape of every tensor.
        tensor_of: makes the tensor of a key; called once for each.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(kinds, key=lambda key: (-kinds[key][0].itemsize, key))  # large items first: all are aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key in order:
        dtype, shape = kinds[key]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            tensor = tensor_of(key)
            assert (tensor.dtype, tuple(tensor.shape)) == kinds[key], f"{key} is not what was announced"
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


class TensorSource(Mapping[str, Tensor]):
    """The tensors of one or several files as one mapping.

    Attributes:
        files: the files, in order.
        metadata: of all headers together.
        entries: dtype and shape of every key, without reading data.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = [TensorFile(path) for path in paths]
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        self._home: dict[str, TensorFile] = {}
        for file in self.files:
            self.metadata.update(file.metadata)
            for key, entry in file.entries.items():
                if key in self._home:
                    raise CheckpointError(f"{key!r} is in {self._home[key].path} and again in {file.path}")
                self._home[key], self.entries[key] = file, entry

    def __getitem__(self, key: str) -> Tensor:
        return self._home[key].view(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, key: str, out: Tensor) -> None:
        """Copy a tensor into `out` (same dtype, contiguous)."""
        self._home[key].read(key, out)

    def __str__(self) -> str:
        names = ", ".join(str(file.path) for file in self.files[:3])
        return names + (f" and {len(self.files) - 3} more" if len(self.files) > 3 else "")


def shard_paths(index: Path) -> list[Path]:
    """The files that an index (`*.safetensors.index.json`) names.

    Raises:
        CheckpointError: the index is malformed, or shards are missing; all of them are named.
    """
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a safetensors index: {type(error).__name__}: {error}") from error
    if not names or any(not isinstance(name, str) for name in names):
        raise CheckpointError(f"{index}: not a safetensors index: its weight_map names no files")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names {len(names)} files, of which these are missing: {', '.join(missing)}")
    return [index.parent / name for name in names]


def tensor_paths(path: str | Path) -> list[Path]:
    """The safetensors files behind a file, an index, or a folder with one model in it.

    Raises:
        CheckpointError: there are none, or a folder holds several models.
    """
    path = Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        return shard_paths(path)
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path}: no such file")
        return [path]
    indices = sorted(path.glob("*" + INDEX_SUFFIX))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return shard_paths(indices[0])
    if len(files) == 1:
        return files
    found = ", ".join(file.name for file in [*indices, *files]) or "none"
    raise CheckpointError(f"{path}: expected one safetensors file, or one index of shards; found {found}")


def open_tensors(path: str | Path) -> TensorSource:
    """The tensors of a file, an index of shards, or a folder."""
    return TensorSource(tensor_paths(path))
