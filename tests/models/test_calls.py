"""What a forward pass asks of PyTorch: a guard against slow forwards that no clock is needed for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import miniflux
from miniflux.families import FAMILIES
from miniflux.models.linear import Linear
from miniflux.sampling.forwards import Told, Words

COPIES = ("cat", "clone", "copy_", "_to_copy", "contiguous")


class Calls(TorchDispatchMode):
    """Counts the operations inside that compute: not the views of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        first = result[0] if isinstance(result, tuple | list) else result
        inputs = [one for one in args if isinstance(one, torch.Tensor)]
        seen = {one.untyped_storage().data_ptr() for one in inputs}
        if not isinstance(first, torch.Tensor):  # a question, as for a dtype
            return result
        if name.rstrip("_") != name or first.untyped_storage().data_ptr() not in seen:
            self.names[name] += 1
        return result


@torch.inference_mode()
def calls(name: str) -> tuple[Any, Counter[str]]:
    """A tiny network with more blocks than one of a kind, and what a pass of it calls."""
    pipe = miniflux.tiny(name)
    network, family = pipe.transformer, FAMILIES[pipe.variant.family]
    config = network.config
    txt = torch.randn(1, 8, config.context_in_dim)
    words = Words(txt, family.text_ids(1, 8), vec=torch.randn(1, getattr(config, "vec_in_dim", 1)))
    one = torch.ones(1)
    told = Told(torch.randn(1, 8, config.in_channels), family.image_ids(1, 2, 4), words, one, one, 0 * one)
    with (counted := Calls()):
        family.velocity(network, told)
    return network, counted.names


@pytest.mark.parametrize(
    ("name", "most", "copies"),
    [("flux1-dev", 219, 25), ("flux2-dev", 214, 20), ("flux3-klein", 306, 20)],
)
def test_a_pass_makes_few_calls_and_copies(name: str, most: int, copies: int) -> None:
    """Every linear once; all else is bounded by what it was when this was written."""
    network, names = calls(name)
    linears = sum(isinstance(module, Linear) for module in network.modules())
    found = names["linear"] + names["_linear_pointwise"] + names["addmm"] + names["mm"]
    assert found <= linears, names
    assert sum(names.values()) <= most, names
    assert sum(names[copy] for copy in COPIES) <= copies, names
