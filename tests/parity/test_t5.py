"""T5Encoder against T5EncoderModel of transformers: the same random weights, the same hidden states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from miniflux.models.t5 import relative_buckets
from tests.parity.peers import t5_pair, transformers
from tests.tiny import T5

VARIANTS = {
    "tiny": T5,
    "heads wider than the model": replace(T5, d_kv=16, num_heads=4),
    "one layer": replace(T5, num_layers=1, d_kv=8, num_heads=1, layer_norm_epsilon=1e-2),
    "few buckets": replace(T5, relative_attention_num_buckets=8, relative_attention_max_distance=10),
    "many buckets": replace(T5, relative_attention_num_buckets=64, relative_attention_max_distance=40),
}
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(2, T5.vocab_size, (2, 30), generator=GENERATOR)
MASK = (torch.arange(30)[None] < torch.tensor([[30], [11]])).long()


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_hidden(name: str, mask: torch.Tensor | None) -> None:
    """The tanh GELU, unscaled scores, shared position bias, and the mask."""
    reference, model = t5_pair(VARIANTS[name])
    expected = reference(input_ids=IDS, attention_mask=mask).last_hidden_state
    assert_close(model(IDS, mask), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 10), (64, 40), (16, 200), (32, 17)])
def test_buckets(buckets: int, distance: int) -> None:
    """Every distance up to the longest prompt falls into the same bucket."""
    reach = torch.arange(512)
    attention = transformers.models.t5.modeling_t5.T5Attention
    expected = attention._relative_position_bucket(
        reach[None, :] - reach[:, None], bidirectional=True, num_buckets=buckets, max_distance=distance
    )
    assert torch.equal(relative_buckets(512, buckets, distance), expected)
