"""Text in the files of pictures: written by us, and read without trusting a byte of it.

PNG: a text chunk `miniflux`. JPEG and WebP: the EXIF description; in a JPEG, where that holds 64 KB, longer settings
lie in APP11 segments instead. Readers of these formats walk over a file's chunks and never decode its pixels.
"""

from __future__ import annotations

import json
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, PngImagePlugin

from miniflux.errors import OutputError, SettingsError
from miniflux.settings import strict

KEY = "miniflux"
MAX_CHUNKS = 200_000  # of a file, pixels included; libpng writes 8 KB of them per chunk
MAX_TEXTS = 64
DESCRIPTION, MAKE, MODEL, EXIF_IFD, COMMENT = 0x010E, 0x010F, 0x0110, 0x8769, 0x9286  # EXIF tags
SEGMENT = b"miniflux\0"  # what our APP11 segments begin with; then number and count, 2 bytes each
SEGMENT_SIZE = 65_000
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"


def options_for(path: Path, settings: list[dict[str, Any]]) -> dict[str, Any]:
    """What Pillow's `save` is given so that the file carries settings: of one picture, or of all on a sheet.

    Raises:
        OutputError: they are more than a file may carry.
    """
    value = _plain(settings[0] if len(settings) == 1 else settings)
    text = json.dumps(value, ensure_ascii=False)
    text = json.dumps(value) if any("\ud800" <= letter <= "\udfff" for letter in text) else text  # halves of characters
    data = text.encode()
    if len(data) > strict.MAX_BYTES:
        raise OutputError(
            f"{path}: the settings of {len(settings)} pictures take {len(data)} bytes, and a file carries at most "
            f"{strict.MAX_BYTES}: save them one by one, or without settings"
        )
    if path.suffix.lower() == ".png":
        info = PngImagePlugin.PngInfo()
        if text.isascii():
            info.add_text(KEY, text)
        else:
            info.add_itxt(KEY, text)
        return {"pnginfo": info}
    ascii_text = json.dumps(value).encode()
    short = ascii_text if len(ascii_text) < SEGMENT_SIZE else data
    if path.suffix.lower() != ".webp" and len(short) >= SEGMENT_SIZE:
        return {"extra": b"".join(_segments(data))}
    exif = Image.Exif()
    exif[DESCRIPTION] = short
    return {"exif": exif}


def _plain(value: Any) -> Any:
    """Numbers that JSON lacks become null."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _segments(data: bytes) -> Iterator[bytes]:
    parts = [data[i : i + SEGMENT_SIZE] for i in range(0, len(data), SEGMENT_SIZE)]
    for i, part in enumerate(parts):
        body = SEGMENT + struct.pack(">HH", i, len(parts)) + part
        yield b"\xff\xeb" + struct.pack(">H", len(body) + 2) + body


def texts_of(path: str | Path) -> dict[str, str]:
    """All texts in a PNG, JPEG or WebP file, by their names; those of EXIF are `exif NAME`.

    Raises:
        SettingsError: it cannot be read, is none of these, is damaged before its end, or holds more text than is read.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(12)
            if start.startswith(PNG):
                file.seek(len(PNG))
                found = list(_png(file))
            elif start.startswith(JPEG):
                file.seek(2)
                found = list(_jpeg(file))
            elif start[:4] == b"RIFF" and start[8:] == b"WEBP":
                found = list(_webp(file))
            else:
                raise SettingsError("not a PNG, JPEG or WebP file")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    texts: dict[str, str] = {}
    for name, text in found:
        if name in texts:
            raise SettingsError(f"{path}: the text {strict.shown(name)} is there twice")
        texts[name] = text
    return texts


