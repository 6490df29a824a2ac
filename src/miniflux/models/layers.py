"""The pieces FLUX transformers are made of: rotary positions, attention, QK norm, modulation, embedders.

Source: `flux/math.py` and `flux/modules/layers.py` of the original release (black-forest-labs/flux).
Letters in shapes: B batch, L tokens, H heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniflux.errors import ConfigError
from miniflux.models.linear import Linear
from miniflux.models.rows import by_row, key_of

# Device types that cannot compute in float64. Rotary angles are made on the CPU for them: an angle is a position times
# a frequency, and at position 256 float32 would already be 1e-5 off.
NO_FLOAT64 = frozenset({"mps"})

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""What takes the place of `attention`: (q, k, v, pe, mask) -> (B, L, H * D)."""


_kept: ContextVar[dict[tuple[Any, ...], Tensor] | None] = ContextVar("rotations", default=None)


@contextmanager
def rotations_kept() -> Generator[None]:
    """In here `rope_rotations` makes those of the same positions once: around a run, once for all of its steps."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def rope_rotations(ids: Tensor, axes_dim: Sequence[int], theta: float) -> Tensor:
    """Rotation matrices of the rotary position embedding, one group of channels per axis.

    Angles are computed in float64 and returned as float32, on every device (RoFormer, arXiv 2104.09864, section 3.2).
    Inside `rotations_kept` they may be looked up, by the numbers in `ids`. On CPUs alone: elsewhere reading these would
    wait for the device.

    Args:
        ids: positions (B, L, A), one number per axis; whole numbers in practice.
        axes_dim: channels of each of the A axes; each even, their sum is the head size D.
        theta: base of the frequencies.

    Returns:
        (B, 1, L, D / 2, 2): cosine and sine of the angle by which each pair of channels turns; 1 stands for the heads.
    """
    apart = torch.compiler.is_compiling() or torch.is_grad_enabled() or ids.device.type != "cpu"
    kept = None if apart else _kept.get()
    if kept is None:
        return _rotations(ids, axes_dim, theta)
    key = (key_of(ids), ids.shape, tuple(axes_dim), theta)
    if key not in kept:
        kept[key] = _rotations(ids, axes_dim, theta)
    return kept[key]


def _rotations(ids: Tensor, axes_dim: Sequence[int], theta: float) -> Tensor:
    """`rope_rotations`, made."""
    device = ids.device
    positions = (ids.cpu() if device.type in NO_FLOAT64 else ids).double()
    angle = positions @ frequencies(axes_dim, theta).to(positions.device)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).unsqueeze(1).float().to(device)


def frequencies(axes_dim: Sequence[int], theta: float) -> Tensor:
    """(A, D / 2), float64: of each axis theta^(-2i / dim) at its own channels, and 0 elsewhere."""
    each = [theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)[None] for dim in axes_dim]
    return torch.block_diag(*each)


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of `x` (B, H, L, D) by `pe` (B, 1, L, D / 2, 2), in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which makes one kernel of real products, and none of complex ones
        (a, b), (cos, sin) = pairs.unbind(-1), pe.unbind(-1)
        turned = torch.stack((cos * a - sin * b, sin * a + cos * b), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(pe))
    return turned.flatten(-2).to(x.dtype)


def rotated(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated, in the dtype of the values; arguments as of `attention`."""
    return apply_rope(q, pe[:, :, -q.shape[2] :]).to(v), apply_rope(k, pe).to(v)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention over rotated queries and keys.

    Args:
        q, k, v: (B, H, L, D); there may be fewer queries than keys, which are then those of the last places.
        pe: rotations of the keys from `rope_rotations`.
        mask: (B, 1, 1, L) booleans, False for keys nobody may look at; None to see all (as released).

    Returns:
        (B, L, H * D), heads side by side.
    """
    q, k = rotated(q, k, v, pe)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return x.transpose(1, 2).flatten(2)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0, time_factor: float = 1000.0) -> Tensor:
    """Sinusoidal features of a number per picture: a time in [0, 1], or a guidance strength.

    Args:
        t: (B,).
        dim: number of features, even: cosines first, then sines.
        max_period: longest wavelength; `time_factor` scales [0, 1] to the 1000 steps diffusion models count in.

    Returns:
        (B, dim) in the dtype of `t`.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    args = (time_factor * t.float())[:, None] * freqs[None]
    return torch.cat([args.cos(), args.sin()], dim=-1).to(t.dtype)


