"""Linear layers, multiplied by the faster of the two libraries that PyTorch has on a CPU.

PyTorch multiplies float32 by MKL, which on processors of AMD leaves half of AVX-512 unused; oneDNN, which it multiplies
bfloat16 and convolves by, does not. On those of Intel, MKL is 5 to 12 % faster at the sizes of the releases; it rounds
a row by how many others there are, unless they are many, and so does not get the others (`benchmarks/linear.py`
measures both).
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

LARGE = 2**15  # numbers in a weight; smaller products take less time than oneDNN takes to start
HUGE = 2**22  # numbers in a weight that MKL multiplies faster, where the processor is Intel's
MANY = 512  # rows from which on it rounds each alike; so many, of so wide a network, are more than are drawn together
DENSE = (Tensor, nn.Parameter)


def _by_intel() -> bool:
    try:
        with open("/proc/cpuinfo", "rb") as file:
            return b"GenuineIntel" in file.read(1000)  # of the first core
    except OSError:  # no Linux
        return "GenuineIntel" in os.environ.get("PROCESSOR_IDENTIFIER", "")


_huge = HUGE if _by_intel() else sys.maxsize

_onednn: Any = None  # what inductor calls as well; it knows no gradients
if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512":
    _onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, of x (..., in), weight (out, in), bias (out,): as `F.linear`, by oneDNN where that is faster."""
    if (
        weight.numel() >= LARGE
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and _onednn is not None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and weight.is_contiguous()  # it takes minutes for others
        and x.numel()
        and (weight.numel() < _huge or x.numel() < MANY * x.shape[-1])
        and type(weight) in DENSE
        and type(x) is Tensor
        and getattr(forward_ad, "_current_level", -1) < 0
        and not torch.is_autocast_enabled("cpu")
    ):
        return _onednn(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear`, multiplied by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
