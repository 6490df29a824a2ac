"""The shared pieces against closed forms and their invariants."""

from __future__ import annotations

import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from miniflux.models import layers
from miniflux.models.layers import (
    Affine,
    Modulation,
    QKNorm,
    RMSNorm,
    Shift,
    ShiftedNorm,
    SwiGLU,
    TanhGELU,
    apply_rope,
    attention,
    heads,
    rope_rotations,
    timestep_embedding,
)
from tests.tiny import randn, randomise

AXES, THETA = (4, 6, 6), 10_000.0


def positions(length: int, seed: int = 0, high: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (2, length, len(AXES)), generator=generator).float()


def rotate_slowly(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rotary embedding as multiplication of complex numbers, pair by pair, with Python's own cosines."""
    out = torch.empty_like(x)
    batch, heads, length, _ = x.shape
    for b in range(batch):
        for token in range(length):
            pair = 0
            for axis, dim in enumerate(AXES):
                for k in range(dim // 2):
                    angle = float(ids[b, token, axis]) * THETA ** (-2 * k / dim)
                    for h in range(heads):
                        z = complex(*x[b, h, token, 2 * pair : 2 * pair + 2].tolist())
                        z *= complex(math.cos(angle), math.sin(angle))
                        out[b, h, token, 2 * pair] = z.real
                        out[b, h, token, 2 * pair + 1] = z.imag
                    pair += 1
    return out


def test_rope_is_a_complex_product() -> None:
    """Breaks with another frequency, direction, pairing of channels or order of axes."""
    ids, x = positions(5), randn(2, 3, 5, sum(AXES))
    assert_close(apply_rope(x, rope_rotations(ids, AXES, THETA)), rotate_slowly(x, ids), rtol=0, atol=1e-6)


@torch.no_grad()
def test_rotations_are_kept_by_the_numbers_of_positions() -> None:
    """The same ones are looked up; those that were edited in place, of other axes or of another batch are not."""
    ids, freely = positions(5), rope_rotations(positions(5), AXES, THETA)
    with layers.rotations_kept():
        first = rope_rotations(ids, AXES, THETA)
        assert torch.equal(first, freely)
        assert rope_rotations(ids.clone(), list(AXES), THETA) is first
        for other, axes, theta in (ids[:1], AXES, THETA), (ids, (6, 4, 6), THETA), (ids, AXES, 100.0):
            expected = layers._rotations(other, axes, theta)
            assert torch.equal(rope_rotations(other, axes, theta), expected)
        ids.data[1, 2, 0] += 1
        assert torch.equal(rope_rotations(ids, AXES, THETA), layers._rotations(ids, AXES, THETA))
        with torch.enable_grad():
            assert rope_rotations(positions(5), AXES, THETA) is not first
        with ThreadPoolExecutor(1) as another:
            assert another.submit(rope_rotations, positions(5), AXES, THETA).result() is not first
    assert rope_rotations(positions(5), AXES, THETA) is not first
    gone = weakref.ref(first)
    del first
    assert gone() is None


def test_rope_at_position_zero_is_the_identity() -> None:
    """Text tokens, which all sit at zero, must not be touched."""
    x = randn(1, 2, 4, sum(AXES))
    assert torch.equal(apply_rope(x, rope_rotations(torch.zeros(1, 4, 3), AXES, THETA)), x)


def test_rope_keeps_lengths() -> None:
    """A rotation changes no norm; a scaled or sheared matrix would."""
    x = randn(2, 2, 7, sum(AXES))
    rotated = apply_rope(x, rope_rotations(positions(7), AXES, THETA))
    assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_rope_scores_depend_on_relative_positions_only(first: int, row: int, column: int) -> None:
    """The same picture elsewhere on the canvas must give the same attention."""
    ids, q, k = positions(6), randn(2, 1, 6, sum(AXES), seed=1), randn(2, 1, 6, sum(AXES), seed=2)

    def scores(ids: torch.Tensor) -> torch.Tensor:
        pe = rope_rotations(ids, AXES, THETA)
        return apply_rope(q, pe) @ apply_rope(k, pe).mT

    moved = ids + torch.tensor([first, row, column], dtype=torch.float32)
    assert_close(scores(moved), scores(ids), rtol=0, atol=2e-5)


def test_rope_angles_are_exact_far_out() -> None:
    """Angles in float32 would be off by 1e-4 at this position."""
    position = 4001
    pe = rope_rotations(torch.full((1, 1, 3), float(position)), AXES, THETA)
    angle = position * THETA ** (-2 / 6)
    cos, sin = math.cos(angle), math.sin(angle)
    assert pe.shape == (1, 1, 1, sum(AXES) // 2, 2)
    assert pe.dtype == torch.float32
    assert_close(pe[0, 0, 0, 3], torch.tensor([cos, sin]), rtol=0, atol=1e-7)


def test_rope_for_devices_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detour over the CPU gives the same matrices, in the same dtype and place."""
    ids = positions(5)
    direct = rope_rotations(ids, AXES, THETA)
    monkeypatch.setattr(layers, "NO_FLOAT64", frozenset({"cpu"}))
    detour = rope_rotations(ids, AXES, THETA)
    assert detour.dtype == direct.dtype
    assert detour.device == ids.device
    assert torch.equal(detour, direct)


def test_rope_computes_in_float32() -> None:
    """Half precision goes in and out, but the rotation itself is not rounded in between."""
    x, pe = randn(2, 2, 6, sum(AXES)).bfloat16(), rope_rotations(positions(6), AXES, THETA)
    rotated = apply_rope(x, pe)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rope(x.float(), pe).bfloat16())


def test_attention_is_a_softmax_average() -> None:
    """Against the written-out formula in float64, with a mask."""
    q, k, v = (randn(2, 2, 5, sum(AXES), seed=i) for i in range(3))
    pe = rope_rotations(positions(5), AXES, THETA)
    mask = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    scores = (apply_rope(q, pe).double() @ apply_rope(k, pe).double().mT) / math.sqrt(sum(AXES))
    weights = scores.masked_fill(~mask[:, None, None, :], -math.inf).softmax(dim=-1)
    expected = (weights @ v.double()).transpose(1, 2).flatten(2)
    actual = attention(q, k, v, pe, mask[:, None, None, :])
    assert_close(actual.double(), expected, rtol=0, atol=1e-6)


@given(st.floats(0, 1), st.sampled_from([2, 8, 256]))
def test_timestep_embedding_closed_form(t: float, dim: int) -> None:
    """Cosines first, then sines, of 1000 t / 10000^(k / half)."""
    angles = [1000 * t * 10_000 ** (-k / (dim // 2)) for k in range(dim // 2)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    actual = timestep_embedding(torch.tensor([t]), dim)
    assert_close(actual, torch.tensor([expected]), rtol=0, atol=2e-4)  # float32 holds an angle of 1000 to 6e-5


def test_timestep_embedding_arguments() -> None:
    """`max_period` and `time_factor` reach the formula; the dtype of t is kept."""
    t = torch.tensor([0.5, 0.25], dtype=torch.bfloat16)
    actual = timestep_embedding(t, 4, max_period=100.0, time_factor=2.0)
    expected = [[math.cos(1), math.cos(0.1), math.sin(1), math.sin(0.1)]]
    expected += [[math.cos(0.5), math.cos(0.05), math.sin(0.5), math.sin(0.05)]]
    assert_close(actual, torch.tensor(expected).bfloat16(), rtol=0, atol=4e-3)


def test_rms_norm_closed_form() -> None:
    """x / sqrt(mean x^2 + eps) * scale, and eps inside the root."""
    norm = randomise(RMSNorm(6))
    x = randn(3, 6) * 1e-3  # small enough for eps to matter
    expected = x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.scale
    assert_close(norm(x), expected, rtol=1e-6, atol=0)


def test_rms_norm_statistic_is_float32() -> None:
    """The square of 1000 overflows float16."""
    norm = RMSNorm(8).half()
    assert_close(norm(torch.full((1, 8), 1000.0, dtype=torch.float16)), torch.ones(1, 8, dtype=torch.float16))


def test_qk_norm() -> None:
    """Queries and keys have their own scales; values stay as they are."""
    norm, qkv = randomise(QKNorm(8)), randn(2, 3, 48, seed=1)
    q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in qkv.split(16, dim=-1))
    found = heads(qkv, 2, norm)
    assert [x.shape for x in found] == [(2, 2, 3, 8)] * 3
    for actual, expected in zip(found, (norm.query_norm(q), norm.key_norm(k), v), strict=True):
        assert_close(actual, expected)
    assert not torch.equal(norm.query_norm(k), norm.key_norm(k))


@pytest.mark.parametrize(("double", "parts"), [(False, 1), (True, 2)])
def test_modulation_order(double: bool, parts: int) -> None:
    """The linear's rows are shift, scale, gate - once, or for attention and then for the MLP."""
    modulation = Modulation(2, double)
    with torch.no_grad():
        modulation.lin.weight.zero_()
        modulation.lin.bias.copy_(torch.arange(6.0 * parts))
    shifts = modulation(randn(3, 2))
    assert len(shifts) == parts
    for i, part in enumerate(shifts):
        values = [part.shift, part.scale, part.gate]
        for j, value in enumerate(values):
            start = 6.0 * i + 2 * j
            assert_close(value, torch.tensor([start, start + 1]).expand(3, 1, 2))


@pytest.mark.parametrize("pictures", [1, 3])
def test_shifted_norm_closed_form(pictures: int) -> None:
    """(1 + scale) * (x - mean) / sqrt(variance + eps) + shift, of one picture and of several."""
    x, shift, scale, gate = randn(pictures, 4, 6), *(randn(pictures, 1, 6, seed=i) for i in range(1, 4))
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert_close(ShiftedNorm(6)(x, Affine(shift, scale)), (1 + scale) * normed + shift)
    assert_close(Shift(shift, scale, gate).added(x, normed), x + gate * normed)


@pytest.mark.parametrize("kind", [TanhGELU, SwiGLU])
def test_activations_are_the_same_in_place(kind: type[nn.Module]) -> None:
    """With gradients their input is left alone; without, it is the memory of the result, to the same bits."""
    given = randn(2, 3, 8)
    trained, x = given.clone().requires_grad_(), given.clone()
    expected, found = kind()(trained), kind()(x)
    assert torch.equal(trained, given) and torch.equal(found, expected)
    assert found.data_ptr() == x.data_ptr()
    expected.sum().backward()
    assert trained.grad is not None and trained.grad.abs().min() > 0
    reference = F.gelu(given, approximate="tanh") if kind is TanhGELU else F.silu(given[..., :4]) * given[..., 4:]
    assert_close(found, reference)


def test_modulation_applies_silu() -> None:
    """The conditioning vector passes a SiLU before the linear."""
    modulation, vec = randomise(Modulation(4, double=False)), randn(2, 4)
    expected = (vec / (1 + (-vec).exp())) @ modulation.lin.weight.T + modulation.lin.bias
    (part,) = modulation(vec)
    assert_close(torch.cat([part.shift, part.scale, part.gate], dim=-1)[:, 0], expected)
