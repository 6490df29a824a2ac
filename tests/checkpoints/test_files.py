"""Safetensors files: what the reference library reads, this reads, bit by bit; what is broken is refused in words."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from miniflux.checkpoints.files import DTYPES, TensorFile, TensorSource, open_tensors
from miniflux.checkpoints.folders import shard_paths, tensor_paths
from miniflux.checkpoints.writing import write_tensors
from miniflux.errors import CheckpointError
from tests.checkpoints.raw import entry, raw
from tests.tiny import randn


def bits(tensor: Tensor) -> bytes:
    """All bytes of a tensor, NaN and negative zero included."""
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def make(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Any bit pattern a dtype can hold."""
    count = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw_bytes = torch.randint(high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw_bytes.view(dtype).view(shape)


def check(source: TensorFile | TensorSource, key: str, expected: Tensor) -> None:
    """Both ways of reading give exactly this tensor."""
    viewed = source.view(key) if isinstance(source, TensorFile) else source[key]
    copied = torch.empty(source.entries[key].shape, dtype=source.entries[key].dtype)
    source.read(key, copied)
    for tensor in (viewed, copied):
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        assert bits(tensor) == bits(expected)


TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda key: key != "__metadata__"),
    st.builds(
        make,
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 4), max_size=4),
        st.integers(0, 2**32),
    ),
    min_size=1,
    max_size=6,
)
METADATA = st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3)


@given(TENSORS, METADATA)
def test_reads_back_bitwise_what_the_reference_library_wrote(tensors: dict[str, Tensor], metadata: Any) -> None:
    """Every dtype, scalars, tensors without elements, names in any script."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        save_file(tensors, path, metadata)
        source = open_tensors(path)
        assert set(source) == set(tensors) and len(source) == len(tensors)
        assert source.metadata == (metadata or {})
        for key, tensor in tensors.items():
            check(source, key, tensor)


@given(TENSORS, METADATA)
def test_the_reference_library_reads_bitwise_what_was_written(tensors: dict[str, Tensor], metadata: Any) -> None:
    """And so do programs on machines that insist on aligned numbers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        write_tensors(path, tensors, metadata or {})
        found = load_file(path)
        assert set(found) == set(tensors)
        for key, tensor in tensors.items():
            assert (found[key].dtype, found[key].shape, bits(found[key])) == (tensor.dtype, tensor.shape, bits(tensor))
        source = open_tensors(path)
        assert source.metadata == (metadata or {})
        assert not [key for key, entry in source.entries.items() if entry.start % entry.dtype.itemsize]


@pytest.mark.parametrize("pad", [1, 2, 3, 5])
def test_a_misaligned_header_still_reads(tmp_path: Path, pad: int) -> None:
    """Old writers did not pad the header, so that float32 values begin at odd addresses."""
    tensors = {"a": randn(3), "bc": randn(2, 2, seed=1).bfloat16(), "d": torch.arange(5)}
    header, data = {}, b""
    for key, tensor in tensors.items():
        name = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
        header[key] = entry(len(data), len(data) + tensor.nbytes, name, list(tensor.shape))
        data += bits(tensor)
    text = json.dumps(header).encode()
    text += b" " * ((pad - 8 - len(text)) % 8)  # data begin at pad modulo 8
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    file = TensorFile(path)
    assert file.entries["a"].start % 8 == pad
    for key, tensor in tensors.items():
        check(file, key, tensor)


