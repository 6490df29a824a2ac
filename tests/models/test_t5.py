"""The T5 encoder: published keys, distance buckets, masks, and half precision without overflow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from miniflux.models.t5 import T5Config, T5Encoder, relative_buckets
from tests.tiny import T5, randomise, shapes

IDS = torch.tensor([[5, 9, 33, 1, 0, 0], [7, 2, 8, 21, 3, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
OVERFLOW = torch.finfo(torch.float16).max


@pytest.fixture(scope="module")
def model() -> T5Encoder:
    return randomise(T5Encoder(T5))


def test_keys_are_those_of_the_published_files(published, manifest) -> None:
    """A renamed attribute or a wrong width would make the `text_encoder_2` files unloadable."""
    fields = set(T5Config.__dataclass_fields__)
    params = {k: v for k, v in published["text_encoders"]["t5-v1_1-xxl-encoder"].items() if k in fields}
    with torch.device("meta"):
        model = T5Encoder(T5Config(**params))
    assert shapes(model) == manifest("te-t5-xxl")


def test_buckets_near_and_far() -> None:
    """Exact up to 8 behind and ahead, then coarser; beyond the maximum distance all share the last bucket."""
    buckets = relative_buckets(300, 32, 128)
    behind, ahead = buckets[:, 0], buckets[0]  # key 0 seen from query d; key d seen from query 0
    assert behind[:8].tolist() == list(range(8))
    assert ahead[1:8].tolist() == list(range(17, 24))
    assert behind.diff().min() >= 0
    assert ahead[1:].diff().min() >= 0
    assert (behind[128:] == 15).all()
    assert (ahead[128:] == 31).all()
    assert behind[64] < 15
    # the logarithmic half: 8 + floor(8 * log(d / 8) / log(16)); 16 and 32 are a quarter and half of the way
    assert [int(behind[d]) for d in (8, 11, 12, 15, 17, 33)] == [8, 8, 9, 9, 10, 12]


def test_buckets_depend_on_the_distance_only() -> None:
    """Every diagonal holds one bucket."""
    buckets = relative_buckets(40, 8, 20)
    for offset in range(-39, 40):
        assert len(buckets.diagonal(offset).unique()) == 1


@torch.inference_mode()
def test_mask_equals_trimming(model: T5Encoder) -> None:
    """Masked padding is as good as absent, whatever ids it holds; without a mask it counts, as released."""
    masked = model(IDS, MASK)
    assert_close(masked[:1, :4], model(IDS[:1, :4]), rtol=0, atol=1e-5)
    nonsense = IDS.masked_fill(MASK == 0, 17)
    assert_close(model(nonsense, MASK)[:, :4], masked[:, :4], rtol=0, atol=1e-5)
    assert_close(model(IDS, MASK.bool()), masked, rtol=0, atol=0)
    assert (model(IDS)[0, :4] - masked[0, :4]).abs().max() > 1e-3


@torch.inference_mode()
def test_prompt_of_a_batch_equals_it_alone(model: T5Encoder) -> None:
    """Nothing leaks from one prompt into another."""
    together = model(IDS, MASK)
    for i in range(2):
        assert_close(together[i : i + 1], model(IDS[i : i + 1], MASK[i : i + 1]), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_order_of_tokens_matters_through_the_bias_only() -> None:
    """With the position bias zeroed the encoder cannot tell orders apart; with it, it can."""
    model = randomise(T5Encoder(T5))
    flipped = model(IDS.flip(1)).flip(1)
    assert (flipped - model(IDS)).abs().max() > 1e-3
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    assert_close(model(IDS.flip(1)).flip(1), model(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("mask", [None, MASK])
@torch.inference_mode()
def test_half_precision_survives_a_residual_beyond_float16(dtype: torch.dtype, tolerance: float, mask) -> None:
    """The published weights drive the residual past 65504: it must neither overflow nor drown the small parts."""
    half = randomise(T5Encoder(replace(T5, num_layers=4)))
    for block in half.encoder.block[:2]:
        block.layer[1].DenseReluDense.wo.weight *= 2e5 / 5
    half = half.to(dtype)
    exact = T5Encoder(half.config)
    exact.load_state_dict(half.state_dict())  # the rounded weights, computed in float32

    residual: list[Tensor] = []
    for block in half.encoder.block:
        block.register_forward_hook(lambda _module, args, out: residual.extend([args[0], out]))
    output, expected = half(IDS, mask), exact(IDS, mask)
    assert residual[-1].abs().max() > OVERFLOW
    assert {x.dtype for x in residual} == {torch.float32}
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert (output.float() - expected).abs().max() < tolerance * expected.abs().max()
