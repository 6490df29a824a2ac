"""Files that clients name: those of a folder, and nothing else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from miniflux.apps.serve.names import named
from miniflux.errors import InputError

ENDINGS = (".safetensors", ".gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files that may be named, and others around it that may not."""
    inside = tmp_path / "loras"
    (inside / "styles" / "deep").mkdir(parents=True)
    files = ("ink.safetensors", "ink.gguf", "Größe 2.safetensors", "styles/ink.safetensors", "styles/deep/a.b.gguf")
    for name in (*files, "notes.txt", ".hidden.safetensors", "../secret.safetensors", "../loras-too.safetensors"):
        (inside / name).write_bytes(b"x")
    (inside / "folder.safetensors").mkdir()
    (tmp_path / "loras-too").mkdir()
    (tmp_path / "loras-too" / "x.safetensors").write_bytes(b"x")
    return inside


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ink", "ink.safetensors"),
        ("ink.gguf", "ink.gguf"),
        ("styles/ink", "styles/ink.safetensors"),
        ("styles/deep/a.b", "styles/deep/a.b.gguf"),
        ("styles/deep/a.b.gguf", "styles/deep/a.b.gguf"),
        ("Größe 2", "Größe 2.safetensors"),
    ],
)
def test_files_by_name(folder: Path, name: str, found: str) -> None:
    assert named(folder, name, ENDINGS) == (folder / found).resolve()
    assert named(str(folder), name, ENDINGS).is_absolute()


def refused(folder: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        named(folder, name, ENDINGS)
    said = str(caught.value)
    assert "\n" not in said and said.isprintable() and len(said) < 200 and str(folder) not in said


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../secret",
            "../secret.safetensors",
            "styles/../../secret",
            "styles/../ink",
            "..",
            ".",
            "",
            "/",
            "//ink",
            "ink/",
        ),
        *("../loras/ink", "../loras-too/x", "../loras-too", "./ink", "styles//ink", "styles/./ink", "...", "styles/.."),
        *(
            "/etc/passwd",
            "\\ink",
            "..\\secret",
            "styles\\ink",
            "C:ink",
            "C:\\ink",
            "c:/ink",
            "\\\\host\\share\\ink",
            "//host/x",
        ),
        *(
            "ink\0",
            "ink\0.safetensors",
            "ink\n",
            "\tink",
            "ink\x7f",
            "ink\x85",
            "ink\u202e",
            "\u200bink",
            "\ud800",
            "ink\ufdd0",
        ),
        *(
            "ink.safetensors::$DATA",
            "ink:x",
            "in*",
            "in?",
            "[i]nk",
            "~",
            "~/ink",
            "~root",
            "$HOME",
            "%2e%2e/secret",
            "file:///x",
        ),
        *(
            "CON",
            "nul",
            "aux.safetensors",
            "COM1",
            "lpt9.gguf",
            "styles/PRN",
            "com¹",
            "CONIN$",
            "nul .x",
            "ink.",
            "ink ",
            " . ",
        ),
        *(
            "x" * 256,
            "x" * 100_000,
            "x/" * 400 + "x",
            "é" * 200,
            "notes.txt",
            "notes",
            ".hidden",
            ".hidden.safetensors",
        ),
        *("folder", "folder.safetensors", "styles", "nothing", "ink.safetensors/x", "ink/x", "INK.SAFETENSORS.txt"),
    ],
)
def test_names_that_are_refused(folder: Path, name: str) -> None:
    refused(folder, name)


def test_what_is_outside_looks_like_what_is_not_there(folder: Path) -> None:
    (folder / "out.safetensors").symlink_to(folder.parent / "secret.safetensors")
    (folder / "none.safetensors").symlink_to(folder.parent / "nothing.safetensors")
    said: list[str] = []
    for name in ("out", "none", "gone"):
        with pytest.raises(InputError) as caught:
            named(folder, name, ENDINGS)
        said.append(str(caught.value).replace(name, "X"))
    assert len(set(said)) == 1


def test_links(folder: Path, tmp_path: Path) -> None:
    (folder / "within.safetensors").symlink_to("styles/ink.safetensors")
    assert named(folder, "within", ENDINGS) == (folder / "styles/ink.safetensors").resolve()
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "beside").symlink_to(tmp_path / "loras-too", target_is_directory=True)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    for name in ("up/secret", "up/loras/../secret", "beside/x", "loop", "up"):
        refused(folder, name)
    linked = tmp_path / "linked"
    linked.symlink_to(folder, target_is_directory=True)  # the folder itself may be one
    assert named(linked, "ink", ENDINGS) == (folder / "ink.safetensors").resolve()


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names")
def test_pipes_and_devices_are_no_files(folder: Path) -> None:
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    refused(folder, "pipe")
    refused(folder, "zero")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "ink")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("/".join([".."] * 20) + "/etc/passwd")
@given(
    st.one_of(
        st.text(max_size=300),
        st.lists(st.sampled_from(["..", ".", "", "ink", "styles", "secret", "loras", "loras-too", "x", "\\", "~"])).map(
            "/".join
        ),
        st.text(alphabet="./\\:~\0 aink", max_size=20),
    )
)
def test_whatever_is_named_lies_inside(folder: Path, name: str) -> None:
    try:
        found = named(folder, name, ENDINGS)
    except InputError:
        refused(folder, name)
    else:
        assert found.is_relative_to(folder.resolve()) and found.suffix in ENDINGS and found.is_file()
        assert ".." not in name and not name.startswith("/")
