"""Many pictures as one file, made while it is sent: it takes no room, however many they are."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

BLOCK = 2**18  # bytes read at once


class _Pipe(io.RawIOBase):
    """A file that can only be written to, and is taken away as it grows."""

    def __init__(self) -> None:
        self.waiting = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        self.waiting += memoryview(data).cast("B")  # pyright: ignore[reportArgumentType]
        return len(memoryview(data))  # pyright: ignore[reportArgumentType]

    def taken(self) -> bytes:
        data = bytes(self.waiting)
        self.waiting.clear()
        return data


def zipped(files: Iterable[tuple[str, Path]]) -> Iterator[bytes]:
    """A zip archive, piece by piece; pictures are compressed already, and stored as they are.

    Files that go while it is made, or cannot be read, are named in `left out.txt` inside.

    Args:
        files: names inside the archive, and where the files are.
    """
    pipe = _Pipe()
    missing: list[str] = []
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
        for name, path in files:
            try:
                source = path.open("rb")
            except OSError as error:
                missing.append(f"{name}: {error.strerror}")
                continue
            with source, archive.open(zipfile.ZipInfo.from_file(path, name), "w", force_zip64=True) as inside:
                while block := source.read(BLOCK):
                    inside.write(block)
                    yield pipe.taken()
            yield pipe.taken()
        if missing:
            archive.writestr("left out.txt", "\n".join(missing) + "\n")
    yield pipe.taken()


def name_of(number: int, words: str, end: str = ".png") -> str:
    """A name that every system takes: a number, and the first words of a prompt."""
    plain = re.sub("[^a-z0-9]+", "-", words[:200].lower()).strip("-")[:60].strip("-")
    return f"{number:04d}{'-' * bool(plain)}{plain}{end}"