def test_writing_to_a_view_leaves_the_file_alone(tmp_path: Path) -> None:
    """Training in place must not eat the checkpoint."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    before = path.read_bytes()
    file = TensorFile(path)
    file.view("a").fill_(7)
    assert path.read_bytes() == before
    assert torch.equal(TensorFile(path).view("a"), torch.ones(1000))


def test_names_of_files_may_be_in_any_script(tmp_path: Path) -> None:
    folder = tmp_path / "Модели und Gewichte"
    folder.mkdir()
    save_file({"a": torch.arange(3)}, folder / "märz 数.safetensors")
    check(open_tensors(folder), "a", torch.arange(3))


class Pickled:
    """Something that must never run."""

    def __reduce__(self) -> Any:
        return print, ("pwned",)


GOOD = {"a": entry(0, 8), "b": entry(8, 24, "I64")}
ARCHIVE = b"PK\x03\x04" + b"\0" * 100  # what torch.save writes begins as a zip file
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes are too few"),
    "7 bytes": (b"1234567", "7 bytes are too few"),
    "header beyond the file": (struct.pack("<Q", 100) + b"{}", "header claims 100 bytes, 2 follow"),
    "absurd header": (b"\xff" * 20, "header claims 18446744073709551615 bytes, 12 follow"),
    "zip of torch.save": (ARCHIVE, "not a safetensors file"),
    "pickle": (pickle.dumps(Pickled()) + b"\0" * 20, "not a safetensors file"),
    "no header": (struct.pack("<Q", 0), "header is no JSON"),
    "no JSON": (raw(b"hello, world"), "header is no JSON"),
    "no text": (raw(b"\xff\xfe\x80\x81"), "header is no JSON"),
    "half a header": (raw(b'{"a": {"dtype": "F32", "sha'), "header is no JSON"),
    "bottomless JSON": (raw(b"[" * 100_000), "header is no JSON"),
    "list": (raw([GOOD]), "no JSON object"),
    "number": (raw(5), "no JSON object"),
    "nothing": (raw({}), "holds no tensors"),
    "metadata only": (raw({"__metadata__": {"format": "pt"}}), "holds no tensors"),
    "metadata of another kind": (
        raw({"__metadata__": ["pt"], **GOOD}, b"\0" * 24),
        "__metadata__ is not a JSON object",
    ),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}, **GOOD}, b"\0" * 24), "__metadata__ is not a JSON object"),
    "entry of another kind": (raw({"a": 5}), "entry of 'a' is malformed: 5"),
    "entry without shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "entry of 'a' is malformed"),
    "one offset": (raw({"a": {**entry(0, 8), "data_offsets": [0]}}), "entry of 'a' is malformed"),
    "offsets of text": (raw({"a": {**entry(0, 8), "data_offsets": "08"}}, b"\0" * 8), "entry of 'a' is malformed"),
    "fractional offset": (
        raw({"a": {**entry(0, 8), "data_offsets": [0, 8.0]}}, b"\0" * 8),
        "entry of 'a' is malformed",
    ),
    "shape of text": (raw({"a": entry(0, 8, shape="2")}, b"\0" * 8), "entry of 'a' is malformed"),
    "fractional shape": (raw({"a": entry(0, 8, shape=[2.5])}, b"\0" * 8), "entry of 'a' is malformed"),
    "no shape": (raw({"a": entry(0, 8, shape=None)}, b"\0" * 8), "entry of 'a' is malformed"),
    "overflowing shape": (raw({"a": entry(0, 0, shape=[2**62, 4, 0])}), "entry of 'a' is malformed"),
    "dtype of another kind": (raw({"a": entry(0, 8, dtype=["F32"])}, b"\0" * 8), "entry of 'a' is malformed"),
    "unknown dtype": (raw({"a": entry(0, 8, dtype="Q4_K")}, b"\0" * 8), "'a' has the unknown dtype 'Q4_K'"),
    "misdeclared shape": (
        raw({"a": entry(0, 8, shape=[3])}, b"\0" * 8),
        r"'a' of shape \[3\].* needs 12 bytes.* says 8",
    ),
    "negative shape": (raw({"a": entry(0, 8, shape=[-1, -2])}, b"\0" * 8), "entry of 'a' is malformed"),
    "misdeclared dtype": (raw({"a": entry(0, 8, dtype="F16")}, b"\0" * 8), "dtype F16 needs 4 bytes.* says 8"),
    "negative offset": (raw({"a": entry(-8, 0)}, b"\0" * 8), "'a' .*"),
    "offsets the wrong way round": (raw({"a": entry(8, 0)}, b"\0" * 8), "'a' .* says -8"),
    "truncated": (raw(GOOD, b"\0" * 23), "cut off: 'b' ends at byte"),
    "overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12), "'b' starts .* overlaps"),
    "shared bytes": (raw({"a": entry(0, 8), "b": entry(0, 8)}, b"\0" * 8), "'b' starts .* overlaps"),
    "hole": (raw({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20), "'b' starts .* bytes of no tensor"),
    "hole at the start": (raw({"a": entry(8, 16)}, b"\0" * 16), "'a' starts .* bytes of no tensor"),
    "bytes too many": (raw(GOOD, b"\0" * 29), "5 bytes too many"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_its_name_and_the_reason(tmp_path: Path, name: str) -> None:
    """Anything but a CheckpointError of one line would reach the user as a traceback."""
    content, reason = BROKEN[name]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_tensors(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    if name not in ("nothing", "metadata only"):  # the reference library refuses all the others too
        with pytest.raises(SafetensorError):
            load_file(path)


GOOD_FILE = raw({"__metadata__": {"k": "v"}, "one": entry(0, 8), "two": entry(8, 12, "BF16", [2])}, bytes(range(12)))


@settings(max_examples=400)
@given(
    st.integers(0, len(GOOD_FILE) - 1),
    st.binary(max_size=3) | st.sampled_from([b"0", b"1", b"4", b'"', b"{", b"]", b"-", b",", b"e", b"null", b"\0"]),
    st.integers(0, 3),
)
def test_a_damaged_file_reads_as_in_the_reference_library_or_not_at_all(at: int, new: bytes, cut: int) -> None:
    """No damage may raise anything but CheckpointError, or read as something else than the reference library reads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        path.write_bytes(GOOD_FILE[:at] + new + GOOD_FILE[at + cut :])
        try:
            source = open_tensors(path)
        except CheckpointError:
            return
        expected = load_file(path)
        assert set(expected) == set(source)
        for key, tensor in expected.items():
            check(source, key, tensor)


