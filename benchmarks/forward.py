"""One forward pass of a transformer against diffusers', same weights and inputs; and against the limit: the matrix
products and attention calls of that pass alone. All take turns in one process.

Random weights, float32, eager; the sizes go from those of unit tests to the width of the releases.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import torch
import torch.nn.functional as F
from timing import median_times
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.sampling import image_ids, text_ids


@dataclass(frozen=True)
class Size:
    """A network and what goes through it."""

    hidden: int
    heads: int
    double: int
    single: int
    rows: int
    columns: int
    text: int

    @property
    def axes(self) -> tuple[int, int, int]:
        head = self.hidden // self.heads
        return head // 8, (head - head // 8) // 2, (head - head // 8) // 2

    def __str__(self) -> str:
        tokens = self.rows * self.columns + self.text
        return f"hidden {self.hidden}, {self.double}+{self.single}, {tokens} tokens"


SIZES = (
    Size(64, 2, 2, 2, 4, 4, 16),
    Size(256, 4, 4, 8, 8, 8, 64),
    Size(768, 12, 4, 8, 32, 32, 256),
    Size(3072, 24, 1, 2, 32, 32, 512),
)


class Products(TorchDispatchMode):
    """Collects the matrix products and attention calls of what runs inside, as calls without arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "linear":
            x, weight, bias = torch.randn(args[0].shape), args[1], args[2] if len(args) > 2 else None
            self.calls.append(lambda: F.linear(x, weight, bias))
        elif "scaled_dot_product" in name:
            q, k, v = (torch.randn(one.shape) for one in args[:3])
            self.calls.append(lambda: F.scaled_dot_product_attention(q, k, v))
        return func(*args, **(kwargs or {}))

    def __call__(self) -> None:
        for call in self.calls:
            call()


def flux1(size: Size) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A pass of ours, and of diffusers'."""
    config = Flux1Config(
        in_channels=64,
        out_channels=64,
        vec_in_dim=768,
        context_in_dim=size.hidden,
        hidden_size=size.hidden,
        num_heads=size.heads,
        depth=size.double,
        depth_single_blocks=size.single,
        axes_dim=size.axes,
        guidance_embed=True,
    )
    ours = Flux1(config).eval()
    theirs = peers.transformer(ours)
    img, txt, vec = (
        torch.randn(1, size.rows * size.columns, 64),
        torch.randn(1, size.text, size.hidden),
        torch.randn(1, 768),
    )
    vec, ids, words = torch.randn(1, 768), image_ids(1, size.rows, size.columns), text_ids(1, size.text)
    sigma, strength = torch.tensor([0.5]), torch.tensor([3.5])

    def peer() -> Tensor:
        return theirs(img, txt, vec, sigma, ids[0], words[0], strength, return_dict=False)[0]

    return lambda: ours(img, ids, txt, words, sigma, vec, strength), peer


@torch.inference_mode()
def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--hidden", type=int, nargs="*", default=[size.hidden for size in SIZES], help="of SIZES")
    arguments.add_argument("--rounds", type=int, default=15)
    options = arguments.parse_args()
    print(f"{'':32} {'miniflux':>9} {'diffusers':>9} {'limit, ms':>10} {'ratio':>6}")
    for size in (size for size in SIZES if size.hidden in options.hidden):
        torch.manual_seed(0)
        ours, theirs = flux1(size)
        with (products := Products()):
            result = ours()
        assert (result - theirs()).abs().max() < 1e-4
        rounds = options.rounds * (8 if size.hidden < 512 else 1)
        mine, peer, limit = median_times(ours, theirs, products, rounds=rounds)
        ratios = f"{mine / limit:9.3f} {peer / limit:9.3f} {1000 * limit:10.2f} {mine / peer:6.3f}"
        print(f"{size!s:32} {ratios}", flush=True)


if __name__ == "__main__":
    main()
