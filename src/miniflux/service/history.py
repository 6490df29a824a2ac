"""What each session has drawn: pictures in one folder under names nobody can guess, an index per session.

A session is a token that its browser keeps. It survives a reload and a restart; whoever does not know it can neither
list nor open nor delete what belongs to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from miniflux.checkpoints.folders import files_in
from miniflux.checks import whole
from miniflux.disk import folder_to_fill, write_beside
from miniflux.errors import InputError, OutputError, SettingsError
from miniflux.result import Result, checked_output, save_picture
from miniflux.service.archive import name_of, zipped
from miniflux.service.grids import Grid
from miniflux.service.queue import Job
from miniflux.settings import Request, strict

log = logging.getLogger(__name__)

LOADED = 64  # sessions whose entries are kept in memory
UNDO_SECONDS = 600  # for which a deleted picture can be had back


def new_session() -> str:
    """A token for a new session: 32 random characters."""
    return secrets.token_urlsafe(24)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One picture of a session.

    Attributes:
        id: 32 random hexadecimal digits.
        request: what makes this one picture again.
        created: seconds since 1970.
        cached: whether it was answered from the cache.
        title: a line about the job it came from; empty for most.
    """

    id: str
    request: Request
    created: float
    cached: bool = False
    title: str = ""

    @property
    def file(self) -> str:
        """Its name in the folder of pictures."""
        return f"{self.id}.png"

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "request": self.request.as_json(),
            "created": self.created,
            "cached": self.cached,
            "title": self.title,
        }

    @classmethod
    def from_json(cls, value: object) -> Entry:
        about = strict.record("entry", value)
        if not re.fullmatch("[0-9a-f]{32}", strict.text("id", about.get("id"))):
            raise SettingsError(f"id must be 32 hexadecimal digits, got {strict.shown(about['id'])}")
        return cls(
            id=about["id"],
            request=Request.from_json(strict.record("request", about.get("request"))),
            created=strict.number("created", about.get("created")),
            cached=bool(about.get("cached")),
            title=strict.text("title", about.get("title", "")),
        )


@dataclass(frozen=True)
class _Deleted:
    """A picture that was deleted: by which session, when (`time.monotonic`), and its size."""

    key: str
    when: float
    bytes: int


