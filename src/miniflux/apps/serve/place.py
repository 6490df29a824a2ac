"""Where a server keeps what it has: one folder, and a database that may be elsewhere."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from miniflux.disk import folder_to_fill, write_beside
from miniflux.errors import InputError, MissingExtraError

SECRET = 32  # bytes
JOBS = "jobs.sqlite"


def default_folder() -> Path:
    """MINIFLUX_DATA, else where this system keeps what programs keep for a user."""
    told = os.environ.get("MINIFLUX_DATA")
    if told:
        return Path(told)
    kept = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(kept) / "miniflux"


@dataclass(frozen=True)
class Place:
    """The folder of a server.

    Attributes:
        folder: `jobs.sqlite`, `pictures/`, `given/` and `secret` are in it.
        database: a URL, for a database elsewhere.

    Raises:
        OutputError: the folder cannot be made, or not be written to.
    """

    folder: Path
    database: str | None = None

    def __post_init__(self) -> None:
        folder_to_fill(self.folder, "a server")

    @property
    def url(self) -> str:
        """Of the database."""
        from miniflux.service.jobs.database import sqlite_url

        return self.database or sqlite_url(self.folder / JOBS)

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def given(self) -> Path:
        return self.folder / "given"

    def secret(self) -> bytes:
        """What signs addresses: made once, so that they outlive a restart. Only this user can read it.

        Raises:
            InputError: the file holds something else.
            OutputError: it cannot be written.
        """
        path = self.folder / "secret"
        if not path.exists():

            def write(beside: Path) -> None:
                beside.touch(mode=0o600)
                beside.write_text(secrets.token_hex(SECRET), "ascii")

            write_beside(path, write)
        try:
            found = bytes.fromhex(path.read_text("ascii"))
        except (ValueError, OSError) as error:
            raise InputError(f"{path}: {SECRET} bytes in hexadecimal are expected; remove it for a new one") from error
        if len(found) != SECRET:
            raise InputError(f"{path}: {SECRET} bytes in hexadecimal are expected; remove it for a new one")
        return found


def needs_extra(error: ModuleNotFoundError) -> MissingExtraError:
    """What to say where a package of the server is not installed."""
    return MissingExtraError(f"the server needs {error.name}: pip install 'miniflux[serve]'")
