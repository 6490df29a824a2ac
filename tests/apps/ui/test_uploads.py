"""Files that people send: written as they come, bounded, and gone when nobody uses them."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import httpx
import pytest

from miniflux.apps.ui import uploads as module
from miniflux.apps.ui.uploads import IDLE_SECONDS, UPLOAD_SECONDS, Uploads, plain_name
from miniflux.apps.web.bodies import RefusedError
from miniflux.errors import OutputError

ANN, BOB = "a" * 32, "b" * 32


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Uploads:
    made = Uploads(tmp_path / "uploads", tmp_path / "loras")
    made.file_bytes, made.session_bytes, made.all_bytes = 1000, 2500, 4000
    monkeypatch.setattr(module, "FORM_BYTES", 600)
    return made


def body(*files: tuple[str, bytes]) -> tuple[str, bytes]:
    """Type and body of a form with files, as another implementation writes it."""
    asked = httpx.Request("POST", "http://x", files=[("files", file) for file in files])
    return asked.headers["content-type"], asked.read()


def send(
    uploads: Uploads, session: str, *files: tuple[str, bytes], announced: bool = True, step: int = 7
) -> list[Path]:
    kind, data = body(*files)
    return give(
        uploads,
        session,
        kind,
        len(data) if announced else None,
        [data[i : i + step] for i in range(0, len(data), step)],
    )


def give(uploads: Uploads, session: str, kind: str, length: int | None, data: Iterable[bytes]) -> list[Path]:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in data:
            yield piece

    return asyncio.run(uploads.receive(session, kind, length, pieces()))


def left(uploads: Uploads) -> list[Path]:
    return [path for path in uploads.folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("announced", [True, False])
def test_files_arrive_whole(uploads: Uploads, step: int, announced: bool) -> None:
    files = [("a.safetensors", b"\r\n--x\r\n" * 20), ("b.png", b""), ("a.safetensors", bytes(range(256)))]
    paths = send(uploads, ANN, *files, announced=announced, step=step)
    assert [(path.name, path.read_bytes()) for path in paths] == files
    assert uploads.used(ANN) == uploads.used() == sum(len(data) for _, data in files)
    assert all(uploads.folder in path.parents for path in paths)


@pytest.mark.parametrize("announced", [True, False])
def test_a_file_that_is_too_large_is_refused(uploads: Uploads, announced: bool) -> None:
    with pytest.raises(RefusedError, match="more than 1000 bytes in one go") as refused:
        send(uploads, ANN, ("a.bin", b"x" * 1601), announced=announced)
    assert refused.value.status == 413
    assert left(uploads) == [] and uploads.used() == 0


@pytest.mark.parametrize("announced", [True, False])
def test_a_session_is_bounded(uploads: Uploads, announced: bool) -> None:
    for name in ("a", "b"):
        send(uploads, ANN, (name, b"x" * 900))
    with pytest.raises(RefusedError, match="one browser"):
        send(uploads, ANN, ("c", b"x" * 900), announced=announced)
    assert uploads.used(ANN) == 1800 and len(left(uploads)) == 2
    send(uploads, BOB, ("c", b"x" * 900))


@pytest.mark.parametrize("announced", [True, False])
def test_all_sessions_together_are_bounded(uploads: Uploads, announced: bool) -> None:
    for session in (ANN, ANN, BOB, BOB):
        send(uploads, session, ("a", b"x" * 900))
    with pytest.raises(RefusedError, match="all browsers") as refused:
        send(uploads, "c" * 32, ("c", b"x" * 900), announced=announced)
    assert refused.value.status == 507


def test_what_is_announced_is_refused_before_it_is_read(uploads: Uploads) -> None:
    def never() -> Iterable[bytes]:
        raise AssertionError("read")
        yield b""

    with pytest.raises(RefusedError, match="in one go"):
        give(uploads, ANN, "multipart/form-data; boundary=x", 3 * 10**9, never())
    assert not list(uploads.folder.iterdir())


def test_a_full_disk_is_said(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FREE_BYTES", 2**62)
    with pytest.raises(RefusedError, match="disk") as refused:
        send(uploads, ANN, ("a", b"x"))
    assert refused.value.status == 507


def test_many_files_are_bounded(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads.file_bytes = uploads.session_bytes = uploads.all_bytes = 10**6
    with pytest.raises(RefusedError, match="more than 64 files"):
        send(uploads, ANN, *[("a", b"")] * 65, announced=False, step=10_000)
    monkeypatch.setattr(module, "SESSION_FILES", 3)
    send(uploads, ANN, *[("a", b"")] * 3, step=10_000)
    with pytest.raises(RefusedError, match="3 files"):
        send(uploads, ANN, ("a", b""))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("multipart/form-data", b"x"),
        ("text/plain; boundary=x", b"x"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"no form at all"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\nhalf',
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\nfield\r\n--x--\r\n',
        ),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"a: " + b"b" * 1_500),
        ("multipart/form-data; boundary=x", b"--x--\r\n"),
        (f"multipart/form-data; boundary={'x' * 300}", b"x"),
    ],
)
def test_what_is_no_form_with_files_is_refused(uploads: Uploads, kind: str, data: bytes) -> None:
    with pytest.raises(RefusedError) as refused:
        give(uploads, ANN, kind, None, [data])
    assert refused.value.status == 400 and "\n" not in refused.value.line
    assert left(uploads) == [] and uploads.used() == 0


def test_a_sender_that_goes_leaves_nothing(uploads: Uploads) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        kind, data = body(("a", b"x" * 500))
        del kind
        yield data[:300]
        raise RefusedError(400, "the body ended early")

    kind, _ = body(("a", b""))
    boundary = kind
    with pytest.raises(RefusedError):
        asyncio.run(uploads.receive(ANN, boundary, None, pieces()))
    assert left(uploads) == [] and uploads.used() == 0


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Windows\\x.png", "x.png"),
        ("a\x00b:c?.safetensors", "abc.safetensors"),
        ("..", "file"),
        ("", "file"),
        ("Größe 花.png", "Größe 花.png"),
        (f"{'n' * 400}.safetensors", f"{'n' * 188}.safetensors"),
        (f"{'花' * 400}.png", f"{'花' * 65}.png"),
    ],
)
def test_names_are_made_plain(name: str, plain: str) -> None:
    assert plain_name(name) == plain


# Leaving


def test_files_go_a_while_after_they_were_read(uploads: Uploads) -> None:
    (path,) = send(uploads, ANN, ("a", b"x"))
    uploads.sweep(time.time() + UPLOAD_SECONDS - 5)
    assert path.exists()
    uploads.sweep(time.time() + UPLOAD_SECONDS + 5)
    assert left(uploads) == [] and uploads.used() == 0


def kept(uploads: Uploads, session: str, data: bytes = b"x" * 9) -> Path:
    (path,) = send(uploads, session, ("a.safetensors", data))
    place = uploads.place / "digest" / "a.safetensors"
    uploads.keep(session, path, place)
    assert not path.exists() and place.read_bytes() == data
    return place


def test_many_files_of_many_sessions_are_bounded(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones take next to no bytes, and room on the disk all the same."""
    monkeypatch.setattr(module, "ALL_FILES", 4)
    for session in (ANN, BOB):
        send(uploads, session, ("a", b""), ("b", b""))
    with pytest.raises(RefusedError, match="all browsers together may have sent 4 files") as refused:
        send(uploads, "c" * 32, ("c", b""))
    assert refused.value.status == 507 and len(left(uploads)) == 4


