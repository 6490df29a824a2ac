"""What every format of packed weights has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from miniflux.errors import CheckpointError

CHUNK = 1 << 18  # numbers that are unpacked at once: temporaries stay in the caches and small beside a layer

Kind = tuple[torch.dtype, tuple[int, ...]]
"""dtype and shape of a stored tensor."""

Get = Callable[[str], Tensor]
"""Reads the part of a weight that has this suffix."""

WEIGHT = "weight"  # the suffix of the packed numbers themselves


@dataclass(frozen=True)
class Stored:
    """How one weight is stored: everything about it but the numbers.

    Attributes:
        format: what packs and unpacks it.
        shape: of the weight, unpacked: (rows, columns).
        parts: the tensors that unpacking needs, by suffix: dtype and shape of each.
        facts: numbers that are not tensors (sizes of blocks, an offset).
        read: suffixes of tensors whose content is in `facts` already.
    """

    format: Format
    shape: tuple[int, ...]
    parts: Mapping[str, Kind]
    facts: Mapping[str, Any] = field(default_factory=dict)
    read: tuple[str, ...] = ()

    @property
    def is_cast(self) -> bool:
        """Whether the weight is stored as it is, in fewer bits: plain float8."""
        return set(self.parts) == {WEIGHT} and self.parts[WEIGHT][0].is_floating_point

    def unpack(self, parts: Mapping[str, Tensor], out: Tensor) -> Tensor:
        """Fill `out` (contiguous, `shape`, any floating dtype and the device of the parts) with the weight."""
        self.format.fill(self, parts, out)
        return out


class Format(ABC):
    """A way to store the weight of a linear layer in fewer bits. Parts are named by what follows the layer's name in a
    file: `weight`, `weight_scale`, `weight.absmax` ...

    Attributes:
        name: its key in `FORMATS`.
        label: what people call it.
        multiple: rows must be a multiple of this long.
        whole: the number of weights must be a multiple of this.
        shared: parts that all rows have in common; what the others hold is in the order of the rows.
    """

    name: str
    label: str
    multiple: int = 1
    whole: int = 1
    shared: tuple[str, ...] = ()

    @abstractmethod
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """A weight (rows, columns) of any floating dtype -> its parts by suffix.

        Raises:
            CheckpointError: the format cannot hold this shape.
        """

    @abstractmethod
    def read(self, kinds: Mapping[str, Kind], get: Get) -> Stored:
        """Check the parts of a weight by dtype and shape; `get` reads small ones whose content says how to read.

        Raises:
            CheckpointError: parts are missing or malformed; the message begins with the suffix of the part.
        """

    @abstractmethod
    def fill(self, stored: Stored, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Unpack into `out`: computed in float32, rounded once to the dtype of `out`."""

    def sound(self, stored: Stored, parts: Mapping[str, Tensor]) -> bool:
        """Whether no scale inside the packed bytes is NaN or infinite. Parts that are floating are checked anyway."""
        return True

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be packed."""
        return len(shape) == 2 and 0 not in shape and shape[1] % self.multiple == shape[0] * shape[1] % self.whole == 0

    def plain(self, stored: Stored, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The parts as `pack` makes them, of files that store them in another way."""
        return parts

    def constants(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The parts that are the same for all weights of a shape."""
        return {}

    def header(self, layers: Iterable[str]) -> dict[str, str]:
        """Metadata of a file in which these layers are packed."""
        return {}

    def markers(self) -> dict[str, Tensor]:
        """Tensors that mark a whole file as being of this format."""
        return {}

    def unpack(
        self, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, out: Tensor | None = None
    ) -> Tensor:
        """The weight that `pack` made these parts of: (rows, columns) in `dtype`, or in `out`.

        Raises:
            CheckpointError: parts are missing or malformed.
        """
        stored = self.read({name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}, parts.__getitem__)
        if out is None:
            out = torch.empty(stored.shape, dtype=dtype, device=parts[WEIGHT].device)
        return stored.unpack(parts, out)

    def checked(self, weight: Tensor) -> Tensor:
        """The weight, if this format can hold it. It may be large: what works on it widens a piece at a time."""
        if not self.holds(tuple(weight.shape)):
            needs = f"rows of a multiple of {self.multiple}" if self.multiple > 1 else "a matrix"
            if self.whole > 1:
                needs = f"a multiple of {self.whole} numbers"
            raise CheckpointError(f"{self.label} needs {needs}, got the shape {list(weight.shape)}")
        return weight.detach()


def need(kinds: Mapping[str, Kind], name: str, *dtypes: torch.dtype) -> tuple[int, ...]:
    """The shape of a part that must be there, in one of these dtypes.

    Raises:
        CheckpointError: it is not.
    """
    if name not in kinds:
        raise CheckpointError(f"{name} is missing")
    dtype, shape = kinds[name]
    if dtypes and dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise CheckpointError(f"{name} is stored as {str(dtype).removeprefix('torch.')}, expected {expected}")
    return shape


def misshapen(name: str, shape: tuple[int, ...], expected: str) -> CheckpointError:
    """The refusal of a part that has the wrong shape."""
    return CheckpointError(f"{name} has the shape {list(shape)}, expected {expected}")


def pieces(count: int, size: int) -> Iterator[slice]:
    """Slices of about `CHUNK` numbers over `count` rows or blocks of `size` numbers."""
    step = max(1, CHUNK // max(1, size))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
