"""From the file of a picture to requests, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from miniflux.errors import InputError, SettingsError
from miniflux.settings import a1111, comfyui, strict
from miniflux.settings.foreign import Mapped
from miniflux.settings.record import Record, record_of
from miniflux.settings.request import Request
from miniflux.settings.texts import KEY, Texts, texts_of

MAX_PICTURES = 1000  # on one sheet


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was found in a picture.

    Attributes:
        origin: who wrote its settings; `none` if it holds none.
        requests: one per picture on the sheet; a single one for foreign settings.
        not_understood: what was found and has no meaning here, a line each.
        records: of our own pictures, all that was written.
    """

    origin: Literal["miniflux", "A1111", "ComfyUI", "none"]
    requests: tuple[Request, ...] = ()
    not_understood: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()


def read_picture(path: str | Path) -> Reading:
    """The settings in a PNG, JPEG or WebP file. Its pixels are not looked at.

    Raises:
        SettingsError: it is no such picture, or its settings are damaged or hostile; the message says what.
    """
    texts = texts_of(path)
    try:
        return _read(texts)
    except InputError as error:
        raise SettingsError(f"{path}: {error}") from error


def _read(texts: Texts) -> Reading:
    found, notes = dict(texts.found), list(texts.notes)
    ours = _ours(found)
    if ours is not None:
        values = strict.items("settings", ours, MAX_PICTURES) if isinstance(ours, list) else [ours]
        if not values:
            raise SettingsError("settings of no picture")
        records = tuple(record_of(one) for one in values)
        return Reading(origin="miniflux", requests=tuple(record.request for record in records), records=records)
    for name in ("parameters", "exif comment", "exif description"):
        if name in found and a1111.looks_like_it(found[name]):
            try:
                return _foreign("A1111", a1111.read(found[name]), [other for other in found if other != name], notes)
            except InputError as error:
                notes.append(f"{name}: {error}")
                del found[name]
    for name in ("exif make", "exif model", "exif description"):  # of animated WebP
        kind, colon, rest = found.get(name, "").partition(":")
        if colon and kind in ("prompt", "workflow") and kind not in found:
            found[kind] = rest
            del found[name]
    for name in ("prompt", "workflow"):
        if name in found:
            try:
                mapped = comfyui.read(name, found[name])
            except InputError as error:
                notes.append(str(error))
                del found[name]
            else:
                rest = [other for other in found if other not in ("prompt", "workflow")]
                return _foreign("ComfyUI", mapped, rest, notes)
    return Reading(origin="none", not_understood=(*_named(found), *notes))


def _ours(found: dict[str, str]) -> Any:
    """The JSON of our own settings; None if there are none."""
    if KEY in found:
        return strict.parsed("settings", found[KEY])
    text = found.get("exif description", "")
    if text.lstrip()[:1] not in ("{", "["):
        return None
    known = {"prompt", "seed", "model"}
    try:
        value = strict.parsed("settings", text)
    except SettingsError:
        if all(f'"{name}"' in text for name in known):
            raise
        return None
    one: Any = value[0] if isinstance(value, list) and value else value
    return value if isinstance(one, dict) and known <= set(one) else None


def _named(names: Iterable[str]) -> list[str]:
    return [f"the text {strict.shown(name)}" for name in names]


def _foreign(origin: Literal["A1111", "ComfyUI"], mapped: Mapped, rest: Iterable[str], notes: list[str]) -> Reading:
    missed = (*mapped.not_understood, *_named(rest), *notes)
    return Reading(origin=origin, requests=(mapped.request,), not_understood=missed)
