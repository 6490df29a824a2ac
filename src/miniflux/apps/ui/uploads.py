"""Files that people send to the page: bounded, each session's apart, and gone when nobody uses them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from miniflux.apps.web.bodies import RefusedError
from miniflux.disk import write_beside
from miniflux.errors import OutputError

log = logging.getLogger(__name__)

FILE_BYTES = 2 * 2**30  # of a file, and of what is dropped in one go; LoRAs are the largest
FORM_BYTES = 2**16  # around the files
SESSION_BYTES = 4 * 2**30  # of one session: files on their way, and LoRAs in its list
ALL_BYTES = 16 * 2**30  # of all sessions
FREE_BYTES = 2**30  # stay free on the disk
REQUEST_FILES, SESSION_FILES, ALL_FILES = 64, 256, 16384
UPLOAD_SECONDS = 15 * 60  # a file is read as soon as it is there; LoRAs are then kept elsewhere
SLOTS = 32  # pictures that a session has sent and that are in no slot of the page, as far as is known: the latest ones
SHOWN = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # what is shown in a slot
IDLE_SECONDS = 24 * 3600  # after which a session that asks for nothing has left


@dataclass
class _Held:
    """Files of one request."""

    session: str
    folder: Path
    bytes: int = 0
    files: int = 0
    since: float = float("inf")  # still on their way
    shown: bool = False  # pictures, which may stay in slots of the page as long as its session is there
    used: bool = False  # known to be in a slot


@dataclass
class _Kept:
    """A file in the lists of sessions."""

    bytes: int
    since: float
    sessions: set[str] = field(default_factory=set[str])


class Uploads:
    """What has been sent.

    Args:
        folder: for files on their way; made, and removed by `close`.
        kept: for files that stay, one folder each; what an earlier page left there goes after a day.
        busy: whether a session still needs a kept file that it has let go.
    """

    def __init__(
        self, folder: Path, kept: Path, busy: Callable[[str, Path], bool] = lambda session, place: False
    ) -> None:
        self.folder, self.place, self.busy = folder, kept, busy
        self.file_bytes, self.session_bytes, self.all_bytes = FILE_BYTES, SESSION_BYTES, ALL_BYTES
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.RLock()
        self._held: list[_Held] = []
        self._leaving: list[tuple[str, Path]] = []
        self._seen: dict[str, float] = {}
        self._kept = {
            path: _Kept((about := path.stat()).st_size, about.st_mtime) for path in kept.glob("*/*") if path.is_file()
        }

    # Room

    def used(self, session: str | None = None) -> int:
        """Bytes of a session, or of all."""
        with self._lock:
            held = sum(one.bytes for one in self._held if session in (None, one.session))
            kept = sum(one.bytes for one in self._kept.values() if session is None or session in one.sessions)
            return held + kept

    def _take(self, held: _Held, more: int) -> None:
        """Count bytes to files that are on their way.

        Raises:
            RefusedError: there is no room for them.
        """
        with self._lock:
            if self.used(held.session) + more > self.session_bytes:
                raise RefusedError(413, f"one browser may have sent {_size(self.session_bytes)} at once, and no more")
            if self.used() + more > self.all_bytes:
                raise RefusedError(507, f"all browsers together may have sent {_size(self.all_bytes)}, and no more")
            if shutil.disk_usage(self.folder).free < more + FREE_BYTES:
                raise RefusedError(507, "the disk is nearly full")
            held.bytes += more

    async def receive(
        self, session: str, content_type: str, length: int | None, pieces: AsyncIterator[bytes]
    ) -> list[Path]:
        """Write the files of a multipart body as it comes.

        Args:
            content_type: with the boundary between the files.
            length: of the body, if it is known: room for all of it is then taken before any of it is read.

        Raises:
            RefusedError: it is no such body, or there is no room; nothing of it is left then.
        """
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise RefusedError(400, "files come as multipart/form-data")
        most = self.file_bytes + FORM_BYTES
        too_much = RefusedError(413, f"more than {_size(self.file_bytes)} in one go")
        if length is not None and length > most:
            raise too_much
        self.sweep()
        held = _Held(session, self.folder / secrets.token_hex(16))
        with self._lock:
            self._seen[session] = time.time()
            if sum(one.files for one in self._held if one.session == session) >= SESSION_FILES:
                raise RefusedError(413, f"one browser may have sent {SESSION_FILES} files at once, and no more")
            if sum(one.files for one in self._held) >= ALL_FILES:
                raise RefusedError(507, f"all browsers together may have sent {ALL_FILES} files, and no more")
            self._take(held, length or 0)
            self._held.append(held)
        try:
            files, got = None, 0
            try:
                held.folder.mkdir(mode=0o700)
                files = _Files(options[b"boundary"], held.folder)
                async for piece in pieces:
                    got += len(piece)
                    if got > most:
                        raise too_much
                    if got > held.bytes:
                        self._take(held, got - held.bytes)
                    await run_in_threadpool(files.write, piece)
                paths = files.finish()
            except (FormParserError, OSError) as error:
                raise RefusedError(*_refusal(error)) from error
            finally:
                if files is not None:
                    files.close()
            held.files, held.bytes, held.since = len(paths), sum(path.stat().st_size for path in paths), time.time()
            held.shown = all(path.suffix.lower() in SHOWN for path in paths)
            with self._lock:
                loose = [one for one in self._held if one.session == session and one.shown and not one.used]
                for old in loose[:-SLOTS]:
                    self._drop(old)
            return paths
        except BaseException:
            self._drop(held)
            raise

    def own(self, session: str, path: Path) -> bool:
        """Whether a path is that of a picture that this session has sent, and that is still here."""
        with self._lock:
            held = any(one.session == session and one.shown and one.folder in path.parents for one in self._held)
        return held and ".." not in path.parts and path.suffix.lower() in SHOWN and path.is_file()

    def hold(self, session: str, name: str, write: Callable[[Path], object]) -> Path:
        """A picture that was made for a session, as if it had sent it.

        Raises:
            OutputError: it cannot be written.
        """
        held = _Held(session, self.folder / secrets.token_hex(16), files=1, since=time.time(), shown=True)
        path = held.folder / name
        try:
            held.folder.mkdir(mode=0o700)
            write(path)
        except OSError as error:
            shutil.rmtree(held.folder, ignore_errors=True)
            raise OutputError(f"{name}: cannot be kept: {error.strerror or error}") from error
        held.bytes = path.stat().st_size
        with self._lock:
            self._seen[session] = time.time()
            self._held.append(held)
        return path

    def use(self, session: str, paths: Sequence[Path]) -> None:
        """These pictures are in slots of a session now, and no others."""
        with self._lock:
            for held in [one for one in self._held if one.session == session]:
                held.used = any(held.folder in path.parents for path in paths)

    def done(self, session: str, paths: Sequence[Path]) -> None:
        """Files that a session has sent, and that were read for good."""
        with self._lock:
            for held in [one for one in self._held if one.session == session]:
                if any(held.folder in path.parents for path in paths):
                    self._drop(held)

    def _drop(self, held: _Held) -> None:
        with self._lock:
            if held in self._held:
                self._held.remove(held)
            shutil.rmtree(held.folder, ignore_errors=True)

    # Files that stay

    def keep(self, session: str, path: Path, place: Path) -> None:
        """Move a file that was sent to where it stays while this session has it; copy any other file there.

        Raises:
            OutputError: it cannot be written there; nothing of it is left.
        """
        with self._lock:
            own = any(one.folder in path.parents for one in self._held)
            if not place.exists():
                try:
                    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    write_beside(place, lambda beside: (shutil.move if own else shutil.copyfile)(path, beside))
                except (OSError, OutputError) as error:
                    with contextlib.suppress(OSError):
                        place.parent.rmdir()
                    cause = error if isinstance(error, OSError) else error.__cause__
                    raise OutputError(f"{path.name}: cannot be kept: {getattr(cause, 'strerror', error)}") from error
            kept = self._kept.setdefault(place, _Kept(place.stat().st_size, time.time()))
            kept.sessions.add(session)
            self._leaving = [one for one in self._leaving if one != (session, place)]
            self._seen[session] = time.time()
            for held in [one for one in self._held if one.folder in path.parents]:
                path.unlink(missing_ok=True)
                held.bytes = sum(file.stat().st_size for file in held.folder.rglob("*") if file.is_file())

    def let_go(self, session: str, place: Path) -> None:
        """A session has no more use for a kept file; it goes once nobody has."""
        with self._lock:
            self._leaving.append((session, place))
        self.sweep()

    # Leaving

    def seen(self, session: str) -> None:
        """A session that has sent files is still there."""
        with self._lock:
            if session in self._seen:
                self._seen[session] = time.time()

    def sweep(self, now: float | None = None) -> list[str]:
        """Remove what nobody uses; the sessions that have left.

        Args:
            now: seconds since 1970; None for now.
        """
        now = time.time() if now is None else now
        with self._lock:
            gone = [session for session, when in self._seen.items() if now - when > IDLE_SECONDS]
            for session in gone:
                del self._seen[session]
                self._leaving += [(session, place) for place, one in self._kept.items() if session in one.sessions]
            old = [one for one in self._held if not one.shown and now - one.since > UPLOAD_SECONDS]
            for held in [*old, *(one for one in self._held if one.session in gone and one not in old)]:
                if held.since != float("inf"):
                    self._drop(held)
            left = [one for one in self._leaving if not self.busy(*one)]
            self._leaving = [one for one in self._leaving if one not in left]
            for session, place in left:
                if place in self._kept and session in self._kept[place].sessions:
                    self._kept[place].sessions.discard(session)
                    self._kept[place].since = self._kept[place].since if self._kept[place].sessions else 0.0
            for place, kept in [(place, kept) for place, kept in self._kept.items() if not kept.sessions]:
                if now - kept.since > IDLE_SECONDS:
                    del self._kept[place]
                    place.unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # the same file under another name is still there
                        place.parent.rmdir()
                    log.info("%s: nobody uses it any more", place.name)
            return gone

    def close(self) -> None:
        """Remove what is on its way. Kept files go with their folder, or after a day."""
        with self._lock:
            shutil.rmtree(self.folder, ignore_errors=True)
            for place in self._kept:
                if place.exists():
                    os.utime(place)


class _Files:
    """The files of a multipart body, written as they come; anything else in it is refused."""

    def __init__(self, boundary: bytes, folder: Path) -> None:
        self.folder, self.paths = folder, list[Path]()
        self._file: BinaryIO | None = None
        self._name, self._value, self._disposition = bytearray(), bytearray(), b""
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._header,
                "on_headers_finished": self._open,
                "on_part_data": self._data,
                "on_part_end": self.close,
                "on_end": self._end,
            },
        )

    def write(self, piece: bytes) -> None:
        self._parser.write(piece)

    def finish(self) -> list[Path]:
        if not self._ended or not self.paths:
            raise FormParserError("ended early")
        return self.paths

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._name, self._value = bytearray(), bytearray()
        self._disposition = b""

    def _header(self) -> None:
        if bytes(self._name).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"filename" not in options:
            raise RefusedError(400, "a part that is no file")
        if len(self.paths) >= REQUEST_FILES:
            raise RefusedError(413, f"more than {REQUEST_FILES} files at once")
        place = self.folder / str(len(self.paths))
        place.mkdir(mode=0o700)
        self.paths.append(place / plain_name(options[b"filename"].decode("utf-8", "replace")))
        self._file = self.paths[-1].open("xb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        assert self._file is not None
        self._file.write(data[start:end])

    def _end(self) -> None:
        self._ended = True


def plain_name(text: str) -> str:
    """The last part of a name, as every system can write it; endings stay, and so do letters of all languages."""
    name = re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "", re.split(r"[/\\]", text)[-1]).strip(" .") or "file"
    stem, dot, ending = name.rpartition(".")
    if not dot or len(ending) > 20:
        stem, dot, ending = name, "", ""
    while len(f"{stem}{dot}{ending}".encode("utf-8", "replace")) > 200:
        stem = stem[:-1]
    return f"{stem}{dot}{ending}"


def _refusal(error: Exception) -> tuple[int, str]:
    if isinstance(error, OSError):
        log.warning("an upload cannot be written: %s", error)
        return 507, f"cannot be written: {error.strerror or 'the disk refused it'}"
    return 400, "the body is no whole multipart/form-data"


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
