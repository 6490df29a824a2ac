"""How the tables of the store came to be: one file in `versions/` for every change, in order."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

from miniflux.service.jobs.database import Database

LOCK = 7_316_582  # of PostgreSQL's advisory locks: one process changes tables at a time


def migrate(database: Database) -> None:
    """Bring the tables of a database to the newest form; nothing happens where they have it."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with database.writing() as connection:
        if not database.local:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
