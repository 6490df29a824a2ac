"""The pieces FLUX transformers are made of: rotary positions, attention, QK norm, modulation, embedders.

Source: `flux/math.py` and `flux/modules/layers.py` of the original release (black-forest-labs/flux).
Letters in shapes: B batch, L tokens, H heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from miniflux.errors import ConfigError

# Device types that cannot compute in float64. Rotary angles are made on the CPU for them: an angle is a position times
# a frequency, and at position 256 float32 would already be 1e-5 off.
NO_FLOAT64 = frozenset({"mps"})

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""What takes the place of `attention`: (q, k, v, pe, mask) -> (B, L, H * D)."""


def rope_rotations(ids: Tensor, axes_dim: Sequence[int], theta: float) -> Tensor:
    """Rotation matrices of the rotary position embedding, one group of channels per axis.

    Angles are computed in float64 and returned as float32, on every device (RoFormer, arXiv 2104.09864, section 3.2).

    Args:
        ids: positions (B, L, A), one number per axis; whole numbers in practice.
        axes_dim: channels of each of the A axes; each even, their sum is the head size D.
        theta: base of the frequencies.

    Returns:
        (B, 1, L, D / 2, 2, 2): the matrix [[cos, -sin], [sin, cos]] for each pair of channels; 1 stands for the heads.
    """
    device = ids.device
    positions = (ids.cpu() if device.type in NO_FLOAT64 else ids).to(torch.float64)
    angles: list[Tensor] = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
        angles.append(positions[..., axis, None] * theta**-exponents)
    angle = torch.cat(angles, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    matrices = rearrange(torch.stack([cos, -sin, sin, cos], dim=-1), "B L D (i j) -> B 1 L D i j", i=2, j=2)
    return matrices.float().to(device)


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of `x` (B, H, L, D) by the matrices `pe` (B, 1, L, D / 2, 2, 2), in float32."""
    pairs = rearrange(x.float(), "B H L (D j) -> B H L D 1 j", j=2)
    rotated = pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]
    return rearrange(rotated, "B H L D i -> B H L (D i)").to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention over rotated queries and keys.

    Args:
        q, k, v: (B, H, L, D); there may be fewer queries than keys, which are then those of the last places.
        pe: rotations of the keys from `rope_rotations`.
        mask: (B, 1, 1, L) booleans, False for keys nobody may look at; None to see all (as released).

    Returns:
        (B, L, H * D), heads side by side.
    """
    q, k = apply_rope(q, pe[:, :, -q.shape[2] :]), apply_rope(k, pe)
    x = F.scaled_dot_product_attention(q.to(v), k.to(v), v, attn_mask=mask)
    return rearrange(x, "B H L D -> B L (H D)")


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
        self.in_layer = nn.Linear(in_dim, hidden_dim, bias=bias)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, the statistic in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        rrms = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x32 * rrms).to(x.dtype) * self.scale


class QKNorm(nn.Module):
    """RMS norms of queries and keys, so that attention logits stay bounded (arXiv 2302.05442)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised (q, k), in the dtype of `v`."""
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SwiGLU(nn.Module):
    """silu(a) * b for the two halves a and b of the last axis (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return F.silu(a) * b


@dataclass(frozen=True)
class Shift:
    """What adaLN does around one sub-layer: x -> x + gate * f((1 + scale) * norm(x) + shift). Each (B, 1, hidden)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Shift and scale a normalised `x` (B, L, hidden)."""
        return (1 + self.scale) * x + self.shift


class Modulation(nn.Module):
    """From the conditioning vector to a block's shifts, scales and gates (adaLN-zero, arXiv 2212.09748, 3.2)."""

    def __init__(self, dim: int, double: bool, bias: bool = True) -> None:
        super().__init__()
        self.parts = 2 if double else 1
        self.lin = nn.Linear(dim, 3 * self.parts * dim, bias=bias)

    def forward(self, vec: Tensor) -> list[Shift]:
        """`vec` (B, hidden) -> one `Shift` (single), or two: attention, MLP (double)."""
        chunks = self.lin(F.silu(vec))[:, None, :].chunk(3 * self.parts, dim=-1)
        return [Shift(*chunks[3 * i : 3 * i + 3]) for i in range(self.parts)]


class SelfAttention(nn.Module):
    """Holds the attention weights of one stream; the block does the attending, because two streams share it."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, hidden) -> normalised q, k and plain v, each (B, H, L, D)."""
        q, k, v = rearrange(self.qkv(x), "B L (K H D) -> K B H L D", K=3, H=self.num_heads)
        q, k = self.norm(q, k, v)
        return q, k, v


def plain_norm(dim: int) -> nn.LayerNorm:
    """adaLN brings its own shift and scale, so the norm has none."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class LastLayer(nn.Module):
    """From the hidden size to the velocity, with a last adaLN (shift first, then scale)."""

    def __init__(self, dim: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.norm_final = plain_norm(dim)
        self.linear = nn.Linear(dim, out_channels, bias=bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, bias=bias))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear((1 + scale) * self.norm_final(x) + shift)


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

        img_q, img_k, img_v = self.img_attn.heads(img_mod1(self.img_norm1(img)))
        txt_q, txt_k, txt_v = self.txt_attn.heads(txt_mod1(self.txt_norm1(txt)))
        q = torch.cat((txt_q, img_q), dim=2)
        k = torch.cat((txt_k, img_k), dim=2)
        v = torch.cat((txt_v, img_v), dim=2)
        attn = attend(q, k, v, pe, mask)
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]

        img = img + img_mod1.gate * self.img_attn.proj(img_attn)
        img = img + img_mod2.gate * self.img_mlp(img_mod2(self.img_norm2(img)))
        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_attn)
        txt = txt + txt_mod2.gate * self.txt_mlp(txt_mod2(self.txt_norm2(txt)))
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
        qkv, mlp = self.linear1(mod(self.pre_norm(x))).split(self.split, dim=-1)
        q, k, v = rearrange(qkv, "B L (K H D) -> K B H L D", K=3, H=self.num_heads)
        q, k = self.norm(q, k, v)
        attn = attend(q, k, v, pe, mask)
        return x + mod.gate * self.linear2(torch.cat((attn, self.mlp_act(mlp)), dim=-1))
