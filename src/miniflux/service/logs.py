"""The log of a server and its workers: every record is one line of JSON, on standard error."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime, timezone
from types import TracebackType

log = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """A record as a line of JSON: `time` (ISO 8601, UTC), `level`, `logger`, and `message`; or, instead of the message,
    the fields that whoever logs gives as `extra={"fields": {...}}`. An exception is in `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        """No line breaks are in it, and nothing but ASCII."""
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        about = {"time": at.replace("+00:00", "Z"), "level": record.levelname.lower(), "logger": record.name}
        about |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            about["traceback"] = self.formatException(record.exc_info)
        return json.dumps(about, default=str)


def begin() -> None:
    """Log so from now on, Python's warnings and what ends a thread as well. For a process that does nothing else."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.getLogger().handlers[:] = [handler]
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda told: _uncaught(told.exc_type, told.exc_value, told.exc_traceback)


@contextmanager
def json_lines() -> Generator[None]:
    """Log so within the context."""
    root = logging.getLogger()
    before, hooks = root.handlers[:], (sys.excepthook, threading.excepthook)
    begin()
    try:
        yield
    finally:
        root.handlers[:] = before
        logging.captureWarnings(False)
        sys.excepthook, threading.excepthook = hooks


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """What ends a process or a thread."""
    if error is not None and not issubclass(kind, (KeyboardInterrupt, SystemExit)):
        log.critical("an exception that nobody caught", exc_info=(kind, error, trace))
