"""Pictures given by users: opened once and for all, upright, in sRGB, first frame, 8 or 16 bits - or refused in a line.

Everything that takes a picture to change (`generate`, the command line, replay, the page) opens it here, so that one
picture has one set of values, one size and one digest, however it came.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import stat
import struct
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageCms, ImageOps, features
from torch import Tensor

from miniflux.errors import InputError

log = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970  # where Pillow itself takes a picture for a decompression bomb
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "QOI")
"""Of Pillow's readers those of plain pictures; others start programs (EPS), or read what nobody gives as a picture."""
SAME_COLOURS = 3  # levels of 255; profiles that say sRGB in other words move colours by no more
PNG = b"\x89PNG\r\n\x1a\n"
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def open_picture(
    given: str | os.PathLike[str] | bytes | BinaryIO | Image.Image,
    *,
    max_pixels: int = MAX_PIXELS,
    formats: Sequence[str] = FORMATS,
) -> Image.Image:
    """A picture that somebody gives, as it is meant to be seen.

    The first frame of several, which is logged; turned as EXIF says; colours of an embedded profile become sRGB.

    Args:
        given: a path, the bytes of a file, an open binary file, or a Pillow picture of any mode.
        max_pixels: of those that its header announces; more are refused before any of them is decoded.
        formats: of files, some of `FORMATS`.

    Returns:
        Mode RGB; RGBA if parts may be transparent; or I;16, grey with 65535 for white. Without EXIF, profile and text.

    Raises:
        InputError: there is no such file, it is no picture or a damaged one, has no pixels or too many, or its numbers
            do not say what is white (modes F and I).
    """
    if isinstance(given, Image.Image):
        return _as_seen(given, getattr(given, "filename", "") or "the picture", max_pixels)
    if isinstance(given, (str, os.PathLike)):
        if not os.fspath(given):
            raise InputError("the name of a picture is empty")
        name, data = os.fspath(given), _bytes_of(Path(given))
    elif isinstance(given, bytes) or hasattr(given, "read"):
        name, data = "the picture", given if isinstance(given, bytes) else given.read()
    else:
        raise InputError(f"a picture is a path, bytes, an open file or a Pillow picture, got a {type(given).__name__}")
    if not data:
        raise InputError(f"{name}: an empty file, no picture")
    Image.init()
    readable = [kind for kind in formats if kind in Image.OPEN]
    try:
        with _pillow_logged(name):
            image = Image.open(io.BytesIO(_without_texts(data)), formats=readable)
            frames = int(getattr(image, "n_frames", 1))
    except Image.UnidentifiedImageError:
        raise InputError(f"{name}: no picture{_kind_of(data)}; {', '.join(formats)} are read") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: {_line(error)}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises whatever its parsers run into
        raise InputError(f"{name}: the picture cannot be read: {_line(error)}") from error
    if frames > 1 and image.format != "MPO":  # which holds smaller copies beside a photo
        log.warning("%s: %d frames; the first is taken", name, frames)
    with image:
        return _as_seen(image, name, max_pixels)