def _exactly(file: BinaryIO, size: int, what: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise SettingsError(f"cut off in {what}")
    return data


def _bounded(size: int, what: str) -> None:
    if size > strict.MAX_BYTES:
        raise SettingsError(f"{what} has {size} bytes; at most {strict.MAX_BYTES} are read")


def _png(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """PNG (third edition), 5.3 and 11.3.3: length, type, data, CRC."""
    texts = 0
    for _ in range(MAX_CHUNKS):
        size, kind = struct.unpack(">I4s", _exactly(file, 8, "a PNG chunk"))
        if kind == b"IEND":
            return
        what = f"the PNG chunk {strict.shown(kind.decode('latin-1'))}"
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            file.seek(size + 4, 1)
            continue
        texts += 1
        if texts > MAX_TEXTS:
            raise SettingsError(f"more than {MAX_TEXTS} texts")
        _bounded(size, what)
        data = _exactly(file, size, what)
        (crc,) = struct.unpack(">I", _exactly(file, 4, what))
        if crc != zlib.crc32(kind + data):
            raise SettingsError(f"{what} is damaged: its checksum is wrong")
        yield _png_text(kind, data, what)
    raise SettingsError(f"more than {MAX_CHUNKS} PNG chunks")


def _png_text(kind: bytes, data: bytes, what: str) -> tuple[str, str]:
    keyword, zero, rest = data.partition(b"\0")
    if not zero or not 0 < len(keyword) < 80:
        raise SettingsError(f"{what} has no keyword")
    name = keyword.decode("latin-1")
    what = f"the text {strict.shown(name)}"
    if kind == b"tEXt":
        return name, rest.decode("latin-1")
    if kind == b"zTXt":
        if rest[:1] != b"\0":
            raise SettingsError(f"{what} is compressed in an unknown way")
        return name, _inflated(rest[1:], what).decode("latin-1")
    packed, method, rest = rest[:1], rest[1:2], rest[2:]
    _, _, rest = rest.partition(b"\0")  # language
    _, _, rest = rest.partition(b"\0")  # translated keyword
    if packed not in (b"\0", b"\1") or (packed == b"\1" and method != b"\0"):
        raise SettingsError(f"{what} is compressed in an unknown way")
    return name, _utf8(_inflated(rest, what) if packed == b"\1" else rest, what)


def _inflated(data: bytes, what: str) -> bytes:
    """Decompressed, but never more than is read."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, strict.MAX_BYTES + 1)
    except zlib.error as error:
        raise SettingsError(f"{what} is damaged: {error}") from None
    if len(found) > strict.MAX_BYTES:
        raise SettingsError(f"{what} has more than {strict.MAX_BYTES} bytes when decompressed; so many are read")
    return found


def _utf8(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{what} is not UTF-8: {error}") from None


def _jpeg(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """JPEG (ITU T.81), annex B: markers with a length, up to the start of the scan."""
    ours: dict[int, bytes] = {}
    count = 0
    for _ in range(1000):
        mark, kind = struct.unpack("BB", _exactly(file, 2, "a JPEG marker"))
        if mark != 0xFF:
            raise SettingsError("damaged: a JPEG marker was expected")
        if kind in (0xD9, 0xDA):  # end of image, start of scan
            break
        if kind == 0xFF:  # a fill byte
            file.seek(-1, 1)
            continue
        if kind == 0x01 or 0xD0 <= kind <= 0xD8:
            continue
        (size,) = struct.unpack(">H", _exactly(file, 2, "a JPEG segment"))
        body = _exactly(file, max(0, size - 2), "a JPEG segment")
        if kind == 0xEB and body.startswith(SEGMENT) and len(body) >= len(SEGMENT) + 4:
            number, count = struct.unpack(">HH", body[len(SEGMENT) : len(SEGMENT) + 4])
            ours[number] = body[len(SEGMENT) + 4 :]
        elif kind == 0xE1 and body.startswith(b"Exif\0\0"):
            yield from _exif(body)
    else:
        raise SettingsError("more than 1000 JPEG segments before its pixels")
    if ours:
        if sorted(ours) != list(range(count)):
            raise SettingsError(f"of the {count} segments with settings {count - len(ours)} are missing")
        data = b"".join(ours[number] for number in range(count))
        _bounded(len(data), "the settings")
        yield KEY, _utf8(data, "the settings")


def _webp(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """WebP container specification: RIFF chunks."""
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            return
        kind, size = struct.unpack("<4sI", head)
        if kind == b"EXIF":
            _bounded(size, "the EXIF chunk")
            yield from _exif(_exactly(file, size, "the EXIF chunk"))
            file.seek(size % 2, 1)
        else:
            file.seek(size + size % 2, 1)
    raise SettingsError(f"more than {MAX_CHUNKS} WebP chunks")


def _exif(data: bytes) -> Iterator[tuple[str, str]]:
    """The texts of an EXIF block that somebody may have written settings to."""
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exif.load(data)
            fields: Sequence[tuple[str, Any]] = [
                ("description", exif.get(DESCRIPTION)),
                ("make", exif.get(MAKE)),
                ("model", exif.get(MODEL)),
                ("comment", exif.get_ifd(EXIF_IFD).get(COMMENT)),
            ]
    except Exception as error:  # Pillow raises, or warns of, whatever its parser runs into
        raise SettingsError(f"its EXIF block is damaged: {type(error).__name__}: {error}") from None
    for name, value in fields:
        if value is None:
            continue
        what = f"the EXIF {name}"
        if isinstance(value, str):  # which Pillow took for Latin-1
            value = value.encode("latin-1", "replace")
        if not isinstance(value, bytes):
            raise SettingsError(f"{what} is no text: {strict.shown(value)}")
        if value.startswith(b"UNICODE\0"):
            data = value[8:]
            text = data.decode("utf-16-le" if data[1:2] == b"\0" else "utf-16-be", "replace")
        else:
            text = _utf8(value.removeprefix(b"ASCII\0\0\0"), what)
        ours = name == "description" and text.lstrip()[:1] in ("{", "[")
        yield (KEY if ours else f"exif {name}"), text.rstrip("\0")
