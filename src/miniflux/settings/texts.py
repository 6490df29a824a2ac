"""Text in the files of pictures: written by us, and read without trusting a byte of it.

PNG: a text chunk `miniflux`. JPEG and WebP: the EXIF description; in a JPEG, where that holds 64 KB, longer settings
lie in APP11 segments instead. Readers of these formats walk over a file's chunks and never decode its pixels. What is
ours must be whole; texts of other programs that are damaged, repeated or too long are left out and told of.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, PngImagePlugin

from miniflux.errors import InputError, OutputError, SettingsError
from miniflux.pictures import check_place
from miniflux.settings import exiftext, strict
from miniflux.text.decoding import repaired

KEY = "miniflux"
READ = (KEY, "parameters", "prompt", "workflow")  # PNG texts that may hold settings; of others only the name is kept
MAX_CHUNKS = 200_000  # of a file, pixels included; libpng writes 8 KB of them per chunk
MAX_NOTES = 50
MAX_EXIF = strict.MAX_BYTES + 2**16
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
    exif[exiftext.DESCRIPTION] = short
    return {"exif": exif}


def _plain(value: Any) -> Any:
    """Numbers that JSON lacks become null; bytes in file names that are no text become U+FFFD."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if isinstance(value, str):
        try:
            return repaired("a text", value)
        except InputError:
            return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _segments(data: bytes) -> Iterator[bytes]:
    parts = [data[i : i + SEGMENT_SIZE] for i in range(0, len(data), SEGMENT_SIZE)]
    for i, part in enumerate(parts):
        body = SEGMENT + struct.pack(">HH", i, len(parts)) + part
        yield b"\xff\xeb" + struct.pack(">H", len(body) + 2) + body


@dataclass
class Texts:
    """The texts in a file.

    Attributes:
        found: those that may hold settings, by their names; those of EXIF are `exif NAME`. Of several with one name it
            is the last, as in most programs.
        notes: what else there is or could not be read, a line each.
    """

    found: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])

    def note(self, line: str) -> None:
        """Tell of a text that is not looked at; one line of each kind, and not without end."""
        if line not in self.notes and len(self.notes) <= MAX_NOTES:
            self.notes.append(line if len(self.notes) < MAX_NOTES else "and more texts")

    def add(self, name: str, text: str) -> None:
        """Keep a text.

        Raises:
            SettingsError: of our own there are two that differ.
        """
        if self.found.get(name, text) != text:
            if name == KEY:
                raise SettingsError(f"the text {strict.shown(name)} is there twice")
            self.note(f"the text {strict.shown(name)} is there several times; the last is read")
        self.found[name] = text


def texts_of(path: str | Path) -> Texts:
    """The texts in a PNG, JPEG or WebP file.

    Raises:
        SettingsError: it cannot be read, is none of these, ends before its end, or our own text in it is damaged.
    """
    texts = Texts()
    try:
        check_place(path)
    except InputError as error:
        raise SettingsError(str(error)) from error
    try:
        with open(path, "rb") as file:
            start = file.read(12)
            if start.startswith(PNG):
                file.seek(len(PNG))
                _png(file, texts)
            elif start.startswith(JPEG):
                file.seek(2)
                _jpeg(file, texts)
            elif start[:4] == b"RIFF" and start[8:] == b"WEBP":
                _webp(file, texts)
            else:
                raise SettingsError("not a PNG, JPEG or WebP file")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    return texts


