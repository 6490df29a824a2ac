"""What settings may be: checks that name the value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from miniflux.errors import InputError

T = TypeVar("T")


def check_number(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises InputError unless `value` is a finite number from low to high."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not number or not math.isfinite(value) or not low <= value <= high:
        bounds = f" from {low:g} to {high:g}" if high < math.inf else f" of at least {low:g}" if low > -math.inf else ""
        raise InputError(f"{name} must be a finite number{bounds}, got {value!r}")


def whole(name: str, value: int, low: int, high: int | None = None) -> int:
    """The value, if it is a whole number of at least low, and at most high if that is given.

    Raises:
        InputError: it is not.
    """
    number = isinstance(value, int) and not isinstance(value, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not number or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name} must be a whole number {bounds}, got {value!r}")
    return value


def check_window(name: str, window: tuple[float, float]) -> None:
    """Raises InputError unless 0 <= start < stop <= 1."""
    if len(window) != 2 or not 0 <= window[0] < window[1] <= 1:
        raise InputError(f"{name} must be (start, stop), 0 <= start < stop <= 1, got {window!r}")


def made(what: str, kinds: Mapping[str, type[T]], name: str, settings: Mapping[str, Any]) -> T:
    """One of several dataclasses, by name, with its settings.

    Raises:
        InputError: an unknown name or setting; both say which there are.
    """
    if name not in kinds:
        raise InputError(f"unknown {what} {name!r}; known: {', '.join(kinds)}")
    known = [f.name for f in fields(kinds[name])]  # pyright: ignore
    for setting in settings:
        if setting not in known:
            raise InputError(f"{what} {name!r} has no setting {setting!r}; it has {', '.join(known)}")
    return kinds[name](**settings)
