"""The prompts of a call: words, quoted texts, files, and what comes in on stdin."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from miniflux.apps import console
from miniflux.errors import InputError

STDIN = "-"


def prompts_of(words: Sequence[str]) -> list[str]:
    """The prompts that the words of a command line stand for.

    `@FILE` stands for the lines of a file, `-` for those of stdin, `@@...` for a prompt that begins with @. Several
    single words and nothing else are one prompt whose quotes were forgotten; texts of several words are a prompt each,
    and so is a single word between lists.

    Raises:
        InputError: a file cannot be read or holds no prompt; or words of which nobody knows where a prompt ends.
    """
    from miniflux.text.decoding import repaired

    if words.count(STDIN) > 1:
        raise InputError("stdin (-) can be read once, and is named twice")
    texts = [repaired("the prompt", word) for word in words]
    single = [_is_a_word(text) and not _is_a_list(text) for text in texts]
    listed = any(map(_is_a_list, texts))
    if any(a and b for a, b in pairwise(single)) if listed else sum(single) > 1:
        if not all(single):
            shown = " ".join(repr(text) for text in texts)
            raise InputError(
                f"where does a prompt end in {shown}? Quote each one as a whole, or give @FILE with one a line"
            )
        texts = [" ".join(texts)]
        console.complain(f"one prompt of {len(single)} words: {texts[0]!r} (several prompts: each line of @FILE or -)")
    prompts: list[str] = []
    for text in texts:
        if text == STDIN:
            prompts += _lines("stdin", _read_stdin())
        elif _is_a_list(text):
            prompts += _lines(text[1:], _read(text))
        else:
            prompts.append(text[1:] if text.startswith("@") else text)
    return prompts


def _is_a_list(text: str) -> bool:
    """Whether it stands for prompts that are written elsewhere."""
    return text == STDIN or (text.startswith("@") and not text.startswith("@@"))


def _is_a_word(text: str) -> bool:
    """Whether it may be part of a prompt whose quotes were forgotten: no space, and none of the letters that are
    written without spaces (Chinese, Japanese, Thai ...)."""
    return not any(
        letter.isspace()
        or (unicodedata.category(letter) == "Lo" and unicodedata.east_asian_width(letter) == "W")
        or "\u0e00" <= letter <= "\u0eff"
        for letter in text
    )


def _read(text: str) -> bytes:
    try:
        with open(text[1:], "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{text[1:]!r}: no prompts could be read: {reason} (a prompt that begins with @ is written @{text})"
        ) from error


def _read_stdin() -> bytes:
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]: closed by whoever started us
        raise InputError("prompts come from stdin (-), which is closed")
    if sys.stdin.isatty():
        console.complain("prompts from the keyboard, one a line; Ctrl-D ends them")
    return sys.stdin.buffer.read()


def _lines(name: str, data: bytes) -> list[str]:
    from miniflux.service.grids import parse_prompts

    try:
        return parse_prompts(data)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
