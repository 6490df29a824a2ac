"""Files that are written tensor by tensor, and can be gone on with after an interruption.

The size and the place of every tensor are known before the first is made, so each is written where it belongs, in any
order. A journal beside the file names what is done, with a checksum; it is believed only as far as the bytes agree.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from miniflux.checkpoints.files import header
from miniflux.checkpoints.formats.base import Kind
from miniflux.checkpoints.targets import size_of
from miniflux.errors import MissingExtraError, OutputError

JOURNAL = "journal.jsonl"
ALIGNMENT = 32  # bytes, of tensors in GGUF files (its default)
BLOCK = 1 << 20  # bytes that are read at once for a checksum
GGUF_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Frame:
    """A file that is to be written: what comes before the data, and where each tensor lies.

    Attributes:
        name: of the file, within its folder.
        head: the first bytes.
        places: first byte of each tensor.
        kinds: dtype and shape of each.
        size: of the whole file, in bytes.
    """

    name: str
    head: bytes
    places: dict[str, int]
    kinds: dict[str, Kind]
    size: int


def safetensors_frame(name: str, kinds: Mapping[str, Kind], metadata: Mapping[str, str]) -> Frame:
    """A safetensors file, as `files.write_tensors` writes it."""
    head, places = header(kinds, metadata)
    return Frame(name, head, places, dict(kinds), len(head) + size_of(list(kinds.values())))


def gguf_frame(
    name: str, kinds: Mapping[str, Kind], blocks: Mapping[str, str], metadata: Mapping[str, str], about: tuple[str, str]
) -> Frame:
    """A GGUF file. The package `gguf` writes its head.

    Args:
        blocks: types of the packed tensors.
        about: the architecture, and the name of the file's type (`MOSTLY_Q8_0`).

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        import gguf
        import numpy as np
    except ImportError as error:
        raise MissingExtraError(
            f"{name}: GGUF files are written with the extra: pip install 'miniflux[gguf]'"
        ) from error
    architecture, kind = about
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[kind])
    for key, value in metadata.items():
        writer.add_string(key, value)
    for key, (dtype, shape) in kinds.items():
        raw = gguf.GGMLQuantizationType[blocks.get(key) or GGUF_FLOATS[dtype]]
        layout = np.dtype(np.uint8 if key in blocks else np.float32)  # of bytes, or as they are
        writer.add_tensor_info(key, shape, layout, size_of([(dtype, shape)]), raw_dtype=raw)
    head = _gguf_head(writer)
    places: dict[str, int] = {}
    end = len(head)
    for key, described in kinds.items():
        places[key] = end
        end += -(-size_of([described]) // ALIGNMENT) * ALIGNMENT
    return Frame(name, head, places, dict(kinds), end)


def write_frame(path: Path, frame: Frame, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file in one go.

    Args:
        tensors: every one of the frame's, in any order; each is let go of before the next is asked for.
    """
    with path.open("wb") as file:
        file.write(frame.head)
        file.truncate(frame.size)
        left = set(frame.kinds)
        for key, tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == frame.kinds[key], f"{key} is not what was announced"
            file.seek(frame.places[key])
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            left.remove(key)
        assert not left, f"{sorted(left)[0]} was announced and not written"


def _gguf_head(writer: Any) -> bytes:
    """What the package writes before the data, up to where they begin. It writes to files of its own alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = path.read_bytes()
    return head + bytes(-len(head) % ALIGNMENT)


@dataclass
class Unfinished:
    """A folder of files being written, and what is done of them.

    Attributes:
        folder: holds the files under their names, and the journal.
        frames: of the files.
        done: checksums of the parts of all tensors that are written, by file and by the name of the tensor.
        resumed: how many tensors were done when it was opened.
    """

    folder: Path
    frames: Mapping[str, Frame]
    done: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)
    resumed: int = 0

    @classmethod
    def open(cls, folder: Path, frames: Mapping[str, Frame], job: str) -> Unfinished:
        """Begin, or go on where the same job was interrupted.

        Args:
            job: tells this job from others; what another one left behind is thrown away.

        Raises:
            OutputError: the folder cannot be written to.
        """
        made = cls(folder, frames)
        try:
            if not made._believe(job):
                made.discard()
                folder.mkdir()
                for name, frame in frames.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    with (folder / name).open("wb") as file:
                        file.write(frame.head)
                        file.truncate(frame.size)
                (folder / JOURNAL).write_text(json.dumps({"job": job}) + "\n", "utf-8")
        except OSError as error:
            made.discard()
            raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from error
        made.resumed = len(made.done)
        return made

    def _believe(self, job: str) -> bool:
        """Read the journal of an earlier run of this job, as far as the bytes in the files agree with it."""
        try:
            first, *rest = (self.folder / JOURNAL).read_text("utf-8").split("\n")
            if json.loads(first) != {"job": job}:
                return False
            if any((self.folder / name).stat().st_size != frame.size for name, frame in self.frames.items()):
                return False
        except (OSError, ValueError):
            return False
        for line in rest:
            try:
                name, key, sums = json.loads(line)
                if all(self.checksum(name, part) == value for part, value in sums.items()):
                    self.done[name, key] = sums
            except (ValueError, KeyError, TypeError, AttributeError, OSError):
                continue  # the line at which it was interrupted
        kept = [json.dumps([name, key, sums]) for (name, key), sums in self.done.items()]
        (self.folder / JOURNAL).write_text("\n".join([json.dumps({"job": job}), *kept, ""]), "utf-8")
        return True

    def write(self, name: str, key: str, parts: Mapping[str, Iterable[Tensor]]) -> None:
        """Put the parts of a tensor where they belong, and say so in the journal.

        Args:
            parts: each in pieces, which are made as they are written.

        Raises:
            OutputError: the place takes no more; what is done stays.
        """
        frame, sums = self.frames[name], dict[str, int]()
        try:
            with (self.folder / name).open("r+b") as file:
                for part, pieces in parts.items():
                    file.seek(frame.places[part])
                    size = sums[part] = 0
                    for piece in pieces:
                        assert piece.dtype == frame.kinds[part][0], f"{part} is not what was announced"
                        raw = piece.contiguous().view(-1).view(torch.uint8).numpy().data
                        _put(file, raw)
                        size, sums[part] = size + len(raw), zlib.crc32(raw, sums[part])
                    assert size == size_of([frame.kinds[part]]), f"{part} is not what was announced"
            with (self.folder / JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(json.dumps([name, key, sums]) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"{self.folder}: {reason}; what is done stays there, the same call goes on") from error
        self.done[name, key] = sums

    def checksum(self, name: str, part: str) -> int:
        """CRC-32 of a tensor as it is in the file."""
        frame, found = self.frames[name], 0
        left = size_of([frame.kinds[part]])
        with (self.folder / name).open("rb", buffering=0) as file:
            file.seek(frame.places[part])
            while left and (block := file.read(min(left, BLOCK))):
                found, left = zlib.crc32(block, found), left - len(block)
        return found

    def discard(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _put(file: BinaryIO, raw: memoryview) -> None:
    done = 0
    while done < len(raw):
        written = file.write(raw[done:])
        if not written:
            raise OSError(0, "the file takes no more")
        done += written
