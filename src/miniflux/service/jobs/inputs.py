"""Pictures that were given with jobs: they outlive the process, since a job that waits may be drawn after a restart."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress

from miniflux.service.given import OWN, Pictures

UNNAMED = 3600.0  # seconds for which one is kept that no job needs


class Inputs(Pictures):
    """A folder of them, which all processes of a server share."""

    def expire(self, needed: Collection[str]) -> int:
        """Remove what was not used for an hour and no job needs; returns how many files went."""
        gone, before = 0, time.time() - UNNAMED
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if OWN.fullmatch(path.name) and path.stem not in needed and path.stat().st_mtime < before:
                    path.unlink()
                    gone += 1
        return gone
