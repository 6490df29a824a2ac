"""Pictures given by users: every kind comes out as it is meant to be seen, or is refused in a line."""

from __future__ import annotations

import io
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from miniflux.errors import InputError
from miniflux.pictures import digest_of, from_image, on_white, open_picture

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)
GREY = np.array([[0, 1000, 1001, 32768, 65535]], np.uint16)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF 2.32, 4.6.4: where row 0 and column 0 of the stored picture are in the one that is seen."""
    return {
        1: values,
        2: values[:, ::-1],
        3: values[::-1, ::-1],
        4: values[::-1],
        5: values.transpose(1, 0, 2),
        6: np.rot90(values, -1),
        7: values[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(values),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG", "MPO"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    ramp = np.zeros((32, 48, 3), np.uint8)  # smooth, for JPEG
    ramp[..., 0], ramp[..., 1] = np.arange(48) * 5, np.arange(32)[:, None] * 7
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "MPO": {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]}}
    data = encoded(Image.fromarray(ramp), kind, exif=exif, **options.get(kind, {}))
    seen = open_picture(data)
    want = turned(ramp, orientation).astype(int)
    assert seen.size == want.shape[1::-1]
    assert np.abs(pixels(seen) - want).mean() < 4
    with Image.open(io.BytesIO(data)) as image:  # a picture that the caller opened is the same one
        assert digest_of(image) == digest_of(seen)
        assert from_image(image).equal(from_image(seen))


def test_ordinary_pictures_keep_their_digests() -> None:
    """Files of earlier versions name them: SHA-256 of the shape and the RGBA values."""
    values = (np.arange(6 * 4 * 3) * 3 % 256).astype(np.uint8).reshape(6, 4, 3)
    image = Image.fromarray(values)
    colours = "95a33489cc7c2ea26e6d297aa0b297405e0f0ea1debc8584d3421ad7e9fa565e"
    assert {digest_of(image.convert(mode)) for mode in ("RGB", "RGBA", "CMYK")} == {colours}
    grey = "a571bd059c92acbef70275d6cda9475b97aa21fef81f834c0edfefc73fd7da05"
    assert {digest_of(image.convert(mode)) for mode in ("L", "LA")} == {grey}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_grey_of_16_bits_keeps_its_values(kind: str) -> None:
    image = open_picture(encoded(Image.fromarray(GREY), kind))
    assert np.array_equal(pixels(image), GREY)
    assert np.allclose(from_image(image).numpy(), GREY[None] / 32767.5 - 1, atol=1e-6)
    assert np.array_equal(pixels(on_white(image))[..., 0], (GREY / 257.0).round())


def test_every_form_of_16_bits_is_the_same_picture() -> None:
    same = [
        Image.fromarray(GREY),
        Image.frombytes("I;16B", (5, 1), GREY.astype(">u2").tobytes()),
        Image.frombytes("I;16L", (5, 1), GREY.astype("<u2").tobytes()),
        open_picture(encoded(Image.fromarray(GREY), "PNG")),
        open_picture(b"P5 5 1 65535\n" + GREY.astype(">u2").tobytes()),
    ]
    assert len({digest_of(image) for image in same}) == 1
    other = GREY.copy()
    other[0, 1] += 1
    assert digest_of(Image.fromarray(other)) != digest_of(same[0])


def tiff(bits: int, photometric: int, data: bytes, width: int) -> bytes:
    """TIFF 6.0, section 3: a grey picture of one row."""
    tags = [
        *((256, 3, width), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric)),
        *((273, 4, 8 + 2 + 9 * 12 + 4), (277, 3, 1), (278, 3, 1), (279, 4, len(data))),
    ]
    entries = b"".join(struct.pack("<HHI", *tag[:2], 1) + struct.pack("<I", tag[2]) for tag in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


def test_tiff_of_12_bits_and_of_white_zeros() -> None:
    twelve = open_picture(tiff(12, 1, bytes.fromhex("000fff800000"), 4))
    assert np.abs(pixels(twelve)[0, :3] - [0, 65535, 0x800 * 65535 / 4095]).max() <= 1
    assert pixels(open_picture(tiff(16, 0, struct.pack("<3H", 0, 1000, 65535), 3))).tolist() == [[65535, 64535, 0]]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_white_are_refused_by_name(mode: str) -> None:
    image = Image.new(mode, (4, 4))
    for read in (from_image, digest_of, open_picture):
        with pytest.raises(InputError, match=rf"mode {mode}, 32 bits"):
            read(image)
    with pytest.raises(InputError, match="mode"):
        open_picture(encoded(image, "TIFF"))


def test_transparency_of_every_kind_is_kept_and_laid_on_white() -> None:
    colours = Image.fromarray(COLOURS)
    alpha = Image.fromarray(RNG.integers(0, 256, (6, 4), dtype=np.uint8))
    rgba = colours.copy()
    rgba.putalpha(alpha)
    blend = (COLOURS * (pixels(alpha) / 255)[..., None] + 255 * (1 - pixels(alpha) / 255)[..., None]).round()
    assert np.abs(pixels(on_white(open_picture(encoded(rgba, "PNG")))) - blend).max() <= 1
    assert np.abs(pixels(on_white(open_picture(rgba.convert("RGBa")))) - blend).max() <= 2

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    for given in (0, b"\x00\xff"):
        seen = open_picture(encoded(palette, "PNG", transparency=given))
        assert pixels(on_white(seen)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    for mode, clear in (("L", 7), ("RGB", (7, 7, 7))):
        image = Image.new(mode, (1, 1), clear)
        assert pixels(on_white(open_picture(encoded(image, "PNG", transparency=clear)))).tolist() == [[[255] * 3]]
    one = open_picture(Image.new("LA", (1, 1), (100, 0)))
    assert one.mode == "RGBA" and pixels(on_white(one)).tolist() == [[[255] * 3]]


def test_transparent_colour_of_16_bits() -> None:
    head = lambda colour: struct.pack(">IIBBBBB", 2, 1, 16, colour, 0, 0, 0)  # noqa: E731
    rows = {0: struct.pack(">2H", 0x1234, 0x1235), 2: struct.pack(">6H", *[0x1234] * 3, *[0xFF00] * 3)}
    for colour, row in rows.items():
        clear = struct.pack(">H", 0x1234) * (1 if colour == 0 else 3)
        data = png((b"IHDR", head(colour)), (b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
        seen = open_picture(data)
        assert seen.mode == "RGBA" and pixels(seen)[0, :, 3].tolist() == [0, 255]


def test_modes_that_other_programs_write() -> None:
    assert pixels(open_picture(Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]
    inverted = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")  # Adobe's: stored as 255 - ink
    assert b"Adobe" in inverted
    assert np.abs(pixels(open_picture(inverted)) - [255, 0, 0]).max() <= 3
    for mode in ("YCbCr", "HSV", "CMYK", "RGBX"):
        assert np.abs(pixels(open_picture(Image.fromarray(COLOURS).convert(mode))) - COLOURS).max() <= 8, mode
    lab = open_picture(Image.new("LAB", (1, 1), (136, 208, 195)))  # CIE Lab of sRGB red: 53.2, 80.1, 67.2 (D65)
    assert np.abs(pixels(lab) - [255, 0, 0]).max() <= 12
    wide = struct.pack(">3H", 0xFFFF, 0x8000, 0x0102)
    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = png((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" + wide)), (b"IEND", b""))
    assert pixels(open_picture(data)).tolist() == [[[255, 128, 1]]]


def adobe_rgb_like() -> bytes:
    """A profile whose red and green are exchanged, built from Pillow's sRGB one."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack(">I", data[128:132])
    places = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    data[red + 4 : red + 12], data[green + 4 : green + 12] = data[green + 4 : green + 12], data[red + 4 : red + 12]
    return bytes(data)


