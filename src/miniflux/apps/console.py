"""What the command says, on consoles of every kind: none of them may end a run or lose its pictures."""

from __future__ import annotations

import codecs
import logging
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import TextIO

ERRORS = "miniflux"  # our way to say what a console cannot


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """What an encoding lacks as a backslash escape; bytes of a file's name that are no text as themselves."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return letter.encode("ascii", "backslashreplace").decode("ascii"), error.start + 1


def prepare(level: int) -> None:
    """Make stdout and stderr take every character, and exist; send the log to stderr, each line once.

    Only for the process of the command: other programs decide this for themselves.
    """
    codecs.register_error(ERRORS, _escaped)
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=ERRORS)
    logging.raiseExceptions = False  # a log that cannot be written is no reason to print a traceback
    handler = logging.StreamHandler()
    handler.addFilter(_Once())
    logging.basicConfig(level=level, format="miniflux: %(message)s", handlers=[handler])  # unless somebody has, already


class _Once(logging.Filter):
    """Lets a warning through once: several pictures of a call have the same to say."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        text = record.getMessage()
        new = text not in self.said
        self.said.add(text)
        return new


def say(text: str) -> None:
    """A line of the result, on stdout. Whether anybody reads it changes nothing of what is done."""
    _write(sys.stdout, text)


def complain(text: str, who: str = "miniflux") -> None:
    """A line about what is wrong, on stderr."""
    _write(sys.stderr, f"{who}: {text}")


def _write(stream: TextIO, text: str) -> None:
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError) as error:  # no reader, no room, or closed
        silence(stream)
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            complain(f"stdout cannot be written to: {getattr(error, 'strerror', None) or error}")


def silence(stream: TextIO) -> None:
    """Send what else is said on a stream to nobody, and have Python find nothing wrong with it at the end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def flush() -> None:
    """Write what is left. Python would do it later, and exit with 120 where that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)
