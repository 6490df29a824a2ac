"""What a file is that holds no tensors that are read, told from its first bytes whatever its name is."""

from __future__ import annotations

import io
import re
import warnings

from PIL import Image

from miniflux.strictjson import MAX_HEADER

HEAD = 512  # bytes that are looked at
PICKLE = "a pickle, which can run code and is never loaded"
SOUND = "a recording of sound"
# Of each kind the first bytes; pictures that are not here are told by Pillow.
BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"GIF8", "a picture (GIF)"),
    (b"BM", "a picture (BMP)"),
    (b"II*\x00", "a picture (TIFF)"),
    (b"MM\x00*", "a picture (TIFF)"),
    (b"8BPS", "a picture (Photoshop)"),
    (b"\x00\x00\x00\x0cJXL ", "a picture (JPEG XL)"),
    (b"\xff\x0a", "a picture (JPEG XL)"),
    (b"\x00\x00\x01\x00", "a picture (icon)"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive without files"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "an archive (7-Zip)"),
    (b"Rar!", "an archive (RAR)"),
    (b"BZh", "an archive (bzip2)"),
    (b"\xfd7zXZ\x00", "an archive (xz)"),
    (b"\x28\xb5\x2f\xfd", "an archive (Zstandard)"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "an array of numpy"),
    (b"SQLite format 3\x00", "a database (SQLite)"),
    (b"\x7fELF", "a program for Linux"),
    (b"MZ", "a program for Windows"),
    (b"\x1aE\xdf\xa3", "a film"),
    *((begin, SOUND) for begin in (b"ID3", b"OggS", b"fLaC")),
    (b"version https://git-lfs", "a Git LFS pointer; the file itself was not downloaded"),
    (b"\x00\x05\x16\x07", "what macOS keeps beside a file on a foreign disk (named ._*), not the file itself"),
)
# And what stands a little later: the place, the bytes.
INSIDE: tuple[tuple[int, bytes, str], ...] = (
    (8, b"WEBP", "a picture (WebP)"),
    (8, b"WAVE", SOUND),
    (8, b"AVI ", "a film"),
    *((4, b"ftyp" + brand, "a picture (AVIF or HEIC)") for brand in (b"avif", b"heic", b"heix", b"mif1")),
    (4, b"ftyp", "a film"),
    (4, b"TFL3", "a model in TensorFlow Lite"),
    (257, b"ustar", "an archive (tar)"),
)
# Newer pickles say their protocol; older ones begin with a dictionary, a list, or the name of a class.
PICKLES = re.compile(rb"\x80[\x02-\x05]|\([dl]p|[}\]]q\x00|c[\w.]+\n\w+\n")
# Protocol buffers say their fields one by one: the version of the format, then who wrote it, or what follows.
ONNX = re.compile(rb"\x08[\x01-\x20](\x12.[ -~]{2}|[\x1a:B])", re.DOTALL)
PAGE = "a web page, perhaps the answer to a failed download"
TEXTS: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", PAGE),
    (b"<html", PAGE),
    (b"{", "a JSON file, perhaps a workflow or a config"),
)


def kind_of_file(head: bytes) -> str | None:
    """What a file is that begins so; None if that is not known, or it begins as safetensors files do.

    Args:
        head: its first bytes, `HEAD` of them if it has as many.
    """
    if int.from_bytes(head[:8], "little") <= MAX_HEADER and head[8:].lstrip().startswith(b"{"):
        return None  # whatever its length looks like
    kind = PICKLE if PICKLES.match(head) else None
    kind = kind or next((kind for begin, kind in BEGINNINGS if head.startswith(begin)), None)
    kind = kind or next((kind for place, sign, kind in INSIDE if head.startswith(sign, place)), None)
    if kind == "a zip archive" and b"/data.pkl" in head:  # the newer way of torch.save
        kind = f"a zip archive as torch.save writes it: with {PICKLE}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kind = kind or next((kind for begin, kind in TEXTS if text.startswith(begin)), None)
    kind = kind or ("a model in ONNX" if ONNX.match(head) else None) or _picture(head)
    if kind is None and len(head) == HEAD and not any(head):
        kind = "nothing but zeros, perhaps a download that was never filled"
    return kind or ("a text file" if len(head) > 8 and _is_text(head) else None)


def _picture(head: bytes) -> str | None:
    """Which of Pillow's kinds of pictures a file begins as, such as TGA, which has no mark of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is missing behind the head
        try:
            return f"a picture ({Image.open(io.BytesIO(head)).format})"
        except Exception:  # Pillow raises whatever its parsers run into
            return None


def _is_text(head: bytes) -> bool:
    try:
        text = head[: len(head) - 4 if len(head) == HEAD else HEAD].decode()
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)