def test_embedded_profiles_become_srgb(caplog: pytest.LogCaptureFixture) -> None:
    image = Image.fromarray(COLOURS)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert digest_of(open_picture(encoded(image, "PNG", icc_profile=own))) == digest_of(image)
    seen = open_picture(encoded(image, "PNG", icc_profile=adobe_rgb_like()))
    assert np.abs(pixels(seen) - COLOURS[..., [1, 0, 2]]).max() <= 3
    assert not caplog.records
    assert digest_of(open_picture(encoded(image, "PNG", icc_profile=b"no profile"))) == digest_of(image)
    assert "colour profile is not applied" in caplog.text


def test_the_first_frame_is_taken_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        caplog.clear()
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        if kind != "TIFF":
            options["duration"] = 100  # frames that last no time may be joined by who writes them
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3, f"{kind} as Pillow wrote it"
        (tmp_path / "a").write_bytes(data)
        assert np.abs(pixels(open_picture(tmp_path / "a").convert("RGB")) - [255, 0, 0]).max() <= 1
        assert "3 frames; the first is taken" in caplog.text, kind


def test_what_is_no_picture_at_all() -> None:
    for given in (5, None, [1], {}):
        with pytest.raises(InputError, match="a picture is a path, bytes, an open file or a Pillow picture, got a"):
            open_picture(given)  # type: ignore[arg-type]


