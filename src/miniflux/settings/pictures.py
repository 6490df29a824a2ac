"""Settings in the files of pictures: ours, and what of A1111 and ComfyUI can be understood."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniflux.settings.request import Request


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was found in a picture.

    Attributes:
        origin: `miniflux`, `A1111`, `ComfyUI`; `none` if the picture holds no settings.
        requests: one per picture on the sheet; a single one for foreign settings, none if there are none.
        not_understood: what was found and has no meaning here, a line each.
        records: of our own pictures, all that was written, files and versions included.
    """

    origin: str
    requests: tuple[Request, ...] = ()
    not_understood: tuple[str, ...] = ()
    records: tuple[dict[str, Any], ...] = ()


def read_picture(path: str | Path) -> Reading:
    """The settings in a PNG, JPEG or WebP file.

    Raises:
        SettingsError: it is no such picture, or its settings are damaged or hostile; the message says what.
    """
    raise NotImplementedError
