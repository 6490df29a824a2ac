"""Files that clients name: LoRAs and networks, in a folder of the operator's, and nothing outside it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from miniflux.checks import shown
from miniflux.errors import InputError

LONGEST, LONGEST_PART = 1000, 255
FORBIDDEN = re.compile(r'[\\:*?"<>|]')  # other separators, drives, streams of NTFS, patterns
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)
"""What Windows takes for a device in every folder, with any ending."""


def named(folder: str | Path, name: str, endings: Sequence[str]) -> Path:
    """The file of that name, in a folder or in folders within it (`styles/ink`), with or without its ending.

    Args:
        endings: those that count, such as `.safetensors`.

    Returns:
        Its path, with links followed: it lies in the folder.

    Raises:
        InputError: there is none, or the name is not one of a file in there. What is elsewhere is not told.
    """
    parts = name.split("/")
    if len(name) > LONGEST or not all(_plain(part) for part in parts):
        raise InputError(f"{shown(name)} is no name of a file here")
    root = Path(folder).resolve()
    given = name.lower().endswith(tuple(endings))
    for ending in ("",) if given else endings:
        path = root.joinpath(*parts[:-1], parts[-1] + ending)
        try:
            found = path.resolve(strict=True)
            if found.is_relative_to(root) and found.is_file():
                return found
        except (OSError, RuntimeError, ValueError):  # not there, a loop of links, or a name that this disk cannot hold
            continue
    raise InputError(f"there is no file {shown(name)} here")


def _plain(part: str) -> bool:
    """Whether it is a name that means a file of that name on every system."""
    if not part or part[0] == "." or part[-1] in ". " or FORBIDDEN.search(part) or DEVICES.fullmatch(part):
        return False
    if any(unicodedata.category(c)[0] == "C" for c in part):  # control characters, direction marks, half surrogates
        return False
    return len(part.encode()) <= LONGEST_PART
