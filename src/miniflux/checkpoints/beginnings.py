"""What a file is that holds no tensors that are read, told from its first bytes whatever its name is."""

from __future__ import annotations

HEAD = 512  # bytes that are looked at
PICKLE = "a pickle, which can run code and is never loaded"
GZIP = "a gzip archive"
# Two bytes may also be the length of a header: these count only where such a header would be too long.
SHORT: tuple[tuple[bytes, str], ...] = (
    *((bytes((0x80, version)), PICKLE) for version in (2, 3, 4, 5)),
    (b"\x1f\x8b", GZIP),
    (b"BM", "a picture (BMP)"),
    (b"P5", "a picture (PGM)"),
    (b"P6", "a picture (PPM)"),
    (b"MZ", "a program for Windows"),
)
BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"GIF8", "a picture (GIF)"),
    (b"II*\x00", "a picture (TIFF)"),
    (b"MM\x00*", "a picture (TIFF)"),
    (b"8BPS", "a picture (Photoshop)"),
    (b"\x00\x00\x00\x0cJXL ", "a picture (JPEG XL)"),
    (b"\xff\x0a", "a picture (JPEG XL)"),
    (b"\x00\x00\x01\x00", "a picture (icon)"),
    (b"%PDF", "a PDF document"),
    (b"GGUF", "a GGUF file; its name must end in .gguf"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "an archive (7-Zip)"),
    (b"Rar!", "an archive (RAR)"),
    (b"BZh", "an archive (bzip2)"),
    (b"\xfd7zXZ\x00", "an archive (xz)"),
    (b"\x28\xb5\x2f\xfd", "an archive (Zstandard)"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "an array of numpy"),
    (b"SQLite format 3\x00", "a database (SQLite)"),
    (b"\x7fELF", "a program for Linux"),
    (b"version https://git-lfs", "a Git LFS pointer; the file itself was not downloaded"),
    (b"\x00\x05\x16\x07", "what macOS keeps beside a file on a foreign disk (named ._*), not the file itself"),
)
PAGE = "a web page, perhaps the answer to a failed download"
TEXTS: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", PAGE),
    (b"<html", PAGE),
    (b"{", "a JSON file, perhaps a workflow or a config"),
)


def kind_of_file(head: bytes, *, header: bool = False) -> str | None:
    """What a file is that begins so; None if that is not known.

    Args:
        head: its first bytes, `HEAD` of them if it has as many.
        header: whether the first eight bytes may be the length of a safetensors header that is cut off.
    """
    kind = next((kind for start, kind in BEGINNINGS if head.startswith(start)), None)
    if kind is None and not header:
        kind = next((kind for start, kind in SHORT if head.startswith(start)), None)
    if kind == "a zip archive" and b"/data.pkl" in head:  # the newer way of torch.save
        kind = f"a zip archive as torch.save writes it: with {PICKLE}"
    if head[:4] == b"RIFF":
        kind = "a picture (WebP)" if head[8:12] == b"WEBP" else "a sound or a film (RIFF)"
    if head[4:8] == b"ftyp":
        kind = "a picture (AVIF or HEIC)" if head[8:12] in (b"avif", b"heic", b"heix", b"mif1") else "a film"
    if head[257:262] == b"ustar":
        kind = "an archive (tar)"
    # Protocol buffers say their fields one by one: the version of the format, then who wrote it.
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a") and not header:
        kind = "a model in ONNX"
    # TGA has no mark at its beginning: no colour map, true colours or greys, no table, 8 to 32 bits.
    if head[1:8] == bytes((0, *head[2:3], 0, 0, 0, 0, 0)) and head[2:3] in (b"\x02", b"\x03", b"\x0a", b"\x0b"):
        kind = "a picture (TGA)" if head[16:17] in (b"\x08", b"\x10", b"\x18", b"\x20") else kind
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kind = kind or next((kind for start, kind in TEXTS if text.startswith(start)), None)
    return kind or ("a text file" if len(head) > 8 and _is_text(head) else None)


def _is_text(head: bytes) -> bool:
    try:
        text = head[: len(head) - 4 if len(head) == HEAD else HEAD].decode()
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)
