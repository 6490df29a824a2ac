"""Prompts to embeddings: padding as asked for, warnings that are true, and a cache that saves work and nothing else."""

from __future__ import annotations

import logging
import threading
import warnings

import pytest
import torch
from torch.testing import assert_close

from miniflux.errors import InputError
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.t5 import T5Encoder
from miniflux.text import Text, TextTokenizer
from tests.tiny import CLIP, T5, randomise


def letters(prompt: str) -> list[int]:
    """A tokenizer that needs no file: one id per letter."""
    return [3 + ord(c) % 30 for c in prompt]


@pytest.fixture
def text() -> Text:
    clip, t5 = randomise(ClipTextEncoder(CLIP)), randomise(T5Encoder(T5), seed=1)
    return Text(
        clip, t5, TextTokenizer(letters, (48,), 49, 49), TextTokenizer(letters, (), 1, 0), length=10, cache_size=3
    )


def test_released_padding_is_t5_on_the_padded_ids_without_a_mask(text: Text) -> None:
    """The default must be what FLUX.1 was trained on."""
    found = text.encode(["ab", "abcdef"])
    with torch.inference_mode():
        assert_close(found.txt, text.t5(text.t5_tokenizer(["ab", "abcdef"], 10)), atol=2e-5, rtol=0)
        assert_close(found.vec, text.clip(text.clip_tokenizer(["ab", "abcdef"], 12))[1], atol=2e-5, rtol=0)
    assert found.mask is None


def test_masked_hides_padding_and_trimmed_cuts_it(text: Text) -> None:
    """Masked tokens equal those of the prompt without any padding; trimmed is the same, shorter."""
    masked, trimmed = text.encode(["ab", "abcdef"], padding="masked"), text.encode(["ab", "abcdef"], padding="trimmed")
    assert masked.mask is not None and masked.mask.sum(dim=1).tolist() == [3, 7] and masked.txt.shape[1] == 10
    assert trimmed.mask is not None and trimmed.txt.shape[1] == 7
    with torch.inference_mode():
        alone = text.t5(text.t5_tokenizer("ab", 3))
    assert_close(masked.txt[:1, :3], alone, atol=2e-5, rtol=0)
    assert_close(trimmed.txt[:1, :3], alone, atol=2e-5, rtol=0)


def test_a_prompt_is_encoded_once(text: Text) -> None:
    """Another seed or another number of steps must cost no encoding."""
    first = text.encode(["a", "b", "a"])
    again = text.encode(["b"])
    assert text.encoded == 2
    assert torch.equal(first.txt[0], first.txt[2]) and torch.equal(first.txt[1], again.txt[0])


def test_the_key_of_the_cache_holds_all_that_matters(text: Text) -> None:
    text.encode(["a"])
    text.encode(["a"], length=6)
    text.encode(["a"], padding="masked")
    assert text.encoded == 3
    text.encode(["a"], padding="trimmed")  # the same embeddings as masked, cut
    assert text.encoded == 3


def test_the_cache_is_bounded_and_drops_the_oldest(text: Text) -> None:
    text.encode(["a", "b", "c"])
    text.encode(["a"])  # now b is the oldest
    text.encode(["d"])
    assert text.encoded == 4
    text.encode(["a", "c", "d"])
    assert text.encoded == 4
    text.encode(["b"])
    assert text.encoded == 5


def test_more_prompts_than_the_cache_holds(text: Text) -> None:
    assert text.encode(list("abcdefgh")).txt.shape == (8, 10, T5.d_model)


def test_clear_forgets(text: Text) -> None:
    text.encode(["a"])
    text.clear()
    text.encode(["a"])
    assert text.encoded == 2


def test_threads_share_the_cache(text: Text) -> None:
    """Equal requests at the same time are computed once and get the same numbers."""
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(text.encode(["abc"]).txt)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert text.encoded == 1 and all(torch.equal(found[0], other) for other in found) and len(found) == 6


def test_over_the_t5_length_warns_with_the_count(text: Text) -> None:
    with pytest.warns(UserWarning, match=r"15 T5 tokens, 5 over the limit of 10"):
        text.encode(["a" * 14])


def test_over_the_clip_length_is_said_once_and_is_no_warning(text: Text, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode(["a" * 20], length=40)
        text.encode(["b" * 20], length=40)
    said = [r for r in caplog.records if "CLIP" in r.message]
    assert len(said) == 1 and said[0].levelno == logging.INFO and "first 12" in said[0].message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [3]}, "prompt must be a string, got 3"),
        ({"prompts": ["a"], "length": 0}, "t5_length .* got 0"),
        ({"prompts": ["a"], "length": 2.5}, "t5_length .* got 2.5"),
        ({"prompts": ["a"], "padding": "odd"}, "padding must be one of released, masked, trimmed, got 'odd'"),
    ],
)
def test_bad_input_is_refused(text: Text, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        text.encode(**arguments)  # type: ignore[arg-type]