class MLPEmbedder(nn.Module):
    """Two linears with a SiLU between: lifts time, guidance or the pooled text to the hidden size."""

    def __init__(self, in_dim: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.in_layer = Linear(in_dim, hidden_dim, bias=bias)
        self.out_layer = Linear(hidden_dim, hidden_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return by_row(self.out_layer, F.silu(by_row(self.in_layer, x)))


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis, the statistic in float32 at least (arXiv 1910.07467). As fast as it gets on a CPU:
    `F.rms_norm` takes longer."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (x * torch.rsqrt(norm.square() / x.shape[-1] + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return unit_rms(x, self.eps) * self.scale


class QKNorm(nn.Module):
    """RMS norms of queries and keys, so that attention logits stay bounded (arXiv 2302.05442)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, qk: Tensor) -> Tensor:
        """Queries and keys (B, L, 2, H, D), normalised together."""
        scale = torch.stack((self.query_norm.scale, self.key_norm.scale))
        return unit_rms(qk, self.query_norm.eps) * scale.unsqueeze(1)


def heads(qkv: Tensor, number: int, norm: QKNorm) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3 * H * D) -> normalised q, k and plain v, each (B, H, L, D)."""
    qk, v = qkv.unflatten(-1, (3, number, -1)).split((2, 1), dim=2)
    q, k, v = (x.transpose(1, 2) for x in (*norm(qk).unbind(2), v.squeeze(2)))
    return q, k, v


class TanhGELU(nn.Module):
    """GELU by its tanh formula (arXiv 1606.08415, section 2); in place of what comes out of a linear, unless a gradient
    needs that: fresh memory costs more than the formula."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return F.gelu(x, approximate="tanh")
        return torch.ops.aten.gelu_(x, approximate="tanh")


class SwiGLU(nn.Module):
    """silu(a) * b for the two halves a and b of the last axis (arXiv 2002.05202); in place of a, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        if x.requires_grad:
            return F.silu(a) * b
        return F.silu(a, inplace=True).mul_(b)


@dataclass(frozen=True)
class Affine:
    """(1 + scale) * x + shift; each (B, 1, hidden)."""

    shift: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Shift(Affine):
    """What adaLN does around one sub-layer: x -> x + gate * f((1 + scale) * norm(x) + shift). Each (B, 1, hidden)."""

    gate: Tensor

    def added(self, x: Tensor, change: Tensor) -> Tensor:
        """x + gate * change, each (B, L, hidden)."""
        return torch.addcmul(x, self.gate, change)


class ShiftedNorm(nn.Module):
    """The layer norm of adaLN, which has no weights of its own, and what is done to its result."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.shape, self.eps = (dim,), eps

    def forward(self, x: Tensor, mod: Affine) -> Tensor:
        """(1 + scale) * norm(x) + shift, of x (B, L, hidden)."""
        return torch.addcmul(mod.shift, 1 + mod.scale, F.layer_norm(x, self.shape, eps=self.eps))


class Modulation(nn.Module):
    """From the conditioning vector to a block's shifts, scales and gates (adaLN-zero, arXiv 2212.09748, 3.2)."""

    def __init__(self, dim: int, double: bool, bias: bool = True) -> None:
        super().__init__()
        self.parts = 2 if double else 1
        self.lin = Linear(dim, 3 * self.parts * dim, bias=bias)

    def forward(self, vec: Tensor) -> list[Shift]:
        """`vec` (B, hidden) -> one `Shift` (single), or two: attention, MLP (double)."""
        chunks = by_row(self.lin, F.silu(vec)).unsqueeze(1).chunk(3 * self.parts, dim=-1)
        return [Shift(*chunks[3 * i : 3 * i + 3]) for i in range(self.parts)]


class SelfAttention(nn.Module):
    """Holds the attention weights of one stream; the block does the attending, because two streams share it."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, dim * 3, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = Linear(dim, dim, bias=bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, hidden) -> normalised q, k and plain v, each (B, H, L, D)."""
        return heads(self.qkv(x), self.num_heads, self.norm)


class LastLayer(nn.Module):
    """From the hidden size to the velocity, with a last adaLN (shift first, then scale)."""

    def __init__(self, dim: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.norm_final = ShiftedNorm(dim)
        self.linear = Linear(dim, out_channels, bias=bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim, bias=bias))

    def modulation(self, vec: Tensor) -> Affine:
        """vec (B, hidden) -> shift and scale."""
        return Affine(*by_row(self.adaLN_modulation, vec).unsqueeze(1).chunk(2, dim=-1))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        return self.linear(self.norm_final(x, self.modulation(vec)))


def checked_axes(axes_dim: Sequence[int], hidden_size: int, num_heads: int) -> tuple[int, ...]:
    """The rotary channels of each axis, as a tuple.

    Raises:
        ConfigError: the width does not divide into heads, or the axes are not even numbers that sum to a head.
    """
    axes = tuple(axes_dim)
    if hidden_size % num_heads:
        raise ConfigError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
    head = hidden_size // num_heads
    if sum(axes) != head or any(dim % 2 for dim in axes):
        raise ConfigError(f"axes_dim {axes} must be even numbers that sum to the head size {head}")
    return axes


def key_mask(txt_mask: Tensor | None, img_ids: Tensor) -> Tensor | None:
    """What attention to [text, image] may look at, (B, 1, 1, T + L): all of the image, and of the text what
    `txt_mask` (B, T) says; None for everything."""
    if txt_mask is None:
        return None
    seen = torch.ones(img_ids.shape[:2], dtype=torch.bool, device=img_ids.device)
    return torch.cat((txt_mask.bool(), seen), dim=1)[:, None, None, :]


class DoubleStream(nn.Module):
    """Image and text tokens with separate weights and one joint attention: what the blocks of FLUX.1 and FLUX.2 do once
    their modulations are known. They bring the weights."""

    img_attn: SelfAttention
    txt_attn: SelfAttention
    img_norm1: nn.Module
    img_norm2: nn.Module
    txt_norm1: nn.Module
    txt_norm2: nn.Module
    img_mlp: nn.Module
    txt_mlp: nn.Module

    def meet(
        self,
        img: Tensor,
        txt: Tensor,
        img_mods: list[Shift],
        txt_mods: list[Shift],
        pe: Tensor,
        mask: Tensor | None,
        attend: Attend,
    ) -> tuple[Tensor, Tensor]:
        """img (B, L, hidden), txt (B, T, hidden); the shifts of attention and MLP -> new (img, txt)."""
        img_mod1, img_mod2 = img_mods
        txt_mod1, txt_mod2 = txt_mods

        img_q, img_k, img_v = self.img_attn.heads(self.img_norm1(img, img_mod1))
        txt_q, txt_k, txt_v = self.txt_attn.heads(self.txt_norm1(txt, txt_mod1))
        q = torch.cat((txt_q, img_q), dim=2)
        k = torch.cat((txt_k, img_k), dim=2)
        v = torch.cat((txt_v, img_v), dim=2)
        attn = attend(q, k, v, pe, mask)
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]

        img = img_mod1.added(img, self.img_attn.proj(img_attn))
        img = img_mod2.added(img, self.img_mlp(self.img_norm2(img, img_mod2)))
        txt = txt_mod1.added(txt, self.txt_attn.proj(txt_attn))
        txt = txt_mod2.added(txt, self.txt_mlp(self.txt_norm2(txt, txt_mod2)))
        return img, txt


class SingleStream(nn.Module):
    """Text and image as one sequence, attention and MLP side by side: likewise."""

    num_heads: int
    linear1: nn.Module
    linear2: nn.Module
    norm: QKNorm
    pre_norm: nn.Module
    mlp_act: nn.Module
    split: tuple[int, int]

    def mix(self, x: Tensor, mod: Shift, pe: Tensor, mask: Tensor | None, attend: Attend) -> Tensor:
        """x (B, T + L, hidden) -> new x."""
        y = self.linear1(self.pre_norm(x, mod))
        qkv, mlp = y.split(self.split, dim=-1)
        q, k, v = heads(qkv, self.num_heads, self.norm)
        attn, mlp = attend(q, k, v, pe, mask), self.mlp_act(mlp)
        if y.requires_grad or attn.requires_grad:
            both = torch.cat((attn, mlp), dim=-1)
        else:  # the place of v, which is done with, is beside the MLP's
            dim = attn.shape[-1]
            y[..., 2 * dim : 3 * dim] = attn
            both = y[..., 2 * dim : 3 * dim + mlp.shape[-1]]
        return mod.added(x, self.linear2(both))
