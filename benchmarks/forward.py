"""One forward pass of a transformer against diffusers', same weights and inputs; and against the matrix products and
attention calls of that pass alone, as PyTorch makes them (`F.linear`). miniflux multiplies by a faster library where
there is one (`models/linear.py`), so that it may be below that limit; the notes tell the time over its own products.

Random weights, float32, eager; the sizes go from those of unit tests to the width of the releases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import torch
import torch.nn.functional as F
from timing import Report, options, times
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miniflux.families import FAMILIES
from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.models.flux2 import Flux2, Flux2Config
from miniflux.models.flux3 import Flux3, Flux3Config
from miniflux.models.linear import linear

Pass = Callable[[], Tensor]


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

    def axes(self, number: int) -> tuple[int, ...]:
        """Rotary channels: three axes as FLUX.1 has them, or four alike."""
        head = self.hidden // self.heads
        return (head // 8, *[(head - head // 8) // 2] * 2) if number == 3 else (head // 4,) * 4

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
    """Collects the matrix products and attention calls of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.attentions: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("linear", "_linear_pointwise"):
            self.products.append((torch.randn(args[0].shape), args[1], args[2] if len(args) > 2 else None))
        elif "scaled_dot_product" in name:
            q, k, v = (torch.randn(one.shape) for one in args[:3])
            self.attentions.append((q, k, v))
        return func(*args, **(kwargs or {}))

    def run(self, multiply: Callable[..., Tensor]) -> None:
        for product in self.products:
            multiply(*product)
        for attention in self.attentions:
            F.scaled_dot_product_attention(*attention)


def flux1(size: Size) -> tuple[Pass, Pass]:
    """A pass of ours, and of diffusers'."""
    ours = Flux1(Flux1Config(out_channels=64, vec_in_dim=768, guidance_embed=True, **shared(size, 3))).eval()
    theirs, about, vec = peers.transformer(ours), inputs(size, "flux1"), torch.randn(1, 768)
    img, ids, txt, words, sigma, strength = about
    given = (img, txt, vec, sigma, ids[0], words[0], strength)
    return lambda: ours(img, ids, txt, words, sigma, vec, strength), lambda: theirs(*given, return_dict=False)[0]


def flux2(size: Size) -> tuple[Pass, Pass]:
    ours = Flux2(Flux2Config(mlp_ratio=3.0, theta=2000, guidance_embed=True, **shared(size, 4))).eval()
    theirs = peers.transformer(ours)
    img, ids, txt, words, sigma, strength = inputs(size, "flux2")
    given = (img, txt, sigma, ids[0], words[0], strength)
    return lambda: ours(img, ids, txt, words, sigma, strength), lambda: theirs(*given, return_dict=False)[0]


def flux3(size: Size) -> tuple[Pass, Pass]:
    sizes = {"cond_in_channels": 64, "out_channels": 64, "theta": 10_000, "flow_map": False, **shared(size, 4)}
    ours = Flux3(Flux3Config(**sizes)).eval()
    theirs = peers.transformer(ours)
    img, ids, txt, words, sigma, _ = inputs(size, "flux3")
    about = {"encoder_hidden_states": txt, "timestep": sigma, "img_ids": ids[0], "txt_ids": words[0]}
    return lambda: ours(img, ids, txt, words, sigma), lambda: theirs(img, **about, return_dict=False)[0]


FAMILY = {"flux1": flux1, "flux2": flux2, "flux3": flux3}


def shared(size: Size, axes: int) -> dict[str, Any]:
    """What the configs of all families say."""
    blocks = {"depth": size.double, "depth_single_blocks": size.single}
    widths = {"in_channels": 64, "context_in_dim": size.hidden, "hidden_size": size.hidden, "num_heads": size.heads}
    return {**blocks, **widths, "axes_dim": size.axes(axes)}


def inputs(size: Size, family: str) -> tuple[Tensor, ...]:
    """Image tokens and their positions, text tokens and theirs, noise level, guidance."""
    known = FAMILIES[family]
    img, txt = torch.randn(1, size.rows * size.columns, 64), torch.randn(1, size.text, size.hidden)
    places = known.image_ids(1, size.rows, size.columns), known.text_ids(1, size.text)
    return img, places[0], txt, places[1], torch.tensor([0.5]), torch.tensor([3.5])


@torch.inference_mode()
def main() -> None:
    arguments = options(__doc__, rounds=15)
    arguments.add_argument("--hidden", type=int, nargs="*", default=[size.hidden for size in SIZES], help="of SIZES")
    arguments.add_argument("--families", nargs="*", choices=[*FAMILY], default=[*FAMILY])
    asked = arguments.parse_args()
    report = Report("One forward pass", "diffusers", "its products and attention calls, by F.linear")
    for family in asked.families:
        for size in (size for size in SIZES if size.hidden in asked.hidden):
            torch.manual_seed(0)
            ours, theirs = FAMILY[family](size)
            with (products := Products()):
                result = ours()
            gap = float((result - theirs()).abs().max())
            assert gap < 1e-4, f"{family}, {size}: apart by {gap}"
            calls = ours, theirs, lambda: products.run(F.linear), lambda: products.run(linear)
            mine, peer, limit, own = times(*calls, rounds=asked.rounds * (8 if size.hidden < 512 else 1))
            note = f"{mine.median / own.median:.3f} over its own products; apart by {gap:.0e}"
            report.add(f"{family}, {size}", mine, peer, limit, note)
    report.write(asked.json)


if __name__ == "__main__":
    main()
