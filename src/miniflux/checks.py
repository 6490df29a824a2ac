"""What settings may be: checks that name the value and what was expected."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from miniflux.errors import InputError

T = TypeVar("T")
LONGEST = 80  # characters of a value in a message


def plain(value: Any) -> Any:
    """A number of numpy or torch, a scalar or an array without axes, as Python's own; anything else is itself."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def plain_fields(record: Any) -> None:
    """Make `plain` what the fields of a frozen dataclass hold, also within lists, arrays and tuples, which all become
    tuples: what is compared, hashed and written as JSON must not depend on who computed a number."""
    for f in fields(record):
        value = plain(getattr(record, f.name))
        if isinstance(value, (list, tuple)) or hasattr(value, "ndim"):
            value = tuple(plain(x) for x in cast("Iterable[Any]", value))
        object.__setattr__(record, f.name, value)


def shown(value: object) -> str:
    """A value for a message of one line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def without_folders(text: str) -> str:
    """A message for people elsewhere: of every absolute path in it only the last name. Addresses stay as they are."""
    return re.sub(r"(?<![\w:/.\\])(?:[A-Za-z]:[\\/]|/)(?:[^\s:'\"\\/]+[\\/])+", "", text)


def finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_number(name: str, value: float, low: float, high: float = math.inf) -> float:
    """The value as Python's own number, if it is finite and from low to high; numbers of numpy and torch count.

    Raises:
        InputError: it is not.
    """
    number = plain(value)
    if not finite(number) or not low <= number <= high:
        bounds = f" from {low:g} to {high:g}" if high < math.inf else f" of at least {low:g}" if low > -math.inf else ""
        raise InputError(f"{name} must be a finite number{bounds}, got {shown(number)}")
    return number


def whole(name: str, value: int, low: int, high: int | None = None) -> int:
    """The value as Python's own, if it is a whole number of at least low, and at most high if that is given. Those of
    numpy and torch count; 4.0 does not.

    Raises:
        InputError: it is not.
    """
    number = plain(value)
    if not isinstance(number, int) or isinstance(number, bool) or number < low or (high is not None and number > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name} must be a whole number {bounds}, got {shown(number)}")
    return number


def several(name: str, value: Any, kinds: str) -> tuple[Any, ...]:
    """The items of a tuple, list or array of as many as `kinds` names, such as "seed, amount".

    Raises:
        InputError: it is none, or of another length.
    """
    is_list = isinstance(value, (list, tuple)) or getattr(value, "ndim", None) == 1
    if not is_list or len(value) != kinds.count(",") + 1:
        raise InputError(f"{name} must be ({kinds}), got {shown(value)}")
    return tuple(plain(x) for x in value)


def check_window(name: str, window: tuple[float, float]) -> None:
    """Raises InputError unless 0 <= start < stop <= 1."""
    start, stop = several(name, window, "start, stop")
    if not finite(start) or not finite(stop) or not 0 <= start < stop <= 1:
        raise InputError(f"{name} must be (start, stop), 0 <= start < stop <= 1, got {shown(window)}")


def made(what: str, kinds: Mapping[str, type[T]], name: str, settings: Mapping[str, Any]) -> T:
    """One of several dataclasses, by name, with its settings.

    Raises:
        InputError: an unknown name or setting; both say which there are.
    """
    if not isinstance(name, str) or name not in kinds:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"unknown {what} {shown(name)}; known: {', '.join(kinds)}")
    known = [f.name for f in fields(kinds[name])]  # pyright: ignore
    for setting in settings:
        if setting not in known:
            raise InputError(f"{what} {name!r} has no setting {setting!r}; it has {', '.join(known)}")
    return kinds[name](**settings)
