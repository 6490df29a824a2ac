"""Changes to a linear layer that leave its weight alone.

A change is computed beside the layer, y = W x + scale * dW x, in whatever factored form the file holds. Changes hang on
the layer as a forward hook: its class, its weight and its place in the network stay what they were, so a quantised
layer is changed like any other and `state_dict` does not see the changes at all.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = tuple[int, int]
CHANGES = "lora_changes"  # attribute of a changed layer: adapter name -> its changes


class Change(nn.Module):
    """What one adapter does to one layer, or to a slice of its output rows.

    Attributes:
        rows: [from, to) of the layer's outputs.
        factor: what the file multiplies the change by: alpha / rank.
        scale: what the user multiplies it by; a tensor, so that another value needs no recompilation.
        active: False if the scale is 0: the change is not computed then.
        merged: the scale at which it is in the weight; 0 if it is not.
        bias: what is added to the layer's bias, (rows,), or None.
    """

    kind = ""
    needs_base = False  # whether `forward` wants the layer's own output
    scale: Tensor
    bias: Tensor | None

    def __init__(self, rows: Rows, factor: float = 1.0, bias: Tensor | None = None) -> None:
        super().__init__()
        self.rows, self.factor, self.active, self.merged = rows, factor, True, 0.0
        device = None if bias is None else bias.device
        self.register_buffer("scale", torch.ones((), device=device), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def keep(self, **tensors: Tensor) -> None:
        """Store the tensors of the file: they move with the network and stay out of its state dict."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
            self.scale = self.scale.to(tensor.device)

    @property
    def rank(self) -> int:
        """Of the change as stored; 0 where that says nothing."""
        return 0

    @property
    def inputs(self) -> int | None:
        """How many of the layer's inputs it reads, from the first; None if it reads none or all of them. A layer that a
        control LoRA has widened has more than an ordinary one knows."""
        return None

    @property
    def on_weight(self) -> bool:
        """Whether it changes more than the bias."""
        return True

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """factor * dW x for inputs (..., in), without scale and bias: (..., rows). `base`: W x of the layer's rows."""
        raise NotImplementedError

    def add_to(self, output: Tensor, x: Tensor, base: Callable[[Tensor], Tensor], scale: Tensor) -> None:
        """Add scale * (factor * dW x + bias) to the layer's output, in place."""
        part = output[..., self.rows[0] : self.rows[1]]
        part += scale * self.forward(x, base)
        if self.bias is not None:
            part += scale * self.bias

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """factor * dW as a float32 matrix (rows, in); `weight`: the layer's rows, for changes that depend on them."""
        raise NotImplementedError

    def norm(self) -> float:
        """Frobenius norm of factor * dW, computed without building dW where the form allows."""
        return float(torch.linalg.matrix_norm(self.delta().double()))


class LowRank(Change):
    """dW = up @ down (arXiv 2106.09685, section 4.1): down (rank, in), up (rows, rank)."""

    kind = "LoRA"
    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, rows: Rows, factor: float = 1.0, bias: Tensor | None = None) -> None:
        super().__init__(rows, factor, bias)
        self.keep(down=down, up=up)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def inputs(self) -> int:
        return self.down.shape[1]

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)) * self.factor, self.up.to(x.dtype))

    def add_to(self, output: Tensor, x: Tensor, base: Callable[[Tensor], Tensor], scale: Tensor) -> None:
        """As of every change, but the last product adds straight into the output: no temporary of its size."""
        small = F.linear(x, self.down.to(x.dtype)) * (self.factor * scale)
        flat, small = (t.flatten(0, -2) if t.ndim > 1 else t[None] for t in (output, small))
        part = flat[:, self.rows[0] : self.rows[1]]
        part.addmm_(small.to(output.dtype), self.up.to(output.dtype).t())
        if self.bias is not None:
            part += scale * self.bias

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.factor * (self.up.float() @ self.down.float())

    def norm(self) -> float:
        up, down = self.up.double(), self.down.double()  # |up down|^2 = sum of (up' up) * (down down')
        return abs(self.factor) * float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())


