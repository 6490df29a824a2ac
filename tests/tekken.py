"""A small `tekken.json`, as Mistral's models have it: byte pairs trained in a few lines."""

from __future__ import annotations

import base64
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from miniflux.text.tekken import OLD_SPECIAL

# Of Mistral-Small's file. In the other one below, spaces are those of Unicode, as Rust has them: Python counts some
# control characters among them.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UNICODE = (
    PATTERN.replace(r"[^\s", r"[^\p{White_Space}").replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
)
SPECIAL = [*OLD_SPECIAL, "[THINK]"]
COUNT = 30  # special tokens, the last of which have no names of their own
CORPUS = (
    "the cat sat on the mat, and then the other cats sat there too; a photo of a cat in the thick fog at night\n\n"
    "猫が好きです。猫は可愛い。 你好你好 안녕하세요 안녕 "
    "Привет, привет! naïve café 🦊🦊 🐈‍⬛ 👩‍🚀 1024x1024  \t  [IMG] x"
) * 3


def words_of(text: str) -> list[bytes]:
    regex = pytest.importorskip("regex")
    return [word.encode() for word in regex.findall(UNICODE, text)]


def trained(merges: int) -> list[bytes]:
    """All bytes, then the commonest pairs of a text, one after the other: a plain training of byte pairs."""
    words = [[bytes([byte]) for byte in word] for word in words_of(CORPUS)]
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(merges):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        (a, b), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        tokens.append(a + b)
        words = [joined(word, a + b) for word in words]
    return tokens


def joined(word: list[bytes], token: bytes) -> list[bytes]:
    """Neighbours that are this token together become one, from the left."""
    made: list[bytes] = []
    for piece in word:
        if made and made[-1] + piece == token:
            made[-1] = token
        else:
            made.append(piece)
    return made


def content(tokens: list[bytes], beyond: int = 0, **config: Any) -> dict[str, Any]:
    """A file of these tokens, of which the model does not know the last `beyond`."""
    return {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": COUNT + len(tokens) - beyond,
            "default_num_special_tokens": COUNT,
            "version": "v7",
            **config,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(tokens)
        ],
        "special_tokens": [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(SPECIAL)],
    }
