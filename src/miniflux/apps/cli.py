"""The command `miniflux`.

Exit code 0 when it worked, 2 for what the user can mend (one line on stderr, of missing weights several), 1 for our own
faults, 130 when it was stopped by Ctrl-C (128 and the number of any other signal, as shells count).
"""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import FrameType

from miniflux.apps import arguments, console
from miniflux.apps.arguments import MENDABLE, Parser
from miniflux.errors import MinifluxError, WeightsNotFoundError
from miniflux.version import __version__

OK, FAULT, SIGNAL = 0, 1, 128
DISK = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EIO", "ENAMETOOLONG")} - {None}


class Stopped(KeyboardInterrupt):
    """Another signal than that of Ctrl-C asks to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def parser() -> Parser:
    """The command line, with help that a newcomer can act on."""
    root = Parser(
        prog="miniflux",
        description="FLUX image models, from scratch in PyTorch.",
        epilog='First picture, without any download:  miniflux generate "a red circle on a blue background" -o out.png',
    )
    root.add_argument("--version", action="version", version=f"miniflux {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)

    from miniflux.apps import batch, convert, fetch, generate, inspect, lora, replay, study, ui
    from miniflux.apps.serve import command as serve
    from miniflux.apps.serve import key_command as keys

    for command in (generate, batch, inspect, lora, study, replay, fetch, convert, ui, serve, keys):
        command.add(commands)
    return root


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    console.prepare(logging.WARNING)
    try:
        options = parser().parse_args(words)
        logging.getLogger().setLevel(logging.INFO if options.verbose else logging.WARNING)
        warnings.showwarning = _show_warning
        with _signals():
            return _run(options)
    finally:
        console.flush()


def _run(options: argparse.Namespace) -> int:
    try:
        code = options.run(options) or OK
        arguments.say_notes(options)
        return code
    except MinifluxError as error:
        lines = str(error).splitlines()
        whole = options.verbose or isinstance(error, WeightsNotFoundError)  # which says how to get them
        console.complain("\n".join(lines if whole else lines[:1]))
        return MENDABLE
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed again and again: it ends at once anyway
        kept = getattr(stop, "kept", "")
        console.complain(f"stopped{f': {kept}' if kept else ''}")
        return SIGNAL + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        console.silence(sys.stdout)
        return OK
    except Exception as error:
        if options.verbose:
            raise
        reason = _mendable(error)
        if reason:
            console.complain(reason)
            return MENDABLE
        console.complain(f"a fault of ours: {type(error).__name__}: {error} (-v shows where)")
        return FAULT


def _mendable(error: Exception) -> str:
    """What to say of an exception of other libraries that somebody can mend: too little memory, or a disk that is full,
    is read-only, or fails; empty for all others."""
    from miniflux.memory.shortage import is_shortage

    if is_shortage(error):
        return "out of memory: end other programs, or ask for less"
    if isinstance(error, OSError) and error.errno in DISK:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return ""


@contextmanager
def _signals() -> Generator[None]:
    """A request to end, of a system that shuts down or a terminal that was closed, is taken as Ctrl-C is."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signal.SIGINT: signal.getsignal(signal.SIGINT)}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # `nohup` has it ignored
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_warning(message: Warning | str, *_: object) -> None:
    console.complain(str(message))
