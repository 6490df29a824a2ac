"""Names of modules against the regular expressions of a PEFT config, as PEFT does, but bounded.

A pattern comes from a stranger's file, and `re` can take longer than the universe lasts for a short one. What it would
say is found here without going back: of every part of a pattern, all the places are kept where it can end.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

from miniflux.errors import LoraError

# What `re` reads a pattern into; one of its own modules, under another name before Python 3.11.
_parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

MAX_PATTERN = 20_000  # characters
MAX_PATTERNS = 5_000  # in one config
MAX_STEPS = 100_000  # for one name and one pattern: a tenth of a second; those that people write take some hundred
MAX_ALL_STEPS = 1_000_000  # for all names of a file
PLAIN = re.compile(r"\^?(?:[\w.\-]|\\\.)*\$?")  # no choice anywhere: `re` itself cannot take long


class Patterns:
    """The keys of a `rank_pattern` or `alpha_pattern`: the first that fits a name counts.

    Args:
        what: where they stand, for messages.
        keys: the regular expressions, in order. Each is matched as `(.*\\.)?(KEY)$` from the beginning of a name (peft
            0.21, `utils.other.get_pattern_key`).

    Raises:
        LoraError: a key is no regular expression, too long, or of a kind that cannot be bounded; it is named.
    """

    def __init__(self, what: str, keys: Iterable[str]) -> None:
        self.what, self.keys = what, list(keys)
        self.fitted: set[str] = set()  # keys that were the first to fit a name
        self._steps = 0
        if len(self.keys) > MAX_PATTERNS:
            raise LoraError(f"{what} has {len(self.keys):,} patterns; at most {MAX_PATTERNS:,} are read")
        self._compiled = [_compiled(what, key) for key in self.keys]

    def first(self, name: str) -> str | None:
        """The first key that fits a name; None if there is none.

        Raises:
            LoraError: it takes too many steps to tell.
        """
        for key, pattern in zip(self.keys, self._compiled, strict=True):
            if isinstance(pattern, re.Pattern):
                found = pattern.match(name) is not None
            else:
                matcher = _Matcher(pattern, name)
                try:
                    found = matcher.matches()
                except _TooManyStepsError:
                    found, self._steps = False, MAX_ALL_STEPS
                self._steps += matcher.steps
                if self._steps >= MAX_ALL_STEPS:
                    raise LoraError(f"{self.what}: the pattern {_shown(key)} takes too many steps to be matched")
            if found:
                self.fitted.add(key)
                return key
        return None


def _shown(key: str) -> str:
    return repr(key) if len(key) <= 80 else f"{key[:80]!r}..."


def _compiled(what: str, key: str) -> re.Pattern[str] | Sequence[Any]:
    """A plain pattern for `re`, or the parts of another."""
    if len(key) > MAX_PATTERN:
        raise LoraError(
            f"{what}: the pattern {_shown(key)} has {len(key):,} characters; at most {MAX_PATTERN:,} are read"
        )
    text = rf"(.*\.)?({key})$"
    try:
        if PLAIN.fullmatch(key):
            return re.compile(text)
        parts = cast("Sequence[Any]", _parser.parse(text))
        _check(parts)
    except (re.error, RecursionError, OverflowError) as error:
        raise LoraError(f"{what}: {_shown(key)} is no regular expression: {error}") from error
    except _UnboundedError as error:
        raise LoraError(f"{what}: the pattern {_shown(key)} has {error}, which is not read") from error
    if parts.state.flags & ~re.UNICODE.value:  # pyright: ignore
        raise LoraError(f"{what}: the pattern {_shown(key)} sets flags, which are not read")
    return parts


class _UnboundedError(Exception):
    """A part of a pattern that cannot be matched without going back; the text says what."""


class _TooManyStepsError(Exception):
    """A match took more than `MAX_STEPS`."""


KNOWN = {
    *("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "BRANCH", "SUBPATTERN"),
    *("MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT"),
}
NAMES = {"GROUPREF": "a reference to a group", "GROUPREF_EXISTS": "a condition on a group"}
MAX_COUNT = 1000  # repetitions that are counted


def _check(parts: Sequence[Any]) -> None:
    for op, value in parts:
        name = str(op)
        if name not in KNOWN:
            raise _UnboundedError(NAMES.get(name, name.replace("_", " ").lower()))
        if name == "SUBPATTERN" and (value[1] or value[2]):
            raise _UnboundedError("flags")
        if name.endswith("_REPEAT") and (value[0] > MAX_COUNT or MAX_COUNT < value[1] < _parser.MAXREPEAT):
            raise _UnboundedError(f"more than {MAX_COUNT} counted repetitions")
        if name in ("ASSERT", "ASSERT_NOT") and value[0] < 0 and len(set(value[1].getwidth())) > 1:
            raise re.error("look-behind requires fixed-width pattern")
        for inner in _inside(name, value):
            _check(inner)


def _inside(name: str, value: Any) -> list[Sequence[Any]]:
    """The patterns that a part is made of."""
    if name == "BRANCH":
        return list(value[1])
    return [value[-1]] if name in ("SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT") else []


class _Matcher:
    """One pattern and one name."""

    def __init__(self, parts: Sequence[Any], name: str) -> None:
        self.parts, self.name, self.steps = parts, name, 0
        self._known: dict[tuple[int, int], frozenset[int]] = {}

    def matches(self) -> bool:
        """Whether the name fits from its beginning."""
        return bool(self._ends(self.parts, 0))

    def _ends(self, parts: Sequence[Any], start: int) -> frozenset[int]:
        """Where parts, one after the other, can end."""
        key = id(parts), start
        if key not in self._known:
            places = frozenset((start,))
            for op, value in parts:
                places = self._after(str(op), value, places)
                if not places:
                    break
            self._known[key] = places
        return self._known[key]

    def _after(self, op: str, value: Any, places: frozenset[int]) -> frozenset[int]:
        """Where one part can end that begins at any of some places."""
        self._count(len(places) + 1)
        if op == "SUBPATTERN":
            return self._all(value[-1], places)
        if op == "BRANCH":
            return frozenset[int]().union(*(self._all(branch, places) for branch in value[1]))
        if op.endswith("_REPEAT"):
            return self._repeated(value, places)
        if op == "AT":
            return frozenset(place for place in places if self._at(str(value), place))
        if op in ("ASSERT", "ASSERT_NOT"):
            return frozenset(place for place in places if self._seen(value[0], value[1], place) == (op == "ASSERT"))
        return frozenset(p + 1 for p in places if p < len(self.name) and _is(op, value, self.name[p]))

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise _TooManyStepsError

    def _all(self, parts: Sequence[Any], places: frozenset[int]) -> frozenset[int]:
        self._count(len(places) + 1)
        return frozenset[int]().union(*(self._ends(parts, place) for place in places))

    def _repeated(self, value: Any, places: frozenset[int]) -> frozenset[int]:
        least, most, parts = value
        for _ in range(least):
            places = self._all(parts, places)
            if not places:
                break
        found = new = places
        for _ in range(min(most - least, len(self.name) + 1)):  # beyond that, a repetition is an empty one
            new = self._all(parts, new) - found
            if not new:
                break
            found |= new
        return found

    def _at(self, where: str, place: int) -> bool:
        end = len(self.name)
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return place == 0
        if where == "AT_END":
            return place == end or (place == end - 1 and self.name[place] == "\n")
        if where == "AT_END_STRING":
            return place == end
        before, after = place > 0 and _word(self.name[place - 1]), place < end and _word(self.name[place])
        return (before != after) == (where == "AT_BOUNDARY")

    def _seen(self, direction: int, parts: Any, place: int) -> bool:
        """Whether a lookahead or lookbehind fits at a place."""
        if direction > 0:
            return bool(self._ends(parts, place))
        width = parts.getwidth()[0]
        return width <= place and place in self._ends(parts, place - width)


def _is(op: str, value: Any, letter: str) -> bool:
    """Whether a letter is what a part of one letter wants."""
    if op == "ANY":
        return letter != "\n"
    if op == "LITERAL":
        return ord(letter) == value
    if op == "NOT_LITERAL":
        return ord(letter) != value
    wanted, found = True, False
    for kind, about in value:
        name = str(kind)
        if name == "NEGATE":
            wanted = False
        elif name == "RANGE":
            found |= about[0] <= ord(letter) <= about[1]
        elif name == "CATEGORY":
            found |= _category(str(about), letter)
        else:
            found |= _is(name, about, letter)
    return found == wanted


def _category(name: str, letter: str) -> bool:
    kind = name.removeprefix("CATEGORY_").removeprefix("UNI_")
    plain = kind.removeprefix("NOT_")
    found = {"DIGIT": letter.isdecimal(), "SPACE": letter.isspace(), "WORD": _word(letter)}[plain]
    return found == (plain == kind)


def _word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"
