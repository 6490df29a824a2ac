"""How much memory a network computes in: what its tensors take at the worst moment, found without computing anything.

The real modules run on the meta device, where tensors have sizes and no numbers, and whoever makes or drops memory is
noted. Weights are not counted. Attention is taken to be one of the kernels that never hold the scores of all pairs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miniflux.models import linear as linears


def _address(storage: Any) -> int:
    """Which memory it is: on the meta device all begin at 0."""
    return storage._cdata


class Live(TorchDispatchMode):
    """Bytes of memory that operations in here have made, and that still lives.

    Attributes:
        now, peak: bytes; the peak since `peak` was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self._note(one.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        pointer = _address(storage)
        if pointer in self._known:
            return
        size = storage.nbytes()
        self._known.add(pointer)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, pointer, size)

    def _gone(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.now -= size

    def knows(self, module: nn.Module) -> None:
        """Weights are there anyway: views of them take nothing."""
        self._known |= {_address(one.untyped_storage()) for one in (*module.parameters(), *module.buffers())}


class Moved(TorchFunctionMode):
    """On the meta device, moves to the CPU are none: it has no less room."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.cpu else func(*args, **(kwargs or {}))


class _Kernels(TorchFunctionMode):
    """What kernels take beside their results: attention holds no scores; on a CPU, oneDNN's linears want their input
    in one piece."""

    def __init__(self, host: bool) -> None:
        super().__init__()
        self.copies = host and linears._onednn is not None  # pyright: ignore[reportPrivateUsage]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attended(*args, **kwargs)
        if func is F.linear and self.copies and not args[0].is_contiguous():
            x, weight = args[0], args[1]
            copied = torch.empty(x.shape if weight.numel() >= linears.LARGE and x.dtype == torch.float32 else 0)
            made = func(*args, **kwargs)
            del copied
            return made
        return func(*args, **kwargs)


def _attended(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Memory as such kernels take it: the result (B, H, L, D), places side by side; a number for each query; and of a
    mask what is added to the scores, in the precision that they have."""
    if attn_mask is not None and (attn_mask.dtype == torch.bool or q.dtype.itemsize < 4):
        added = torch.empty_like(attn_mask, dtype=torch.float32 if attn_mask.dtype != torch.bool else q.dtype)
        del added
    batch, heads, length = q.shape[:3]
    sums = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    del sums
    return torch.empty(batch, length, heads, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)


@contextmanager
def _alone(module: nn.Module, live: Live, peaks: dict[str, int]) -> Generator[None]:
    """In here the peak of every module that is called is noted, by its name."""
    highest: list[int] = []

    def before(*_: Any) -> None:
        highest.append(live.peak)
        live.peak = live.now

    def after(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            peaks[name] = max(peaks.get(name, 0), live.peak)
            live.peak = max(live.peak, highest.pop())

        return note

    handles: list[Any] = []
    for name, one in module.named_modules():
        handles += [one.register_forward_pre_hook(before), one.register_forward_hook(after(name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def peaks_of(module: nn.Module, run: Callable[[], Any], host: bool = False) -> dict[str, int]:
    """Bytes at the worst moment of each module of a network on the meta device, by its name, while `run` calls it; of
    the whole of `run` by the empty name. What the caller of a module holds meanwhile is counted, too: a block's is all
    that has to be there for it.

    Args:
        module: on the meta device; nobody else uses it meanwhile.
        run: makes inputs and calls the network.
        host: by the kernels of this CPU, and not by those of a GPU.
    """
    live, peaks = Live(), dict[str, int]()
    live.knows(module)
    with torch.inference_mode(), _alone(module, live, peaks), torch.device("meta"), Moved(), _Kernels(host), live:
        run()
    return {**peaks, "": live.peak}
