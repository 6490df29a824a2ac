"""Which files something was made from, and their SHA-256: computed when asked for, once per file."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miniflux.checkpoints.folders import tensor_paths
from miniflux.disk import digest_of, write_beside
from miniflux.errors import CheckpointError, OutputError
from miniflux.weights.finding import PARTS, Files

log = logging.getLogger(__name__)

LARGE = 64 * 2**20  # bytes; hashes of larger files are kept from one run to the next
SMALL_FILES = (
    *("config.json", "tokenizer.json", "tekken.json", "vocab.json", "merges.txt", "spiece.model"),
    "adapter_config.json",
)
"""What a part is made of beside its tensors."""


@dataclass(frozen=True)
class Stamp:
    """A file as it was when it was opened: if it has changed since, nothing is said about it any more.

    Attributes:
        path: where it lies.
        size, modified: bytes, and nanoseconds since 1970.
    """

    path: str
    size: int
    modified: int

    @classmethod
    def of(cls, path: str | Path) -> Stamp:
        """The file as it is now.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            about = os.stat(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        return cls(os.path.abspath(path), about.st_size, about.st_mtime_ns)

    def sha256(self) -> str:
        """64 hexadecimal digits. Computed once; of large files kept in the user's cache folder.

        Raises:
            CheckpointError: the file has changed since it was opened, or cannot be read.
        """
        if Stamp.of(self.path) != self:  # mapped tensors may have changed with it
            raise CheckpointError(f"{self.path}: has changed since it was loaded")
        return _HASHES.of(self)


class Edited(Stamp):
    """A file whose contents were changed in memory after it was loaded: its hash is not that of what is used."""

    @classmethod
    def like(cls, stamp: Stamp) -> Edited:
        """The same file."""
        return cls(stamp.path, stamp.size, stamp.modified)

    def sha256(self) -> str:
        """None can be given.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{self.path}: what was loaded from it has been changed in memory")


@dataclass(frozen=True)
class Origin:
    """What a pipeline was loaded from.

    Attributes:
        name: the variant's name, or the path that `load` was given.
        dtype: the precision that `load` was asked for; None if it chose.
        files: (part, file) of everything it was read from, weights first.
        kept: what `miniflux.loaded` remembers of it.
    """

    name: str
    dtype: str | None
    files: tuple[tuple[str, Stamp], ...]
    kept: dict[str, Any] = field(default_factory=dict[str, Any], compare=False, repr=False)


def stamped(files: Files) -> tuple[tuple[str, Stamp], ...]:
    """The files of every part of a model."""
    return tuple(
        (part, stamp)
        for part in PARTS
        if (path := getattr(files, part)) is not None
        for stamp in stamps(path, part.endswith("tokenizer"))
    )


def stamps(path: Path, tokenizer: bool = False) -> list[Stamp]:
    """The files behind a path: those with tensors, unless it is a tokenizer's, and the small ones of their folder."""
    found = [] if tokenizer else tensor_paths(path)
    folder = path if path.is_dir() else path.parent
    if tokenizer or path.is_dir():
        found += [folder / name for name in SMALL_FILES if (folder / name).is_file()]
    return [Stamp.of(file) for file in found or [path]]


def hashed(files: Iterable[tuple[str, Stamp]]) -> list[dict[str, Any]]:
    """For the settings of a picture: part, name, size and hash of every file; the hash is None if it has changed."""
    told: list[dict[str, Any]] = []
    for part, stamp in files:
        try:
            digest = stamp.sha256()
        except CheckpointError as error:
            log.warning("%s: its hash is left out of the settings", error)
            digest = None
        told.append({"part": part, "file": Path(stamp.path).name, "bytes": stamp.size, "sha256": digest})
    return told


def belongs(part: str, settings: Mapping[str, Any]) -> bool:
    """Whether a picture was made from a part of its call: all but the LoRAs of its neighbours, which its settings do
    not name."""
    return not part.startswith("lora ") or any(part == f"lora {about['name']}" for about in settings["loras"])


class _Hashes:
    """Hashes of files by path, size and time of modification."""

    def __init__(self) -> None:
        self.known: dict[Stamp, str] = {}
        self.lock = threading.Lock()
        self.read = False

    def of(self, stamp: Stamp) -> str:
        with self.lock:
            if stamp.size >= LARGE and not self.read:
                self.known |= _kept()
                self.read = True
            if stamp not in self.known:
                self.known[stamp] = _computed(stamp)
                if stamp.size >= LARGE:
                    _keep({s: digest for s, digest in self.known.items() if s.size >= LARGE})
            return self.known[stamp]


_HASHES = _Hashes()


def _computed(stamp: Stamp) -> str:
    try:
        digest = digest_of(stamp.path)
    except OSError as error:
        raise CheckpointError(f"{stamp.path}: cannot be read: {error.strerror}") from error
    if Stamp.of(stamp.path) != stamp:
        raise CheckpointError(f"{stamp.path}: has changed since it was loaded")
    return digest


def _store() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "miniflux" / "sha256.json"


def _kept() -> dict[Stamp, str]:
    """Hashes of earlier runs; none if there are none, or they cannot be read."""
    try:
        rows = json.loads(_store().read_text("utf-8"))
        return {Stamp(str(path), int(size), int(modified)): str(digest) for path, size, modified, digest in rows}
    except (OSError, ValueError, TypeError):
        return {}


def _keep(hashes: dict[Stamp, str]) -> None:
    rows = [[stamp.path, stamp.size, stamp.modified, digest] for stamp, digest in hashes.items()]

    def write(beside: Path) -> None:
        beside.write_text(json.dumps(rows), "utf-8")

    try:
        _store().parent.mkdir(parents=True, exist_ok=True)
        write_beside(_store(), write)
    except (OSError, OutputError) as error:
        log.info("hashes of large files are not kept: %s", error)