class Hadamard(Change):
    """LoHa: dW = (a1 @ b1) * (a2 @ b2), elementwise (arXiv 2108.06098): a (rows, rank), b (rank, in).

    The product is itself of low rank: its factors are all products of two columns of a1, a2 and of two rows of b1, b2.
    """

    kind = "LoHa"
    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor

    def __init__(
        self,
        a1: Tensor,
        b1: Tensor,
        a2: Tensor,
        b2: Tensor,
        rows: Rows,
        factor: float = 1.0,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(rows, factor, bias)
        self.keep(a1=a1, b1=b1, a2=a2, b2=b2)

    @property
    def rank(self) -> int:
        return self.b1.shape[0]

    @property
    def inputs(self) -> int:
        return self.b1.shape[1]

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(down, up) of the same change, of rank1 * rank2."""
        b1, b2, a1, a2 = (t.to(dtype) for t in (self.b1, self.b2, self.a1, self.a2))
        down = (b1[:, None] * b2[None]).flatten(0, 1)
        up = (a1[:, :, None] * a2[:, None, :]).flatten(1, 2)
        return down, up

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        down, up = self.factors(x.dtype)
        return F.linear(F.linear(x, down) * self.factor, up)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.factor * (self.a1.float() @ self.b1.float()) * (self.a2.float() @ self.b2.float())


class Kronecker(Change):
    """LoKr: dW = kron(w1, w2) (arXiv 2212.10650, section 4); w2, or w1, may itself be a product a @ b.

    kron(w1, w2) x, without building it: x as a matrix X of (columns of w1) x (columns of w2) gives w1 X w2'.
    """

    kind = "LoKr"
    w1: Tensor
    w2: Tensor
    w1_b: Tensor | None
    w2_b: Tensor | None

    def __init__(
        self,
        w1: Tensor,
        w2: Tensor,
        rows: Rows,
        factor: float = 1.0,
        bias: Tensor | None = None,
        w1_b: Tensor | None = None,
        w2_b: Tensor | None = None,
    ) -> None:
        super().__init__(rows, factor, bias)
        self.keep(w1=w1, w2=w2)
        self.register_buffer("w1_b", w1_b, persistent=False)
        self.register_buffer("w2_b", w2_b, persistent=False)

    @property
    def rank(self) -> int:
        inner = self.w2_b if self.w2_b is not None else self.w1_b
        return 0 if inner is None else inner.shape[0]

    @property
    def inputs(self) -> int:
        first, second = (self.w1 if self.w1_b is None else self.w1_b), (self.w2 if self.w2_b is None else self.w2_b)
        return first.shape[1] * second.shape[1]

    def halves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """w1 and w2, multiplied out."""
        w1, w2 = self.w1.to(dtype), self.w2.to(dtype)
        return (
            w1 if self.w1_b is None else w1 @ self.w1_b.to(dtype),
            w2 if self.w2_b is None else w2 @ self.w2_b.to(dtype),
        )

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        columns = self.w1.shape[1] if self.w1_b is None else self.w1_b.shape[1]
        x = x.unflatten(-1, (columns, -1))
        if self.w2_b is not None:
            x = F.linear(x, self.w2_b.to(x.dtype))
        x = F.linear(x, self.w2.to(x.dtype)).transpose(-1, -2)  # (..., rows of w2, columns of w1)
        if self.w1_b is not None:
            x = F.linear(x, self.w1_b.to(x.dtype))
        x = F.linear(x, self.w1.to(x.dtype)).transpose(-1, -2)
        return self.factor * x.flatten(-2)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.factor * torch.kron(*self.halves(torch.float32))

    def norm(self) -> float:
        w1, w2 = self.halves(torch.float64)
        return abs(self.factor) * float(torch.linalg.matrix_norm(w1) * torch.linalg.matrix_norm(w2))


class Dense(Change):
    """The whole difference of a weight (`diff`), or of a bias alone."""

    kind = "diff"
    difference: Tensor | None

    def __init__(self, difference: Tensor | None, rows: Rows, bias: Tensor | None = None) -> None:
        super().__init__(rows, bias=bias)
        self.register_buffer("difference", difference, persistent=False)
        if difference is not None:
            self.scale = self.scale.to(difference.device)

    @property
    def on_weight(self) -> bool:
        return self.difference is not None

    @property
    def inputs(self) -> int | None:
        return None if self.difference is None else self.difference.shape[1]

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        if self.difference is None:
            return x.new_zeros(())
        return F.linear(x, self.difference.to(x.dtype))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return torch.zeros(1, 1) if self.difference is None else self.difference.float()


class Magnitude(Change):
    """DoRA (arXiv 2402.09353, section 4.1): W + dW, scaled so that its rows, or its columns, have given norms.

    The scale of the user goes from the layer as it was (0) to the one that was trained (1) in a straight line. A row or
    column of zeros has no direction: it stays what W + dW is.

    Args:
        inner: the change of direction.
        magnitude: the norms: (rows,) or (rows, 1) for rows, (1, in) for columns.
        weight: the layer's rows, float32, from which the norms of W + dW are taken once.
    """

    kind = "DoRA"
    needs_base = True
    stretch: Tensor
    magnitude: Tensor

    def __init__(self, inner: Change, magnitude: Tensor, weight: Tensor) -> None:
        super().__init__(inner.rows, 1.0, inner.bias)
        self.by_column = magnitude.ndim == 2 and magnitude.shape[0] == 1 and weight.shape[0] != 1
        self.inner = inner
        axis = 0 if self.by_column else 1
        wanted = magnitude.flatten()
        changed = weight.float() + inner.delta(weight)
        # In parts of the largest number, because the squares of the smallest ones are nothing in float32.
        peaks = changed.abs().amax(dim=axis, keepdim=True)
        parts = changed / torch.where(peaks == 0, 1.0, peaks)
        norms = torch.linalg.vector_norm(parts, dim=axis) * peaks.squeeze(axis)
        stretch = wanted.float() / norms
        self.keep(magnitude=magnitude, stretch=torch.where(stretch.isfinite(), stretch, 1.0))

    @property
    def rank(self) -> int:
        return self.inner.rank

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        if self.by_column:
            stretched = x * self.stretch.to(x.dtype)
            return base(stretched) + self.inner(stretched, base) - base(x)
        # In float32: a row of very small numbers may be stretched beyond the range of float16.
        return ((self.stretch - 1) * base(x) + self.stretch * self.inner(x, base)).to(x.dtype)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        assert weight is not None, "what DoRA changes depends on the layer's weight"
        stretch = self.stretch if self.by_column else self.stretch[:, None]
        return (weight.float() + self.inner.delta(weight)) * stretch - weight.float()

    def norm(self) -> float:
        return float("nan")


def _key(name: str) -> str:
    """An adapter's name as a name for a submodule, which may hold no dot and be no method of a ModuleDict."""
    return "adapter " + name.replace("%", "%25").replace(".", "%2E")


def _name(key: str) -> str:
    return key.removeprefix("adapter ").replace("%2E", ".").replace("%25", "%")


def changes_of(layer: nn.Module) -> dict[str, list[Change]]:
    """The changes that hang on a layer, by the name of their adapter."""
    found = getattr(layer, CHANGES, None)
    return {} if found is None else {_name(key): list(changes) for key, changes in found.items()}


def add_changes(layer: nn.Module, name: str, changes: list[Change]) -> None:
    """Hang the changes of an adapter on a layer."""
    if not hasattr(layer, CHANGES):
        layer.add_module(CHANGES, nn.ModuleDict())
        handle = layer.register_forward_hook(_add)
        layer.__dict__["_lora_hook"] = handle
    cast(nn.ModuleDict, getattr(layer, CHANGES))[_key(name)] = nn.ModuleList(changes)


def remove_changes(layer: nn.Module, name: str) -> None:
    """Take the changes of an adapter off; after the last one the layer is as it was."""
    adapters = cast(nn.ModuleDict, getattr(layer, CHANGES))
    del adapters[_key(name)]
    if not adapters:
        delattr(layer, CHANGES)
        layer.__dict__.pop("_lora_hook").remove()


def rescale(changes: Sequence[Change], scales: Sequence[float]) -> None:
    """Set the scales of many changes at once; by way of the dicts of the modules, whose attributes are slow."""
    if not changes:
        return
    for change, scale in zip(changes, scales, strict=True):
        change.__dict__["active"] = scale != 0
    tensors = [cast(Tensor, change._buffers["scale"]) for change in changes]  # pyright: ignore[reportPrivateUsage]
    with torch.inference_mode():  # which may also change tensors that were made in it
        torch._foreach_zero_(tensors)  # pyright: ignore
        torch._foreach_add_(tensors, list(scales))  # pyright: ignore


OfPictures = Mapping[Change, Sequence[float]]
"""The strength of a change for each picture of a batch."""

_pictures: ContextVar[OfPictures | None] = ContextVar("pictures", default=None)


@contextmanager
def of_pictures(strengths: OfPictures) -> Generator[None]:
    """In here these changes have, in this thread alone, a strength for each picture of the batch that a network is
    called with, instead of their scale."""
    token = _pictures.set(strengths)
    try:
        yield
    finally:
        _pictures.reset(token)


def _add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook of a changed layer."""
    (x,) = inputs
    # Compiled code computes changes of scale 0 as well: to skip them would mean to compile again.
    everything = torch.compiler.is_compiling()
    own = {} if everything else _pictures.get() or {}
    changes = [c for adapter in getattr(layer, CHANGES).values() for c in adapter if everything or c.active or c in own]
    untouched = output.clone() if any(change.needs_base for change in changes) else None
    for change in changes:
        if change in own:
            _add_by_picture(layer, change, own[change], x, output, untouched)
        else:
            _add_one(layer, change, change.scale, x, output, untouched)
    return output


def _add_one(layer: Any, change: Change, scale: Tensor, x: Tensor, output: Tensor, untouched: Tensor | None) -> None:
    """Add one change to the output of a layer, `untouched`: before all changes."""
    seen = x if change.inputs in (None, x.shape[-1]) else x[..., : change.inputs]
    change.add_to(output, seen, partial(_base, layer, change.rows, x, untouched), scale)


def _add_by_picture(
    layer: Any, change: Change, strengths: Sequence[float], x: Tensor, output: Tensor, untouched: Tensor | None
) -> None:
    """Add a change to those pictures of a batch that have it. It is computed for neighbours of one strength together,
    and not at all for the others: so each picture is computed as alone, whatever kind of change it is, and numbers of
    one that overflow are no zeros times infinity in another.

    The texts of a guide follow each other along the batch, each with all pictures. Behind them there may be rows that
    only fill up (`models.rows.by_row`): theirs is any strength.
    """
    of_rows = [strengths[row % len(strengths)] for row in range(len(x))]
    for strength, group in groupby(range(len(x)), of_rows.__getitem__):
        if strength == 0:
            continue
        first, *others = group
        rows, scale = slice(first, first + 1 + len(others)), torch.full_like(change.scale, strength)
        if x.ndim == 2:  # a vector of each picture: one to three of them by themselves would be rounded otherwise
            changed = output.clone()
            _add_one(layer, change, scale, x, changed, untouched)
            output[rows] = changed[rows]
        else:
            _add_one(layer, change, scale, x[rows], output[rows], None if untouched is None else untouched[rows])


def _base(layer: Any, rows: Rows, x: Tensor, output: Tensor | None, inputs: Tensor) -> Tensor:
    """W inputs, for the rows of the layer, without its bias; for `x` that is already in `output`."""
    y = output if inputs is x and output is not None else layer.forward(inputs)
    y = y[..., rows[0] : rows[1]]
    return y if layer.bias is None else y - layer.bias[rows[0] : rows[1]].to(y.dtype)
