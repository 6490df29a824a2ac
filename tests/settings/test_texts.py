"""Settings in the files of pictures: other people's readers find them, and hostile ones are refused by name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from miniflux.errors import MinifluxError, OutputError, SettingsError
from miniflux.result import save_picture
from miniflux.settings import exiftext, read_picture
from miniflux.settings.texts import texts_of
from tests.hanging import no_hang

PICTURE = Image.effect_noise((32, 32), 80).convert("RGB")
RECORD: dict[str, Any] = {"prompt": "a star", "seed": 3, "model": "nano-dev"}
PROMPTS = [
    "plain",
    "<script>alert('x')</script> & \"quotes\" \\",
    "\U0001f600 é 漢字 \u202e reversed",
    "\x00\x01\x1b[31m\r\n\t",
    "\U0001f600" * 100_000,
    "x" * 100_000,
    "\x00" * 100_000,
]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["plain", "markup", "emoji", "control", "long-emoji", "long", "zeros"])
def test_texts_come_back_as_they_were(tmp_path: Path, name: str, prompt: str) -> None:
    record = {**RECORD, "prompt": prompt}
    save_picture(PICTURE, tmp_path / name, [record])
    key = "miniflux" if name.endswith(".png") or "miniflux" in texts_of(tmp_path / name).found else "exif description"
    assert json.loads(texts_of(tmp_path / name).found[key]) == record
    assert read_picture(tmp_path / name).requests[0].prompt == prompt
    with Image.open(tmp_path / name) as image:  # Pillow takes no offence
        image.load()
        if name.endswith(".png"):
            assert json.loads(image.text["miniflux"]) == record  # type: ignore[attr-defined]
        elif len(prompt) < 1000:
            assert json.loads(image.getexif()[0x010E]) == record


def test_settings_can_be_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp"):
        save_picture(PICTURE, tmp_path / name, None)
        assert texts_of(tmp_path / name).found == {}
        assert read_picture(tmp_path / name).origin == "none"


def test_more_than_a_file_carries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="settings of 30 pictures take .* save them one by one"):
        save_picture(PICTURE, tmp_path / "a.png", [{**RECORD, "prompt": "x" * 100_000}] * 30)
    assert not list(tmp_path.iterdir())


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    save_picture(PICTURE, tmp_path / "a.png", [{**RECORD, "cache": {"name": "tea", "psnr": float("inf")}}])
    assert read_picture(tmp_path / "a.png").origin == "miniflux"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes) -> bytes:
    """A whole PNG with chunks before its end."""
    stream = io.BytesIO()
    PICTURE.save(stream, "PNG")
    data = stream.getvalue()
    return data[:-12] + b"".join(chunks) + data[-12:]


def ours(text: str | bytes) -> bytes:
    return chunk(b"tEXt", b"miniflux\0" + (text.encode() if isinstance(text, str) else text))


def bomb(size: int = 50_000_000) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1_000_000)) for _ in range(size // 1_000_000)) + packer.flush()


def jpeg(*segments: bytes) -> bytes:
    stream = io.BytesIO()
    PICTURE.save(stream, "JPEG")
    data = stream.getvalue()
    return data[:2] + b"".join(segments) + data[2:]


def segment(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body


def exif(text: bytes) -> bytes:
    block = Image.Exif()
    block[0x010E] = text
    return block.tobytes()


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "no picture": (lambda: b"GIF89a" + bytes(100), "not a PNG, JPEG or WebP"),
    "empty": (lambda: b"", "not a PNG, JPEG or WebP"),
    "cut off": (lambda: png(ours("{}"))[:-20], "cut off|is damaged"),
    "megabytes of text": (lambda: png(ours("x" * 5_000_000)), "5000009 bytes; at most"),
    "a length beyond the file": (lambda: png(struct.pack(">I", 0x7FFFFFFF) + b"tEXt"), "cut off in a PNG chunk"),
    "zTXt bomb": (lambda: png(chunk(b"zTXt", b"miniflux\0\0" + bomb())), "when decompressed"),
    "iTXt bomb": (lambda: png(chunk(b"iTXt", b"miniflux\0\1\0\0\0" + bomb())), "when decompressed"),
    "two texts of ours": (lambda: png(ours("{}"), ours("[]")), "'miniflux' is there twice"),
    "wrong checksum": (lambda: png(ours("{}")[:-1] + b"?"), "checksum is wrong"),
    "damaged compression": (lambda: png(chunk(b"zTXt", b"miniflux\0\0junk")), "is damaged"),
    "unknown compression": (lambda: png(chunk(b"zTXt", b"miniflux\0\7junk")), "compressed in an unknown way"),
    "not UTF-8": (lambda: png(chunk(b"iTXt", b"miniflux\0\0\0\0\0\xff\xfe")), "not UTF-8"),
    "not JSON": (lambda: png(ours("star")), "not JSON"),
    "deep JSON": (lambda: png(ours("[" * 200_000)), "nested deeper than 32"),
    "very deep JSON": (lambda: png(ours("[" * 1_000_000)), "more than 300000 items"),
    "deep but closed": (lambda: png(ours("[" * 60 + "]" * 60)), "nested deeper than 32"),
    "wide JSON": (lambda: png(ours("[" + "[]," * 600_000 + "[]]")), "more than 300000 items"),
    "too many pictures": (lambda: png(ours("[" + "{}," * 1_000 + "{}]")), "1001 entries; at most 1000"),
    "a number of a million digits": (lambda: png(ours('{"seed": ' + "9" * 1_000_000 + "}")), "not JSON|whole number"),
    "a number": (lambda: png(ours("3")), "settings must be an object"),
    "no pictures": (lambda: png(ours("[]")), "settings of no picture"),
    "missing fields": (lambda: png(ours("{}")), "'prompt' is missing"),
    "wrong types": (lambda: png(ours(json.dumps({**RECORD, "seed": "3"}))), "seed must be a whole number, got '3'"),
    "wrong types inside": (
        lambda: png(ours(json.dumps({**RECORD, "files": [{"part": 1}]}))),
        r"files\[0\]: part must be",
    ),
    "unknown fields": (lambda: png(ours(json.dumps({**RECORD, "power": 3}))), "unknown field 'power'"),
    "values out of range": (lambda: png(ours(json.dumps({**RECORD, "steps": 10**9}))), "steps must be"),
    "path in the hash": (
        lambda: png(
            ours(json.dumps({**RECORD, "files": [{"part": "t5", "file": "x", "bytes": 1, "sha256": "../../x"}]}))
        ),
        "sha256 must be 64",
    ),
    "JPEG cut off": (lambda: jpeg(segment(0xE1, exif(b"{}")))[:30], "cut off"),
    "JPEG without markers": (lambda: b"\xff\xd8" + bytes(100), "marker was expected"),
    "JPEG not JSON": (lambda: jpeg(segment(0xE1, exif(b'{"prompt": "a", "seed": 1, "model": "na'))), "not JSON"),
    "JPEG missing segments": (
        lambda: jpeg(segment(0xEB, b"miniflux\0" + struct.pack(">HH", 1, 3) + b"{}")),
        "of the 3 segments with settings 2 are missing",
    ),
    "JPEG many segments": (lambda: jpeg(segment(0xE2, b"") * 5000), "more than 1000 JPEG segments"),
}
# Of other programs: left out, and told of.
FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "zTXt bomb": (lambda: png(chunk(b"zTXt", b"parameters\0\0" + bomb())), "when decompressed"),
    "iTXt bomb": (lambda: png(chunk(b"iTXt", b"prompt\0\1\0\0\0" + bomb())), "when decompressed"),
    "megabytes": (lambda: png(chunk(b"tEXt", b"prompt\0" + b"x" * 5_000_000)), "5000007 bytes; at most"),
    "megabytes of another kind": (lambda: png(chunk(b"tEXt", b"XML\0" + b"x" * 5_000_000)), "the text 'XML'"),
    "many texts": (lambda: png(chunk(b"tEXt", b"a\0b") * 1000), "the text 'a'"),
    "many kinds": (lambda: png(*(chunk(b"tEXt", b"a%d\0b" % i) for i in range(1000))), "and more texts"),
    "the same text twice": (
        lambda: png(chunk(b"tEXt", b"prompt\0a"), chunk(b"tEXt", b"prompt\0b")),
        "'prompt' is there several times; the last is read",
    ),
    "wrong checksum": (lambda: png(chunk(b"tEXt", b"prompt\0{}")[:-1] + b"?"), "checksum is wrong"),
    "no keyword": (lambda: png(chunk(b"tEXt", b"text")), "without a keyword"),
    "damaged compression": (lambda: png(chunk(b"zTXt", b"prompt\0\0junk")), "is damaged"),
    "unknown compression": (lambda: png(chunk(b"zTXt", b"prompt\0\7junk")), "compressed in an unknown way"),
    "damaged EXIF": (lambda: jpeg(segment(0xE1, b"Exif\0\0" + b"junk" * 9)), "EXIF block is damaged"),
    "EXIF that begins like JSON": (lambda: jpeg(segment(0xE1, exif(b"[Group 0]-a star"))), "exif description"),
    "JSON of another program": (lambda: jpeg(segment(0xE1, exif(b'{"prompt": "a", "steps": 3}'))), "exif description"),
    "WebP long EXIF": (lambda: b"RIFF\0\0\0\0WEBPEXIF" + struct.pack("<I", 2**31), "EXIF chunk has 2147483648 bytes"),
    "ComfyUI: not JSON": (lambda: png(chunk(b"tEXt", b"prompt\0{")), "prompt: not JSON"),
    "ComfyUI: a list": (lambda: png(chunk(b"tEXt", b"prompt\0[1]")), "prompt must be an object"),
    "ComfyUI: no nodes": (lambda: png(chunk(b"tEXt", b'prompt\0{"1": 5}')), "holds no node of ComfyUI"),
    "ComfyUI: many nodes": (
        lambda: png(chunk(b"tEXt", b"prompt\0" + json.dumps({str(i): {} for i in range(9000)}).encode())),
        "9000 nodes; at most",
    ),
    "A1111: a long line": (
        lambda: png(chunk(b"tEXt", b"parameters\0a\nSteps: 3" + b"x" * 50_000)),
        "line of settings has 50008",
    ),
}


NOT_PNG = {
    "damaged EXIF",
    "EXIF that begins like JSON",
    "JSON of another program",
    "WebP long EXIF",
}  # ours is EXIF there


@pytest.mark.parametrize(
    ("name", "beside"),
    [*((name, False) for name in FOREIGN), *((name, True) for name in sorted(FOREIGN.keys() - NOT_PNG))],
)
def test_texts_of_other_programs_are_left_out_and_told(tmp_path: Path, name: str, beside: bool) -> None:
    """Whatever others wrote, our own picture stays readable, and theirs is no error."""
    make, message = FOREIGN[name]
    data, path = make(), tmp_path / "x.png"
    path.write_bytes(data[:-12] + ours(json.dumps(RECORD)) + data[-12:] if beside else data)
    with no_hang():
        reading = read_picture(path)
    if beside:
        assert reading.origin == "miniflux" and reading.requests[0].prompt == "a star"
    else:
        assert reading.origin == "none" and message in "\n".join(reading.not_understood)
    assert len(reading.not_understood) <= 60 and all(len(line) < 500 for line in reading.not_understood)


UTF8 = "ein Wärter, 灯台, 😀"


def test_raw_utf8_in_text_chunks_is_read_as_such(tmp_path: Path) -> None:
    """PNG says Latin-1; what is strictly UTF-8 is that, everything else is Latin-1."""
    settings = "\nSteps: 3, Sampler: Euler"
    for kind, pack in ((b"tEXt", bytes), (b"zTXt", lambda data: b"\0" + zlib.compress(data))):
        for text, encoding in ((UTF8, "utf-8"), ("Wärter, façade", "latin-1"), ("plain", "ascii")):
            data = (text + settings).encode(encoding)
            (tmp_path / "x.png").write_bytes(png(chunk(kind, b"parameters\0" + pack(data))))
            assert read_picture(tmp_path / "x.png").requests[0].prompt == text


COMMENTS = {
    "big": b"UNICODE\0" + UTF8.encode("utf-16-be"),
    "little": b"UNICODE\0" + UTF8.encode("utf-16-le"),
    "marked big": b"UNICODE\0\xfe\xff" + UTF8.encode("utf-16-be"),
    "marked little": b"UNICODE\0\xff\xfe" + UTF8.encode("utf-16-le"),
    "ended": b"UNICODE\0" + UTF8.encode("utf-16-le") + b"\0\0",
    "half a unit more": b"UNICODE\0" + UTF8.encode("utf-16-be") + b"\0",
    "UTF-8": b"UNICODE\0" + UTF8.encode(),
    "marked UTF-8": b"UNICODE\0\xef\xbb\xbf" + UTF8.encode(),
    "ASCII": b"ASCII\0\0\0" + UTF8.encode(),
    "ASCII by blanks": b"ascii   " + UTF8.encode(),
    "undefined": bytes(8) + UTF8.encode(),
    "undefined big": bytes(8) + UTF8.encode("utf-16-be"),
    "undefined little": bytes(8) + UTF8.encode("utf-16-le"),
    "none": UTF8.encode(),
}


@pytest.mark.parametrize("name", COMMENTS)
@pytest.mark.parametrize("order", [exiftext.UTF16, exiftext.UTF16[::-1]])
def test_user_comments_of_every_code_and_order(name: str, order: tuple[str, ...]) -> None:
    assert exiftext.comment(COMMENTS[name], order) == UTF8


@pytest.mark.parametrize("text", ["一只猫在灯塔里", "дом на холме", "등대", "灯台の夜、霧", "a", "一只猫, film"])
@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le"])
def test_user_comments_by_the_order_that_makes_sense(text: str, encoding: str) -> None:
    assert exiftext.comment(b"UNICODE\0" + text.encode(encoding)) == text


def test_user_comments_in_other_codes() -> None:
    for encoding in ("iso2022_jp", "cp932", "utf-8"):
        assert exiftext.comment(b"JIS\0\0\0\0\0" + "灯台の夜".encode(encoding)) == "灯台の夜"
    assert exiftext.comment(b"ASCII\0\0\0" + "façade".encode("latin-1")) == "façade"
    assert exiftext.comment(b"") == exiftext.comment(bytes(8)) == exiftext.comment(b"UNICODE\0") == ""


@given(st.binary(max_size=64))
def test_no_user_comment_raises(data: bytes) -> None:
    for code in (b"", b"UNICODE\0", b"ASCII\0\0\0", b"JIS\0\0\0\0\0", bytes(8)):
        assert isinstance(exiftext.comment(code + data), str)


def test_settings_in_the_exif_block_of_a_png(tmp_path: Path) -> None:
    block = Image.Exif()
    block.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a star\nSteps: 3, Seed: 1".encode("utf-16-le")
    PICTURE.save(tmp_path / "x.png", exif=block.tobytes())
    assert read_picture(tmp_path / "x.png").requests[0].steps == 3


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_refused_by_name(tmp_path: Path, name: str) -> None:
    make, message = HOSTILE[name]
    path = tmp_path / "x.png"
    path.write_bytes(make())
    with no_hang(), pytest.raises(SettingsError, match=message) as caught:
        read_picture(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


def test_places_that_hold_no_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", "/dev/zero", tmp_path / "none.png", "a\0b", ""):
        with no_hang(), pytest.raises(SettingsError, match="folder|no plain file|cannot be read|no path"):
            read_picture(place)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_mutated_files_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    """1,500 files with bytes changed, cut out or doubled: nothing but our own error."""
    save_picture(PICTURE, tmp_path / f"whole.{kind}", [RECORD])
    whole = (tmp_path / f"whole.{kind}").read_bytes()
    place = whole.index(b"a star")
    rng = random.Random(0)
    path = tmp_path / f"x.{kind}"
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            near = rng.randint(max(0, place - 80), min(len(data) - 1, place + 80))
            at = rng.choice([near, rng.randrange(len(data))])
            change = rng.randrange(3)
            if change == 0:
                data[at] = rng.randrange(256)
            elif change == 1:
                del data[at : at + rng.randint(1, 20)]
            else:
                data[at:at] = data[at : at + rng.randint(1, 20)]
        path.write_bytes(data)
        with contextlib.suppress(MinifluxError):
            read_picture(path)


def test_pillows_own_texts_are_found(tmp_path: Path) -> None:
    """Every kind of text chunk as Pillow writes it, compressed ones too."""
    info = PngImagePlugin.PngInfo()
    info.add_text("one", "latin é")
    info.add_text("two", "packed", zip=True)
    info.add_itxt("three", "漢字", lang="ja", tkey="x")
    info.add_itxt("four", "漢字" * 100, zip=True)
    PICTURE.save(tmp_path / "a.png", pnginfo=info)
    info.add_text("parameters", "latin é")
    info.add_text("prompt", "packed é", zip=True)
    info.add_itxt("workflow", "漢字" * 100, lang="ja", tkey="x", zip=True)
    PICTURE.save(tmp_path / "a.png", pnginfo=info)
    assert texts_of(tmp_path / "a.png").found == {
        "parameters": "latin é",
        "prompt": "packed é",
        "workflow": "漢字" * 100,
    }
    assert set(read_picture(tmp_path / "a.png").not_understood) >= {f"the text {name!r}" for name in ("one", "four")}
