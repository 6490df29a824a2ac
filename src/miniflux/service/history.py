"""What each session has drawn: pictures in one folder under names nobody can guess, an index per session.

A session is a token that its browser keeps. It survives a reload and a restart; whoever does not know it can neither
list nor open nor delete what belongs to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from miniflux.checkpoints.saving import write_beside
from miniflux.errors import InputError, SettingsError
from miniflux.result import Result
from miniflux.sampling.checks import whole
from miniflux.service.queue import Job
from miniflux.settings import Request, strict

log = logging.getLogger(__name__)


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


class History:
    """All sessions.

    Args:
        folder: where everything is kept: `pictures/`, which may be served, and `sessions/`, which may not.
        per_session: pictures of one session; the oldest go first.
        max_bytes: of all pictures together; the oldest go first.
    """

    def __init__(self, folder: str | Path, *, per_session: int = 200, max_bytes: int = 2_000_000_000) -> None:
        self.per_session, self.max_bytes = whole("per_session", per_session, 1), whole("max_bytes", max_bytes, 1)
        self.pictures, self._indices = Path(folder) / "pictures", Path(folder) / "sessions"
        for place in (self.pictures, self._indices):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.RLock()
        self._sessions: dict[str, list[Entry]] = {}
        self._sizes: dict[str, int] = {}
        for index in sorted(self._indices.glob("*.json")):
            self._sessions[index.stem] = self._read(index)
        kept = {entry.file for entries in self._sessions.values() for entry in entries}
        for picture in self.pictures.iterdir():  # left behind by a crash between picture and index
            if picture.name not in kept:
                picture.unlink(missing_ok=True)

    def _read(self, index: Path) -> list[Entry]:
        """The entries of a session whose pictures are there. A damaged index is put aside, and said."""
        found: list[Entry] = []
        try:
            for line in index.read_text("utf-8").splitlines():
                entry = Entry.from_json(strict.parsed(str(index), line))
                try:
                    self._sizes[entry.id] = (self.pictures / entry.file).stat().st_size
                    found.append(entry)
                except OSError:
                    log.warning("%s: its picture %s is gone", index, entry.file)
        except (OSError, ValueError) as error:
            log.warning("%s: damaged, its pictures are given up: %s", index, error)
            index.replace(index.with_suffix(".damaged"))
            return []
        return found

    def _write(self, key: str) -> None:
        text = "".join(json.dumps(entry.as_json()) + "\n" for entry in self._sessions[key])

        def write(beside: Path) -> None:
            beside.write_text(text, "utf-8")

        write_beside(self._indices / f"{key}.json", write)

    def add(self, session: str, request: Request, result: Result, title: str = "") -> list[Entry]:
        """Keep the pictures of a result, one entry each.

        Raises:
            InputError: the session is no token.
            OutputError: the folder cannot be written to.
        """
        key, made = _key(session), list[Entry]()
        for i in range(len(result.images)):
            cached = bool(result.settings[i].get("cached"))
            entry = Entry(
                id=secrets.token_hex(16), request=request.single(i), created=time.time(), cached=cached, title=title
            )
            path = result.single(i).save(self.pictures / entry.file)
            self._sizes[entry.id] = path.stat().st_size
            made.append(entry)
        with self._lock:
            own = self._sessions.setdefault(key, [])
            own += made
            for entry in own[: -self.per_session]:
                self._remove(key, entry)
            while sum(self._sizes.values()) > self.max_bytes and len(self._sizes) > 1:
                self._remove(*min(((k, e) for k, es in self._sessions.items() for e in es), key=lambda x: x[1].created))
            self._write(key)
        return made

    def deliver(self, job: Job, which: int, result: Result) -> None:
        """`add`, as `Queue` calls it."""
        self.add(job.session, job.requests[which], result, job.title)

    def listed(self, session: str) -> list[Entry]:
        """The pictures of a session, newest first; none of a session that is not known."""
        with self._lock:
            return self._sessions.get(_key(session), [])[::-1]

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
        with Image.open(self.path(session, id)) as image:
            image.load()
        image.info.clear()
        path = Path(path)
        write_beside(path, lambda beside: image.save(beside, format="PNG"))
        return path

    def delete(self, session: str, id: str | None = None) -> None:
        """Delete one picture of a session, or all of them."""
        key = _key(session)
        with self._lock:
            for entry in [self.get(session, id)] if id is not None else list(self._sessions.get(key, [])):
                self._remove(key, entry)
            if key in self._sessions:
                self._write(key)

    def _remove(self, key: str, entry: Entry) -> None:
        self._sessions[key] = [other for other in self._sessions[key] if other is not entry]
        self._sizes.pop(entry.id, None)
        (self.pictures / entry.file).unlink(missing_ok=True)


def _key(session: str) -> str:
    """The name of a session's index: a hash, so that the folder does not give tokens away."""
    if not isinstance(session, str) or not re.fullmatch("[A-Za-z0-9_-]{16,128}", session):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"a session is a token of 16 to 128 letters, digits, - and _, got {strict.shown(session)}")
    return hashlib.sha256(session.encode()).hexdigest()