def test_a_folder_or_nothing_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read: Is a directory"):
        TensorFile(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        open_tensors(tmp_path / "gone.safetensors")


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    """Loading takes minutes on slow disks; a file that is deleted or cut meanwhile is an error, not garbage."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cut off while 'a'"):
        file.read("a", torch.empty(100))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be read: No such file"):
        file.read("a", torch.empty(100))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be mapped"):
        file.view("a")


def sharded(folder: Path, shards: dict[str, list[str]]) -> Path:
    """A folder with an index and its shards; tensors hold the number of their name."""
    index = {"metadata": {}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index), "utf-8")
    for name, keys in shards.items():
        save_file({key: torch.tensor([int(key[1:])]) for key in keys}, folder / name, {"file": name})
    return path


SHARDS = {f"model-{i}-of-3.safetensors": [f"t{2 * i}", f"t{2 * i + 1}"] for i in range(3)}


def test_shards_read_as_one(tmp_path: Path) -> None:
    """By the folder and by the index."""
    index = sharded(tmp_path, SHARDS)
    for path in (tmp_path, str(tmp_path), index):
        source = open_tensors(path)
        assert {key: int(source[key]) for key in source} == {f"t{n}": n for n in range(6)}
        assert [file.path.name for file in source.files] == list(SHARDS)
    assert str(source).count("model-") == 3


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    """So that one look is enough to download what is missing."""
    index = sharded(tmp_path, SHARDS)
    (tmp_path / "model-0-of-3.safetensors").unlink()
    (tmp_path / "model-2-of-3.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-0-of-3\.safetensors, model-2-of-3\.safetensors$") as caught:
        open_tensors(tmp_path)
    assert str(index) in str(caught.value) and "model-1" not in str(caught.value)


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, SHARDS)
    path = tmp_path / "model-1-of-3.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: cut off"):
        open_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """One of them would win in silence."""
    sharded(tmp_path, {"a.safetensors": ["t1", "t2"], "b.safetensors": ["t2", "t3"]})
    with pytest.raises(CheckpointError, match=r"'t2' is in .*a\.safetensors and again in .*b\.safetensors"):
        open_tensors(tmp_path)


NO_INDEX = (
    *("", "not json", "[]", "5", "{}", "[" * 100_000),
    *('{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": "x"}', '{"weight_map": {"a": 5}}'),
    *('{"weight_map": {"a": null, "b": "x"}}', '{"weight_map": {"a": ["x"]}}'),
)


@pytest.mark.parametrize("content", NO_INDEX, ids=range(len(NO_INDEX)))
def test_a_malformed_index_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}(: not a safetensors index| is no JSON)"):
        shard_paths(path)


def test_an_index_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read: No such file"):
        open_tensors(tmp_path / "model.safetensors.index.json")


def test_a_folder_must_hold_exactly_one_model(tmp_path: Path) -> None:
    """Guessing between several would load the wrong one some day."""
    with pytest.raises(CheckpointError, match="found none"):
        tensor_paths(tmp_path)
    for name in ("model.safetensors", "another.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"found another\.safetensors, model\.safetensors"):
        tensor_paths(tmp_path)


def test_a_file_larger_than_the_memory_can_be_mapped(tmp_path: Path) -> None:
    """Linux sets memory aside for a writable private mapping unless told not to. The file is sparse."""
    path, size = tmp_path / "a.safetensors", 2**42
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    view = open_tensors(path)["a"]
    assert view[-1] == 0
    view[-1] = 1  # a private copy of one page
    assert view[-1] == 1
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        assert file.read() == b"\0"