class History:
    """All sessions.

    Args:
        folder: where everything is kept: `pictures/`, which may be served, `sessions/` and `deleted/`, which may not.
        per_session: pictures of one session; the oldest go first.
        max_bytes: of all pictures together; the oldest go first.

    Raises:
        OutputError: the folder cannot be made, or not be written to.
    """

    def __init__(self, folder: str | Path, *, per_session: int = 200, max_bytes: int = 2_000_000_000) -> None:
        self.per_session, self.max_bytes = whole("per_session", per_session, 1), whole("max_bytes", max_bytes, 1)
        self.pictures, self._indices = Path(folder) / "pictures", Path(folder) / "sessions"
        self._bin = Path(folder) / "deleted"
        for place in (self.pictures, self._indices, self._bin):
            folder_to_fill(place, "a history")
        self._lock = threading.RLock()
        self._sessions: OrderedDict[str, list[Entry]] = OrderedDict()  # those that were asked for last
        found = [(picture, picture.stat()) for picture in files_in(self.pictures, (".png",))]
        found.sort(key=lambda x: x[1].st_mtime)
        self._sizes = {picture.stem: about.st_size for picture, about in found}  # the oldest first
        self._bytes = sum(self._sizes.values())
        self._deleted: dict[str, _Deleted] = {}  # the oldest first
        for left in files_in(self._bin, (".png",)):  # by an earlier run, whose time for second thoughts is over
            left.unlink(missing_ok=True)

    def add(self, session: str, request: Request, result: Result, title: str = "") -> list[Entry]:
        """Keep the pictures of a result, one entry each.

        Raises:
            InputError: the session is no token.
            OutputError: the folder cannot be written to.
        """
        key, made = _key(session), list[Entry]()
        with self._all_or_none(made):
            for i in range(len(result.images)):
                entry = Entry(
                    id=secrets.token_hex(16),
                    request=request.single(i),
                    created=time.time(),
                    cached=bool(result.settings[i].get("cached")),
                    title=title,
                )
                self._count(entry, result.single(i).save(self.pictures / entry.file))
                made.append(entry)
            self._keep(key, made)
        return made

    def add_sheet(self, session: str, grid: Grid, results: Sequence[Result], title: str = "") -> Entry:
        """Keep the labelled sheet of a grid as one picture; errors as of `add`, and of `Grid.save`."""
        key = _key(session)
        entry = Entry(id=secrets.token_hex(16), request=grid.base.single(0), created=time.time(), title=title)
        with self._all_or_none([entry]):
            self._count(entry, grid.save(self.pictures / entry.file, results))
            self._keep(key, [entry])
        return entry

    @contextmanager
    def _all_or_none(self, made: Sequence[Entry]) -> Generator[None]:
        """Pictures that could not all be written and entered are none: nobody would find them again."""
        try:
            yield
        except OutputError:
            with self._lock:
                for entry in made:
                    self._remove(entry.id)
            raise

    def _count(self, entry: Entry, path: Path) -> None:
        with self._lock:
            self._sizes[entry.id] = path.stat().st_size
            self._bytes += self._sizes[entry.id]

    def _keep(self, key: str, made: list[Entry]) -> None:
        """Enter pictures that were written, and let the oldest go."""
        with self._lock:
            self._forget_old()
            own = self._entries(key)
            self._append(key, made)
            own += made
            for entry in [entry for entry in own if entry.id in self._sizes][: -self.per_session]:
                self._remove(entry.id)
            while self._bytes > self.max_bytes and (self._deleted or len(self._sizes) > 1):
                self._forget(next(iter(self._deleted))) if self._deleted else self._remove(next(iter(self._sizes)))
            self._compact(key)

    def deliver(self, job: Job, which: int, result: Result) -> None:
        """`add`, as `Queue` calls it."""
        self.add(job.session, job.requests[which], result, job.title)

    def listed(self, session: str) -> list[Entry]:
        """The pictures of a session, newest first; none of a session that is not known."""
        key = _key(session)
        with self._lock:
            return [entry for entry in reversed(self._entries(key)) if entry.id in self._sizes]

    def get(self, session: str, id: str) -> Entry:
        """One picture of a session.

        Raises:
            InputError: the session has none of this id.
        """
        found = next((entry for entry in self.listed(session) if entry.id == id), None)
        if found is None:
            raise InputError(f"this session has no picture {strict.shown(id)}")
        return found

    def path(self, session: str, id: str) -> Path:
        """The file of one picture; errors as of `get`."""
        return self.pictures / self.get(session, id).file

    def bare(self, session: str, id: str, path: str | Path) -> Path:
        """Write a picture without its settings; errors as of `get` and `Result.save`."""
        path = checked_output(path)
        with Image.open(self.path(session, id)) as image:
            save_picture(image.convert("RGB"), path, None)
        return path

    def zipped(self, session: str) -> Iterator[bytes]:
        """All pictures of a session as one zip archive, the oldest first; see `archive.zipped`."""
        entries = list(reversed(self.listed(session)))
        names = (name_of(i, entry.request.prompt) for i, entry in enumerate(entries, 1))
        return zipped(zip(names, [self.pictures / entry.file for entry in entries], strict=True))

    def delete(self, session: str, id: str | None = None) -> None:
        """Delete one picture of a session, or all of them; errors as of `get`.

        For ten minutes `restore` can have them back, unless their room is needed before; then they are gone for good.
        """
        key = _key(session)
        with self._lock:
            self._forget_old()
            for entry in self.listed(session) if id is None else [self.get(session, id)]:
                try:
                    (self.pictures / entry.file).replace(self._bin / entry.file)
                except FileNotFoundError:  # somebody else has taken it away
                    self._remove(entry.id)
                    continue
                except OSError as error:
                    raise OutputError(f"the picture cannot be deleted: {error.strerror}") from error
                self._deleted[entry.id] = _Deleted(key, time.monotonic(), self._sizes.pop(entry.id))
            self._compact(key)

    def restore(self, session: str, id: str) -> Entry:
        """A deleted picture again, at its place.

        Raises:
            InputError: the session has deleted no picture of this id, or too long ago.
        """
        with self._lock:
            self._forget_old()
            entry = next((entry for entry in self._entries(_key(session)) if entry.id == id), None)
            if entry is None or id not in self._deleted:
                if entry is not None and id in self._sizes:
                    return entry
                raise InputError(f"the picture {strict.shown(id)} cannot be had back: it is gone for good")
            (self._bin / entry.file).replace(self.pictures / entry.file)
            self._sizes[id] = self._deleted.pop(id).bytes
            return entry

    def _remove(self, id: str) -> None:
        self._bytes -= self._sizes.pop(id, 0)
        (self.pictures / f"{id}.png").unlink(missing_ok=True)

    def _forget(self, *ids: str) -> None:
        """Let go of deleted pictures, and of what the indices say of them."""
        keys: set[str] = set()
        for id in ids:
            gone = self._deleted.pop(id)
            self._bytes -= gone.bytes
            (self._bin / f"{id}.png").unlink(missing_ok=True)
            keys.add(gone.key)
        for key in keys:
            self._compact(key)

    def _forget_old(self) -> None:
        """Let go of those that were deleted too long ago."""
        now = time.monotonic()
        self._forget(*[id for id, gone in self._deleted.items() if now - gone.when > UNDO_SECONDS])

    def close(self) -> None:
        """Let go of everything that was deleted: nobody can ask for it any more."""
        with self._lock:
            self._forget(*self._deleted)

    # The index of a session: a line of JSON per picture, the oldest first.

    def _entries(self, key: str) -> list[Entry]:
        """All entries of a session, also those whose pictures are gone."""
        if key not in self._sessions:
            self._sessions[key] = self._read(self._indices / f"{key}.jsonl")
            while len(self._sessions) > LOADED:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def _read(self, index: Path) -> list[Entry]:
        found: list[Entry] = []
        try:
            lines = index.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OutputError(f"{index}: cannot be read: {error.strerror}") from error
        for i, line in enumerate(lines, 1):
            try:
                found.append(Entry.from_json(strict.parsed("a line of the history", line)))
            except InputError as error:
                log.warning("%s, line %d, is left out: %s", index, i, error)
        return found

    def _append(self, key: str, made: list[Entry]) -> None:
        path = self._indices / f"{key}.jsonl"
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(b"".join(_line(entry) for entry in made))
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)  # half a line
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error

    def _compact(self, key: str) -> None:
        """Leave out of an index what is gone, if there is much of it."""
        own = self._entries(key)
        kept = [entry for entry in own if entry.id in self._sizes or entry.id in self._deleted]
        if len(own) - len(kept) <= len(kept) // 4:
            return
        path = self._indices / f"{key}.jsonl"

        def write(beside: Path) -> None:
            beside.write_bytes(b"".join(_line(entry) for entry in kept))

        write_beside(path, write)
        own[:] = kept
        if not kept:
            path.unlink(missing_ok=True)


def _line(entry: Entry) -> bytes:
    return json.dumps(entry.as_json()).encode() + b"\n"


def _key(session: str) -> str:
    """The name of a session's index: a hash, so that the folder does not give tokens away."""
    if not isinstance(session, str) or not re.fullmatch("[A-Za-z0-9_-]{16,128}", session):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"a session is a token of 16 to 128 letters, digits, - and _, got {strict.shown(session)}")
    return hashlib.sha256(session.encode()).hexdigest()
