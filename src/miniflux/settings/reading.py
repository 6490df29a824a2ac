"""From the file of a picture to requests, whoever wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from miniflux.errors import InputError, SettingsError
from miniflux.settings import a1111, comfyui, strict
from miniflux.settings.foreign import Mapped
from miniflux.settings.pictures import KEY, texts_of
from miniflux.settings.record import Record, record_of
from miniflux.settings.request import Request

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


def _read(texts: dict[str, str]) -> Reading:
    if KEY in texts:
        value = strict.parsed("settings", texts[KEY])
        values = strict.items("settings", value, MAX_PICTURES) if isinstance(value, list) else [value]
        if not values:
            raise SettingsError("settings of no picture")
        records = tuple(record_of(one) for one in values)
        return Reading(origin="miniflux", requests=tuple(record.request for record in records), records=records)
    for name in ("parameters", "exif comment", "exif description"):
        if name in texts and a1111.looks_like_it(texts[name]):
            return _foreign("A1111", a1111.read(texts.pop(name)), texts)
    prompt, workflow = texts.pop("prompt", None), texts.pop("workflow", None)
    for name in ("exif make", "exif model", "exif description"):  # of animated WebP
        kind, colon, rest = texts.get(name, "").partition(":")
        if colon and kind == "prompt" and prompt is None:
            prompt = texts.pop(name) and rest
        elif colon and kind == "workflow" and workflow is None:
            workflow = texts.pop(name) and rest
    if prompt is not None or workflow is not None:
        return _foreign("ComfyUI", comfyui.read(prompt, workflow), texts)
    return Reading(origin="none", not_understood=tuple(f"the text {strict.shown(name)}" for name in texts))


def _foreign(origin: Literal["A1111", "ComfyUI"], mapped: Mapped, rest: dict[str, str]) -> Reading:
    missed = [*mapped.not_understood, *(f"the text {strict.shown(name)}" for name in rest)]
    return Reading(origin=origin, requests=(mapped.request,), not_understood=tuple(missed))
