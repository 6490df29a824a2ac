"""Hashes of files: those of hashlib, computed once, never of another file than was loaded."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

import miniflux
from miniflux.errors import CheckpointError
from miniflux.weights import origin
from miniflux.weights.finding import BUNDLED
from miniflux.weights.origin import Stamp, hashed, stamps


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(os.urandom(3_000_001))
    assert Stamp.of(file).sha256() == hashlib.sha256(file.read_bytes()).hexdigest()


def test_it_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By path, size and time; a new file under the old name is another one."""
    file = tmp_path / "x"
    file.write_bytes(b"one")
    first = Stamp.of(file)
    digest = first.sha256()
    monkeypatch.setattr(origin, "_computed", lambda stamp: pytest.fail("read again"))
    assert Stamp.of(file).sha256() == digest
    monkeypatch.undo()
    file.write_bytes(b"three")
    assert Stamp.of(file).sha256() == hashlib.sha256(b"three").hexdigest()


def test_a_file_that_has_changed_since_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"one")
    stamp = Stamp.of(file)
    file.write_bytes(b"longer")
    with pytest.raises(CheckpointError, match="has changed since it was loaded"):
        stamp.sha256()
    assert hashed([("t5", stamp)]) == [{"part": "t5", "file": "x", "bytes": 3, "sha256": None}]
    assert "left out" in caplog.text
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        stamp.sha256()


def test_hashes_of_large_files_outlive_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's cache folder; small files leave nothing there, and a damaged store counts as empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(origin, "_HASHES", origin._Hashes())
    file, store = tmp_path / "x", tmp_path / "cache" / "miniflux" / "sha256.json"
    file.write_bytes(b"content")
    Stamp.of(file).sha256()
    assert not store.exists()
    monkeypatch.setattr(origin, "LARGE", 4)
    for damage in (None, "[[1]]", "{", '{"a": 1}'):
        if damage is not None:
            store.write_text(damage)
        monkeypatch.setattr(origin, "_HASHES", origin._Hashes())
        digest = Stamp.of(file).sha256()
        assert json.loads(store.read_text())[0][3] == digest == hashlib.sha256(b"content").hexdigest()
    monkeypatch.setattr(origin, "_HASHES", origin._Hashes())
    monkeypatch.setattr(origin, "_computed", lambda stamp: pytest.fail("read again"))
    assert Stamp.of(file).sha256() == digest


def test_every_file_of_a_pipeline_is_named() -> None:
    pipe = miniflux.load("nano")
    assert pipe.origin is not None and pipe.origin.name == "nano-dev" and pipe.origin.dtype is None
    parts = {part for part, _ in pipe.origin.files}
    assert parts == {"transformer", "autoencoder", "clip", "t5", "clip_tokenizer", "t5_tokenizer"}
    named = {Path(stamp.path) for _, stamp in pipe.origin.files}
    assert {file for file in named if file.suffix == ".safetensors"} == {
        *(BUNDLED / name for name in ("flux1-nano-dev.safetensors", "ae.safetensors")),
        *(BUNDLED / part / "model.safetensors" for part in ("text_encoder", "text_encoder_2")),
    }
    assert {file.name for file in named} >= {"spiece.model", "vocab.json", "merges.txt", "config.json"}


def test_a_folder_with_shards(tmp_path: Path) -> None:
    for name in ("a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "config.json"):
        (tmp_path / name).write_text("{}")
    index = {"weight_map": {"x": "a-00001-of-00002.safetensors", "y": "a-00002-of-00002.safetensors"}}
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps(index))
    assert [Path(stamp.path).name for stamp in stamps(tmp_path)] == [
        "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "config.json"
    ]  # fmt: skip
