"""What steers a picture beside its words, as plain data: what `Condition.described` tells, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miniflux.conditions.again import KINDS, NETWORKS, PICTURES
from miniflux.errors import SettingsError
from miniflux.settings import strict

MAX_CONDITIONS = 16
MAX_SETTINGS = 32
MAX_VALUES = 256  # of one setting: a strength for each block


@dataclass(frozen=True)
class ConditionUse:
    """One condition of a picture.

    Attributes:
        kind: one of `again.KINDS`.
        about: its settings by their names, pictures as their SHA-256; lists are tuples.
        network: the file or folder of its network; None if it has none, or if that is not known.
    """

    kind: str
    about: tuple[tuple[str, Any], ...]
    network: str | None = None

    @property
    def pictures(self) -> tuple[str, ...]:
        """The SHA-256 of every picture that it needs."""
        found = dict(self.about)
        values = [found[name] for name in PICTURES if name in found]
        return tuple(digest for value in values for digest in (value if isinstance(value, tuple) else (value,)))

    def described(self) -> dict[str, Any]:
        """What `Condition.described` told, and `kind`."""
        return {
            "kind": self.kind,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in self.about},
        }

    def as_json(self) -> dict[str, Any]:
        return self.described() | ({} if self.network is None else {"network": self.network})

    @classmethod
    def from_json(cls, what: str, value: object) -> ConditionUse:
        """
        Raises:
            SettingsError: its kind is not known, or a setting is no number, text, or list of them.
        """
        about = dict(strict.record(what, value))
        kind = strict.text(f"{what}: kind", about.pop("kind", None), 100)
        if kind not in KINDS:
            raise SettingsError(f"{what}: kind must be one of {', '.join(KINDS)}, got {strict.shown(kind)}")
        network = about.pop("network", None)
        if network is not None and (kind not in NETWORKS or not strict.text(f"{what}: network", network)):
            raise SettingsError(f"{what}: a {kind} has no network {strict.shown(network)}")
        if len(about) > MAX_SETTINGS:
            raise SettingsError(f"{what}: {len(about)} settings; at most {MAX_SETTINGS} are read")
        return cls(kind, tuple((name, _value(f"{what}: {name}", x)) for name, x in about.items()), network)


def _value(what: str, value: object, inside: bool = False) -> Any:
    if isinstance(value, list) and not inside:
        return tuple(_value(what, x, True) for x in strict.items(what, value, MAX_VALUES))
    if isinstance(value, (list, Mapping)):
        raise SettingsError(f"{what} must be a number, a text or a list of them, got {strict.shown(value)}")
    return strict.text(what, value) if isinstance(value, str) else value


def conditions(what: str, value: object) -> tuple[ConditionUse, ...]:
    """A list of them."""
    return tuple(
        ConditionUse.from_json(f"{what}[{i}]", one) for i, one in enumerate(strict.items(what, value, MAX_CONDITIONS))
    )
