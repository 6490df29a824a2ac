"""The language model against transformers' Qwen3, Qwen3-VL and Mistral, and published key lists."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from miniflux.errors import ConfigError, InputError
from miniflux.models.causal_lm import CausalLm, CausalLmConfig, KeyValues
from tests.tiny import randomise, shapes

QWEN3 = CausalLmConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=1e6,
    qk_norm=True,
    tie_word_embeddings=True,
)
MISTRAL = replace(QWEN3, rms_norm_eps=1e-5, rope_theta=1e9, qk_norm=False, tie_word_embeddings=False)
KINDS = {
    "Qwen3": QWEN3,
    "Qwen3, untied": replace(QWEN3, tie_word_embeddings=False),
    "Qwen3-VL": replace(QWEN3, rope_theta=5e6),
    "Mistral": MISTRAL,
}


def theirs(kind: str, config: CausalLmConfig) -> Any:
    transformers = pytest.importorskip("transformers")
    about: dict[str, Any] = {
        name: getattr(config, name)
        for name in CausalLmConfig.__dataclass_fields__
        if name not in ("qk_norm", "rope_theta")
    }
    about["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if kind == "Qwen3-VL":
        about["rope_parameters"] |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
        text = transformers.models.qwen3_vl.Qwen3VLTextConfig(**about)
        return transformers.models.qwen3_vl.Qwen3VLTextModel(text).eval()
    name = kind.partition(",")[0]
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**about)).eval()


def pair(kind: str) -> tuple[Any, CausalLm]:
    peer, model = randomise(theirs(kind, KINDS[kind])), CausalLm(KINDS[kind])
    weights = peer.state_dict()
    if kind == "Qwen3-VL":
        weights = {f"model.{name}": x for name, x in weights.items()}
    if KINDS[kind].tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    model.load_state_dict(weights)
    return peer, model


def words(batch: int = 3, tokens: int = 9) -> torch.Tensor:
    return torch.randint(0, 50, (batch, tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("padded", ["none", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_hidden_states_equal_transformers(kind: str, padded: str) -> None:
    """After every layer, of padding too: FLUX looks at it."""
    peer, model = pair(kind)
    mask = torch.ones(3, 9, dtype=torch.long)
    for row, pads in enumerate((0, 2, 5)):
        if padded != "none" and pads:
            mask[row, slice(0, pads) if padded == "left" else slice(9 - pads, 9)] = 0
    told = {"attention_mask": None if padded == "none" else mask, "output_hidden_states": True}
    expected = peer(input_ids=words(), **told).hidden_states
    found = model(words(), told["attention_mask"], layers=range(5))
    assert len(expected) == len(found) == 5
    for ours, other in zip(found, expected, strict=True):
        assert_close(ours, other, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_positions_of_ones_own_equal_transformers() -> None:
    """As FLUX.3 gives them: 1 on padding."""
    peer, model = pair("Qwen3")
    positions = torch.arange(9).repeat(3, 1)
    positions[:, 6:] = 1
    expected = peer.model(input_ids=words(), position_ids=positions).last_hidden_state
    assert_close(model(words(), position_ids=positions)[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen3, untied", "Mistral"])
@torch.inference_mode()
def test_logits_and_greedy_words_equal_transformers(kind: str) -> None:
    peer, model = pair(kind)
    ids = words(1)
    assert_close(model.logits(model(ids)[0]), peer(input_ids=ids).logits, rtol=0, atol=2e-5)
    expected = peer.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    cache, new = KeyValues(), ids
    for _ in range(6):
        (hidden,) = model(new, cache=cache)
        new = model.logits(hidden[:, -1:]).argmax(-1)
        ids = torch.cat((ids, new), dim=1)
    assert torch.equal(ids, expected) and cache.length == 14


@torch.inference_mode()
def test_what_was_read_is_not_read_again() -> None:
    """In pieces, with padding on the left, as in one."""
    model, mask = randomise(CausalLm(MISTRAL)), torch.ones(3, 9, dtype=torch.bool)
    mask[1, :3] = False
    whole, cache = model(words(), mask)[0], KeyValues()
    parts = [model(words()[:, a:b], mask[:, :b], cache=cache)[0] for a, b in ((0, 4), (4, 5), (5, 9))]
    assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_layers_after_the_last_one_are_not_computed() -> None:
    model = randomise(CausalLm(QWEN3))
    expected = model(words(), layers=(1, 2))
    model.model.layers[2:].to("meta")
    model.model.norm.to("meta")
    found = model(words(), layers=(2, 1))
    assert torch.equal(found[0], expected[1]) and torch.equal(found[1], expected[0])
    for wrong in ((), (5,), (-1,)):
        with pytest.raises(InputError, match="numbers from 0 to 4"):
            model(words(), layers=wrong)


@pytest.mark.parametrize(
    ("name", "published_name", "qk_norm"),
    [
        ("te-qwen3-4b", "qwen3-4b", True),
        ("te-qwen3-8b", "qwen3-8b", True),
        ("te-mistral-small-24b-language-model", "mistral-small-3.2-24b-language-model", False),
    ],
)
def test_keys_are_those_of_the_published_file(
    published: Any, manifest: Any, name: str, published_name: str, qk_norm: bool
) -> None:
    about = published["text_encoders"][published_name]
    sizes = {field: about[field] for field in CausalLmConfig.__dataclass_fields__ if field in about}
    with torch.device("meta"):
        model = CausalLm(CausalLmConfig(**{**sizes, "qk_norm": qk_norm}))
    assert shapes(model) == manifest(name)


@pytest.mark.parametrize("wrong", [{"num_key_value_heads": 3}, {"head_dim": 15}])
def test_sizes_that_do_not_go_together_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(QWEN3, **wrong)
