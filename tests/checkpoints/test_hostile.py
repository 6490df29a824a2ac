"""Files made to do harm: refused by name in less than 200 MB, and never read as more than is in them.

How long it takes to refuse them is measured by `benchmarks/hostile.py`.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from miniflux.assembly import locate
from miniflux.checkpoints import TensorSource, inspect, open_tensors
from miniflux.checkpoints.files import TensorFile
from miniflux.checkpoints.folders import shard_paths
from miniflux.errors import CheckpointError, LoraError, MinifluxError, TokenizerError
from miniflux.lora import read
from miniflux.strictjson import MAX_JSON, MAX_MARKS, json_file, json_of
from miniflux.text import load_clip_tokenizer, load_t5_tokenizer
from miniflux.weights.finding import BUNDLED
from tests.checkpoints.hostile import AT_THE_LIMIT, FILES, INDEX_SUFFIX, filled, made
from tests.checkpoints.raw import entry, raw
from tests.hanging import no_hang

BYTES = 200_000_000


def refused(call: Callable[[], object], kind: type[MinifluxError] = CheckpointError) -> str:
    """The one line with which a call refuses, in little memory."""
    tracemalloc.start()
    try:
        with no_hang(), pytest.raises(kind) as caught:
            call()
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1500 and str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("name", [name for name in FILES if name not in AT_THE_LIMIT])
def test_hostile_files(tmp_path: Path, name: str) -> None:
    path = made(name, tmp_path)
    said = refused(lambda: open_tensors(path))
    assert said.startswith(f"{path}: ")
    with pytest.raises(CheckpointError, match=FILES[name][2]):
        raise CheckpointError(said)


class Loaded:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_pickles_are_named_and_never_loaded(tmp_path: Path) -> None:
    """In every place where a checkpoint may be given, under every name."""
    trace, path = tmp_path / "trace", tmp_path / "a.safetensors"
    pickled = {protocol: pickle.dumps(Loaded(trace), protocol) for protocol in range(6)}
    for content in pickled.values():
        path.write_bytes(content)
        said = refused(lambda: open_tensors(path))
        assert "not a safetensors file" in said and "looks like a pickle" in said
    for zipped in (True, False):
        torch.save(Loaded(trace), path, _use_new_zipfile_serialization=zipped)
        for call in (open_tensors, inspect, read, lambda file: locate(file, [], {})):
            assert "pickle, which can run code and is never loaded" in refused(
                lambda call=call: call(path), LoraError if call is read else CheckpointError
            )
    shutil.move(path, tmp_path / "pytorch_model.bin")
    assert "not a safetensors file" in refused(lambda: inspect(tmp_path / "pytorch_model.bin"))
    assert "found none" in refused(lambda: inspect(tmp_path))
    assert not trace.exists()
    pickle.loads(pickled[4])  # it does leave a trace
    assert trace.exists()


STRANGERS = {
    "zip": "a zip archive",
    "GGUF": "a GGUF file; its name must end in .gguf",
    "LFS": "a Git LFS pointer; the file itself was not downloaded",
    "page": "a web page",
    "gzip": "a gzip archive",
}


@pytest.mark.parametrize("name", STRANGERS)
def test_other_files_under_this_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    if name == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "b" * 100)
    else:
        begin = {"GGUF": b"GGUF\3\0\0\0\1\0", "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0"}
        begin |= {"page": b"<!DOCTYPE html><html>", "gzip": b"\x1f\x8b\x08\0\1\2\3\4"}
        path.write_bytes(begin[name] + b"\0" * 100)
    assert f"not a safetensors file: it looks like {STRANGERS[name]}" in refused(lambda: open_tensors(path))


def test_a_cut_off_file_is_not_taken_for_something_else(tmp_path: Path) -> None:
    """Headers of 640 and 3,050,271 bytes begin as pickles and gzip archives do."""
    for begin in (b"\x80\2", b"\x1f\x8b\x2e"):
        path = tmp_path / "a.safetensors"
        path.write_bytes(begin.ljust(8, b"\0") + b'{"a": ')
        assert "cut off: its header claims" in refused(lambda path=path: open_tensors(path))


def indexed(folder: Path, content: object) -> Path:
    path = folder / f"model{INDEX_SUFFIX}"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


PLACES = ["../b.safetensors", "/b.safetensors", "sub/b.safetensors", "..", ".", "", "./b.safetensors", "sub\\b", "C:b",
          "b\0.safetensors", "b" * 5000, "//host/b"]  # fmt: skip


@pytest.mark.parametrize("name", PLACES, ids=range(len(PLACES)))
def test_an_index_names_files_beside_it_only(tmp_path: Path, name: str) -> None:
    """Not even where the other file is there, and would load."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "sub"):
        save_file({"a": torch.ones(2)}, place / "b.safetensors")
    if name.startswith("/b"):
        name = str(tmp_path / "b.safetensors")
    index = indexed(folder, {"weight_map": {"a": name}})
    said = refused(lambda: shard_paths(index))
    assert said.startswith(str(index)) and ("shards are files in the folder of their index" in said or len(name) > 255)
    assert refused(lambda: inspect(folder)) == said


