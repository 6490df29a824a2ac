"""The history: isolated, unguessable, surviving a restart, bounded."""

from __future__ import annotations

import errno
import io
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from miniflux import disk
from miniflux.errors import InputError, OutputError
from miniflux.service import Axis, Grid, History, new_session
from miniflux.settings import Request, read_picture
from tests.service.conftest import picture

ALICE, BOB = new_session(), new_session()


def ask(seed: int = 0, **options: object) -> Request:
    return Request(prompt="a <b>star</b> \U0001f600", seed=seed, **options)  # type: ignore[arg-type]


def add(history: History, session: str, seed: int = 0, **options: object) -> None:
    history.add(session, ask(seed, **options), picture(ask(seed, **options)))


def test_pictures_of_a_session_newest_first(tmp_path: Path) -> None:
    history = History(tmp_path)
    for seed in range(3):
        add(history, ALICE, seed)
    add(history, ALICE, 7, images=2)
    listed = history.listed(ALICE)
    assert [entry.request.seed for entry in listed] == [8, 7, 2, 1, 0]
    assert all(entry.request.images == 1 for entry in listed)
    for entry in listed:
        path = history.path(ALICE, entry.id)
        assert path.parent == tmp_path / "pictures" and path.name == entry.file and len(entry.id) == 32
        assert read_picture(path).requests[0].prompt == entry.request.prompt
    assert len({entry.id for entry in listed}) == 5


def test_sessions_are_isolated(tmp_path: Path) -> None:
    """Nobody lists, opens or deletes what is another's, and the folder does not give tokens away."""
    history = History(tmp_path)
    add(history, ALICE)
    (entry,) = history.listed(ALICE)
    assert history.listed(BOB) == [] and history.listed(new_session()) == []
    for call in (history.path, history.get, history.delete):
        with pytest.raises(InputError, match="this session has no picture"):
            call(BOB, entry.id)
    history.delete(BOB)
    assert history.path(ALICE, entry.id).is_file()
    names = " ".join(str(path) for path in tmp_path.rglob("*"))
    texts = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert ALICE not in names and ALICE.encode() not in texts
    assert stat.S_IMODE((tmp_path / "sessions").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "token", ["", "short", "../../etc/passwd-and-more", "a" * 200, "with blanks and more", None, 5]
)
def test_what_is_no_token_is_refused(tmp_path: Path, token: object) -> None:
    history = History(tmp_path)
    for call in (history.listed, lambda t: history.get(t, "x"), lambda t: add(history, t)):
        with pytest.raises(InputError, match="a session is a token"):
            call(token)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no picture"):
        history.path(ALICE, "../../../etc/passwd")


def test_it_survives_a_restart(tmp_path: Path) -> None:
    history = History(tmp_path)
    for seed in range(3):
        add(history, ALICE, seed)
    add(history, BOB, 9)
    again = History(tmp_path)
    assert again.listed(ALICE) == history.listed(ALICE) and again.listed(BOB) == history.listed(BOB)
    add(again, ALICE, 3)
    assert [entry.request.seed for entry in History(tmp_path).listed(ALICE)] == [3, 2, 1, 0]


def test_damage_costs_a_line_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line cut off by a crash, nonsense between lines, a picture that is gone, an empty index."""
    history = History(tmp_path)
    for seed in range(4):
        add(history, ALICE, seed)
    (index,) = (tmp_path / "sessions").iterdir()
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(lines[0] + b'{"id": "../x"}\n\xff\xfe\n' + lines[1] + lines[2] + lines[3][:-30])
    (tmp_path / "pictures" / history.listed(ALICE)[-1].file).unlink()
    assert [entry.request.seed for entry in History(tmp_path).listed(ALICE)] == [2, 1]
    assert "is left out" in caplog.text
    index.write_bytes(b"")
    assert History(tmp_path).listed(ALICE) == []


def test_deleting(tmp_path: Path) -> None:
    history = History(tmp_path)
    for seed in range(4):
        add(history, ALICE, seed)
    add(history, BOB, 9)
    gone = history.listed(ALICE)[1]
    path = history.path(ALICE, gone.id)
    history.delete(ALICE, gone.id)
    assert not path.exists() and [entry.request.seed for entry in history.listed(ALICE)] == [3, 1, 0]
    with pytest.raises(InputError, match="no picture"):
        history.delete(ALICE, gone.id)
    history.delete(ALICE)
    assert history.listed(ALICE) == [] and len(list((tmp_path / "pictures").iterdir())) == 1
    history.close()
    assert len(list((tmp_path / "sessions").iterdir())) == 1 and not list((tmp_path / "deleted").iterdir())
    assert len(History(tmp_path).listed(BOB)) == 1


def test_deleted_picture_comes_back_at_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for who deleted it, only for a while; then nothing of it is left on the disk."""
    history = History(tmp_path)
    for seed in range(4):
        add(history, ALICE, seed)
    ids = [entry.id for entry in history.listed(ALICE)]
    kept = {id: history.path(ALICE, id).read_bytes() for id in ids}
    history.delete(ALICE, ids[1])
    history.delete(ALICE, ids[2])
    with pytest.raises(InputError, match="no picture"):
        history.path(ALICE, ids[1])
    with pytest.raises(InputError, match="for good"):
        history.restore(BOB, ids[1])
    for id in ids[1:3]:
        assert history.restore(ALICE, id).id == history.restore(ALICE, id).id == id
    assert [entry.id for entry in history.listed(ALICE)] == ids
    assert {id: history.path(ALICE, id).read_bytes() for id in ids} == kept
    assert [entry.id for entry in History(tmp_path).listed(ALICE)] == ids

    history.delete(ALICE, ids[0])
    monkeypatch.setattr("miniflux.service.history.UNDO_SECONDS", -1)
    with pytest.raises(InputError, match="for good"):
        history.restore(ALICE, ids[0])
    assert not [path for path in tmp_path.rglob("*") if ids[0] in path.name]


