"""ClipTextEncoder against CLIPTextModel of transformers: the same random weights, the same hidden states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.parity.peers import clip_pair
from tests.tiny import CLIP

VARIANTS = {
    "quick_gelu": CLIP,
    "gelu": replace(CLIP, hidden_act="gelu"),
    "legacy end token": replace(CLIP, eos_token_id=2),
    "another end token": replace(CLIP, eos_token_id=30),
    "deep": replace(CLIP, hidden_size=16, num_attention_heads=1, num_hidden_layers=4, intermediate_size=24),
    "wide": replace(CLIP, hidden_size=40, num_attention_heads=5, num_hidden_layers=1, layer_norm_eps=1e-2),
}
# start 48, end 49; the second prompt holds the ids 2 and 30 before the end, the third has no padding
IDS = torch.tensor(
    [
        [48, 5, 17, 49, 49, 49, 49, 49],
        [48, 2, 9, 30, 2, 49, 30, 49],
        [48, 1, 3, 30, 7, 11, 13, 49],
    ]
)


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_hidden_and_pooled(name: str) -> None:
    """Activation, epsilon, causal mask, and the position that is pooled."""
    reference, model = clip_pair(VARIANTS[name])
    expected = reference(input_ids=IDS)
    hidden, pooled = model(IDS)
    assert_close(hidden, expected.last_hidden_state, rtol=0, atol=2e-5)
    assert_close(pooled, expected.pooler_output, rtol=0, atol=2e-5)
