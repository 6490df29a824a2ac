"""CLIP's text tower: published keys, causality, and which position is pooled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from miniflux.errors import ConfigError, InputError
from miniflux.models.clip import ClipTextConfig, ClipTextEncoder, quick_gelu
from tests.tiny import CLIP, randn, randomise, shapes

END = CLIP.eos_token_id


@pytest.fixture(scope="module")
def model() -> ClipTextEncoder:
    return randomise(ClipTextEncoder(CLIP))


def test_keys_are_those_of_the_published_file(published, manifest) -> None:
    """A renamed attribute or a wrong width would make `model.safetensors` unloadable."""
    fields = set(ClipTextConfig.__dataclass_fields__)
    params = {k: v for k, v in published["text_encoders"]["clip-l"].items() if k in fields}
    with torch.device("meta"):
        model = ClipTextEncoder(ClipTextConfig(**params))
    assert shapes(model) == manifest("te-clip-l")


def test_quick_gelu_closed_form() -> None:
    """x * sigmoid(1.702 x), written out."""
    x = randn(100, seed=1) * 3
    assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))


@torch.inference_mode()
def test_attention_is_causal(model: ClipTextEncoder) -> None:
    """A later token changes nothing before it, and something from it on."""
    ids = torch.tensor([[1, 2, 3, 4, 5, END]])
    other = torch.tensor([[1, 2, 3, 9, 5, END]])
    hidden, changed = model(ids)[0], model(other)[0]
    assert_close(changed[:, :3], hidden[:, :3], rtol=0, atol=1e-6)
    assert (changed[:, 3:] - hidden[:, 3:]).abs().amax(dim=-1).min() > 1e-3


@torch.inference_mode()
def test_pooled_is_the_first_end_token(model: ClipTextEncoder) -> None:
    """Padding repeats the end token; taking the last one would make the vector depend on the padding."""
    hidden, pooled = model(torch.tensor([[1, 5, END, END, END], [1, 5, 6, 7, END]]))
    assert torch.equal(pooled[0], hidden[0, 2])
    assert torch.equal(pooled[1], hidden[1, 4])
    _, short = model(torch.tensor([[1, 5, END]]))
    assert_close(pooled[:1], short, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_legacy_end_token_is_the_largest_id() -> None:
    """`eos_token_id` 2 of old config files means the largest id, not the token 2."""
    model = randomise(ClipTextEncoder(replace(CLIP, eos_token_id=2)))
    hidden, pooled = model(torch.tensor([[1, 2, 49, 49], [2, 40, 30, 7]]))
    assert torch.equal(pooled[0], hidden[0, 2])
    assert torch.equal(pooled[1], hidden[1, 1])


@torch.inference_mode()
def test_prompt_of_a_batch_equals_it_alone(model: ClipTextEncoder) -> None:
    """Nothing leaks from one prompt into another."""
    ids = torch.tensor([[1, 5, END, END], [1, 8, 9, END]])
    hidden, pooled = model(ids)
    for i in range(2):
        alone, alone_pooled = model(ids[i : i + 1])
        assert_close(hidden[i : i + 1], alone, rtol=0, atol=1e-6)
        assert_close(pooled[i : i + 1], alone_pooled, rtol=0, atol=1e-6)


def test_too_many_tokens(model: ClipTextEncoder) -> None:
    """There are only so many learned positions; the message says how many."""
    assert model(torch.ones(1, 12, dtype=torch.long))[0].shape == (1, 12, 24)
    with pytest.raises(InputError, match=r"13 tokens.*12"):
        model(torch.ones(1, 13, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size 24 is not a multiple of num_attention_heads 5"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not one of.*gelu.*quick_gelu"),
    ],
)
def test_config_refuses_contradictions(change: dict, message: str) -> None:
    """The message names the value and what was expected."""
    with pytest.raises(ConfigError, match=message):
        replace(CLIP, **change)
