"""Tokenizer folders that transformers opens: what releases keep there, made of what there is.

FLUX.1's repositories hold several files that say the same; `miniflux fetch` takes one of each, and that is enough for
our own tokenizers. transformers wants `tokenizer.json` of T5 (it reads `spiece.model` only with further packages), and
of both the length and the special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from miniflux.checkpoints.folders import entries
from miniflux.checkpoints.opened import tekken_in
from miniflux.errors import CheckpointError
from miniflux.strictjson import json_file
from miniflux.text.chat import ChatForm
from miniflux.text.special import CLIP_END, CLIP_START, T5_END, T5_PAD, T5_UNKNOWN
from miniflux.text.tekken import TEKKEN, from_tekken, tekken_of

Content = Path | str | dict[str, Any]
"""A file to be copied, a text, or what becomes JSON."""

CLIP_LENGTH, T5_LENGTH, MOST = 77, 512, 131_072  # tokens; the last of a language model
TEMPLATE = "chat_template.jinja"
EXTRA_IDS = 100  # `<extra_id_99>` ... `<extra_id_0>`, behind the pieces of T5's model
CLIP_TOKENS = {"bos_token": CLIP_START, "eos_token": CLIP_END, "pad_token": CLIP_END, "unk_token": CLIP_END}
T5_TOKENS = {"eos_token": T5_END, "pad_token": T5_PAD, "unk_token": T5_UNKNOWN}


def tokenizer_files(folder: Path, part: str) -> dict[str, Content]:
    """The files of a tokenizer's folder, and those that transformers needs beside them.

    Args:
        part: `clip_tokenizer` or `t5_tokenizer`.

    Raises:
        CheckpointError: a file cannot be read.
    """
    made: dict[str, Content] = {path.name: path for path in entries(folder) if path.is_file()}
    if part == "clip_tokenizer":
        if not {"vocab.json", "merges.txt"} <= set(made):
            made |= _clip_tables(folder / "tokenizer.json")
        missing = _about("CLIPTokenizer", CLIP_LENGTH, CLIP_TOKENS)
    else:
        if "tokenizer.json" not in made:
            made["tokenizer.json"] = t5_tokenizer(folder / "spiece.model")
        missing = _about("T5Tokenizer", T5_LENGTH, T5_TOKENS)
    return {**missing, **made}


def chat_tokenizer_files(path: Path, form: ChatForm) -> dict[str, Content]:
    """The files of a language model's tokenizer: those that are there, `tokenizer.json` of Mistral's `tekken.json`, and
    what transformers wants beside it: special tokens, the side of padding, and how prompts become chats.

    Args:
        path: their folder, or the language model's file that has its tokenizer in it.

    Raises:
        CheckpointError, TokenizerError: a file cannot be read.
    """
    made: dict[str, Content] = {}
    if path.is_dir():
        made = {file.name: file for file in entries(path) if file.is_file()}
    if "tokenizer.json" not in made and not {"vocab.json", "merges.txt"} <= set(made):
        tekken = from_tekken(path / TEKKEN) if path.is_dir() else tekken_of(tekken_in(path), str(path))
        made["tokenizer.json"] = tekken.to_str(pretty=True)
    if "tokenizer_config.json" not in made:
        kind = "PreTrainedTokenizerFast"
        about = {"tokenizer_class": kind, "pad_token": form.pad, "padding_side": form.side, "model_max_length": MOST}
        made["tokenizer_config.json"] = about
    told = made["tokenizer_config.json"]
    if isinstance(told, Path) and "chat_template" not in json_file(told) and TEMPLATE not in made:
        made[TEMPLATE] = chat_template(form)
    elif not isinstance(told, Path):
        made.setdefault(TEMPLATE, chat_template(form))
    return made


def chat_template(form: ChatForm) -> str:
    """The form in the words of transformers' templates, for a message of the user behind one of the system, or alone.
    Texts are strings, or lists of parts of a message."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    prompt = "{{ m.content if m.content is string else m.content | map(attribute='text') | join('') }}"
    before, after = form.before, form.after
    marks = [mark for mark in ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]") if mark in before]
    if not marks:
        return (
            "{% for m in messages %}{{ " + quoted(before) + " }}" + prompt + "{{ " + quoted(after) + " }}{% endfor %}"
        )
    begin, _ = before.split(marks[0])
    _, user = before.split(marks[1])
    return (
        "{{ " + quoted(begin) + " }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ " + quoted(marks[0]) + " }}" + prompt + "{{ " + quoted(marks[1]) + " }}"
        "{% else %}{{ " + quoted(user) + " }}" + prompt + "{{ " + quoted(after) + " }}{% endif %}{% endfor %}"
    )


def _about(kind: str, length: int, tokens: dict[str, str]) -> dict[str, Content]:
    config = {"tokenizer_class": kind, "model_max_length": length, "clean_up_tokenization_spaces": True, **tokens}
    return {"tokenizer_config.json": config, "special_tokens_map.json": dict(tokens)}


def _clip_tables(path: Path) -> dict[str, Content]:
    """`vocab.json` and `merges.txt` out of `tokenizer.json`."""
    content = json_file(path)
    try:
        model = content["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return {"vocab.json": dict(model["vocab"]), "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n"}
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no table of byte pairs, as CLIP's tokenizer has") from error


def t5_tokenizer(path: Path) -> str:
    """`tokenizer.json` that gives the ids of a SentencePiece model.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        model = SentencePieceProcessor(model_file=str(path))
        proto = model.serialized_model_proto()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model") from error
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    extra = [f"<extra_id_{i}>" for i in reversed(range(EXTRA_IDS))]
    tokenizer: Any = Tokenizer(Unigram([*pieces, *((name, 0.0) for name in extra)], unk_id=model.unk_id()))
    characters = b"".join(value for spec in _fields(proto, 3) for value in _fields(spec, 2))
    if characters:
        tokenizer.normalizer = normalizers.Precompiled(characters)
    space: Any = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    tokenizer.decoder = decoders.Metaspace(**space)
    end = model.eos_id()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {T5_END}", special_tokens=[(T5_END, end)])
    tokenizer.add_special_tokens([T5_PAD, T5_END, T5_UNKNOWN, *extra])
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1)


def _fields(message: bytes, number: int) -> Iterator[bytes]:
    """The values of a field of bytes in a protocol buffer (its wire format): in a SentencePiece model field 3 says how
    texts are normalised, and field 2 of that with which table of characters."""
    at = 0

    def whole() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        tag = whole()
        kind = tag & 7
        if kind == 0:
            whole()
            continue
        size = whole() if kind == 2 else {1: 8, 5: 4}[kind]
        if tag >> 3 == number and kind == 2:
            yield message[at : at + size]
        at += size
