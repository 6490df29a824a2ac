"""JSON from files that anybody may have written: bounded, and read the same way by every parser.

A few megabytes of brackets become hundreds of megabytes of Python objects, a key that stands twice means something
else to every reader, and Python takes halves of surrogate pairs for characters.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO

from miniflux.errors import CheckpointError

MAX_JSON = 8_000_000  # bytes
# Published headers have 0.15 MB, with all side tensors of nf4 0.6 MB; sd-scripts writes every tag of its data there,
# some MB of one string. 100 MB, the limit of the reference implementation, would take seconds and gigabytes.
MAX_HEADER = 20_000_000
MAX_MEMORY = 48_000_000  # bytes of the text in memory, where one rare character makes all of them wide
MAX_MARKS = 250_000  # brackets and commas: how many objects become of the text; published headers have 45,000 at most


def json_of(text: bytes, what: str, most: int = MAX_JSON, marks: int = MAX_MARKS) -> Any:
    """The value of a JSON text.

    Args:
        what: a name for the text, which messages begin with.
        most: bytes that are read.
        marks: brackets and commas that are read; the text may take memory in proportion.

    Raises:
        CheckpointError: it is too large, not UTF-8, not JSON, or gives a key twice.
    """
    if len(text) > most:
        raise CheckpointError(f"{what} has more than {most:,} bytes, which are not read")
    if _marks(text) > marks and _marks(_without_strings(text, marks)) > marks:
        raise CheckpointError(f"{what} is JSON of more than {marks:,} items, which is not read")
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is no JSON: not UTF-8 at byte {error.start}") from error
    if sys.getsizeof(decoded) > MAX_MEMORY * marks // MAX_MARKS:
        raise CheckpointError(f"{what} has {len(decoded):,} characters, some of which take four bytes; it is not read")
    try:
        return json.loads(decoded, object_pairs_hook=_object, parse_int=_whole)
    except _DuplicateKey as error:
        raise CheckpointError(f"{what} {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is no JSON: {str(error) or type(error).__name__:.200}") from error


def _marks(text: bytes) -> int:
    return sum(map(text.count, (b"[", b"{", b",")))


def _without_strings(text: bytes, marks: int) -> bytes:
    """What of a JSON text is outside of its strings: commas in a trainer's tags make no objects."""
    text = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # what is left of quotes begins and ends strings
    if text.count(b'"') > 4 * marks:  # a string has two, and a mark beside it for every key and value
        return b"," * (marks + 1)
    return b"".join(text.split(b'"')[::2])


def json_file(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        CheckpointError: as of `json_of`; or the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            return json_of(file.read(MAX_JSON + 1), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; never a pipe or a device, which may have no end.

    Raises:
        CheckpointError: it is no regular file.
        OSError: it cannot be opened.
    """
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # opening a folder says so by itself
        raise CheckpointError(f"{path}: cannot be read: it is a pipe or a device, not a file")
    return path.open("rb")


class _DuplicateKey(ValueError):
    """A key stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(f"gives {shown(key)} twice")
            seen.add(key)
    for key, value in pairs:
        for text in (key, value):
            if isinstance(text, str) and not text.isascii():
                text.encode("utf-8")  # half a surrogate pair is no character; raises a ValueError
    return found


def _whole(digits: str) -> int | float:
    """JSON's `-0` is not the whole number 0: elsewhere it is read as a floating-point number."""
    return -0.0 if digits == "-0" else int(digits)


def shown(value: object) -> str:
    """Something out of a file for a message of one line: quoted, and cut if it is long."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 100 else f"{value[:80]!r}... ({len(value):,} characters)"
    return reprlib.repr(value)
