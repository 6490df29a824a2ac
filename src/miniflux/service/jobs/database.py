"""The database behind the store: SQLite in its WAL mode, or PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, case, create_engine, event, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from miniflux.errors import InputError, MissingExtraError
from miniflux.service.jobs.tables import COUNTS, JOBS, WORKERS

WAITS = 30.0  # seconds for which a write waits for that of another
IN_LINE = (JOBS.c.due, JOBS.c.created, JOBS.c.id)
GONE = SQLAlchemyError
"""What is raised when the database is locked for too long, full, or not there."""


class Database:
    """One database, which several processes may use at once.

    Args:
        url: as SQLAlchemy takes it: `sqlite:////srv/jobs.sqlite`, `postgresql+psycopg://...`.

    Raises:
        InputError: the URL names no database, or another kind than these two.
        MissingExtraError: the driver is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            self.url = make_url(url)
            kind = self.url.get_backend_name()
            if kind not in ("sqlite", "postgresql"):
                raise InputError(f"a database of SQLite or PostgreSQL is expected, got {kind}")
            self.local = kind == "sqlite"
            self.engine = _sqlite(url) if self.local else create_engine(url, pool_pre_ping=True)
        except ArgumentError:
            raise InputError("no URL of a database: sqlite:///FILE or postgresql+psycopg://... is expected") from None
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"this database needs {error.name}: pip install 'miniflux[postgres]'") from error

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def writing(self) -> Generator[Connection]:
        """A transaction that changes something: all of it or nothing. In SQLite one at a time."""
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Generator[Connection]:
        """For questions alone; waits for nobody."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            yield connection

    def workers(self) -> list[dict[str, Any]]:
        """Every worker that was not given up: id, host, pid, started, seen, and what it told about itself."""
        with self.reading() as c:
            return [{**row, "about": json.loads(row["about"])} for row in c.execute(select(WORKERS)).mappings()]

    # Counting

    def insert(self, table: Any) -> Any:
        """An insert that can say what happens if the row is there."""
        return (sqlite if self.local else postgresql).insert(table)

    def count(self, c: Connection, more: Mapping[str, float]) -> None:
        """Add to what is counted."""
        for name, value in sorted(more.items()):  # in one order, so that no two wait for each other
            row = self.insert(COUNTS).values(name=name, value=value)
            c.execute(
                row.on_conflict_do_update(index_elements=["name"], set_={"value": COUNTS.c.value + row.excluded.value})
            )


def told_from(now: float) -> dict[str, Any]:
    """Whoever wants to be told of a job's end is told from now on."""
    return {"webhook_due": case((JOBS.c.webhook.is_not(None), now), else_=None)}


def _sqlite(url: str) -> Engine:
    """SQLite as several processes can use it: writers wait for each other, readers for nobody."""
    engine = create_engine(url, connect_args={"timeout": WAITS, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def opened(connection: Any, _: object) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.isolation_level = None  # the driver would begin transactions where it thinks best
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # what was answered survives the machine, too

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:  # pyright: ignore[reportUnusedFunction]
        if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # who only reads at first could not write later

    return engine


def sqlite_url(path: Path) -> str:
    """The URL of a database in a file."""
    return f"sqlite:///{path.resolve()}"
