"""What was captured: values in memory up to a bound, beyond it in a file of safetensors that grows as they come."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from miniflux.checks import shown
from miniflux.errors import CheckpointError, InputError
from miniflux.study.values.growing import DTYPES, Growing, Stored, moved

LARGE = 2**20  # bytes of a value


@dataclass(frozen=True)
class Record:
    """A value that was kept, and where it was seen.

    Attributes:
        point: its name.
        run: the call of `generate` since the capture began, from 0.
        picture: its number in that call; None of what is computed before the first picture, as by text encoders.
        step: from 0; None outside of the transformer.
        call: of the network in that step, from 0: guidance and solvers of a higher order make several. None likewise.
        text: positive, negative ...; None likewise.
        turn: how often the point was seen before in that call of the network; of encoders, in that run.
    """

    point: str
    run: int = 0
    picture: int | None = None
    step: int | None = None
    call: int | None = None
    text: str | None = None
    turn: int = 0

    @property
    def key(self) -> str:
        """Its name in a file: the fields in their order, with - for None."""
        return "/".join("-" if value is None else str(value) for value in asdict(self).values())

    @classmethod
    def of(cls, key: str) -> Record:
        """The inverse of `key`.

        Raises:
            InputError: it is none.
        """
        values = key.split("/")
        if len(values) != len(FIELDS) + 1:
            raise InputError(f"{shown(key)} is no value of a capture: expected point/{'/'.join(FIELDS)}")
        point, *numbers, text, turn = (None if value == "-" else value for value in values)
        try:
            run, picture, step, call = (None if n is None else int(n) for n in numbers)
            return cls(str(point), run or 0, picture, step, call, text, int(turn or 0))
        except ValueError:
            raise InputError(f"{shown(key)} is no value of a capture: numbers were expected") from None


FIELDS = tuple(f.name for f in fields(Record))[1:]
"""What tells the values of a point apart."""


class Kept:
    """Values by what they are of; `print` shows which.

        seen["double_blocks.0.img_out"]                  # all of a point, one after the other: (values, L, hidden)
        seen.get("double_blocks.0.img_out", step=3)      # one of them: (L, hidden)

    Attributes:
        max_bytes: as many are held in memory.
        whole: whether values are whole, with all of their heads and tokens.
        held: bytes in memory now.
    """

    def __init__(self, max_bytes: int, file: Path | None = None, whole: bool = True) -> None:
        self.max_bytes, self.whole, self._file = max_bytes, whole, file
        self.held = 0
        self._values: dict[Record, Tensor | Stored] = {}
        self._growing: Growing | None = None
        self._path: Path | None = None  # of a file that is only read

    @classmethod
    def of(cls, path: Path, start: int, entries: Mapping[Record, Any], whole: bool) -> Kept:
        """What is in a finished file, whose values begin at `start`; `entries`: of its header."""
        kept, dtypes = cls(0, whole=whole), {name: dtype for dtype, name in DTYPES.items()}
        kept._path = path
        for record, entry in entries.items():
            first, last = entry["data_offsets"]
            kept._values[record] = Stored(start + first, start + last, dtypes[entry["dtype"]], tuple(entry["shape"]))
        return kept

    # Asked.

    @property
    def records(self) -> list[Record]:
        """What there is, in the order in which it was seen."""
        return list(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, record: object) -> bool:
        return record in self._values

    def find(self, point: str, **which: Any) -> list[Record]:
        """The records of a point that agree with some fields, see `Record`.

        Raises:
            InputError: no such field, or nothing was kept; the message says of what there is something.
        """
        for name in which:
            if name not in FIELDS:
                raise InputError(f"{name!r} tells no values apart; {', '.join(FIELDS)} do")
        mine = [record for record in self._values if record.point == point]
        if not mine:
            points = list(dict.fromkeys(record.point for record in self._values))
            told = ", ".join(points[:5]) + (" ..." if len(points) > 5 else "")
            raise InputError(f"nothing was kept of {shown(point)}; there is something of {told or 'nothing'}")
        found = [record for record in mine if all(getattr(record, name) == value for name, value in which.items())]
        if not found:
            have = {name: list(dict.fromkeys(getattr(record, name) for record in mine)) for name in which}
            raise InputError(f"nothing was kept of {point} with {_said(which)}; there is {_said(have)}")
        return found

    def get(self, point: str, **which: Any) -> Tensor:
        """The one value of a point with these fields.

        Raises:
            InputError: there is none, or more than one.
        """
        found = self.find(point, **which)
        if len(found) > 1:
            differ = [name for name in FIELDS if len({getattr(record, name) for record in found}) > 1]
            raise InputError(f"{len(found)} values of {point} were kept: say which, by {', '.join(differ)}")
        return self.value(found[0])

    def __getitem__(self, point: str) -> Tensor:
        """All values of a point, in the order in which they were seen, along a new first axis."""
        values = [self.value(record) for record in self.find(point)]
        if len({value.shape for value in values}) > 1:
            raise InputError(f"the values of {point} are of several shapes: ask for them with `get`")
        return torch.stack(values)

    def value(self, record: Record) -> Tensor:
        """The value of a record."""
        value = self._values[record]
        if isinstance(value, Tensor):
            return value
        path = self._path if self._growing is None else self._growing.at
        assert path is not None
        return value.read(path)

    def __str__(self) -> str:
        rows: dict[str, list[Record]] = {}
        for record in self._values:
            rows.setdefault(record.point, []).append(record)
        width = max(map(len, rows), default=0)
        lines: list[str] = []
        for point, records in rows.items():
            parts = {name: list(dict.fromkeys(getattr(record, name) for record in records)) for name in FIELDS}
            said = _said({name: values for name, values in parts.items() if values not in ([None], [0])})
            shape = tuple(self._values[records[0]].shape)
            lines.append(f"{point:<{width}}  {len(records)} x {shape}  {said}".rstrip())
        return "\n".join(lines) or "nothing was kept"

    # Filled.

    def add(self, record: Record, value: Tensor) -> None:
        """Keep a copy of a value, on the CPU.

        Raises:
            InputError: it alone is larger than the bound.
            OutputError: the file cannot be written.
        """
        size = value.numel() * value.element_size()
        if size > self.max_bytes:
            raise InputError(f"max_bytes {self.max_bytes} is less than one value of {record.point} takes: {size}")
        with torch.inference_mode(False), torch.no_grad():  # else no gradient could ever go through it
            copy = _room(tuple(value.shape), value.dtype, size)
            copy.copy_(value)
        if self._file is None and self._growing is None and self.held + size <= self.max_bytes:
            self.held += size
            self._values[record] = copy
        else:
            self._values[record] = self._grown().write(copy)

    def _grown(self) -> Growing:
        """The file; when it is opened, what is held moves there."""
        if self._growing is None:
            self._growing = Growing(self._file)
            for record, value in list(self._values.items()):
                if isinstance(value, Tensor):
                    self._values[record] = self._growing.write(value)
            self.held = 0
        return self._growing

    def finish(self) -> None:
        """Nothing more comes. A file gets its name, if there is anything to write."""
        if self._growing is None:
            return
        stored = {record: value for record, value in self._values.items() if isinstance(value, Stored)}
        names = {record.key: value for record, value in stored.items()}
        by = self._growing.finish(names, {"whole": json.dumps(self.whole)})
        self._values.update({record: moved(value, by) for record, value in stored.items()})

    def give_up(self) -> None:
        """Something went wrong: what is in a file goes with it."""
        if self._growing is not None:
            self._growing.give_up()
            self._growing, self._values = None, {}


def _room(shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
    """Memory for a value. That of a large one goes back to the system as soon as nobody holds it; what is allocated
    otherwise stays with the process, beside what comes next."""
    if size < LARGE:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap(-1, size), dtype=dtype).view(shape)


def opened(path: str | Path) -> Kept:
    """What a capture has written into a file. Values are read when they are asked for.

    Raises:
        CheckpointError: no file of safetensors.
        InputError: it was written by something else.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            names, about = list(file.keys()), file.metadata() or {}
        with open(path, "rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            entries: dict[str, Any] = json.loads(raw.read(size))
    except Exception as error:  # the library has an exception of its own, without a common base
        raise CheckpointError(f"{path}: no file of a capture: {error}") from error
    inside = sorted(names, key=lambda name: entries[name]["data_offsets"])  # as they were seen
    return Kept.of(path, 8 + size, {Record.of(name): entries[name] for name in inside}, about.get("whole") == "true")


def _said(which: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in which.items())


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return f"{value[0]}" if len(value) == 1 else f"{value[0]} ... {value[-1]} ({len(value)})"
