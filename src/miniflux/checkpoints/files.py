"""Tensors in safetensors files: one file, or the shards of a folder, as a lazy mapping.

Nothing is read before it is asked for. `source[key]` is a view into the memory-mapped file; `source.read(key, out)`
copies into memory that the caller owns, without leaving pages of the file behind.
Format: 8 bytes length, a JSON header, the data (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniflux.checkpoints.beginnings import HEAD, kind_of_file
from miniflux.checkpoints.folders import tensor_paths
from miniflux.errors import CheckpointError
from miniflux.strictjson import MAX_HEADER, json_of, open_regular, shown

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
FIELDS = ("dtype", "shape", "data_offsets")  # of a tensor's entry in the header, and no others
LARGE = 2**22  # bytes of a tensor that gets memory of its own from the system
MAX_AXES = 32  # of a tensor's shape; published tensors have 5 at most


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its dtype, its shape and its place in the file, in bytes.

    Of packed tensors in GGUF files also the type of block, and the shape of what is packed.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    block: str = ""
    unpacked: tuple[int, ...] = ()


class TensorFile:
    """One safetensors file: its header is read and checked now, its tensors when asked for.

    Raises:
        CheckpointError: the file is missing, empty, cut off, or its header contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                self.size = os.fstat(file.fileno()).st_size
                head = file.read(HEAD)
                if len(head) < 8:
                    raise CheckpointError(f"{path}: {self.size} bytes are too few for a safetensors file")
                (length,) = struct.unpack("<Q", head[:8])
                if length > self.size - 8 or length > MAX_HEADER or (head[8:9] != b"{" and kind_of_file(head)):
                    raise CheckpointError(f"{path}: {self._stranger(head, length)}")
                file.seek(8)
                text = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        header = json_of(text, f"{path}: its header", MAX_HEADER)
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: its header is no JSON object, as that of a safetensors file is")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{path}: its __metadata__ is not a JSON object of strings")
        self.metadata: dict[str, str] = metadata
        self.entries = {key: self._entry(key, about, 8 + length) for key, about in header.items()}
        if not self.entries:
            raise CheckpointError(f"{path}: holds no tensors")
        self._check_order(8 + length)
        self._bytes: Tensor | None = None

    def _stranger(self, begin: bytes, length: int) -> str:
        """What is wrong with a file whose first bytes are no length of a header, or of one that is not read."""
        kind = kind_of_file(begin)
        if kind is not None:
            hint = "; its name must end in .gguf" if kind == "a GGUF file" else ""
            return f"not a safetensors file: it looks like {kind}{hint}"
        if length > self.size - 8:
            return f"not a safetensors file, or cut off: its header claims {length} bytes, {self.size - 8} follow"
        return (
            f"its header has {length:,} bytes, of which at most {MAX_HEADER:,} are read; where a trainer wrote all its "
            "tags there, save the file without them"
        )

    def _entry(self, key: str, about: Any, offset: int) -> Entry:
        fields: list[Any] = [about.get(field) for field in FIELDS] if isinstance(about, dict) else [None] * 3
        name, shape, offsets = fields
        numbers = _whole(shape, MAX_AXES) and _whole(offsets, 2) and len(offsets) == 2
        if (
            not isinstance(name, str)
            or not numbers
            or len(about) > len(FIELDS)
            or math.prod(max(n, 1) for n in shape) >= 2**63
        ):
            raise CheckpointError(f"{self.path}: the header entry of {shown(key)} is malformed: {shown(about)}")
        start, end = offsets
        if name not in DTYPES:
            raise CheckpointError(f"{self.path}: {shown(key)} has the unknown dtype {shown(name)}")
        expected = math.prod(shape) * DTYPES[name].itemsize
        if end - start != expected:
            raise CheckpointError(
                f"{self.path}: {shown(key)} of shape {shape} and dtype {name} needs {expected} bytes, "
                f"its header says {end - start}"
            )
        if offset + end > self.size:
            raise CheckpointError(
                f"{self.path}: cut off: {shown(key)} ends at byte {offset + end}, the file has {self.size}"
            )
        return Entry(DTYPES[name], tuple(shape), offset + start, expected)

    def _check_order(self, offset: int) -> None:
        """Tensors must fill the file from the header to its end, as the reference implementation demands."""
        end = offset
        for key, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].size)):
            if entry.start != end:
                what = "overlaps another tensor" if entry.start < end else "comes after bytes of no tensor"
                raise CheckpointError(
                    f"{self.path}: {shown(key)} starts at byte {entry.start}, expected {end}: it {what}"
                )
            end += entry.size
        if end != self.size:
            raise CheckpointError(f"{self.path}: {self.size - end} bytes too many: its tensors end at byte {end}")

    def view(self, key: str) -> Tensor:
        """The tensor as a view into the mapped file; writing to it does not change the file."""
        entry = self.entries[key]
        if self._bytes is None:
            try:
                self._bytes = _mapped(self.path, self.size)
            except (OSError, ValueError) as error:  # gone or shorter since
                raise CheckpointError(f"{self.path}: cannot be mapped into memory: {error}") from error
        raw = self._bytes[entry.start : entry.start + entry.size]
        if entry.start % entry.dtype.itemsize:  # old writers did not align the header
            raw = raw.clone()
        return raw.view(entry.dtype).view(entry.shape)

    def read(self, key: str, out: Tensor, first: int = 0) -> None:
        """Copy the tensor, or as much of it as `out` holds from element `first` on, into `out`: contiguous, of the same
        dtype."""
        entry = self.entries[key]
        size = out.numel() * out.itemsize
        assert first * out.itemsize + size <= entry.size, f"{key} has no so many elements"
        buffer: Any = out.view(-1).view(torch.uint8).numpy()  # a buffer, but not to type checkers before 3.12
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.start + first * out.itemsize)
                done = 0
                while done < size:
                    count = file.readinto(memoryview(buffer)[done:])
                    if not count:
                        raise CheckpointError(f"{self.path}: cut off while {shown(key)} was being read")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error