def test_deleted_pictures_go_before_others_when_room_is_needed_and_with_the_run(tmp_path: Path) -> None:
    history = History(tmp_path)
    for seed in range(3):
        add(history, ALICE, seed)
    ids = [entry.id for entry in history.listed(ALICE)]
    history.delete(ALICE, ids[0])
    history.max_bytes = history._bytes + 40
    add(history, BOB, 9)
    assert not list((tmp_path / "deleted").iterdir())
    assert [entry.id for entry in history.listed(ALICE)] == ids[1:]
    history.delete(ALICE, ids[1])
    again = History(tmp_path)
    assert not list((tmp_path / "deleted").iterdir()) and [e.id for e in again.listed(ALICE)] == ids[2:]


def test_all_pictures_of_a_session_in_one_archive(tmp_path: Path) -> None:
    """The oldest first, with their settings; of nobody else."""
    history = History(tmp_path)
    for seed in range(3):
        add(history, ALICE, seed)
    add(history, BOB, 9)
    with zipfile.ZipFile(io.BytesIO(b"".join(history.zipped(ALICE)))) as archive:
        assert archive.testzip() is None
        listed = list(reversed(history.listed(ALICE)))
        assert [archive.read(name) for name in archive.namelist()] == [
            history.path(ALICE, entry.id).read_bytes() for entry in listed
        ]


def test_it_is_bounded_per_session_and_by_bytes(tmp_path: Path) -> None:
    history = History(tmp_path / "a", per_session=3)
    for seed in range(8):
        add(history, ALICE, seed)
    assert [entry.request.seed for entry in history.listed(ALICE)] == [7, 6, 5]
    assert len(list((tmp_path / "a" / "pictures").iterdir())) == 3
    probe = History(tmp_path / "b")
    add(probe, ALICE)
    size = probe.path(ALICE, probe.listed(ALICE)[0].id).stat().st_size
    small = History(tmp_path / "c", max_bytes=4 * size + size // 2)
    for seed in range(4):
        add(small, ALICE, seed)
    for seed in range(3):
        add(small, BOB, seed)
    assert [entry.request.seed for entry in small.listed(ALICE)] == [3]
    assert [entry.request.seed for entry in small.listed(BOB)] == [2, 1, 0]
    again = History(tmp_path / "c", max_bytes=4 * size + size // 2)
    add(again, BOB, 3)
    assert again.listed(ALICE) == [] and len(list((tmp_path / "c" / "pictures").iterdir())) == 4


def test_from_many_threads(tmp_path: Path) -> None:
    history = History(tmp_path)
    sessions = [new_session() for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for run in [pool.submit(add, history, sessions[i % 4], i) for i in range(40)]:
            run.result()
    again = History(tmp_path)
    for i, session in enumerate(sessions):
        assert sorted(entry.request.seed for entry in again.listed(session)) == list(range(i, 40, 4))


def test_more_sessions_than_are_kept_in_memory(tmp_path: Path) -> None:
    history = History(tmp_path)
    sessions = [new_session() for _ in range(80)]
    for i, session in enumerate(sessions):
        add(history, session, i)
    assert [history.listed(session)[0].request.seed for session in sessions] == list(range(80))
    assert len(history._sessions) <= 64


def test_a_copy_without_settings(tmp_path: Path) -> None:
    history = History(tmp_path / "h")
    add(history, ALICE, 5)
    (entry,) = history.listed(ALICE)
    bare = history.bare(ALICE, entry.id, tmp_path / "bare.png")
    assert read_picture(bare).origin == "none" and b"star" not in bare.read_bytes()
    with Image.open(bare) as one, Image.open(history.path(ALICE, entry.id)) as other:
        assert one.tobytes() == other.tobytes()


def test_a_sheet_is_one_picture(tmp_path: Path) -> None:
    history = History(tmp_path)
    grid = Grid(ask(), Axis.parse("seed", "1-3"), Axis.parse("steps", "2,4"))
    entry = history.add_sheet(ALICE, grid, [picture(request) for request in grid.requests()], "a grid")
    assert history.listed(ALICE) == [entry] and entry.title == "a grid"
    assert [request.seed for request in read_picture(history.path(ALICE, entry.id)).requests] == [1, 2, 3, 1, 2, 3]
    assert History(tmp_path).listed(ALICE) == [entry]


def test_no_place_for_a_history(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="no folder for a history"):
        History(tmp_path / "file")
    with pytest.raises(InputError, match="per_session must be"):
        History(tmp_path, per_session=0)


def test_what_else_lies_in_the_folders_of_a_history_is_left_alone(tmp_path: Path) -> None:
    for place in ("pictures", "deleted"):
        (tmp_path / place / "folder.png").mkdir(parents=True)
        (tmp_path / place / "nowhere.png").symlink_to(tmp_path / "gone")
    history = History(tmp_path)
    add(history, ALICE)
    assert len(history.listed(ALICE)) == 1 and len(list((tmp_path / "deleted").iterdir())) == 2


def test_folder_that_is_there_and_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is mounted for reading: every folder is there already, which says nothing."""
    History(tmp_path)

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match="no folder for a history: Read-only file system"):
        History(tmp_path)