def test_long_texts_in_a_png_do_not_matter() -> None:
    about = PngImagePlugin.PngInfo()
    about.add_text("parameters", "x" * 5_000_000, zip=True)
    for _ in range(100):
        about.add_itxt("XML:com.adobe.xmp", "y" * 900_000, zip=True)
    data = encoded(Image.fromarray(COLOURS), "PNG", pnginfo=about)
    with pytest.raises(ValueError):  # Pillow itself
        Image.open(io.BytesIO(data))
    assert np.array_equal(pixels(open_picture(data)), COLOURS)


BOMB = png((b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (BOMB, r"3600000000 pixels|60000x60000"),
        (png((b"IHDR", struct.pack(">IIBBBBB", 13500, 13500, 8, 2, 0, 0, 0)), (b"IDAT", b"")), "13500x13500|pixels"),
        (b"", "empty"),
        (b"hello, world, I am a text\n" * 9, "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (encoded(Image.fromarray(COLOURS), "PNG")[:60], "damaged|read"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:400], "damaged|read"),
        (encoded(Image.new("RGB", (64, 64)), "WEBP")[:60], "damaged|read"),
        (png((b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)), (b"IEND", b"")), "pixels|read"),
    ],
)
def test_what_is_no_picture_is_refused_in_a_line(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(InputError, match=words) as error:
        open_picture(tmp_path / "x.png")
    assert "x.png" in str(error.value) and "\n" not in str(error.value)


def test_places_that_hold_no_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place, words in (
        (tmp_path, "folder"),
        (tmp_path / "pipe", "plain file"),
        ("/dev/zero", "plain file"),
        (tmp_path / "none.png", "No such file"),
        ("a\0b", "no path"),
        (tmp_path / ("x" * 5000), "too long"),
    ):
        with pytest.raises(InputError, match=words):
            open_picture(place)


def test_any_damage_is_refused_or_opened() -> None:
    """Bytes exchanged, cut or put in: never another exception."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "QOI"):
        if kind == "QOI" and kind not in Image.SAVE:
            continue
        data = encoded(image, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
        for _ in range(60):
            broken = bytearray(data)
            for place in rng.integers(0, min(len(data), 400), rng.integers(1, 6)):
                broken[place] = rng.integers(0, 256)
            with suppress(InputError):
                open_picture(bytes(broken[: rng.integers(10, len(data) + 1)] if rng.random() < 0.3 else broken))
