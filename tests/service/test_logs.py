"""The log of a server: each record is one line of JSON, whoever makes it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from miniflux.service.logs import json_lines


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    with json_lines():
        logging.getLogger("miniflux.serve").error("two\nlines, a %s", "\u2028star\udc80")
    (told,) = lines(capsys)
    at = datetime.fromisoformat(told.pop("time").replace("Z", "+00:00"))
    assert at.utcoffset() == timedelta(0) and abs(at.timestamp() - time.time()) < 60
    assert told == {"level": "error", "logger": "miniflux.serve", "message": "two\nlines, a \u2028star\udc80"}


def test_fields_instead_of_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    with json_lines():
        logging.getLogger("a").error("for people", extra={"fields": {"request": "r", "status": 200}})
    (told,) = lines(capsys)
    assert set(told) == {"time", "level", "logger", "request", "status"} and told["status"] == 200


def test_an_exception(capsys: pytest.CaptureFixture[str]) -> None:
    with json_lines():
        try:
            raise RuntimeError("what went wrong")
        except RuntimeError:
            logging.getLogger("a").exception("a job failed")
    (told,) = lines(capsys)
    assert told["message"] == "a job failed" and told["traceback"].endswith("RuntimeError: what went wrong")
    assert told["traceback"].startswith("Traceback")


def test_warnings_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    """Within the context, and as before behind it."""
    before = logging.getLogger().handlers[:]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with json_lines():
            warnings.warn("its end was cut off", stacklevel=1)
        (told,) = lines(capsys)
        assert (told["level"], told["logger"]) == ("warning", "py.warnings")
        assert "its end was cut off" in told["message"]
    assert logging.getLogger().handlers == before
    with pytest.warns(UserWarning, match="seen"):
        warnings.warn("seen", stacklevel=1)


def test_what_ends_a_thread(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("what went wrong")

    with json_lines():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    (told,) = lines(capsys)
    assert told["level"] == "critical" and told["traceback"].endswith("RuntimeError: what went wrong")


def test_a_worker_logs_so(tmp_path: Path) -> None:
    """A process that ends with an exception, because its database has no tables."""
    duty = {"worker": "w", "database": f"sqlite:///{tmp_path}/none.sqlite", "blobs": str(tmp_path / "b")}
    ended = subprocess.run(
        [sys.executable, "-m", "miniflux.service.jobs.worker"],
        input=json.dumps({**duty, "inputs": str(tmp_path / "i")}) + "\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = [json.loads(line) for line in ended.stderr.splitlines()]
    assert ended.returncode == 1  # its thread of signs may have the last word
    assert [one for one in told if "no such table" in one.get("traceback", "")]
    assert {"miniflux.service.jobs.worker", "miniflux.service.logs"} >= {one["logger"] for one in told}