@contextmanager
def _pillow_logged(name: str) -> Generator[None]:
    """Log what Pillow warns of, in a line; but not of many pixels, for which there is `MAX_PIXELS`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for line in {_line(one.message): None for one in caught if one.category is not Image.DecompressionBombWarning}:
        log.warning("%s: %s", name, line)


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse what is no file to be read to its end: reading a pipe waits for ever, a device never ends.

    Raises:
        InputError: there is nothing, a folder, a pipe or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is no path: {error}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a folder, no picture")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is no plain file, and so no picture")


def _bytes_of(path: Path) -> bytes:
    check_place(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _without_texts(data: bytes) -> bytes:
    """A PNG without its text chunks, at which Pillow stops if one of them is long; anything else as it is."""
    if not data.startswith(PNG):
        return data
    kept, place = [PNG], len(PNG)
    while place + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(data[place : place + size + 12])
        place += size + 12
    return b"".join(kept)


def _kind_of(data: bytes) -> str:
    """What a file that is no picture seems to be."""
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return " that can be read here, but HEIC: save it as JPEG or PNG"
    return ""


def _line(error: Exception | Warning | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _as_seen(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """The first frame, checked, loaded, upright and in plain colours."""
    if not image.width or not image.height:
        raise InputError(f"{name}: {image.width}x{image.height}, a picture without pixels")
    if image.width * image.height > max_pixels:
        raise InputError(f"{name}: {image.width}x{image.height} pixels; at most {max_pixels:,} in all are read")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # 16 bits in those two
        raise InputError(
            f"{name}: its pixels are of mode {image.mode}, 32 bits, which does not say what is white: save it with 8 "
            "or 16 bits per channel"
        )
    try:
        with _pillow_logged(name):
            image.load()
            return _plain(_upright(image, name), image, name)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # as above; a file that is cut off shows it here
        raise InputError(f"{name}: the picture is damaged: {_line(error)}") from error


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Turned as EXIF says (a TIFF has been by Pillow); always a copy."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:
        log.warning("%s: its EXIF data are damaged (%s); it is taken as it lies", name, _line(error))
        return image.copy()


def _plain(image: Image.Image, source: Image.Image, name: str) -> Image.Image:
    """RGB, RGBA or I;16 of a loaded picture, its own profile and transparency worked in."""
    profile, clear = image.info.get("icc_profile"), image.info.get("transparency")
    if image.mode in SIXTEEN_BITS or image.mode == "I":
        levels = _sixteen_bits(image, source)
        if not profile and clear is None:
            return Image.fromarray(levels)
        eight = _eight_bits(levels)
        if clear is not None:
            alpha = Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8))
            eight = Image.merge("LA", (eight, alpha))
        image = eight
    elif image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits, of which Pillow keeps 8
        image.info["transparency"] = tuple(level >> 8 for level in clear)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.replace("a", "A"))
    transparent = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    if image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A"):
        transparent = True
    alpha = None
    if transparent:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    elif image.mode not in ("L", "CMYK", "LAB", "RGB"):
        image = image.convert("RGB")
    if profile:
        image = _in_srgb(image, profile, name)
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
    image.info = {}
    return image


def _sixteen_bits(image: Image.Image, source: Image.Image) -> np.ndarray:
    """Grey levels (H, W), uint16, 65535 for white."""
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise InputError(f"grey levels from {levels.min()} to {levels.max()}; expected 0 to 65535")
    levels = levels.astype(np.uint16)
    tags = getattr(source, "tag_v2", {}) if source.format == "TIFF" else {}
    bits = tags.get(258, 16)  # BitsPerSample
    if (bits[0] if isinstance(bits, tuple) else bits) == 12:
        levels = (levels.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
    return 65535 - levels if tags.get(262) == 0 else levels  # PhotometricInterpretation: WhiteIsZero


def _eight_bits(levels: np.ndarray) -> Image.Image:
    """Grey of 16 bits as mode L, rounded."""
    return Image.fromarray(((levels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """The colours that an ICC profile means, RGB; a profile of sRGB itself changes nothing."""
    if not features.check("littlecms2"):
        log.warning("%s: Pillow is built without littlecms2, so its colour profile is not applied", name)
        return image
    try:
        theirs, ours = ImageCms.getOpenProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        space = str(getattr(theirs.profile, "xcolor_space", "")).strip()
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}.get(space)
        if mode is None or (mode != image.mode and {mode, image.mode} != {"L", "RGB"}):
            raise ValueError(f"it is for {space}, the pixels are {image.mode}")
        change = ImageCms.buildTransform(theirs, ours, mode, "RGB")
        given = image.convert(mode)
        if mode in ("RGB", "L") and _changes_little(change, mode):
            return image
        changed = ImageCms.applyTransform(given, change)
        assert changed is not None
        return changed
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        log.warning("%s: its colour profile is not applied: %s", name, _line(error))
        return image


def _changes_little(change: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform leaves a grid of colours as they are, but for rounding."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = steps[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    colours = Image.fromarray(np.ascontiguousarray(grid))
    seen = ImageCms.applyTransform(colours, change)
    gap = np.asarray(seen, np.int16) - np.asarray(colours.convert("RGB"), np.int16)
    return int(np.abs(gap).max()) <= SAME_COLOURS


def from_image(image: Image.Image) -> Tensor:
    """A picture of any mode, as RGB pixels (3, H, W) in [-1, 1]; transparency is laid on white.

    Raises:
        InputError: as `open_picture`.
    """
    image = open_picture(image)
    if image.mode == "I;16":
        grey = torch.from_numpy(np.asarray(image).astype(np.float32)) / 32767.5 - 1
        return grey.expand(3, *grey.shape).contiguous()
    pixels = torch.from_numpy(np.array(on_white(image)))
    return rearrange(pixels, "H W C -> C H W").float() / 127.5 - 1


def on_white(image: Image.Image) -> Image.Image:
    """What `open_picture` gives, as 8-bit RGB; transparency is laid on white."""
    if image.mode == "I;16":
        return Image.fromarray(((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def digest_of(image: Image.Image | Tensor) -> str:
    """SHA-256 of the pixels of a picture as `open_picture` gives them, or of latents, with their shape.

    Raises:
        InputError: as `open_picture`.
    """
    if isinstance(image, Tensor):
        values = image.float().cpu().numpy()
    else:
        image = open_picture(image)
        values = np.asarray(image if image.mode == "I;16" else image.convert("RGBA"))
    return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()
