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

    Raises:
        SettingsError: its kind is not known; a setting is there twice, or is no number, text, or tuple of them; a
            picture is missing, or no SHA-256; or it has a network and needs none.
    """

    kind: str
    about: tuple[tuple[str, Any], ...]
    network: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingsError(f"kind must be one of {', '.join(KINDS)}, got {strict.shown(self.kind)}")
        if self.network is not None and (self.kind not in NETWORKS or not strict.text("network", self.network)):
            raise SettingsError(f"a {self.kind} has no network {strict.shown(self.network)}")
        pairs: Any = self.about
        if not isinstance(pairs, tuple) or not all(isinstance(one, tuple) and len(one) == 2 for one in pairs):
            raise SettingsError(f"the settings of a {self.kind} must be (name, value), got {strict.shown(pairs)}")
        names = [name for name, _ in self.about]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise SettingsError(f"{twice} of a {self.kind} is there twice")
        for name, value in self.about:
            values: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
            if any(isinstance(one, (tuple, list, dict)) for one in values):
                raise SettingsError(f"{name} of a {self.kind} must be numbers or texts, got {strict.shown(value)}")
            for one in values:
                if isinstance(one, str):
                    strict.text(f"{name} of a {self.kind}", one)
            for digest in values if name in PICTURES else ():
                strict.sha256(f"{name} of a {self.kind}", digest)
        if not self.pictures:
            raise SettingsError(f"a {self.kind} needs a picture: its SHA-256")

    @property
    def pictures(self) -> tuple[str, ...]:
        """The SHA-256 of every picture that it needs."""
        found = dict(self.about)
        values = [found[name] for name in PICTURES if name in found]
        return tuple(digest for value in values for digest in (value if isinstance(value, tuple) else (value,)))

    def described(self, pictures: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What `Condition.described` told, and `kind`.

        Args:
            pictures: other names of pictures, by those they have here.
        """
        told: dict[str, Any] = {"kind": self.kind}
        for name, value in self.about:
            values = value if isinstance(value, tuple) else (value,)
            if name in PICTURES and pictures is not None:
                values = tuple(pictures[digest] for digest in values)
            told[name] = list(values) if isinstance(value, tuple) else values[0]
        return told

    def as_json(self) -> dict[str, Any]:
        return self.described() | ({} if self.network is None else {"network": self.network})

    @classmethod
    def from_json(cls, what: str, value: object) -> ConditionUse:
        """
        Raises:
            SettingsError: its kind is not known, or a setting is no number, text, or list of them.
        """
        about = dict(strict.record(what, value))
        kind, network = strict.text(f"{what}: kind", about.pop("kind", None), 100), about.pop("network", None)
        if len(about) > MAX_SETTINGS:
            raise SettingsError(f"{what}: {len(about)} settings; at most {MAX_SETTINGS} are read")
        settings = tuple((name, _value(f"{what}: {name}", x)) for name, x in about.items())
        try:
            return cls(kind, settings, network)
        except SettingsError as error:
            raise SettingsError(f"{what}: {error}") from None


def _value(what: str, value: object) -> Any:
    return tuple(strict.items(what, value, MAX_VALUES)) if isinstance(value, list) else value


def conditions(what: str, value: object) -> tuple[ConditionUse, ...]:
    """A list of them."""
    return tuple(
        ConditionUse.from_json(f"{what}[{i}]", one) for i, one in enumerate(strict.items(what, value, MAX_CONDITIONS))
    )
