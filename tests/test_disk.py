"""A place that takes no more: whoever writes says so as a mendable error, and leaves nothing half-written behind."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import miniflux
from miniflux.apps.cli import main
from miniflux.cache import ResultCache
from miniflux.checkpoints.saving import save, save_all_in_one
from miniflux.disk import write_beside
from miniflux.errors import OutputError
from miniflux.result import Result
from miniflux.service.history import History, new_session
from miniflux.settings.request import Request
from miniflux.training.state import TrainingState

resource: Any = pytest.importorskip("resource", reason="limits the size of files, which POSIX systems can")


@contextmanager
def files_of(size: int) -> Generator[None]:
    """The operating system writes no file of more bytes: true errors, after a part was written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def result() -> Result:
    return miniflux.tiny().generate("x", steps=1, width=128, height=128)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


WRITERS: dict[str, Callable[[Path, Result], object]] = {
    "png": lambda folder, result: result.save(folder / "a.png"),
    "jpeg": lambda folder, result: result.save(folder / "a.jpg"),
    "webp": lambda folder, result: result.save(folder / "a.webp"),
    "network": lambda folder, result: save(nn.Linear(100, 100), folder / "a.safetensors"),
    "training": lambda folder, result: TrainingState(nn.Linear(100, 100), folder / "a", 0.1, {}).save(),
    "all in one": lambda folder, result: save_all_in_one(miniflux.tiny(), folder / "a.safetensors"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("old", [b"old", None])
def test_writers_leave_nothing_behind(name: str, old: bytes | None, tmp_path: Path, result: Result) -> None:
    suffix = {"png": "png", "jpeg": "jpg", "webp": "webp", "training": "pt"}.get(name, "safetensors")
    if old is not None:
        (tmp_path / f"a.{suffix}").write_bytes(old)
    with files_of(500), pytest.raises(OutputError, match="cannot be written: File too large"):
        WRITERS[name](tmp_path, result)
    assert names(tmp_path) == ([] if old is None else [f"a.{suffix}"])
    assert old is None or (tmp_path / f"a.{suffix}").read_bytes() == old


def test_a_history_enters_all_pictures_or_none(tmp_path: Path, result: Result) -> None:
    """Also where the second picture, or the index, is what does not fit; later ones are kept as ever."""
    history, session = History(tmp_path), new_session()
    before = history.add(session, Request(prompt="x"), result)
    kept, content = names(tmp_path), {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with files_of(500), pytest.raises(OutputError, match="File too large"):
        history.add(session, Request(prompt="x"), result)
    index = next(name for name in kept if name.endswith(".jsonl"))
    many = b"\n" * 400_000  # lines that are skipped, so that the index is what is too long
    (tmp_path / index).write_bytes(content[index] + many)
    with files_of(len(content[index] + many) + 20), pytest.raises(OutputError, match="File too large"):
        history.add(session, Request(prompt="x"), result)
    (tmp_path / index).write_bytes((tmp_path / index).read_bytes().removesuffix(many))
    assert names(tmp_path) == kept
    assert all((tmp_path / name).read_bytes() == content[name] for name in kept)
    assert history.listed(session) == before
    assert len(history.add(session, Request(prompt="x"), result)) == 1


def test_a_full_cache_is_said_and_the_picture_kept(
    tmp_path: Path, result: Result, caplog: pytest.LogCaptureFixture
) -> None:
    """The picture is drawn all the same: it would be lost for nothing."""
    pipe = miniflux.load("nano", cache=ResultCache(tmp_path / "cache"), device="cpu")
    with caplog.at_level(logging.WARNING), files_of(500):
        assert pipe.generate("x", steps=1, width=64, height=64).images
    assert "could not be kept in the cache" in caplog.text
    assert names(tmp_path / "cache") == []


def test_names_as_long_as_they_may_be(tmp_path: Path, result: Result) -> None:
    """What is written beside has a short name of its own."""
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    path = tmp_path / ("x" * (longest - 4) + ".png")
    assert result.save(path).is_file() and names(tmp_path) == [path.name]
    for bad in ("y" * (longest - 3) + ".png", "ü" * (longest // 2) + ".png", "a\0b.png"):
        with pytest.raises(OutputError, match="cannot be written") as caught:
            result.save(tmp_path / bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="cannot be written"):
        write_beside(tmp_path / "a\0b", lambda beside: None)
    assert names(tmp_path) == [path.name]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    """Each has a file of its own until it is renamed."""

    def outer(beside: Path) -> None:
        beside.write_text("outer")
        write_beside(tmp_path / "a.txt", lambda other: other.write_text("inner"))
        assert beside.read_text() == "outer"

    write_beside(tmp_path / "a.txt", outer)
    assert (tmp_path / "a.txt").read_text() == "outer" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.gguf"), "a.gguf: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "b"), "b: Read-only file system"),
        (OSError(errno.EIO, "Input/output error"), "a file: Input/output error"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    ],
)
def test_the_command_line_tells_them_as_mendable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    """Wherever they come from; one line, exit 2."""

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("miniflux.inspection.inspect", fails)
    assert main(["inspect", "x"]) == 2
    printed = capsys.readouterr().err.strip()
    assert said in printed and "\n" not in printed and "fault" not in printed