def test_hostile_indices(tmp_path: Path) -> None:
    shards = {f"t{i}": f"{i}.s" for i in range(MAX_MARKS - 10)}
    cases = {
        "gives 't' twice": b'{"weight_map": {"t": "a.safetensors", "t": "b.safetensors"}}',
        "250,000 items": filled(b'{"weight_map": [%0]}', b"[],", MAX_JSON),
        "names 249,990 files": {"weight_map": shards},
        "more than 8,000,000 bytes": b" " * 100_000_000,
        "not UTF-8": b'{"weight_map": {"t": "\xff"}}',
    }
    for reason, content in cases.items():
        index = indexed(tmp_path, content)
        assert reason in refused(lambda index=index: shard_paths(index))


def test_loops_of_links_are_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first.symlink_to(second)
    second.symlink_to(first)
    (tmp_path / "dead.safetensors").symlink_to(tmp_path / "gone")
    for path in (first, tmp_path / "dead.safetensors"):
        assert "a symbolic link that leads nowhere or in a circle" in refused(lambda path=path: open_tensors(path))
    assert "cannot be read: Too many levels of symbolic links" in refused(lambda: TensorFile(first))
    index = indexed(tmp_path, {"weight_map": {"t": "a.safetensors"}})
    assert "these are missing: a.safetensors" in refused(lambda: open_tensors(index))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "transformer").symlink_to(tmp_path / "folder")
    assert "found none" in refused(lambda: inspect(tmp_path / "folder"))


def test_links_of_the_hugging_face_cache_work(tmp_path: Path) -> None:
    """There, the snapshot of a folder is links to files named by their hashes in another folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123" / "transformer"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    weight_map = {}
    for n in (1, 2):
        save_file({f"t{n}": torch.full((2,), float(n))}, blobs / f"hash{n}")
        (snapshot / f"model-{n}.safetensors").symlink_to(Path("../../../blobs", f"hash{n}"))
        weight_map[f"t{n}"] = f"model-{n}.safetensors"
    shutil.move(indexed(tmp_path, {"weight_map": weight_map}), blobs / "hash3")
    (snapshot / f"model{INDEX_SUFFIX}").symlink_to("../../../blobs/hash3")
    source = open_tensors(snapshot)
    assert source["t1"].tolist() == [1, 1] and source["t2"].tolist() == [2, 2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    assert "a pipe or a device, not a file" in refused(lambda: open_tensors(tmp_path / "a.safetensors"))
    os.mkfifo(tmp_path / f"a{INDEX_SUFFIX}")
    assert "a pipe or a device, not a file" in refused(lambda: open_tensors(tmp_path / f"a{INDEX_SUFFIX}"))
    assert "a pipe or a device, not a file" in refused(lambda: json_file(Path("/dev/zero")))


def test_hostile_files_beside_the_weights(tmp_path: Path) -> None:
    """Config files, tokenizers and what a LoRA trainer leaves behind."""
    huge = filled(b'{"a": [%0]}', b"[],", MAX_JSON)
    shutil.copytree(BUNDLED, tmp_path / "model")
    for content, reason in ((huge, "250,000 items"), (b'{"d_ff": 1, "d_ff": 2}', "twice"), (b"[" * 9999, "no JSON")):
        (tmp_path / "config.json").write_bytes(content)
        assert reason in refused(lambda: json_file(tmp_path / "config.json"))
    clip, t5 = tmp_path / "model" / "tokenizer", tmp_path / "model" / "tokenizer_2"
    (clip / "vocab.json").write_bytes(huge)
    assert "250,000 items" in refused(lambda: load_clip_tokenizer(clip), TokenizerError)
    for file in (clip / "vocab.json", clip / "merges.txt", *t5.iterdir()):
        file.unlink()
    for folder, load in ((clip, load_clip_tokenizer), (t5, load_t5_tokenizer)):
        (folder / "tokenizer.json").write_bytes(b" " * (MAX_JSON + 1))
        assert "8,000,001 bytes" in refused(lambda folder=folder, load=load: load(folder), TokenizerError)
    (t5 / "tokenizer.json").unlink()
    (t5 / "spiece.model").write_bytes(b"\0" * (MAX_JSON + 1))
    assert "8,000,001 bytes" in refused(lambda: load_t5_tokenizer(t5), TokenizerError)
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(huge)
    assert "250,000 items" in refused(lambda: read(tmp_path / "adapter_model.safetensors"))


LEAVES = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_ordinary_json_reads_as_ever(value: Any) -> None:
    assert json_of(json.dumps(value).encode(), "it") == value
    assert json_of(json.dumps(value, ensure_ascii=False, indent=1).encode(), "it") == value


SEEDS = [
    raw({"__metadata__": {"k": "v"}, "one": entry(0, 8), "two": entry(8, 12, "BF16", [2])}, bytes(range(12))),
    save({"a": torch.ones(2, 3), "b": torch.zeros(0, 4).half(), "c": torch.arange(5)}, {"format": "pt"}),
    save({f"blocks.{i}.lora_{half}.weight": torch.ones(2, 2).bfloat16() for i in range(3) for half in "AB"}),
]
BITS = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 7)), max_size=3)
PIECES = st.binary(max_size=6) | st.sampled_from(
    [b"0", b"-", b"1e1", b"0.0", b'"', b"{}", b"[]", b",", b":", b"null", b"\\", b"\\ud800", b"NaN", b"\xff", b'"a":1,']
)
NUMBERS = st.integers(0, 24) | st.sampled_from([-1, 2**31, 2**60, 2**63, 2**64, 10**30, 1.0, True, None, "1", -0.0])
NEARLY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "U8", "I64", "BOOL", "F8_E4M3", "F4", "f32", "", None, 3]),
        "shape": st.lists(NUMBERS, max_size=3) | st.sampled_from([[], [2], [2, 2], [0], None, "2", [[2]]]),
        "data_offsets": st.tuples(NUMBERS, NUMBERS) | st.lists(NUMBERS, max_size=3),
    },
    optional={"more": st.none()},
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)
METADATA = st.dictionaries(st.text(max_size=3), st.text(max_size=3) | VALUES, max_size=2) | VALUES


@st.composite
def honest(draw: st.DrawFn) -> dict[str, Any]:
    """Entries that fit each other, perhaps all but one."""
    header: dict[str, Any] = {}
    end = 0
    for key in draw(st.lists(st.text(max_size=3), max_size=3, unique=True)):
        name, size = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        start, end = end, end + size * int(torch.tensor(shape).prod()) if shape else end + size
        header[key] = entry(start, end, name, shape)
    if header and draw(st.booleans()):
        header[draw(st.sampled_from(sorted(header)))][draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(
            VALUES
        )
    return header


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Flipped bits, a cut, a splice; or a header made up."""
    if draw(st.booleans()):
        header = draw(honest() | st.dictionaries(st.text(max_size=3), NEARLY | VALUES, max_size=3))
        if draw(st.booleans()):
            header["__metadata__"] = draw(METADATA)
        text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
        length = len(text) + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 2**40]))
        return struct.pack("<Q", max(0, length)) + text + bytes(draw(st.integers(0, 24)))
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for at, bit in draw(BITS):
        content[at % len(content)] ^= 1 << bit
    if draw(st.booleans()):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 8))] = draw(PIECES)
    return bytes(content[: draw(st.sampled_from([len(content)] * 4 + list(range(0, len(content), 7))))])


