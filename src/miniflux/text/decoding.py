"""Text as it comes from outside: bytes of an unsaid encoding, and strings that hold halves of characters."""

from __future__ import annotations

import codecs
import re
import unicodedata

from miniflux.checks import shown
from miniflux.errors import InputError

HALF = re.compile("[\ud800-\udfff]")
PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
ESCAPED = re.compile("[\udc80-\udcff]+")  # bytes that Python could not decode, as its `surrogateescape` keeps them
# Longest first: the mark of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def repaired(what: str, text: str) -> str:
    """A text that can be written as UTF-8: pairs of halves joined, bytes of an ASCII locale read as the UTF-8 they are.

    Raises:
        InputError: it is no string, or half a character is left over.
    """
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"{what} must be a string, got {shown(text)}")
    if not HALF.search(text):
        return text
    whole = PAIR.sub(lambda found: found[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
    try:
        whole = ESCAPED.sub(lambda found: found[0].encode("utf-8", "surrogateescape").decode("utf-8"), whole)
    except UnicodeDecodeError as error:
        raise InputError(f"{what} holds the byte 0x{error.object[error.start]:02x}, which is not UTF-8") from None
    left = HALF.search(whole)
    if left:
        raise InputError(
            f"{what} holds half a character (the lone surrogate U+{ord(left[0]):04X}) at place {left.start()}"
        )
    return whole


def decoded(what: str, data: bytes) -> str:
    """The text in the bytes of a file: as its mark (BOM) says; without one UTF-8, or UTF-16 and UTF-32 of plain text.

    Never by a code page, since the same bytes are another text in every one of them.

    Raises:
        InputError: it is none of these, is damaged, or holds NUL.
    """
    for mark, encoding in MARKS:
        if data.startswith(mark) and (len(data) % 4 == 0 or not encoding.startswith("utf-32")):
            return _checked(what, _strictly(what, data[len(mark) :], encoding))
    if b"\0" not in data:
        return _strictly(what, data, "utf-8")
    # UTF-16 and UTF-32 write NUL beside every ASCII letter.
    for unit, names in ((4, ("utf-32-le", "utf-32-be")), (2, ("utf-16-le", "utf-16-be"))):
        found = sensible(data, names) if len(data) % unit == 0 else None
        if found is not None and "\0" not in found:
            return found
    return _checked(what, _strictly(what, data, "utf-8"))


def _strictly(what: str, data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        where = f"line {data[: error.start].count(10) + 1}" if encoding == "utf-8" else f"byte {error.start}"
        raise InputError(f"{what}: not {encoding.upper()} ({error.reason} at {where}): save it as UTF-8") from None


def _checked(what: str, text: str) -> str:
    if "\0" in text:
        raise InputError(f"{what}: holds NUL at place {text.index(chr(0))}, so it is no text")
    return text


def sensible(data: bytes, encodings: tuple[str, ...]) -> str | None:
    """Of the texts that bytes are in several encodings the likeliest, the first of equals; None if they are in none."""
    texts: list[str] = []
    for encoding in encodings:
        try:
            texts.append(data.decode(encoding))
        except UnicodeDecodeError:
            continue
    return max(texts, key=_sense, default=None)


# Letters and signs that texts are mostly made of, beside ASCII: Latin, Greek, Cyrillic, Hebrew, Arabic, Indic and Thai;
# punctuation; kana and Chinese characters; Hangul; full-width forms; emoji.
COMMON = (
    *("\u00a0\u06ff", "\u0900\u0e7f", "\u2000\u206f", "\u3000\u30ff", "\u4e00\u9fff", "\uac00\ud7a3"),
    *("\uff00\uffef", "\U0001f300\U0001faff"),
)


def _sense(text: str) -> int:
    """How much a text looks like one: three for ASCII, one for a common letter, less for what nobody writes."""
    return sum(_weight(letter) for letter in text[:4096])


def _weight(letter: str) -> int:
    if letter in "\t\n\r" or " " <= letter <= "~":
        return 3
    if unicodedata.category(letter) in ("Cc", "Cn", "Co", "Cs"):
        return -3
    return 1 if any(low <= letter <= high for low, high in COMMON) else -1