def _exactly(file: BinaryIO, size: int, what: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise SettingsError(f"cut off in {what}")
    return data


def _bounded(size: int, what: str) -> None:
    if size > strict.MAX_BYTES:
        raise SettingsError(f"{what} has {size} bytes; at most {strict.MAX_BYTES} are read")


def _png(file: BinaryIO, texts: Texts) -> None:
    """PNG (third edition), 5.3 and 11.3.3: length, type, data, CRC."""
    for _ in range(MAX_CHUNKS):
        size, kind = struct.unpack(">I4s", _exactly(file, 8, "a PNG chunk"))
        if kind == b"IEND":
            return
        end = file.tell() + size + 4
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            word, zero, _ = file.read(min(size, 80)).partition(b"\0")
            name = word.decode("latin-1")
            what = f"the text {strict.shown(name)}"
            if not zero or not word:
                texts.note(f"a {kind.decode()} chunk without a keyword")
            elif name not in READ:
                texts.note(what)
            else:
                try:
                    _bounded(size, what)
                    file.seek(end - size - 4)
                    texts.add(name, _png_text(kind, _whole(file, size, kind, what), what))
                except SettingsError as error:
                    _skipped(error, name, texts)
        elif kind == b"eXIf":
            try:
                _bounded(size, "the EXIF block")
                _exif(_whole(file, size, kind, "the EXIF block"), texts)
            except SettingsError as error:
                _skipped(error, "EXIF", texts)
        file.seek(end)
    raise SettingsError(f"more than {MAX_CHUNKS} PNG chunks")


def _skipped(error: SettingsError, name: str, texts: Texts) -> None:
    """Tell of a damaged text of another program; of our own raise."""
    if name == KEY or str(error).startswith("cut off"):
        raise error
    texts.note(str(error))


def _whole(file: BinaryIO, size: int, kind: bytes, what: str) -> bytes:
    """The data of a PNG chunk, if its checksum is right."""
    data = _exactly(file, size, what)
    (crc,) = struct.unpack(">I", _exactly(file, 4, what))
    if crc != zlib.crc32(kind + data):
        raise SettingsError(f"{what} is damaged: its checksum is wrong")
    return data


def _png_text(kind: bytes, data: bytes, what: str) -> str:
    _, _, rest = data.partition(b"\0")  # the keyword
    if kind == b"tEXt":
        return _utf8_or_latin1(rest)
    if kind == b"zTXt":
        if rest[:1] != b"\0":
            raise SettingsError(f"{what} is compressed in an unknown way")
        return _utf8_or_latin1(_inflated(rest[1:], what))
    packed, method, rest = rest[:1], rest[1:2], rest[2:]
    _, _, rest = rest.partition(b"\0")  # language
    _, _, rest = rest.partition(b"\0")  # translated keyword
    if packed not in (b"\0", b"\1") or (packed == b"\1" and method != b"\0"):
        raise SettingsError(f"{what} is compressed in an unknown way")
    return _utf8(_inflated(rest, what) if packed == b"\1" else rest, what)


def _utf8_or_latin1(data: bytes) -> str:
    """PNG says Latin-1, where many write UTF-8; Latin-1 that happens to be UTF-8 is no text of any language."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


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


def _jpeg(file: BinaryIO, texts: Texts) -> None:
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
            _exif(body, texts)
    else:
        raise SettingsError("more than 1000 JPEG segments before its pixels")
    if ours:
        if sorted(ours) != list(range(count)):
            raise SettingsError(f"of the {count} segments with settings {count - len(ours)} are missing")
        data = b"".join(ours[number] for number in range(count))
        _bounded(len(data), "the settings")
        texts.add(KEY, _utf8(data, "the settings"))


def _webp(file: BinaryIO, texts: Texts) -> None:
    """WebP container specification: RIFF chunks."""
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            return
        kind, size = struct.unpack("<4sI", head)
        if kind == b"EXIF" and size > MAX_EXIF:
            texts.note(f"the EXIF chunk has {size} bytes; at most {MAX_EXIF} are read")
            file.seek(size + size % 2, 1)
        elif kind == b"EXIF":
            _exif(_exactly(file, size, "the EXIF chunk"), texts)
            file.seek(size % 2, 1)
        else:
            file.seek(size + size % 2, 1)
    raise SettingsError(f"more than {MAX_CHUNKS} WebP chunks")


def _exif(data: bytes, texts: Texts) -> None:
    try:
        for name, text in exiftext.texts(data):
            texts.add(f"exif {name}", text)
    except SettingsError as error:
        texts.note(str(error))
