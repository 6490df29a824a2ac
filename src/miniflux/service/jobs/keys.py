"""Keys: who may ask, how often, and how soon it is their turn.

A key is told once, when it is made; what is kept is its SHA-256, which is enough for 256 random bits.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass, fields

from sqlalchemy import delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from miniflux.checks import shown, whole
from miniflux.errors import InputError
from miniflux.service.jobs.database import Database
from miniflux.service.jobs.records import Bounds
from miniflux.service.jobs.tables import KEYS

PREFIX = "mf-"  # by which people, and programs that look for secrets in files, know what it is
LONGEST = 200  # characters of a name, and of what is given as a key
HIGHEST = 10  # priority, and lowest below zero


@dataclass(frozen=True, kw_only=True)
class Key:
    """One of them, without the key itself.

    Attributes:
        id: random; jobs know it.
        name: what the operator calls it.
        per_day: pictures in any 24 hours; None for no bound.
        per_minute: requests in any 60 seconds; None for no bound.
        priority: higher ones are drawn earlier, see `store.PRIORITY`.
        created: seconds since 1970.
    """

    id: str
    name: str
    per_day: int | None
    per_minute: int | None
    priority: int
    created: float

    def bounds(self, waiting: int | None) -> Bounds:
        """What may be asked for with it, where so many jobs may wait."""
        return Bounds(waiting=waiting, per_day=self.per_day, per_minute=self.per_minute)


def add(
    database: Database, name: str, *, per_day: int | None = None, per_minute: int | None = None, priority: int = 0
) -> str:
    """Make a key; returns it, for the only time.

    Raises:
        InputError: the name is taken, empty or too long, or a number is out of its range.
    """
    if not name.strip() or len(name) > LONGEST or not name.isprintable():
        raise InputError(f"a name of 1 to {LONGEST} printable characters is expected, got {shown(name)}")
    key = PREFIX + secrets.token_urlsafe(32)
    values = {
        "id": secrets.token_hex(16),
        "name": name,
        "digest": _digest(key),
        "per_day": None if per_day is None else whole("per_day", per_day, 0, 10**9),
        "per_minute": None if per_minute is None else whole("per_minute", per_minute, 0, 10**9),
        "priority": whole("priority", priority, -HIGHEST, HIGHEST),
        "created": time.time(),
    }
    try:
        with database.writing() as c:
            c.execute(insert(KEYS).values(values))
    except IntegrityError:
        raise InputError(f"there is a key of the name {shown(name)}; remove it first, or choose another") from None
    return key


def listed(database: Database) -> list[Key]:
    """All keys, by name."""
    with database.reading() as c:
        return [_key(row) for row in c.execute(select(*_COLUMNS).order_by(KEYS.c.name))]


def remove(database: Database, name: str) -> None:
    """Take a key away: from now on it opens nothing.

    Raises:
        InputError: there is none of this name.
    """
    with database.writing() as c:
        if not c.execute(delete(KEYS).where(KEYS.c.name == name)).rowcount:
            raise InputError(f"there is no key of the name {shown(name)}")


def any_there(database: Database) -> bool:
    """Whether there is a key at all."""
    with database.reading() as c:
        return c.execute(select(func.count()).select_from(KEYS)).scalar_one() > 0


def known(database: Database, key: str) -> Key | None:
    """Whose key it is; None if nobody's.

    What is looked up is its SHA-256: how long that takes says nothing about the keys that there are, because nobody can
    choose a key whose SHA-256 begins as another's.
    """
    if not 0 < len(key) <= LONGEST:
        return None
    with database.reading() as c:
        row = c.execute(select(*_COLUMNS).where(KEYS.c.digest == _digest(key))).one_or_none()
        return None if row is None else _key(row)


_COLUMNS = [KEYS.c[f.name] for f in fields(Key)]


def _key(row: object) -> Key:
    return Key(**{f.name: getattr(row, f.name) for f in fields(Key)})


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
