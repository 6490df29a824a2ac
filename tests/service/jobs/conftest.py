"""A store on SQLite, and the same on a real PostgreSQL."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from miniflux.service.jobs.database import GONE, Database, sqlite_url
from miniflux.service.jobs.migrations import migrate
from miniflux.service.jobs.store import Store
from miniflux.service.jobs.tables import METADATA
from miniflux.service.jobs.workbench import Workbench


def postgres_programs() -> Path | None:
    """The folder with `initdb` and `postgres`, as Debian or PATH have it."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if folder.joinpath("postgres").exists()), None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a server of our own, in a folder that goes with it."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="mfpg"))
    user: dict[str, str] = {}
    if os.geteuid() == 0:  # it refuses to be started by root
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL needs a user that is not root")
        user = {"user": "postgres"}
        shutil.chown(folder, "postgres")
        folder.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    data = folder / "data"
    init = [programs / "initdb", "-D", data, "-A", "trust", "-U", "tester", "--no-sync", "-E", "UTF8", "--locale=C"]
    subprocess.run(init, check=True, capture_output=True, **user)
    words = [programs / "postgres", "-D", data, "-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1"]
    server = subprocess.Popen([*words, "-c", "fsync=off"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user)
    url = f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
    try:
        until = time.monotonic() + 60
        while True:
            try:
                with Database(url).reading() as c:
                    c.execute(text("SELECT 1"))
                break
            except GONE:
                assert server.poll() is None and time.monotonic() < until, "PostgreSQL did not start"
                time.sleep(0.1)
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # SIGTERM waits for its clients
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database with the newest tables and nothing in them."""
    if request.param == "sqlite":
        found = sqlite_url(tmp_path / "jobs.sqlite")
        database = Database(found)
        migrate(database)
        database.close()
        yield found
        return
    found = request.getfixturevalue("postgres")
    database = Database(found)
    migrate(database)
    with database.writing() as c:
        for table in METADATA.sorted_tables:
            c.execute(table.delete())
    database.close()
    yield found


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    made = Store(url)
    yield made
    made.close()


@pytest.fixture
def bench(url: str) -> Iterator[Workbench]:
    made = Workbench(url)
    yield made
    made.close()
