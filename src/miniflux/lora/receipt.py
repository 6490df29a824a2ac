"""What became of a LoRA file: every module it changes, and every tensor that found no use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from miniflux.lora.layer import Change, Magnitude


@dataclass(frozen=True)
class ModuleReceipt:
    """One change of one module.

    Attributes:
        target: the module's name; with `clip:` or `t5:` in front for text encoders.
        rows: the output rows that change; None for a replaced parameter.
        kind: LoRA, LoHa, LoKr, DoRA, diff or replace.
        rank: 0 where the form has none.
        blocks: separate LoRAs that one tensor holds along its diagonal (kohya's `split_qkv`); else 1.
        change: the change itself; None for a replaced parameter.
        module: the changed module.
        base: gives its weight without what is merged into it (packed ones unpacked), or None.
    """

    target: str
    rows: tuple[int, int] | None
    kind: str
    rank: int
    blocks: int
    change: Change | None
    module: nn.Module
    base: Callable[[], Tensor | None]

    @property
    def scale(self) -> float:
        """The effective scale now, beside the weight or in it: the user's times alpha / rank."""
        if self.change is None:
            return 1.0
        inner = self.change.inner if isinstance(self.change, Magnitude) else self.change
        return math.nan if self.change.scale.is_meta else (float(self.change.scale) + self.change.merged) * inner.factor

    @cached_property
    def norm(self) -> float:
        """||dW|| (Frobenius) at scale 1; NaN where it is not known without the numbers."""
        if self.change is None or any(buffer.is_meta for buffer in self.change.buffers()):
            return math.nan
        if isinstance(self.change, Magnitude):
            weight = self._base()
            return math.nan if weight is None else float(torch.linalg.matrix_norm(self.change.delta(weight).double()))
        return self.change.norm()

    @cached_property
    def relative(self) -> float:
        """||dW|| / ||W|| over the rows that change (packed weights are unpacked); NaN for absent or empty ones."""
        weight = self._base()
        size = 0.0 if weight is None else float(torch.linalg.vector_norm(weight).double())
        return self.norm / size if size else math.nan

    def _base(self) -> Tensor | None:
        weight = None if self.rows is None else self.base()
        if self.rows is None or weight is None or weight.is_meta or not weight.dtype.is_floating_point:
            return None
        return weight.detach()[self.rows[0] : self.rows[1]].float()


@dataclass(frozen=True)
class Receipt:
    """What `attach` did.

    Attributes:
        name: what the adapter is called.
        source: where it came from.
        dialect: how the file names things.
        applied: modules that are changed now.
        expected: modules that the file has tensors for.
        unmatched: keys that found no use; empty unless `strict=False`.
        modules: the changes, one by one.
        fits: variants whose layers and widths the file has, where that was asked; |W| is that of the first.
    """

    name: str
    source: str
    dialect: str
    applied: int
    expected: int
    unmatched: list[str]
    modules: list[ModuleReceipt]
    fits: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A first line that sums up, then a table."""
        head = f"{self.source}: {self.dialect}, {self.applied} of {self.expected} modules applied"
        if self.fits:
            others = f" (it fits {', '.join(self.fits[1:])} as well)" if self.fits[1:] else ""
            head += f"; for {self.fits[0]}{others}"
        if self.unmatched:
            head += f", {len(self.unmatched)} tensors without use"
        blocks = max((module.blocks for module in self.modules), default=1)
        if blocks > 1:
            head += f"; block-diagonal (split_qkv) with {blocks} parts"
        width = max([len("module"), *(len(_label(module)) for module in self.modules)])
        lines = [head, f"{'module':<{width}}  kind     rank   scale       |dW|  |dW|/|W|"]
        for module in self.modules:
            rank = str(module.rank) if module.rank else "-"
            lines.append(
                f"{_label(module):<{width}}  {module.kind:<7}  {rank:>4}  {_number(module.scale, 6)}  "
                f"{_number(module.norm, 9)}  {_number(module.relative, 8)}"
            )
        return "\n".join([*lines, *(f"no use: {key}" for key in self.unmatched)])


def _label(module: ModuleReceipt) -> str:
    partly = module.change is not None and module.rows is not None and module.rows != (0, _height(module.module))
    return f"{module.target}[{module.rows[0]}:{module.rows[1]}]" if partly and module.rows else module.target


def _height(module: nn.Module) -> int:
    return cast(int, getattr(module, "out_features", 0))


def _number(value: float, width: int) -> str:
    return f"{'-':>{width}}" if math.isnan(value) else f"{value:>{width}.4g}"
