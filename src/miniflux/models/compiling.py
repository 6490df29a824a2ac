"""Compiled blocks: `torch.compile` makes one program of each kind of block, and all blocks of the kind share it.

What is compiled is the `forward` that is there to be read; there is no other. Numbers of tokens and of pictures are
left open, so that another prompt or size needs no other program. On a GPU the kernels of a block can be kept as a CUDA
graph, one for each block and size, so that all of them are begun in one go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from miniflux.errors import InputError
from miniflux.models.attention import Chosen
from miniflux.models.compiler import check_compiler, reason
from miniflux.models.layers import attention
from miniflux.models.transformer import Transformer

log = logging.getLogger(__name__)

PROGRAMS = 64  # of a kind that are kept, of all pipelines together; torch's own limit, 8, is one of a few LoRAs
GRAPHS = "graphs"  # the way to compile that keeps CUDA graphs too


def check_compile(compile: bool | str, device: torch.device) -> None:
    """
    Raises:
        InputError: not one of the ways to compile, or not one for this device, or torch cannot compile here.
    """
    if compile not in (True, GRAPHS):
        raise InputError(f"compile must be True, False or {GRAPHS!r}, got {compile!r}")
    if compile == GRAPHS and device.type != "cuda":
        raise InputError(f"compile={GRAPHS!r} keeps CUDA graphs, and the device is {device.type}: use compile=True")
    check_compiler(f"compile={compile!r}", device)


def compile_blocks(
    transformer: Transformer, backend: str | Callable[..., Any] = "inductor", graphs: bool = False
) -> None:
    """Have the blocks of a network run compiled. That begins when the first block of a kind runs.

    A kind is compiled once more for two pictures or more at a time, for a mask, for a sequence of a single token, with
    gradients, and for blocks that a LoRA changes; never for other sizes or prompts. Where a function from elsewhere
    attends (NAG, IP-Adapters, references that are looked at once), a block runs as it is.

    Args:
        transformer: its weights are where they compute.
        backend: what makes a program of a graph, see `torch.compile`.
        graphs: whether to keep CUDA graphs.
    """
    blocks = [transformer.get_submodule(name) for name in transformer.config.blocks]
    kinds = {kind: Kind(kind, backend, graphs) for kind in dict.fromkeys(map(type, blocks))}
    for block in blocks:
        block.forward = Compiled(kinds[type(block)], block)


def how_compiled(transformer: nn.Module) -> bool | str:
    """As `load(compile=...)` has it: whether blocks of a network run compiled, or `graphs`."""
    found = [x for module in transformer.modules() if isinstance(x := module.__dict__.get("forward"), Compiled)]
    return GRAPHS if any(one.kind.graphs for one in found) else bool(found)


def is_compiled(transformer: nn.Module) -> bool:
    """Whether blocks of a network run compiled."""
    return bool(how_compiled(transformer))


class Kind:
    """All blocks of a class.

    Attributes:
        graphs: whether its kernels are kept as CUDA graphs.
        refused: functions for attention with which it cannot be compiled.
    """

    def __init__(self, kind: type[nn.Module], backend: str | Callable[..., Any], graphs: bool = False) -> None:
        from torch._dynamo.exc import TorchDynamoException  # not at the top: torch imports its whole compiler for it

        self.name, self.forward, self.graphs = kind.__name__, kind.forward, graphs
        mode = "reduce-overhead" if graphs else None
        self.fast = torch.compile(kind.forward, fullgraph=True, dynamic=True, backend=backend, mode=mode)
        self.error, self.refused = TorchDynamoException, set[Any]()

    def run(self, block: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What the forward of a block says to these arguments."""
        attend = next((x for x in (*options.values(), *inputs[-1:]) if callable(x)), attention)
        if (attend is attention or isinstance(attend, Chosen)) and attend not in self.refused:
            try:
                with _strictly():
                    out = self.fast(block, *inputs, **options)
                return tree_map(_copied, out) if self.graphs else out
            except self.error as error:
                log.warning("a %s cannot be compiled and runs as it is: %s", self.name, reason(error))
                self.refused.add(attend)
        return self.forward(block, *inputs, **options)


class Compiled:
    """Stands in the place of the forward of a block."""

    def __init__(self, kind: Kind, block: nn.Module) -> None:
        self.kind, self.block = kind, block

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.kind.run(self.block, inputs, options)


def _copied(x: Any) -> Any:
    """What a CUDA graph says lies where the next one of its kind writes, and step caches keep it for longer."""
    return x.clone() if isinstance(x, Tensor) else x


@contextmanager
def _strictly() -> Generator[None]:
    """In here torch does not take sizes that happen to be equal for the same one, since the first picture may well have
    as many tokens as its prompt, and the next one has not; it looks whether hooks have come or gone, as those of a LoRA
    do; and it keeps so many programs. The settings are those of this thread."""
    from torch._dynamo import config as dynamo
    from torch.fx.experimental import _config as shapes

    before = shapes.use_duck_shape, dynamo.skip_nnmodule_hook_guards, dynamo.recompile_limit
    shapes.use_duck_shape, dynamo.skip_nnmodule_hook_guards, dynamo.recompile_limit = False, False, PROGRAMS
    try:
        yield
    finally:
        shapes.use_duck_shape, dynamo.skip_nnmodule_hook_guards, dynamo.recompile_limit = before
