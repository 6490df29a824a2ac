"""Which tokens of the text a word of the prompt is, by the tokenizer of the text encoder that the network listens to.

Of FLUX.1 that is T5; of FLUX.2 and FLUX.3 the language model, which reads the prompt in the form of a chat. CLIP's
summary has no tokens that a picture could look at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from miniflux.errors import InputError
from miniflux.text import Text, TextReader
from miniflux.text.decoding import repaired

UNSPACED = "[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
"""Letters of Thai, Japanese, Chinese, and Korean, which hangs endings on words."""


@dataclass(frozen=True)
class Word:
    """A word of a prompt, or several that stand together.

    Attributes:
        name: as it was asked for.
        first, stop: its tokens, of those of the whole text, which has `count`.
        left: whether padding stands before the text.
        end: tokens that are kept at the end of a text that is cut.
    """

    name: str
    first: int
    stop: int
    count: int
    left: bool
    end: int

    def places(self, window: int) -> list[int]:
        """Its tokens in a text of so many, padded or cut as the encoder does.

        Raises:
            InputError: it was cut off.
        """
        kept = self.count if self.count <= window else window - self.end
        if self.stop > kept:
            raise InputError(
                f"the word {self.name!r} is not read: it is cut off behind {kept} of the text's {self.count} tokens; "
                "draw with a larger t5_length"
            )
        before = max(0, window - self.count) if self.left else 0
        return list(range(before + self.first, before + self.stop))


def words_in(prompt: str) -> list[str]:
    """The words of a prompt, in order, those that occur again with their number: `red`, `red:2`."""
    found = re.findall(r"\w+(?:['’-]\w+)*", prompt)
    numbers = dict.fromkeys(found, 0)
    names: list[str] = []
    for word in found:
        numbers[word] += 1
        names.append(f"{word}:{numbers[word]}" if found.count(word) > 1 else word)
    return names


def listed(what: str, asked: Sequence[str]) -> list[str]:
    """Names of words or concepts, each once.

    Raises:
        InputError: it is no list, or an empty one, one of them is no text, or is there twice.
    """
    if isinstance(asked, str) or not isinstance(asked, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"{what} must be a list of texts, got {asked!r}")
    if not asked:
        raise InputError(f"{what} is empty: at least one is needed")
    for each in asked:
        if not isinstance(each, str) or not each.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"{what} must be texts that are not empty, got {each!r}")
    if len(set(asked)) < len(asked):
        raise InputError(f"{what} has {next(each for each in asked if list(asked).count(each) > 1)!r} twice")
    return [repaired(what, each) for each in asked]


def find(reader: TextReader, prompt: str, words: Sequence[str]) -> list[Word]:
    """Words of a prompt, by their names.

    Args:
        reader: of the pipeline that reads the prompt.
        words: each as it stands in the prompt, also several that stand together ("red circle"); one that occurs more
            than once with its number, from 1: "red:2".

    Raises:
        InputError: a word is not in the prompt, or which of several is meant is not said.
    """
    prompt = repaired("the prompt", prompt)
    return [_word(reader, prompt, name) for name in listed("words", words)]


def own(reader: TextReader, text: str) -> Word:
    """All of a text, without what the encoder reads around it."""
    return _tokens(reader, text, text, 0, len(text))


def _word(reader: TextReader, prompt: str, name: str) -> Word:
    word, colon, number = name.rpartition(":")
    spans = _spans(prompt, name)
    if not spans and colon and number.isdecimal():
        spans = _spans(prompt, word)
        if spans and not 1 <= int(number) <= len(spans):
            raise InputError(f"{name!r}: {word!r} occurs {len(spans)} times in the prompt")
        spans = spans[int(number) - 1 : int(number)]
    if not spans:
        raise InputError(f"the word {name!r} is not in the prompt; its words are {', '.join(words_in(prompt))}")
    if len(spans) > 1:
        numbered = ", ".join(f"{name}:{i + 1}" for i in range(len(spans)))
        raise InputError(f"the word {name!r} occurs {len(spans)} times in the prompt: ask for {numbered}")
    return _tokens(reader, name, prompt, *spans[0])


def _spans(prompt: str, word: str) -> list[tuple[int, int]]:
    """Where it stands, from letter to letter: not as a part of a longer word, where words have spaces between them."""
    found = [each.span() for each in re.finditer(re.escape(word), prompt)]
    return [(a, b) for a, b in found if not _joined(prompt[a - 1 : a + 1]) and not _joined(prompt[b - 1 : b + 1])]


def _joined(pair: str) -> bool:
    """Whether two letters next to each other are of one word."""
    return len(pair) == 2 and all(re.match(r"\w", letter) and not re.match(UNSPACED, letter) for letter in pair)


def _tokens(reader: TextReader, name: str, prompt: str, start: int, stop: int) -> Word:
    """The tokens that cover a part of a text.

    A text ends between two tokens where its beginning, read alone, has the same ids as in the whole: so nothing has to
    be known of how a tokenizer counts letters.
    """
    if isinstance(reader, Text):
        tokens, left, end = reader.t5_tokenizer.tokens, False, 1
    else:
        tokenizer = reader.tokenizers["lm_tokenizer"]
        tokens, left, end = tokenizer.tokens, tokenizer.form.side == "left", 0
    whole = tokens(prompt)
    after = _alike(tokens("")[::-1], tokens("x")[::-1])  # what stands behind every prompt

    def ends(letters: int) -> int | None:
        """How many tokens the beginning has, if a token ends behind it."""
        ids = tokens(prompt[:letters])
        ids = ids[: len(ids) - after]
        return len(ids) if whole[: len(ids)] == ids else None

    first = next(n for n in (ends(i) for i in range(start, -1, -1)) if n is not None)
    last = next((n for n in (ends(i) for i in range(stop, len(prompt) + 1)) if n is not None), len(whole) - after)
    if last <= first:
        raise InputError(f"{name!r} has no token of its own in the vocabulary")
    return Word(name, first, last, len(whole), left, end)


def _alike(a: list[int], b: list[int]) -> int:
    """How many of the first numbers are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
