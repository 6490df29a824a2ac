"""Ways to compute attention: those of torch, and packages with faster kernels for some devices.

    attend = attention_by("flash3")                 # or "auto": the first that takes the tensors
    pipe.generate(prompt, attend=attend)

All take queries and keys that are rotated already, and no kernel knows of positions.
Letters in shapes: B batch, L tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from miniflux.errors import InputError
from miniflux.models.compiler import check_compiler
from miniflux.models.layers import rotated

Kernel = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(q, k, v, mask) -> (B, H, L, D), of q, k, v (B, H, L, D); the mask (B, 1, 1, L) of booleans, or None."""

HALF = (torch.float16, torch.bfloat16)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _cudnn() -> Kernel:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def _flash(package: str) -> Kernel:
    """FlashAttention, whose tensors are (B, L, H, D)."""
    kernel = import_module(package).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = out[0] if isinstance(out, tuple) else out  # early releases of version 3 give the sums as well
        return cast(Tensor, out).transpose(1, 2)

    return attend


def _sage() -> Kernel:
    kernel = import_module("sageattention").sageattn

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return kernel(q, k, v, tensor_layout="HND", is_causal=False)

    return attend


def _flex() -> Kernel:
    from torch.nn.attention.flex_attention import flex_attention

    check_compiler("attention 'flex'", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    fused = torch.compile(flex_attention, dynamic=True)  # as it is, it would hold the scores of all pairs

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return fused(q, k, v)

        def seen(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return torch.where(mask[b, 0, 0, key], score, -torch.inf)

        return fused(q, k, v, score_mod=seen)

    return attend


@dataclass(frozen=True)
class Backend:
    """A way to compute attention, and what it needs.

    Attributes:
        make: gives the kernel; imports its package.
        package: the module that must be installed; empty for what is in torch.
        install: how it is.
        devices: types of devices; empty for all.
        majors: of CUDA devices, the first numbers of the compute capabilities; empty for all.
        dtypes: of the tensors; empty for all.
        largest: head size; 0 for any. Where there is a largest, all must be multiples of 8.
        masks: whether keys can be hidden.
    """

    make: Callable[[], Kernel]
    package: str = ""
    install: str = ""
    devices: tuple[str, ...] = ()
    majors: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    largest: int = 0
    masks: bool = True

    def absent(self) -> str | None:
        """Why it cannot be used here; None if it can."""
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed ({self.install})"
        if self.devices == ("cuda",) and not torch.cuda.is_available():
            return "it needs a CUDA device, and there is none"
        if self.majors and (major := torch.cuda.get_device_capability()[0]) not in self.majors:
            wanted = ", ".join(f"{one}.x" for one in self.majors)
            return f"it needs a CUDA device of compute capability {wanted}, this one has {major}.x"
        return None

    def unfit(self, v: Tensor, masked: bool) -> str | None:
        """Why it does not take such tensors; None if it does."""
        head = v.shape[-1]
        if self.devices and v.device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, the tensors are on {v.device.type}"
        if self.dtypes and v.dtype not in self.dtypes:
            return f"it computes in {' and '.join(map(str, self.dtypes))}, the tensors are {v.dtype}"
        if self.largest and (head > self.largest or head % 8):
            return f"heads must be multiples of 8 up to {self.largest}, these have {head} channels"
        if masked and not self.masks:
            return "it knows no masks: draw with padding='released' or 'trimmed'"
        return None


# In the order in which `auto` tries them, the fastest first (arXiv 2407.08608, section 4.1). SDPA takes all tensors, so
# what comes behind it is had by name only.
BACKENDS: dict[str, Backend] = {
    "flash3": Backend(
        lambda: _flash("flash_attn_interface"),
        package="flash_attn_interface",
        install="from the folder hopper of https://github.com/Dao-AILab/flash-attention: python setup.py install",
        devices=("cuda",),
        majors=(9,),  # written for Hopper
        dtypes=HALF,
        largest=256,
        masks=False,
    ),
    "cudnn": Backend(_cudnn, devices=("cuda",), majors=(8, 9, 10, 12), dtypes=HALF, largest=128),
    "flash2": Backend(
        lambda: _flash("flash_attn"),
        package="flash_attn",
        install="pip install flash-attn --no-build-isolation",
        devices=("cuda",),
        majors=(8, 9, 10, 12),
        dtypes=HALF,
        largest=256,
        masks=False,
    ),
    "sdpa": Backend(lambda: _sdpa),
    "flex": Backend(_flex, devices=("cuda", "cpu")),
    "sage": Backend(  # no float result: it multiplies queries and keys in 8 bits
        _sage,
        package="sageattention",
        install="pip install sageattention",
        devices=("cuda",),
        majors=(8, 9, 12),
        dtypes=HALF,
        largest=128,
        masks=False,
    ),
}


def available() -> list[str]:
    """Names of the ways that can be used here."""
    return [name for name, backend in BACKENDS.items() if backend.absent() is None]


@cache
def attention_by(name: str) -> Chosen:
    """What takes the place of `attention`, for `generate(attend=...)`.

    Args:
        name: of `BACKENDS`; `auto` for the first that takes the device, dtype, head size and mask of the tensors in
            hand.

    Raises:
        InputError: an unknown name, or it cannot be used here; the message says what to install.
    """
    if name == "auto":
        here = available()
        names = here[: here.index("sdpa") + 1]
    elif name not in BACKENDS:
        raise InputError(f"unknown attention {name!r}; known: auto, {', '.join(BACKENDS)}")
    elif (why := BACKENDS[name].absent()) is not None:
        raise InputError(f"attention {name!r} cannot be used here: {why}; here are {', '.join(available())}")
    else:
        names = [name]
    try:
        return Chosen(tuple(names), tuple(BACKENDS[name].make() for name in names))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # built for another version of torch, say
        raise InputError(f"attention {name!r}: its package cannot be imported: {error}") from error


@dataclass(frozen=True)
class Chosen:
    """Attention by the first of several kernels that takes the tensors; used as `attention` is."""

    names: tuple[str, ...]
    kernels: tuple[Kernel, ...] = field(repr=False)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Raises:
            InputError: none takes them; the message says why the last does not.
        """
        why = None
        for name, kernel in zip(self.names, self.kernels, strict=True):
            why = BACKENDS[name].unfit(v, mask is not None)
            if why is None:
                q, k = rotated(q, k, v, pe)
                return kernel(q, k, v, mask).transpose(1, 2).flatten(2)
        raise InputError(f"attention {self.names[-1]!r} does not take these tensors: {why}")
