"""Files by the SHA-256 of what is in them: written once, never changed, gone when they are old or too many."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from miniflux.checks import shown
from miniflux.disk import folder_to_fill, write_beside
from miniflux.errors import InputError

NAME = re.compile(r"[0-9a-f]{64}\.(png|jpg|webp)")
LEFT_OVER = 3600.0  # seconds after which a file that was never finished is taken for one that never will be


class Blobs:
    """A folder of them, which several processes may fill.

    Raises:
        OutputError: the folder cannot be made, or not be written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        folder_to_fill(self.folder, "pictures")

    def add(self, data: bytes, ending: str) -> str:
        """Keep a file; returns its name. Those of the same content are one, which is young again.

        Raises:
            OutputError: it cannot be written.
        """
        name = f"{hashlib.sha256(data).hexdigest()}.{ending}"
        try:
            os.utime(self.path(name))
        except OSError:
            write_beside(self.path(name), lambda beside: beside.write_bytes(data))
        return name

    def path(self, name: str) -> Path:
        """Where one is, or would be.

        Raises:
            InputError: it is no name of one.
        """
        if not NAME.fullmatch(name):
            raise InputError(f"no name of a picture: {shown(name)}")
        return self.folder / name

    def __contains__(self, name: str) -> bool:
        return self.path(name).is_file()

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(when it was written, bytes, path) of everything in the folder."""
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process has taken it away
                about = path.stat()
                yield about.st_mtime, about.st_size, path

    def expire(self, seconds: float, max_bytes: int) -> int:
        """Remove what is older, then the oldest until the rest is small enough; returns how many files went."""
        now, gone = time.time(), 0
        files = sorted(self._files())
        left = sum(size for _, size, _ in files)
        for when, size, path in files:
            finished = NAME.fullmatch(path.name) is not None
            old = now - when > (seconds if finished else LEFT_OVER)
            if not (old or (finished and left > max_bytes)):
                continue
            with suppress(FileNotFoundError):
                if path.stat().st_mtime > when:  # somebody has just kept the same content
                    continue
                path.unlink()
            left -= size
            gone += 1
        return gone
