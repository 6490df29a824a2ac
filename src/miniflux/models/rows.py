"""Products of a few rows, as the conditioning vector's: each rounded as it is alone, and known ahead of a run."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from miniflux.models.linear import Linear

ROWS = 4  # from so many on, a BLAS rounds the product of a row as it does without its neighbours

GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")  # of all modules there are

Key = tuple[torch.dtype, bytes]


class Table:
    """What linears made of rows, while their weights and hooks are as they were then.

    Attributes:
        open: whether products are still being noted.
    """

    def __init__(self) -> None:
        self.open = True
        self._rows: dict[Any, tuple[Any, dict[Key, Tensor]]] = {}

    def note(self, linear: Any, x: Tensor, y: Tensor) -> None:
        """Each row of y = linear(x), if nothing but the weights makes it."""
        state = _state(linear)
        if state is not None:
            _, rows = self._rows.setdefault(linear, (state, {}))
            rows |= {key_of(row): made for row, made in zip(x, y.split(1), strict=True)}

    def made(self, linear: Any, x: Tensor) -> Tensor | None:
        """linear(x), a new tensor; None if it is not known."""
        state, rows = self._rows.get(linear, (None, {}))
        if not rows or state != _state(linear):
            return None
        found = [rows.get(key_of(row)) for row in x]
        return None if any(row is None for row in found) else torch.cat(found)  # pyright: ignore[reportArgumentType]


_table: ContextVar[Table | None] = ContextVar("table", default=None)


def by_row(linear: nn.Module | Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`linear(x)` of (B, C). On a CPU, without gradients, rows are repeated up to a multiple of `ROWS`: the product of
    one to three would be rounded in another way, and a picture must not depend on its neighbours. Inside `known` it may
    be looked up."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu":
        return linear(x)
    table = _table.get()
    if table is not None and not table.open and len(x) < ROWS and (row := table.made(linear, x)) is not None:
        return row
    missing = -len(x) % ROWS
    y = linear(torch.cat((x, x[-1:].expand(missing, -1))))[: len(x)] if missing else linear(x)
    if table is not None and table.open:
        table.note(linear, x, y)
    return y


@contextmanager
def known(note: Callable[[], object]) -> Generator[None]:
    """In here, what `by_row` made while `note` ran is looked up: of all steps in one product, instead of a few rows a
    step, which take as long to multiply."""
    table = Table()
    token = _table.set(table)
    try:
        note()
        table.open = False
        yield
    finally:
        _table.reset(token)


def key_of(row: Tensor) -> Key:
    """What a row, or any tensor of one shape, is found by: its bytes, and what they mean."""
    return row.dtype, row.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def unhooked(module: nn.Module) -> bool:
    """Whether nobody is told when a module, or a part of it, is called."""
    parts = (vars(one) for one in module.modules())
    everywhere = (vars(nn.modules.module)[name] for name in GLOBAL_HOOKS)
    return not any(one["_forward_hooks"] or one["_forward_pre_hooks"] for one in parts) and not any(everywhere)


def _state(linear: Any) -> list[Any] | None:
    """What changes when the product of a linear, or of a chain with one, does; None if that cannot be told."""
    if any(vars(nn.modules.module)[name] for name in GLOBAL_HOOKS):
        return None
    found: list[Any] = []
    for one in (linear, *linear.children()) if type(linear) is nn.Sequential else (linear,):
        values: dict[str, Any] = vars(one) if isinstance(one, nn.Module) else {"forward": one}
        if "forward" in values or values["_forward_hooks"] or values["_forward_pre_hooks"]:
            return None
        tensors = [tensor for tensor in values["_parameters"].values() if tensor is not None]
        if type(one) not in (Linear, nn.SiLU, nn.Sequential) or any(tensor.is_inference() for tensor in tensors):
            return None
        found += [(id(tensor), tensor._version) for tensor in tensors]
    return found
