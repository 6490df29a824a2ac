"""Files on the disk: written beside and renamed, hashed, and folders that can be filled."""

from __future__ import annotations

import hashlib
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from miniflux.errors import OutputError

BLOCK = 2**20  # bytes that are read at once


def folder_to_fill(folder: Path, what: str) -> None:
    """Make a folder, if it is not there, that only this user can read; see that files can be written into it.

    Args:
        what: is kept there, for the error.

    Raises:
        OutputError: it cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"here")
    except OSError as error:
        raise OutputError(f"{folder}: no folder for {what}: {error.strerror or error}") from error


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it: there is never half a file, and what was there stays.

    Raises:
        OutputError: the place cannot be written to, has no room, or the name is none.
    """
    if "\0" in str(path):
        raise OutputError(f"{str(path)!r}: cannot be written: a name without NUL was expected")
    # A name of its own, so that two writers do not meet; short, because that of `path` may be as long as names may be.
    beside = path.with_name(f"{secrets.token_hex(8)}.part")
    try:
        try:
            write(beside)
            beside.replace(path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                beside.unlink()
            raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def digest_of(path: str | Path, digest: Any = None) -> str:
    """The hash of a file of any size, in hexadecimal: SHA-256, or that of another kind that has begun.

    Raises:
        OSError: it cannot be read.
    """
    digest, buffer = digest or hashlib.sha256(), bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
