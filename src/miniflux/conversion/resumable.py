"""Files that are written tensor by tensor, and can be gone on with after an interruption.

The size and the place of every tensor are known before the first is made, so each is written where it belongs, in any
order. A journal beside the file names what is done, with a checksum; it is believed only as far as the bytes agree.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from miniflux.checkpoints.writing import Frame, size_of
from miniflux.errors import OutputError

JOURNAL = "journal.jsonl"
BLOCK = 1 << 20  # bytes that are read at once for a checksum


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
