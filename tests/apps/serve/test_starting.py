"""What `miniflux serve` and `miniflux keys` refuse before they begin, in a line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from miniflux.apps.cli import main


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "zzz"], "device 'zzz' cannot be used here"),
        (["--dtype", "int8"], "--dtype int8: one of float32"),
        (["--url", "foo"], "--url foo: a whole address"),
        (["--allow-fetch", ""], "--allow-fetch: the name of a host"),
        (["--models", "nope"], "there is no model 'nope' here; there are flux"),
        (["--loras", "nowhere"], "--loras nowhere: no such folder"),
        (["--database", "postgresql+psycopg://me:hidden@127.0.0.1:9/x"], "this database cannot be used"),
        (["--ui", "--ray"], "--ui with --ray"),
        ([], "nobody has a key"),
    ],
)
def test_refused_before_it_serves(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_to_all = ["--insecure-no-keys"] if options else []
    assert main(["serve", "--data", str(tmp_path), "--port", "0", *open_to_all, *options]) == 2
    told = capsys.readouterr().err
    assert said in told and "hidden" not in told and told.count("\n") == 1


def test_a_database_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"no database at all, but longer than a header of one " * 30)
    assert main(["keys", "list", "--data", str(tmp_path)]) == 2
    assert "jobs.sqlite: this database cannot be used: file is not a database" in capsys.readouterr().err


@pytest.mark.parametrize("act", [["list"], ["remove", "me"]])
def test_keys_of_a_folder_that_is_not_there(act: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is made there: a name that was mistyped must not look like a server without keys."""
    assert main(["keys", *act, "--data", str(tmp_path / "nope")]) == 2
    assert "nobody has a key here" in capsys.readouterr().err
    assert not (tmp_path / "nope").exists()
