"""Many pictures as one file."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from miniflux.service.archive import name_of, zipped


def test_archive_holds_the_files_as_they_are_and_tests_well(tmp_path: Path) -> None:
    files = [(f"{i}.png", tmp_path / str(i)) for i in range(3)]
    for i, (_, path) in enumerate(files):
        path.write_bytes(bytes([i]) * (300_000 * i))
    with zipfile.ZipFile(io.BytesIO(b"".join(zipped(files)))) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == {n: p.read_bytes() for n, p in files}


def test_archive_of_nothing_is_one(tmp_path: Path) -> None:
    assert zipfile.ZipFile(io.BytesIO(b"".join(zipped([])))).namelist() == []


def test_file_that_is_gone_is_named_and_the_others_are_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    data = b"".join(zipped([("gone.png", tmp_path / "gone"), ("a.png", tmp_path / "a")]))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["a.png", "left out.txt"]
        assert b"gone.png" in archive.read("left out.txt")


def test_archive_takes_no_room_however_long_it_is(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(8_000_000))
    tracemalloc.start()
    try:
        size = sum(len(piece) for piece in zipped((f"{i}.png", tmp_path / "large") for i in range(10)))
        assert size > 80_000_000 and tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("A red circle, on blue!", "0007-a-red-circle-on-blue.png"),
        ("../../etc/passwd", "0007-etc-passwd.png"),
        ("\N{GRINNING FACE}", "0007.png"),
        ("", "0007.png"),
        ("x" * 500, f"0007-{'x' * 60}.png"),
        ("CON\r\n", "0007-con.png"),
    ],
)
def test_names_are_ones_that_every_system_takes(words: str, name: str) -> None:
    assert name_of(7, words) == name
