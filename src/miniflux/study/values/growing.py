"""A file of safetensors that grows: values are written as they come, and the header, which stands before them, at the
end. No value is held for it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from miniflux.disk import write_beside
from miniflux.errors import OutputError

HEADER = 4 * 2**20  # bytes that are left for the names; a header that is longer has all values moved behind it
BLOCK = 16 * 2**20  # bytes that are moved at once
DTYPES = {  # as safetensors names them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where in a file a value is, in bytes."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, path: Path) -> Tensor:
        """The value."""
        with open(path, "rb") as file:
            file.seek(self.start)
            data = bytearray(file.read(self.stop - self.start))
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape) if data else torch.empty(self.shape)


class Growing:
    """The file while it grows.

    Args:
        path: what it will be called; None for one that goes with this object.

    Attributes:
        at: where it is now.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._end = path, HEADER
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="miniflux-capture-") if path is None else None
            folder = Path(self._folder.name) if self._folder is not None else cast(Path, path).parent
            name = "capture" if path is None else f".{path.name}.part"
            self.at = folder / name
            self._file = open(self.at, "w+b", buffering=0)  # noqa: SIM115  # unbuffered: it is read meanwhile
        except OSError as error:
            raise OutputError(f"{path or 'a temporary file'}: cannot be written: {error.strerror or error}") from error

    def write(self, value: Tensor) -> Stored:
        """Append a value, which is on the CPU."""
        start = self._end
        if value.numel():
            data: Any = value.contiguous().flatten().view(torch.uint8).numpy()
            self._put(memoryview(data), start)
        self._end = start + value.numel() * value.element_size()
        return Stored(start, self._end, value.dtype, tuple(value.shape))

    def finish(self, values: Mapping[str, Stored], about: Mapping[str, str]) -> int:
        """Write the header, and give the file its name; returns by how much all values have moved."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", **about}}
        for name, value in values.items():
            offsets = [value.start - HEADER, value.stop - HEADER]
            entries[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        header = json.dumps(entries, separators=(",", ":")).encode()
        room = max(HEADER, -(-(len(header) + 8) // 8) * 8)
        self._move(room - HEADER)
        self._put(memoryview((room - 8).to_bytes(8, "little") + header.ljust(room - 8)), 0)
        self._file.close()
        if self._path is not None:
            write_beside(self._path, self.at.replace)
            self.at = self._path
        return room - HEADER

    def give_up(self) -> None:
        """Leave no half file behind."""
        self._file.close()
        with suppress(OSError):
            self.at.unlink()

    def _put(self, data: memoryview, start: int) -> None:
        try:
            self._file.seek(start)
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise OutputError(f"{self._path or self.at}: cannot be written: {error.strerror or error}") from error

    def _move(self, by: int) -> None:
        """All values towards the end, from the last on."""
        stop = self._end if by else HEADER
        while stop > HEADER:
            here = max(HEADER, stop - BLOCK)
            self._file.seek(here)
            self._put(memoryview(cast(bytes, self._file.read(stop - here))), here + by)
            stop = here


def moved(value: Stored, by: int) -> Stored:
    """Where a value is, when all have moved."""
    return replace(value, start=value.start + by, stop=value.stop + by)
