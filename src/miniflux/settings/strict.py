"""JSON from strangers: bounded, and every value of the kind that was expected - or refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from miniflux.errors import InputError, SettingsError
from miniflux.text.decoding import repaired

MAX_BYTES = 2 * 2**20  # two prompts of the longest allowed length, every character written as \u0000, fit
MAX_MARKS = 300_000  # brackets and commas, each of which may cost an object; two of the longest prompts of commas fit
MAX_DEPTH = 32  # of brackets within brackets
MAX_NUMBER = 1e300  # beyond it, whole numbers are too large for a float
MAX_PROMPT = 2**17  # characters; T5 reads 512 tokens of them


def parsed(what: str, text: str | bytes, lenient: bool = False) -> Any:
    """The value that a JSON text stands for.

    Args:
        lenient: take NaN and infinities for null, as other programs write them.

    Raises:
        SettingsError: it is too long or too deep, is no JSON, names a key twice, or holds NaN or infinities.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > MAX_BYTES:
        raise SettingsError(f"{what}: {len(data)} bytes of JSON; at most {MAX_BYTES} are read")
    if sum(map(data.count, (b"[", b"{", b","))) > MAX_MARKS:
        raise SettingsError(f"{what}: JSON of more than {MAX_MARKS} items, which is not read")
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_constant=_null if lenient else _no_number)
        _check_depth(value)
    except SettingsError as error:
        raise SettingsError(f"{what}: {error}") from None
    except RecursionError:
        raise SettingsError(f"{what}: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # also a number of thousands of digits, and bytes that are not UTF-8
        raise SettingsError(f"{what}: not JSON: {error}") from None
    return value


def _check_depth(value: Any) -> None:
    """Refuse what is nested too deep for those who read it by recursion."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for x in level:
            if isinstance(x, dict):
                below += x.values()
            elif isinstance(x, list):
                below += x
        if not below:
            return
        level = below
    raise SettingsError(f"nested deeper than {MAX_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise SettingsError(f"{shown(twice)} is there twice")
    return found


def _null(_: str) -> None:
    return None


def _no_number(name: str) -> Any:
    raise SettingsError(f"{name} is no number of JSON")


def shown(value: object, length: int = 80) -> str:
    """A value for a message, cut to a length that fits on a line."""
    text = repr(value[: length + 1] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= length else text[:length] + "..."


def record(what: str, value: object) -> Mapping[str, Any]:
    """The value, if it is a JSON object."""
    if not isinstance(value, dict):
        raise SettingsError(f"{what} must be an object, got {shown(value)}")
    return value


def only(what: str, value: Mapping[str, Any], known: Mapping[str, Any] | tuple[str, ...] | list[str]) -> None:
    """Refuse keys that mean nothing."""
    for key in value:
        if key not in known:
            raise SettingsError(f"{what}: unknown field {shown(key)}; known: {', '.join(known)}")


def text(what: str, value: object, longest: int = 4096) -> str:
    """The value, if it is a string of at most so many characters that can be written as UTF-8."""
    if not isinstance(value, str):
        raise SettingsError(f"{what} must be a string, got {shown(value)}")
    if len(value) > longest:
        raise SettingsError(f"{what} has {len(value)} characters; at most {longest} are taken")
    try:
        return repaired(what, value)
    except InputError as error:
        raise SettingsError(str(error)) from None


def sha256(what: str, value: object) -> str:
    """The value, if it is a SHA-256 as 64 hexadecimal digits."""
    if not re.fullmatch("[0-9a-f]{64}", text(what, value)):
        raise SettingsError(f"{what} must be 64 hexadecimal digits, got {shown(value)}")
    return str(value)


def integer(what: str, value: object) -> int:
    """The value, if it is a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingsError(f"{what} must be a whole number, got {shown(value)}")
    return value


def number(what: str, value: object) -> float:
    """The value, if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > MAX_NUMBER:
        raise SettingsError(f"{what} must be a finite number, got {shown(value)}")
    return value


def items(what: str, value: object, longest: int) -> list[Any]:
    """The value, if it is a list of at most so many."""
    if not isinstance(value, (list, tuple)):
        raise SettingsError(f"{what} must be a list, got {shown(value)}")
    if len(value) > longest:
        raise SettingsError(f"{what} has {len(value)} entries; at most {longest} are taken")
    return list(value)
