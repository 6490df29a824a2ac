"""Linear layers whose weights stay packed in memory and are unpacked when they run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from miniflux.checkpoints.formats.base import WEIGHT, Stored
from miniflux.checkpoints.formats.scaled import PLAIN
from miniflux.models.linear import linear

Stack = tuple[Stored, Mapping[str, Tensor]]
"""A stack of rows of a weight: how it is stored, and its parts by suffix."""

_PER_THREAD = threading.local()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of this shape that all layers of this thread unpack into, one after the other; as large as the largest."""
    if torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    kept = cast("dict[tuple[torch.dtype, torch.device], Tensor]", _PER_THREAD.__dict__)
    size = torch.Size(shape).numel()
    flat = kept.get((dtype, device))
    if flat is None or flat.numel() < size:
        kept.pop((dtype, device), None)  # before the larger one is made
        with torch.inference_mode(False):  # a tensor made in it could not be written to outside
            flat = torch.empty(size, dtype=dtype, device=device)
        kept[dtype, device] = flat
    return flat[:size].view(shape)


def free_scratch() -> None:
    """Let go of this thread's memory for unpacking."""
    _PER_THREAD.__dict__.clear()


class QuantizedLinear(nn.Module):
    """Stands for an `nn.Linear` whose weight is packed: y = W x + b, with W unpacked for each call into memory that all
    such layers of a thread share.

    The parts are buffers named as in the file: `weight`, `weight_scale`, `weight_absmax` (in the file:
    `weight.absmax`) ... A weight that a file keeps as several stacked tensors (q, k and v in diffusers' layout) stays
    several: their buffers end in `_0`, `_1` ... and nothing is packed anew. Stacks into which a LoRA is merged may be
    plain floats, which is one of the ways to be stored (`scaled.PLAIN`).

    Attributes:
        layers: the file's names of the layers that its stacks of rows come from, from the first row on.
        stored: how each of them is stored.
        origins: the file's key of each buffer.
        swapped: whether the two halves of the rows change places.
        paired: rows of a head in which those of its two halves lie in turn; 0 if they do not.
        bias: (out_features,) or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        bias: bool,
        stored: Mapping[str, Stored],
        swapped: bool = False,
        paired: int = 0,
    ) -> None:
        """On the meta device. `stored`: the file's name of every layer that makes up this one, and how it is stored."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.swapped, self.paired = swapped, paired
        self.layers = list(stored)
        self._names: list[dict[str, str]] = []  # of each stack: suffix of the part -> buffer
        with torch.device("meta"):
            parts = [
                {part: torch.empty(shape, dtype=d) for part, (d, shape) in how.parts.items()} for how in stored.values()
            ]
        self.hold(list(zip(stored.values(), parts, strict=True)))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None
        )

    def hold(self, stacks: Sequence[Stack]) -> None:
        """Put another weight in the place of this one: as many stacks of as many rows, each stored in its own way."""
        for name in (name for names in self._names for name in names.values()):
            del self._buffers[name]
        self.stored, self.origins, self._names = [stored for stored, _ in stacks], dict[str, str](), []
        for i, (layer, (stored, parts)) in enumerate(zip(self.layers, stacks, strict=True)):
            names = self.buffers_of(i, stored, len(stacks))
            for part, name in names.items():
                self.register_buffer(name, parts[part])
                self.origins[name] = f"{layer}.{part}"
            self._names.append(names)
        self.packed_features = self.stored[0].shape[1]  # a control LoRA may give the layer more inputs than it has

    @staticmethod
    def buffers_of(i: int, stored: Stored, stacks: int) -> dict[str, str]:
        """The buffers that hold the parts of stack i of so many, by their suffixes."""
        return {part: part.replace(".", "_") + (f"_{i}" if stacks > 1 else "") for part in stored.parts}

    @property
    def device(self) -> torch.device:
        """Where the packed weight is."""
        return self.parts(0)["weight"].device

    def names(self, stack: int) -> dict[str, str]:
        """The buffers of one stack of rows, by the suffixes of the parts that they hold."""
        return self._names[stack]

    def parts(self, stack: int) -> dict[str, Tensor]:
        """The tensors of one stack of rows, by their suffixes."""
        return {part: cast(Tensor, self._buffers[name]) for part, name in self._names[stack].items()}

    def stacks(self) -> list[Stack]:
        """The weight as it is stored, from the first row on."""
        return [(stored, self.parts(i)) for i, stored in enumerate(self.stored)]

    def dense(
        self, dtype: torch.dtype = torch.float32, out: Tensor | None = None, stacks: Sequence[Stack] | None = None
    ) -> Tensor:
        """The weight, unpacked: (out_features, in_features) as in the file, in `dtype` or in `out`; or what it would be
        if the layer held other `stacks`."""
        stacks = self.stacks() if stacks is None else stacks
        shape = (self.out_features, stacks[0][0].shape[1])
        out = torch.empty(shape, dtype=dtype, device=self.device) if out is None else out
        if out.is_meta:
            return out
        start = 0
        with torch.no_grad():
            for stored, parts in stacks:
                stored.unpack(parts, out[start : start + stored.shape[0]])
                start += stored.shape[0]
            if self.swapped:
                first, second = (half.clone() for half in out.chunk(2))
                out[: len(second)], out[len(second) :] = second, first
            if self.paired:
                out.copy_(rearrange(out, "(H D two) I -> (H two D) I", two=2, D=self.paired // 2))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of `x`."""
        x = x[..., : self.packed_features]  # the others meet a weight of zero
        if torch.is_grad_enabled() and x.requires_grad:
            y = cast(Tensor, _Unpacked.apply(x, self))
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return linear(x, self._weight(x), None if self.bias is None else self.bias.to(x.dtype))

    def _weight(self, x: Tensor) -> Tensor:
        moved = self.swapped or self.paired
        if self.stored[0].format is PLAIN and len(self.stored) == 1 and not moved:  # a LoRA is merged into it
            weight = self.parts(0)[WEIGHT]
            if weight.dtype == x.dtype:
                return weight
        shape = (self.out_features, self.packed_features)
        return self.dense(out=scratch(shape, x.dtype, x.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves go for all tensors; changes of dtype only for the bias, because packed bytes and their scales are what
        they are."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else keep(buffer)
        packed = dict(self._buffers)
        super()._apply(fn, recurse)
        self._buffers.update(packed)
        return self

    def extra_repr(self) -> str:
        kinds = ", ".join(dict.fromkeys(stored.format.label for stored in self.stored))
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kinds}"
        )


class _Unpacked(torch.autograd.Function):
    """W x whose W is unpacked again for the gradient, instead of being kept; W itself gets none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.layer = layer
        return linear(x, layer._weight(x))  # pyright: ignore[reportPrivateUsage]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad @ ctx.layer._weight(grad), None


Linear = nn.Linear | QuantizedLinear


def packed_layers(network: nn.Module) -> dict[str, QuantizedLinear]:
    """The packed layers of a network, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}


LENDER = "_lender"  # attribute of a layer that has its tensors only while it runs (`memory.streaming`)


class Lender(Protocol):
    """Who has the tensors of a layer."""

    @property
    def device(self) -> torch.device:
        """Where the layer runs."""
        ...

    def borrowed(self) -> AbstractContextManager[None]:
        """In here the layer has its tensors."""
        ...

    def at_rest(self, owner: nn.Module, name: str) -> Tensor:
        """The tensor of this name, or what stands in its place while the layer does not run."""
        ...


def lender_of(layer: nn.Module) -> Lender | None:
    """Who lends a layer its tensors; None if they are its own."""
    return cast("Lender | None", layer.__dict__.get(LENDER))


def tensor_of(layer: nn.Module, name: str) -> Tensor | None:
    """A parameter of a layer, a copy of it if it is lent; None if there is none."""
    lender = lender_of(layer)
    with nullcontext() if lender is None else lender.borrowed():
        tensor = getattr(layer, name, None)
        if not isinstance(tensor, Tensor):
            return None
        return tensor if lender is None else tensor.clone()


def dense_weight(layer: nn.Module) -> Tensor | None:
    """The weight of a layer in numbers: unpacked (float32) if it is packed; None if the layer has none."""
    if not isinstance(layer, QuantizedLinear):
        return tensor_of(layer, "weight")
    with nullcontext() if (lender := lender_of(layer)) is None else lender.borrowed():
        return layer.dense()


def device_of(layer: nn.Module) -> torch.device:
    """Where the weight of a layer is when it runs."""
    if (lender := lender_of(layer)) is not None:
        return lender.device
    return layer.device if isinstance(layer, QuantizedLinear) else cast(Tensor, layer.weight).device