def test_a_file_that_cannot_be_kept_leaves_nothing(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    """The history may be on another disk than temporary files, and that one full."""

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", source)

    (path,) = send(uploads, ANN, ("a.safetensors", b"x" * 9))
    monkeypatch.setattr(module.shutil, "move", full)
    with pytest.raises(OutputError) as refused:
        uploads.keep(ANN, path, uploads.place / "digest" / "a.safetensors")
    assert str(refused.value) == "a.safetensors: cannot be kept: No space left on device"
    assert list(uploads.place.iterdir()) == [] and uploads.used(ANN) == 9


def test_kept_files_go_with_the_last_session_that_has_them(uploads: Uploads) -> None:
    place = kept(uploads, ANN)
    assert kept(uploads, BOB) == place
    assert uploads.used(ANN) == uploads.used(BOB) == uploads.used() == 9
    uploads.let_go(ANN, place)
    assert place.exists() and uploads.used(ANN) == 0
    uploads.let_go(BOB, place)
    assert not place.parent.exists() and uploads.used() == 0


def test_kept_files_stay_while_a_job_needs_them(uploads: Uploads) -> None:
    needed = True
    uploads.busy = lambda session, place: needed
    place = kept(uploads, ANN)
    uploads.let_go(ANN, place)
    assert place.exists()
    needed = False
    uploads.sweep()
    assert not place.exists()


def test_a_session_that_asks_for_nothing_leaves(uploads: Uploads) -> None:
    place, now = kept(uploads, ANN), time.time()
    assert uploads.sweep(now + IDLE_SECONDS - 5) == [] and place.exists()
    uploads._seen[ANN] = now + 100  # as `seen` does, later
    assert uploads.sweep(now + IDLE_SECONDS + 50) == [] and place.exists()
    assert uploads.sweep(now + IDLE_SECONDS + 150) == [ANN]
    assert not place.exists()


def test_files_of_an_earlier_page_go_after_a_day(uploads: Uploads, tmp_path: Path) -> None:
    place = kept(uploads, ANN)
    uploads.close()
    assert not uploads.folder.exists() and place.exists()
    later = Uploads(tmp_path / "uploads", tmp_path / "loras")
    assert later.used() == 9
    later.sweep(time.time() + IDLE_SECONDS + 5)
    assert not place.exists()


def test_pictures_in_slots_stay_with_their_session(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than other files; the latest ones; shown to nobody else; gone when they were read for good, or with it."""
    monkeypatch.setattr(module, "SLOTS", 2)
    (first,), (text,) = send(uploads, ANN, ("a.png", b"1")), send(uploads, ANN, ("a.txt", b"1"))
    uploads.sweep(time.time() + UPLOAD_SECONDS + 1)
    assert uploads.own(ANN, first) and not text.exists() and not uploads.own(BOB, first)
    assert not uploads.own(ANN, first.parent / ".." / "0" / "a.png") and not uploads.own(ANN, first.parent)
    (second,), (third,) = send(uploads, ANN, ("b.png", b"2")), send(uploads, ANN, ("c.png", b"3"))
    assert [uploads.own(ANN, path) for path in (first, second, third)] == [False, True, True]
    uploads.done(BOB, [second])
    uploads.done(ANN, [third])
    assert [uploads.own(ANN, path) for path in (second, third)] == [True, False]
    uploads.use(ANN, [second])
    for name in ("d.png", "e.png", "f.png"):
        send(uploads, ANN, (name, b"4"))
    assert uploads.own(ANN, second) and len(left(uploads)) == 3
    uploads.use(ANN, [])
    send(uploads, ANN, ("g.png", b"4"))
    assert not uploads.own(ANN, second) and len(left(uploads)) == 2
    made = uploads.hold(ANN, "made.png", lambda path: path.write_bytes(b"4"))
    assert uploads.own(ANN, made) and uploads.used(ANN) == 3
    uploads.sweep(time.time() + IDLE_SECONDS + 1)
    assert not left(uploads)


def test_what_is_no_picture_is_not_shown(uploads: Uploads) -> None:
    for name in ("a.html", "a.svg", "a.txt"):
        (path,) = send(uploads, ANN, (name, b"<script>"))
        assert not uploads.own(ANN, path)


def test_a_picture_that_cannot_be_held_leaves_nothing(uploads: Uploads) -> None:
    def fails(_: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OutputError, match="made.png: cannot be kept: full"):
        uploads.hold(ANN, "made.png", fails)
    assert not left(uploads) and not uploads.used()
