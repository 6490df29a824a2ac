"""The texts of an EXIF block, whose encodings programs agree on as little as on its byte order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from PIL import Image

from miniflux.errors import SettingsError
from miniflux.settings import strict
from miniflux.text.decoding import MARKS, sensible

DESCRIPTION, MAKE, MODEL, EXIF_IFD, COMMENT = 0x010E, 0x010F, 0x0110, 0x8769, 0x9286
UTF16 = ("utf-16-be", "utf-16-le")
CODES = ("ASCII", "JIS", "UNICODE", "")  # EXIF 2.32, table 9: the first 8 bytes of a user comment


def texts(data: bytes) -> Iterator[tuple[str, str]]:
    """(`description`, `make`, `model` or `comment`, text): where somebody may have written settings.

    Raises:
        SettingsError: the block is damaged.
    """
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exif.load(data)
            fields: list[tuple[str, Any]] = [
                ("description", exif.get(DESCRIPTION)),
                ("make", exif.get(MAKE)),
                ("model", exif.get(MODEL)),
                ("comment", exif.get_ifd(EXIF_IFD).get(COMMENT)),
            ]
    except Exception as error:  # Pillow raises, or warns of, whatever its parser runs into
        raise SettingsError(f"its EXIF block is damaged: {type(error).__name__}: {error}") from None
    order = UTF16 if exif.endian == ">" else UTF16[::-1]
    for name, value in fields:
        if isinstance(value, str):  # which Pillow took for Latin-1
            value = value.encode("latin-1", "replace")
        if isinstance(value, tuple) and all(isinstance(x, int) and 0 <= x < 256 for x in value):
            value = bytes(value)  # bytes of the type BYTE
        if isinstance(value, bytes):
            yield name, (comment(value, order) if name == "comment" else _plain(value, order))
        elif value is not None:
            raise SettingsError(f"the EXIF {name} is no text: {strict.shown(value)}")


def comment(data: bytes, order: tuple[str, ...] = UTF16) -> str:
    """A user comment: the code of its encoding in 8 bytes, which many leave out, and the text.

    Args:
        order: UTF-16 of the byte order of the block first, for texts that make sense in both.
    """
    code = data[:8].rstrip(b"\0 ").upper().decode("latin-1")
    if code not in CODES:
        return _plain(data, order)
    if code == "JIS":
        return _japanese(data[8:])
    return _plain(data[8:], order, wide=code == "UNICODE")


def _plain(data: bytes, order: tuple[str, ...], wide: bool = False) -> str:
    """By its mark (BOM); UTF-8 if it is strictly; UTF-16 in the order that makes sense; else Latin-1."""
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace").rstrip("\0")
    trimmed = data.rstrip(b"\0")
    try:
        text = trimmed.decode("utf-8")
    except UnicodeDecodeError:
        text = None
    if text is not None and "\0" not in text:
        return text
    if wide or b"\0" in trimmed:
        found = sensible(data[: len(data) // 2 * 2], order)  # also where the last byte is missing
        if found is not None and (wide or "\0" not in found.rstrip("\0")):
            return found.rstrip("\0")
    return trimmed.decode("latin-1") if text is None else text


def _japanese(data: bytes) -> str:
    for encoding in ("iso2022_jp_ext", "utf-8", "cp932", "euc_jp"):
        try:
            return data.rstrip(b"\0").decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")
