"""`tekken.json`, the tokenizer of Mistral's models: byte pairs as ranks, special tokens before them.

A token of rank r is what its two halves become when no pair of lower rank is left. `tokenizers` wants pairs instead of
ranks, so each token is given every pair of tokens that makes it, as transformers does for `tokenizer.json`.
Sources: `tekken.py` of mistral-common (what the file holds), `integrations/mistral` of transformers.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from miniflux.errors import CheckpointError, TokenizerError
from miniflux.strictjson import json_of, open_regular, shown
from miniflux.text.tokenizers import byte_words

TEKKEN = "tekken.json"
MAX_BYTES, MAX_MARKS = 40_000_000, 2_000_000  # Mistral-Small's has 19 MB, and four marks for each of 150,000 tokens
MAX_TOKEN = 512  # bytes of one token
MAX_SPECIAL = 10_000  # special tokens; Mistral's have 1,000
# Of files that do not name them, in the order of their numbers (`Tekkenizer.DEPRECATED_SPECIAL_TOKENS`).
OLD_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def from_tekken(path: Path) -> Tokenizer:
    """A tokenizer as `tekken.json` describes it. Special tokens are recognised in texts, as by transformers;
    mistral-common itself takes them for plain text.

    Raises:
        TokenizerError: the file cannot be read, or is damaged.
    """
    try:
        with open_regular(path) as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, CheckpointError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error
    return tekken_of(text, str(path))


def tekken_of(text: bytes, what: str) -> Tokenizer:
    """The same of a file's content; `what` is its name in messages."""
    try:
        content = json_of(text, what, MAX_BYTES, MAX_MARKS)
        special, ranks, pattern = _special(content), _ranks(content), content["config"]["pattern"]
        if not isinstance(pattern, str):
            raise ValueError(f"its pattern is {shown(pattern)}")
        return _tokenizer(special, ranks, pattern)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise TokenizerError(f"{what}: not a tekken.json: {type(error).__name__}: {error}") from error
    except Exception as error:  # the library raises bare Exception for a pattern that is none
        said = str(error) if str(error).startswith(what) else f"{what}: {error}"
        raise TokenizerError(said) from error


def _special(content: Mapping[str, Any]) -> list[str]:
    """The special tokens in the order of their numbers, which begin at 0."""
    entries = content.get("special_tokens")
    if entries is None:
        named = list(OLD_SPECIAL)
    else:
        named = [entry["token_str"] for entry in sorted(entries, key=lambda entry: entry["rank"])]
        if sorted(entry["rank"] for entry in entries) != list(range(len(named))):
            raise ValueError("the numbers of its special tokens do not count from 0")
    for name in named:
        if not isinstance(name, str) or not name:
            raise ValueError(f"a special token is {shown(name)}")
    count = _number(content, "default_num_special_tokens", len(named))
    if not len(named) <= count <= MAX_SPECIAL:
        raise ValueError(f"it has {len(named)} special tokens and claims {count}; at most {MAX_SPECIAL} are read")
    named += [f"<SPECIAL_{number}>" for number in range(len(named), count)]
    if len(set(named)) < count:
        raise ValueError("a special token is there twice")
    return named


def _ranks(content: Mapping[str, Any]) -> dict[bytes, int]:
    """The tokens, those that the model knows: files hold more of them, for larger models."""
    entries = content["vocab"]
    count = _number(content, "default_num_special_tokens", len(content.get("special_tokens") or OLD_SPECIAL))
    wanted = _number(content, "default_vocab_size", len(entries) + count) - count
    if not 0 < wanted <= len(entries):
        raise ValueError(f"it has {len(entries)} tokens, and {wanted} are wanted")
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(entries[:wanted]):
        if entry["rank"] != rank:
            raise ValueError(f"token {rank} of its vocabulary has the rank {shown(entry['rank'])}")
        try:
            token = base64.b64decode(entry["token_bytes"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"token {rank} is no base64: {shown(entry['token_bytes'])}") from error
        if not 0 < len(token) <= MAX_TOKEN:
            raise ValueError(f"token {rank} has {len(token)} bytes; expected 1 to {MAX_TOKEN}")
        if token in ranks:
            raise ValueError(f"token {rank} is token {ranks[token]} again")
        ranks[token] = rank
    absent = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if absent is not None:
        raise ValueError(f"no token is the byte {absent}")
    return ranks


def _number(content: Mapping[str, Any], name: str, default: int) -> int:
    number = content["config"].get(name)
    number = default if number is None else number
    if type(number) is not int:
        raise ValueError(f"its {name} is {shown(number)}")
    return number


def _tokenizer(special: list[str], ranks: Mapping[bytes, int], pattern: str) -> Tokenizer:
    letters = _letters()
    spelled = {token: token.decode("latin-1").translate(letters) for token in ranks}
    vocabulary = {spelled[token]: rank + len(special) for token, rank in ranks.items()}
    # A token that spells a special one is never met: texts are cut at special tokens first.
    vocabulary |= {token: number for number, token in enumerate(special)}
    pairs: list[tuple[str, str]] = []
    for token in ranks:  # in the order of ranks
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        made = [(ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks]
        pairs += [(spelled[a], spelled[b]) for _, _, a, b in sorted(made)]
    tokenizer = byte_words(Tokenizer(BPE(vocabulary, pairs, ignore_merges=True)), pattern)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _letters() -> dict[int, int]:
    """The visible character that stands for each byte in byte pairs (`bytes_to_unicode` of GPT-2): itself where it is
    one, else the next from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: byte for byte in shown} | {byte: 256 + number for number, byte in enumerate(hidden)}
