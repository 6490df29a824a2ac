"""Mistral's tokenizer file: the ids of a plain loop over byte pairs, special tokens, and files that are damaged."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from miniflux.errors import TokenizerError
from miniflux.text.chat import dev_form, load_chat_tokenizer, load_tokenizer
from miniflux.text.tekken import OLD_SPECIAL, tekken_of
from tests import reference
from tests.tekken import CORPUS, COUNT, SPECIAL, content, trained, words_of


def expected(text: str, ranks: dict[bytes, int]) -> list[int]:
    """The ids of a text without special tokens: the neighbours of the lowest rank become one, until none do."""
    found: list[int] = []
    for word in words_of(text):
        pieces = [word] if word in ranks else [bytes([byte]) for byte in word]
        while pairs := [a + b for a, b in pairwise(pieces) if a + b in ranks]:
            lowest = min(pairs, key=ranks.__getitem__)
            at = next(at for at in range(len(pieces)) if pieces[at] + pieces[at + 1] == lowest)
            pieces[at : at + 2] = [lowest]
        found += [ranks[piece] + COUNT for piece in pieces]
    return found


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    return trained(140)


@pytest.fixture(scope="module")
def file(tokens: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mistral") / "tekken.json"
    path.write_text(json.dumps(content(tokens, beyond=20)))
    return path


PIECES = [
    CORPUS[:30],
    "猫は",
    "안녕",
    "🐈‍⬛",
    "👩‍🚀",
    "\x00\x01\x1f\x7f",
    "\x85\u2028",
    "\r\n\n",
    "  \t ",
    "naïve",
    "É",
    "/\n",
]
texts = st.lists(
    st.sampled_from(PIECES)
    | st.text(st.characters(exclude_categories=["Cs", "Cn"]))
    | st.text("cath etfog \n", max_size=20)
).map("".join)


@given(text=texts)
def test_ids_are_those_of_a_plain_loop(file: Path, tokens: list[bytes], text: str) -> None:
    """And the text comes back."""
    ranks = {token: rank for rank, token in enumerate(tokens[:-20])}
    tokenizer = load_tokenizer(file)
    assume(not any(name in text for name in SPECIAL))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == expected(text, ranks)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


PLAIN = [text for prompt in reference.prompts() if not {"<", "["} & set(text := prompt["text"])]
"""Prompts that spell no special token."""


@pytest.mark.parametrize("text", PLAIN)
def test_ids_of_prompts(file: Path, tokens: list[bytes], text: str) -> None:
    """Unicode, emoji, control characters, in the form of dev's chat: special tokens have numbers of their own."""
    ranks = {token: rank for rank, token in enumerate(tokens[:-20])}
    form = dev_form()
    read = load_chat_tokenizer(file.parent, form)
    bos, system, end, inst, close = (
        SPECIAL.index(name) for name in ("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")
    )
    said = form.before.removeprefix("<s>[SYSTEM_PROMPT]").removesuffix("[/SYSTEM_PROMPT][INST]")
    wanted = [bos, system, *expected(said, ranks), end, inst, *expected(text, ranks), close]
    assert read.tokens(text) == wanted and read.pad == SPECIAL.index("<pad>") == 11


def test_special_tokens(file: Path, tokens: list[bytes], tmp_path: Path) -> None:
    """Those without a name are there; of old files, which name none, the numbers are known; and where a plain token
    spells one, the special one is meant."""
    tokenizer = load_tokenizer(file)
    assert tokenizer.get_vocab_size() == COUNT + len(tokens) - 20
    assert [tokenizer.id_to_token(number) for number in range(COUNT)] == [
        *SPECIAL,
        *(f"<SPECIAL_{n}>" for n in range(21, 30)),
    ]
    assert tokenizer.encode("a<SPECIAL_25>[THINK]").ids == [ord("a") + COUNT, 25, 20]
    old = content([*tokens, b"[INST]"])
    del old["special_tokens"], old["config"]["default_num_special_tokens"], old["config"]["default_vocab_size"]
    read = tekken_of(json.dumps(old).encode(), "old")
    assert read.encode("<s>[INST]a").ids == [1, 3, ord("a") + len(OLD_SPECIAL)]
    assert read.decode([ord("a") + len(OLD_SPECIAL)]) == "a"


def damaged(what: str, about: dict[str, Any]) -> bytes:
    vocab, special, config = about["vocab"], about["special_tokens"], about["config"]
    if what == "rank":
        vocab[300]["rank"] = 299
    elif what == "base64":
        vocab[300]["token_bytes"] = "=a"
    elif what == "again":
        vocab[300]["token_bytes"] = vocab[299]["token_bytes"]
    elif what == "byte":
        vocab[7]["token_bytes"] = base64.b64encode(b"zzzz").decode()
    elif what == "long":
        vocab[300]["token_bytes"] = base64.b64encode(b"z" * 1000).decode()
    elif what == "empty":
        vocab[300]["token_bytes"] = ""
    elif what == "number":
        vocab[300]["token_bytes"] = 3
    elif what == "short":
        del vocab[300:]
    elif what == "no vocabulary":
        del about["vocab"]
    elif what == "no entry":
        vocab[300] = None
    elif what == "pattern":
        config["pattern"] = "(("
    elif what == "no pattern":
        config["pattern"] = None
    elif what == "size":
        config["default_vocab_size"] = "many"
    elif what == "many special":
        config["default_num_special_tokens"] = 10**9
    elif what == "special twice":
        special[3]["token_str"] = special[4]["token_str"]
    elif what == "special numbers":
        special[3]["rank"] = 77
    elif what == "special unnamed":
        special[3]["token_str"] = None
    elif what == "list":
        return b"[]"
    elif what == "cut":
        return json.dumps(about).encode()[:-100]
    elif what == "bytes":
        return b"\xff" * 10
    elif what == "deep":
        return b"[" * 100_000
    return json.dumps(about).encode()


DAMAGES = (
    "rank, base64, again, byte, long, empty, number, short, no vocabulary, no entry, pattern, no pattern, size, "
    "many special, special twice, special numbers, special unnamed, list, cut, bytes, deep"
).split(", ")


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_files_are_refused_by_name(tokens: list[bytes], tmp_path: Path, what: str) -> None:
    path = tmp_path / "tekken.json"
    path.write_bytes(damaged(what, content(tokens)))
    with pytest.raises(TokenizerError, match=r"tekken\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"expected tokenizer\.json, tekken\.json, or vocab\.json"):
        load_tokenizer(tmp_path)