# Readers of other kinds of files, by the ending of their names; each enters itself.
READERS: dict[str, type[TensorFile]] = {}


def open_file(path: Path) -> TensorFile:
    """A file of tensors: safetensors, unless its name ends as that of another kind."""
    return READERS.get(path.suffix.lower(), TensorFile)(path)


def _mapped(path: Path, size: int) -> Tensor:
    """The bytes of a file: writing to them makes a private copy. No memory is set aside for such copies beforehand,
    which Linux would refuse for a file larger than the memory of the machine."""
    with path.open("rb") as file:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
            return torch.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
        area = mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(area, dtype=torch.uint8)


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Memory for a tensor, not filled. On the CPU that of a large one is the system's own: in large pages where there
    are any, because setting up small ones takes longer than the copying that they are for; and given back when
    the tensor is let go of, where the C library's heap would keep it and grow with every size that comes along."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or torch.device(device).type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system built without them
            area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=dtype).view(tuple(shape))


def _whole(numbers: object, most: int) -> bool:
    """Whether this is a list of at most `most` whole numbers from 0 to 2**63; true and false are none."""
    return (
        isinstance(numbers, list) and len(numbers) <= most and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    )


class TensorSource(Mapping[str, Tensor]):
    """The tensors of one or several files as one mapping.

    Attributes:
        files: the files, in order.
        metadata: of all headers together.
        entries: dtype and shape of every key, without reading data.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = [open_file(path) for path in paths]
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        self._home: dict[str, TensorFile] = {}
        for file in self.files:
            self.metadata.update(file.metadata)
            for key, entry in file.entries.items():
                if key in self._home:
                    raise CheckpointError(f"{shown(key)} is in {self._home[key].path} and again in {file.path}")
                self._home[key], self.entries[key] = file, entry

    def __getitem__(self, key: str) -> Tensor:
        return self._home[key].view(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, key: str, out: Tensor, first: int = 0) -> None:
        """Copy a tensor, or a run of its elements from `first` on, into `out` (same dtype, contiguous)."""
        self._home[key].read(key, out, first)

    def __str__(self) -> str:
        names = ", ".join(str(file.path) for file in self.files[:3])
        return names + (f" and {len(self.files) - 3} more" if len(self.files) > 3 else "")


class Selection(TensorSource):
    """Some of the tensors of a source, under names of their own.

    Args:
        names: own name -> name there.
        title: what it is called; None for the name of the whole.
    """

    def __init__(self, whole: TensorSource, names: Mapping[str, str], title: str | None = None) -> None:
        self.whole, self.names, self.title = whole, dict(names), title or str(whole)
        self.files, self.metadata = whole.files, dict(whole.metadata)
        self.entries = {own: whole.entries[name] for own, name in self.names.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self.whole[self.names[key]]

    def read(self, key: str, out: Tensor, first: int = 0) -> None:
        self.whole.read(self.names[key], out, first)

    def __str__(self) -> str:
        return self.title


def open_tensors(path: str | Path) -> TensorSource:
    """The tensors of a file, an index of shards, or a folder."""
    return TensorSource(tensor_paths(path))
