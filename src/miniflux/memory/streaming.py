"""Networks whose blocks have their weights only while they run.

The weights wait in a file (`stream`) or in the memory of the machine (`offload`). Blocks run one after the other, so
two areas of memory are enough: the running block's tensors are views into the one, while a thread reads the next block
into the other. To a GPU it is copied from pinned memory, beside what the GPU computes (`lanes.py`): the computing waits
for the copy, and the copy for the block that was there before; the thread that calls waits for neither. The network is
the same module; its blocks' `forward` is wrapped. No forward hook does this, because it is skipped when a call is
interrupted, and because the changes of a LoRA call `forward` of their layer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from miniflux.checkpoints.files import TensorSource
from miniflux.checkpoints.layouts import Counterpart, counterparts
from miniflux.checkpoints.loading import fetch, is_finite, load_into, unsound
from miniflux.checkpoints.networks import BY_KIND
from miniflux.checkpoints.opened import layout_in
from miniflux.checkpoints.quantized import LENDER, QuantizedLinear, packed_layers
from miniflux.errors import CheckpointError
from miniflux.memory.lanes import Mark, lane_of

ALIGNMENT = 64  # bytes; that of torch's own tensors. Views of mapped files lie where the file has them.

Read = Callable[[str, Tensor], int]
"""(key of the state dict, memory on the CPU to read it into) -> bytes read."""


@dataclass(frozen=True)
class Piece:
    """One tensor of a unit.

    Attributes:
        key: its name in the network.
        owner, name: the module it belongs to, and its attribute there.
        empty: what stands in its place while the unit does not run, on the meta device.
        phase: its address, modulo `ALIGNMENT`, where it is resident. Matrix products may add in another order at
            another alignment, and all modes are to give the same bits.
        start: its place in the area, in bytes.
    """

    key: str
    owner: nn.Module
    name: str
    empty: Tensor
    phase: int = 0
    start: int = 0

    @property
    def size(self) -> int:
        return self.empty.numel() * self.empty.element_size()

    def alone(self) -> Tensor:
        """Memory for this tensor by itself."""
        size = self.phase + self.size
        return replace(self, start=self.phase).within(torch.empty(size, dtype=torch.uint8))

    def within(self, area: Tensor) -> Tensor:
        return area[self.start : self.start + self.size].view(self.empty.dtype).view(self.empty.shape)

    def swap(self, old: Tensor | None, new: Tensor) -> None:
        """Put a tensor in the place of another, unless a third has been put there meanwhile (by a control LoRA)."""
        tensors = cast(
            "dict[str, Tensor]",
            self.owner._parameters if isinstance(self.empty, nn.Parameter) else self.owner._buffers,  # pyright: ignore[reportPrivateUsage]
        )
        if old is None or tensors[self.name] is old:
            tensors[self.name] = new


@dataclass
class Unit:
    """A module whose tensors come and go together."""

    name: str
    module: nn.Module
    pieces: list[Piece]
    checked: bool = False  # whether its values were looked at; done when they are first read
    lent: list[tuple[Piece, Tensor]] = field(default_factory=list[tuple[Piece, Tensor]])

    @property
    def size(self) -> int:
        return _aligned(self.pieces[-1].start + self.pieces[-1].size) if self.pieces else 0

    def take(self, area: Tensor) -> None:
        """Let the tensors be views into an area."""
        for piece in self.pieces:
            view = piece.within(area)
            tensor = nn.Parameter(view, requires_grad=False) if isinstance(piece.empty, nn.Parameter) else view
            self.lent.append((piece, tensor))  # first: what others see in its place is in here at all times
            piece.swap(piece.empty, tensor)

    def give_back(self) -> None:
        for piece, tensor in self.lent:
            piece.swap(tensor, piece.empty)
        self.lent.clear()

    def check(self, area: Tensor, source: str) -> None:
        """Look once at every value.

        Raises:
            CheckpointError: some are not finite.
        """
        tensors = {piece.key: piece.within(area) for piece in self.pieces}
        layers = {f"{self.name}.{name}".rstrip("."): layer for name, layer in packed_layers(self.module).items()}
        _check(tensors, layers, source)
        self.checked = True


@dataclass
class _Area:
    """Memory for one unit at a time.

    Attributes:
        memory: where the network runs.
        holds: the unit whose tensors are there, or are being read.
        reading: done when they are read, and the device is told to copy them here.
        copied: when that will be done.
        left: all that the device had been told to compute when the last unit was left, or the memory taken: whoever
            had it before may have given it back with work still to do there.
    """

    memory: Tensor
    holds: Unit | None = None
    reading: Future[None] | None = None
    left: Mark = None
    copied: Mark = None


@dataclass
class _Stage:
    """Memory of the machine from which the device copies.

    Attributes:
        copied: when the last copy from it will be done.
    """

    memory: Tensor
    copied: Mark = None


class Chain:
    """Modules that run one after the other, in two areas of memory that they use in turns.

    Attributes:
        units: in the order in which they run. Another order is right too, but waits for its reading.
        bytes_read: so far.
    """

    def __init__(self, units: Sequence[Unit], read: Read, device: torch.device, source: str) -> None:
        self.units, self.device = list(units), device
        self.bytes_read = 0
        self._read, self._source = read, source
        self._next = {a.name: b for a, b in pairwise(self.units)}
        self._lock = threading.RLock()
        self._areas: list[_Area] = []
        self._stages: list[_Stage] = []
        self._turns: Iterator[_Stage] = iter(())
        self._lane = lane_of(device)
        self._reader: ThreadPoolExecutor | None = None
        for unit in self.units:
            unit.module.forward = self._wrapped(unit, unit.module.forward)
            for owner in {id(piece.owner): piece.owner for piece in unit.pieces}.values():
                owner.__dict__[LENDER] = _Lender(self, unit)

    @property
    def held(self) -> int:
        """Bytes of the areas now."""
        return sum(len(each.memory) for each in (*self._areas, *self._stages))

    def _wrapped(self, unit: Unit, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any, **options: Any) -> Any:
            with self.loaded(unit):
                return forward(*inputs, **options)

        return run

    @contextmanager
    def loaded(self, unit: Unit) -> Generator[None]:
        """The unit has its tensors in here. One at a time: other threads wait.

        Raises:
            CheckpointError: the file cannot be read any more, or holds numbers that are not finite.
        """
        with self._lock:
            if unit.lent:  # by an outer call
                yield
                return
            area = self._filled(unit)
            follower = self._next.get(unit.name)
            if follower is not None and all(other.holds is not follower for other in self._areas):
                self._begin(next(other for other in self._areas if other is not area), follower)
            unit.take(area.memory)
            try:
                yield
            finally:
                unit.give_back()
                area.left = self._lane.here()

    def _filled(self, unit: Unit) -> _Area:
        """The area with the tensors of this unit, read now if they were not read ahead."""
        if not self._areas:
            largest = max(unit.size for unit in self.units)
            with torch.inference_mode(False):  # a tensor made in it could not be written to outside
                count = min(2, len(self.units))
                memory = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(count)]
                self._areas = [_Area(each, left=self._lane.here()) for each in memory]
                self._stages = [_Stage(self._lane.stage(largest)) for _ in range(min(count, self._lane.stages))]
                self._turns = cycle(self._stages)
            self._reader = ThreadPoolExecutor(1, "miniflux-weights")
        area = next((area for area in self._areas if area.holds is unit), None)
        if area is None:
            area = self._areas[0]
            if area.reading is not None and not area.reading.done():
                area = self._areas[-1]
            self._begin(area, unit)
        assert area.reading is not None
        try:
            area.reading.result()
        except BaseException:
            area.holds = None
            raise
        self._lane.join(area.memory, area.copied, area.left)  # left perhaps by a caller with another queue, at work yet
        return area

    def _begin(self, area: _Area, unit: Unit) -> None:
        assert self._reader is not None
        if area.reading is not None:
            area.reading.exception()  # it may still be read into
        area.holds = unit
        area.reading = self._reader.submit(self._fill, area, unit)

    def _fill(self, area: _Area, unit: Unit) -> None:
        """Read a unit into an area; runs in the reading thread."""
        with torch.no_grad():
            stage = next(self._turns, None)
            if stage is not None:
                self._lane.finish(stage.copied)  # else it would be read into while it is copied
            host = area.memory if stage is None else stage.memory
            for piece in unit.pieces:
                self.bytes_read += self._read(piece.key, piece.within(host))
            if not unit.checked:
                unit.check(host, self._source)
            if stage is not None:
                source, target = host[: unit.size], area.memory[: unit.size]
                stage.copied = area.copied = self._lane.copy(source, target, area.left)

    def free(self) -> None:
        """Let go of both areas; the next call makes them again."""
        with self._lock:
            if self._reader is not None:
                self._reader.shutdown(wait=True)
            for stage in self._stages:
                self._lane.finish(stage.copied)
            self._areas, self._stages, self._turns, self._reader = [], [], iter(()), None


@dataclass(frozen=True)
class _Lender:
    """How others get at the tensors of a layer, see `checkpoints.quantized.LENDER`."""

    chain: Chain
    unit: Unit

    @property
    def device(self) -> torch.device:
        return self.chain.device

    def borrowed(self) -> Any:
        return self.chain.loaded(self.unit)

    def at_rest(self, owner: nn.Module, name: str) -> Tensor:
        while True:
            tensor = cast(Tensor, getattr(owner, name))
            for piece, lent in tuple(self.unit.lent):
                if lent is tensor:
                    return piece.empty
            if getattr(owner, name) is tensor:  # else another thread has come to the end of the unit meanwhile
                return tensor


class Streamed:
    """A network whose blocks come and go.

    Attributes:
        network: the module.
        chains: what comes and goes.
    """

    def __init__(self, network: nn.Module, chains: Sequence[Chain]) -> None:
        self.network, self.chains = network, list(chains)
        self._lock = threading.RLock()
        forward = network.forward

        def run(*inputs: Any, **options: Any) -> Any:
            with self._lock, torch.no_grad():  # weights that are gone when a gradient is computed would make it wrong
                return forward(*inputs, **options)

        network.forward = run

    @property
    def bytes_read(self) -> int:
        """From file or memory, so far."""
        return sum(chain.bytes_read for chain in self.chains)

    @property
    def held(self) -> int:
        """Bytes that are set aside for running blocks now."""
        return sum(chain.held for chain in self.chains)

    def free(self) -> None:
        """Let go of the memory for running blocks; waits for a call in another thread."""
        with self._lock:
            for chain in self.chains:
                chain.free()


@dataclass(frozen=True)
class Partition:
    """What of a network comes and goes, and what stays.

    Attributes:
        network: on the meta device, with packed layers in place.
        dtype: what it computes in.
        chains: the units of each chain.
        kept: the tensors that stay.
    """

    network: nn.Module
    dtype: torch.dtype
    chains: list[list[Unit]]
    kept: list[Piece]

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        units = [unit for chain in self.chains for unit in chain]
        return self.kept_size + sum(piece.size for unit in units for piece in unit.pieces)

    @property
    def kept_size(self) -> int:
        return sum(piece.size for piece in self.kept)

    @property
    def areas(self) -> list[int]:
        """Bytes of the areas that each chain needs while it runs."""
        return [min(2, len(units)) * max((unit.size for unit in units), default=0) for units in self.chains]


def partitioned(network: nn.Module, source: TensorSource, dtype: torch.dtype) -> Partition:
    """Tell apart what stays and what comes and goes; nothing is changed.

    Args:
        network: on the meta device, its packed layers in place.
        source: a file that `compare` found nothing wrong with.
        dtype: what it computes in.
    """
    table = counterparts(network, layout_in(source, network))
    packed = {f"{name}.{part}" for name, layer in packed_layers(network).items() for part in layer.origins}
    pieces: dict[str, Piece] = {}
    for key, tensor in network.state_dict().items():
        path, _, name = key.rpartition(".")
        owner = network.get_submodule(path)
        as_it_is = key in packed or not tensor.is_floating_point()
        empty = torch.empty(tensor.shape, dtype=tensor.dtype if as_it_is else dtype, device="meta")
        if name in owner._parameters:  # pyright: ignore[reportPrivateUsage]
            empty = nn.Parameter(empty, requires_grad=False)
        pieces[key] = Piece(key, owner, name, empty, _phase(source, table[key], empty.dtype))
    record = BY_KIND.get(type(network))
    patterns = [re.compile(pattern) for pattern in (record.chains if record else ())]
    stays = record.stays if record else None
    found = [[name for name, _ in network.named_modules() if pattern.fullmatch(name)] for pattern in patterns]
    inner_first = sorted((name for names in found for name in names), key=len, reverse=True)
    units: dict[str, Unit] = {}
    for name in inner_first:
        mine = [key for key in pieces if key.startswith(f"{name}.") and not (stays and stays.fullmatch(key))]
        units[name] = Unit(name, network.get_submodule(name), _laid_out([pieces.pop(key) for key in mine]))
    return Partition(network, dtype, [[units[name] for name in names] for names in found], list(pieces.values()))


def stream(plan: Partition, source: TensorSource, device: torch.device) -> Streamed:
    """Fill a network but for its blocks, which are read from the file for every call.

    Args:
        plan: of a network on the meta device; its blocks are converted to the plan's dtype one at a time, packed ones
            stay packed.
        source: a file that `compare` found nothing wrong with.
        device: where the network runs.

    Raises:
        CheckpointError: numbers that are not finite; those of blocks are found when they are first read.
    """
    table = counterparts(plan.network, layout_in(source, plan.network))

    def read(key: str, out: Tensor) -> int:
        fetch(source, table[key], tuple(out.shape), out=out)
        return sum(source.entries[name].size for name in table[key].keys)

    def made(piece: Piece) -> Tensor:
        out = piece.alone()
        read(piece.key, out)
        return out

    return _streamed(plan, made, read, device, str(source))


def offload(plan: Partition, source: TensorSource, device: torch.device) -> Streamed:
    """As `stream`, but the blocks wait in memory, as they are stored: views of the mapped file where that is possible.

    Raises:
        CheckpointError: numbers that are not finite.
    """
    load_into(plan.network, source)
    waiting = plan.network.state_dict()

    def read(key: str, out: Tensor) -> int:
        out.copy_(waiting[key])
        return waiting[key].numel() * waiting[key].element_size()

    def made(piece: Piece) -> Tensor:
        return waiting.pop(piece.key).to(piece.empty.dtype)

    return _streamed(plan, made, read, device, str(source))


def _streamed(
    plan: Partition, made: Callable[[Piece], Tensor], read: Read, device: torch.device, source: str
) -> Streamed:
    kept = {piece.key: made(piece) for piece in plan.kept}
    _check(kept, packed_layers(plan.network), source)
    for piece in plan.kept:
        tensor = kept[piece.key].to(device)
        is_parameter = isinstance(piece.empty, nn.Parameter)
        piece.swap(None, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    for piece in (piece for units in plan.chains for unit in units for piece in unit.pieces):
        piece.swap(None, piece.empty)
    return Streamed(plan.network, [Chain(units, read, device, source) for units in plan.chains])


def _check(tensors: dict[str, Tensor], layers: dict[str, QuantizedLinear], source: str) -> None:
    whole = {name: layer for name, layer in layers.items() if f"{name}.{next(iter(layer.origins))}" in tensors}
    bad = [key for key, tensor in tensors.items() if not is_finite(tensor)] + unsound(whole, tensors)
    if bad:
        raise CheckpointError(f"{source}: {len(bad)} not finite (NaN or infinite), such as {bad[0]}")


def _laid_out(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces one after the other in an area."""
    placed: list[Piece] = []
    start = 0
    for piece in pieces:
        placed.append(replace(piece, start=start + piece.phase))
        start = _aligned(start + piece.phase + piece.size)
    return placed


def _phase(source: TensorSource, origin: Counterpart, dtype: torch.dtype) -> int:
    """Where a resident tensor would begin, modulo `ALIGNMENT`: that of its place in the file, if it is a view of it."""
    entry = source.entries[origin.keys[0]]
    is_view = origin.how in ("same", "1x1", "packed") and entry.dtype == dtype and not entry.start % dtype.itemsize
    return entry.start % ALIGNMENT if is_view else 0


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
