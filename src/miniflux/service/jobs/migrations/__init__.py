"""How the tables of the store came to be: one file in `versions/` for every change, in order."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

from miniflux.errors import InputError
from miniflux.service.jobs.database import GONE, Database

LOCK = 7_316_582  # of PostgreSQL's advisory locks: one process changes tables at a time


def migrate(database: Database) -> None:
    """Bring the tables of a database to the newest form; nothing happens where they have it.

    Raises:
        InputError: it cannot be used: not there, locked, or no database.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    try:
        with database.writing() as connection:
            if not database.local:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except GONE as error:
        why = str(getattr(error, "orig", None) or error).partition("\n")[0]
        place = database.url.render_as_string(hide_password=True)
        raise InputError(f"{place}: this database cannot be used: {why}") from error