@settings(max_examples=2500)
@given(content=mutated())
def test_whatever_is_read_the_reference_library_reads_alike(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of 2,500 damaged files none raises anything but CheckpointError, and none is read that `safetensors` refuses."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.unlink(missing_ok=True)  # some systems flush a file to the disk that is written over
    path.write_bytes(content)
    try:
        source = open_tensors(path)
    except CheckpointError as error:
        source = str(error)
    if isinstance(source, str):
        assert source.startswith(str(path)) and source.isprintable()
        return
    expected = dict(safetensors.deserialize(content))
    assert set(expected) == set(source)
    for key, about in expected.items():
        assert list(source.entries[key].shape) == about["shape"]
        assert bytes(source[key].contiguous().view(-1).view(torch.uint8).numpy()) == bytes(about["data"])
    assert isinstance(str(inspect(path)), str)


NAMES = st.sampled_from(["a.safetensors", "b.safetensors", "../a.safetensors", "/etc/passwd", "", "."]) | st.text(
    max_size=4
)
INDICES = st.fixed_dictionaries(
    {"weight_map": st.dictionaries(st.text(max_size=2), NAMES | VALUES, max_size=3) | VALUES}
)


@settings(max_examples=300)
@given(index=INDICES | VALUES)
def test_whatever_an_index_names_lies_beside_it(index: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    for name in ("a", "b"):
        if not (folder / f"{name}.safetensors").exists():
            save_file({name: torch.ones(1)}, folder / f"{name}.safetensors")
    (folder / f"model{INDEX_SUFFIX}").unlink(missing_ok=True)
    path = indexed(folder, json.dumps(index).encode("utf-8", "surrogatepass"))
    try:
        source = open_tensors(path)
    except CheckpointError:
        return
    assert isinstance(source, TensorSource) and {file.path.parent for file in source.files} == {folder}
