"""The command `miniflux`.

Exit code 0 when it worked, 2 for what the user can mend (one line on stderr), 1 for our own faults.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from miniflux.errors import MinifluxError, WeightsNotFoundError
from miniflux.version import __version__

OK, FAULT, MENDABLE, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(MENDABLE)


def parser() -> argparse.ArgumentParser:
    """The command line, with help that a newcomer can act on."""
    root = _Parser(
        prog="miniflux",
        description="FLUX image models, from scratch in PyTorch.",
        epilog='First picture, without any download:  miniflux generate "a red circle on a blue background" -o out.png',
    )
    root.add_argument("--version", action="version", version=f"miniflux {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)

    from miniflux.apps import convert, fetch, generate, inspect, lora, replay, study, ui

    for command in (generate, inspect, lora, study, replay, fetch, convert, ui):
        command.add(commands)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="miniflux: %(message)s")
    warnings.showwarning = _show_warning
    try:
        options.run(options)
    except MinifluxError as error:
        lines = str(error).splitlines()
        whole = options.verbose or isinstance(error, WeightsNotFoundError)  # which says how to get them
        print("miniflux:", "\n".join(lines if whole else lines[:1]), file=sys.stderr)
        return MENDABLE
    except KeyboardInterrupt:
        print("miniflux: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if options.verbose:
            raise
        print(f"miniflux: a fault of ours: {type(error).__name__}: {error} (-v shows where)", file=sys.stderr)
        return FAULT
    return OK


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"miniflux: {message}", file=sys.stderr)
