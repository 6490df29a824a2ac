"""The ControlNet of FLUX.2 dev: its published file fits, and it computes what the paper and pencil version computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from miniflux.checkpoints import to_layout
from miniflux.models.flux2_controlnet import Flux2ControlNet, Flux2ControlNetConfig
from miniflux.models.layers import Shift, rope_rotations
from tests.tiny import randn, randomise

TINY = Flux2ControlNetConfig(control_channels=36, hidden_size=32, num_heads=2, depth=3)
AXES, THETA = (4, 4, 4, 4), 2000.0


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def heads(x: Tensor, norm: Tensor | None, ids: Tensor, count: int) -> Tensor:
    """(L, hidden) to (count, L, D), with its norm and turned by its places: pairs of channels as complex numbers."""
    x = x.reshape(len(x), count, -1).transpose(0, 1)
    if norm is None:
        return x
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm
    angles = [ids[:, a, None] * THETA ** (-torch.arange(0, dim, 2) / dim) for a, dim in enumerate(AXES)]
    turns = torch.polar(torch.ones(()).double(), torch.cat(angles, dim=-1).double())
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:2], -1, 2)) * turns).flatten(-2)


def by_hand(
    p: dict[str, Tensor], control: Tensor, img: Tensor, txt: Tensor, mods: Sequence[Sequence[Shift]], ids: Tensor
) -> list[Tensor]:
    """The hints of one picture (L, hidden), from the tensors of a published file alone, in float64."""
    count = img.shape[-1] // len(p["control_transformer_blocks.0.attn.norm_q.weight"])
    c = F.linear(control, p["control_img_in.weight"], p["control_img_in.bias"])
    first = "control_transformer_blocks.0.before_proj"
    c, hints, length = F.linear(c, p[f"{first}.weight"], p[f"{first}.bias"]) + img, list[Tensor](), len(txt)
    (ia, im), (ta, tm) = mods
    for n in range(sum(key.endswith("after_proj.weight") for key in p)):
        at = f"control_transformer_blocks.{n}."

        def w(x: Tensor, name: str, at: str = at) -> Tensor:
            return x @ p[f"{at}{name}.weight"].T

        def qkv(kind: str, t: Tensor, i: Tensor, w=w, at: str = at) -> Tensor:  # type: ignore[no-untyped-def]
            theirs = torch.cat((w(t, f"attn.add_{kind}_proj"), w(i, f"attn.to_{kind}")))
            if kind == "v":
                return heads(theirs, None, ids, count)
            own = [p[f"{at}attn.{norm}{kind}.weight"] for norm in ("norm_added_", "norm_")]
            return torch.cat(
                [heads(theirs[part], norm, ids[part], count)
                 for part, norm in zip((slice(length), slice(length, None)), own, strict=True)], dim=1,
            )  # fmt: skip

        t, i = ta.scale[0] * normed(txt) + normed(txt) + ta.shift[0], ia.scale[0] * normed(c) + normed(c) + ia.shift[0]
        q, k, v = (qkv(kind, t, i) for kind in "qkv")
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).exp()
        seen = (scores / scores.sum(-1, keepdim=True) @ v).transpose(0, 1).flatten(1)
        c = c + ia.gate[0] * w(seen[length:], "attn.to_out.0")
        txt = txt + ta.gate[0] * w(seen[:length], "attn.to_add_out")
        for name, mod in (("ff", im), ("ff_context", tm)):
            x = c if name == "ff" else txt
            a, b = w((1 + mod.scale[0]) * normed(x) + mod.shift[0], f"{name}.linear_in").chunk(2, dim=-1)
            x = x + mod.gate[0] * w(a * torch.sigmoid(a) * b, f"{name}.linear_out")
            c, txt = (x, txt) if name == "ff" else (c, x)
        hints.append(F.linear(c, p[f"{at}after_proj.weight"], p[f"{at}after_proj.bias"]))
    return hints


def test_hints_are_those_of_the_formula() -> None:
    """Three blocks, with the text that they hand on to each other; and a batch is its pictures."""
    network, dim = randomise(Flux2ControlNet(TINY)).double(), TINY.hidden_size
    tensors = to_layout(network, network.state_dict(), "diffusers")
    control, img, txt = (randn(2, n, c, seed=n).double() for n, c in ((6, 36), (6 + 0, dim), (5, dim)))
    ids = torch.cat(
        (torch.tensor([[0, 0, 0, i] for i in range(5)]), torch.tensor([[0, i // 3, i % 3, 0] for i in range(6)]))
    )
    mods = [[Shift(*(0.3 * randn(2, 1, dim, seed=20 + 9 * s + 3 * n + i).double() for i in range(3))) for n in range(2)]
            for s in range(2)]  # fmt: skip
    found = network(control, img, txt, *mods, rope_rotations(ids.expand(2, -1, -1), AXES, THETA))
    assert len(found) == TINY.depth
    for row in range(2):
        own = [[Shift(*(x[row] for x in (m.shift, m.scale, m.gate))) for m in stream] for stream in mods]
        expected = by_hand(tensors, control[row], img[row], txt[row], own, ids)
        for hint, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(hint[row], wanted, rtol=0, atol=2e-5)


def test_keys_are_those_that_were_published() -> None:
    """76 tensors at the size of FLUX.2 dev (`infer_checkpoint_profile` of a ComfyUI node states the same)."""
    with torch.device("meta"):
        network = Flux2ControlNet(Flux2ControlNetConfig(control_channels=260, hidden_size=6144, num_heads=48, depth=4))
    found = {key: list(tensor.shape) for key, tensor in to_layout(network, network.state_dict(), "diffusers").items()}
    assert found == published()
    assert len(found) == 76


def published() -> dict[str, list[int]]:
    """Keys and shapes of FLUX.2-dev-Fun-Controlnet-Union.safetensors."""
    square = {"weight": [6144, 6144], "bias": [6144]}
    keys: dict[str, list[int]] = {"control_img_in.weight": [6144, 260], "control_img_in.bias": [6144]}
    keys |= {f"control_transformer_blocks.0.before_proj.{name}": shape for name, shape in square.items()}
    for at in (f"control_transformer_blocks.{i}." for i in range(4)):
        keys |= {f"{at}after_proj.{name}": shape for name, shape in square.items()}
        linears = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        keys |= {f"{at}attn.{name}.weight": [6144, 6144] for name in linears}
        keys |= {f"{at}attn.{name}.weight": [128] for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
        for name in ("ff", "ff_context"):
            keys |= {f"{at}{name}.linear_in.weight": [36864, 6144], f"{at}{name}.linear_out.weight": [6144, 18432]}
    return keys
