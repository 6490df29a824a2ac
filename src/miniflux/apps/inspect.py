"""`miniflux inspect`: what a file or folder is."""

from __future__ import annotations

import argparse
from typing import Any

from miniflux.apps import arguments


def add(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    inspect = commands.add_parser(
        "inspect",
        help="say what a file or folder is",
        description="Say which network, variant, layout and format a safetensors or GGUF file or a model folder holds.",
    )
    inspect.add_argument("path", metavar="FILE|FOLDER")
    inspect.add_argument("--data", action="store_true", help="read every tensor: name those with NaN, and all zero")
    inspect.add_argument("--json", action="store_true", help="the same for programs")
    inspect.set_defaults(run=_inspect)
    arguments.add_verbose(inspect)


def _inspect(options: argparse.Namespace) -> None:
    from miniflux.checkpoints import inspect

    found = inspect(options.path, data=options.data)
    print(found.json() if options.json else found)
