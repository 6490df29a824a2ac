"""Many requests from one: a list of prompts, and every pair of values of two settings as one labelled picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from miniflux.errors import InputError
from miniflux.result import Result, checked_output, labelled, save_picture
from miniflux.settings import Request, strict
from miniflux.text.decoding import decoded, repaired

MAX_CELLS = 256
SETTINGS = (
    *("seed", "steps", "guidance", "solver", "schedule", "shift", "prompt", "negative", "model"),
    *("width", "height", "strength", "padding"),
)
"""Fields of `Request` that an axis may vary, beside `lora`, `lora N` and `guide.FIELD`."""


def parse_prompts(given: str | bytes) -> list[str]:
    """One prompt per line; empty lines do not count. Lines end at LF, CR or both, and at nothing else.

    Args:
        given: a text; or what is in a file, in UTF-8, or in UTF-16 or UTF-32 with or without a mark (BOM).

    Raises:
        InputError: no line, or more than `MAX_CELLS`; another encoding, NUL, or half a character.
    """
    what = "the list of prompts"
    text = decoded(what, given) if isinstance(given, bytes) else repaired(what, given).removeprefix("\ufeff")
    prompts = [line.strip() for line in re.split("[\r\n]", text) if line.strip()]
    if not 0 < len(prompts) <= MAX_CELLS:
        raise InputError(f"a list of prompts has 1 to {MAX_CELLS} lines with text, got {len(prompts)}")
    if "\0" in text:
        raise InputError(f"{what}: holds NUL at place {text.index(chr(0))}, so it is no text")
    return prompts


def batch(base: Request, prompts: Sequence[str]) -> list[Request]:
    """The same request with each of the prompts."""
    return [replace(base, prompt=prompt) for prompt in prompts]


@dataclass(frozen=True)
class Axis:
    """One setting and the values it takes.

    Attributes:
        setting: one of `SETTINGS`; `lora` for the strength of the first LoRA, `lora 2` for that of the second;
            `guide.scale` and the like for a number of the guide.
        values: in order.
    """

    setting: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        head = self.setting.split(" ")[0].split(".")[0]
        if self.setting not in SETTINGS and head not in ("lora", "guide"):
            raise InputError(
                f"unknown setting {self.setting!r}; an axis takes {', '.join(SETTINGS)}, lora, lora 2, guide.scale"
            )
        if not 0 < len(self.values) <= MAX_CELLS:
            raise InputError(f"an axis has 1 to {MAX_CELLS} values, got {len(self.values)}")

    @classmethod
    def parse(cls, setting: str, text: str) -> Axis:
        """From text: values between commas, prompts between lines; whole numbers also as `1-4`.

        Raises:
            InputError: an unknown setting, or a value that is not of its kind.
        """
        text = repaired(setting, text)
        words = re.split("\r\n|[\r\n]", text) if setting in ("prompt", "negative") else text.split(",")
        values: list[Any] = []
        for word in (word.strip() for word in words):
            if setting in ("prompt", "negative", "solver", "schedule", "model", "padding"):
                values.append(word)
            elif setting in ("seed", "steps", "width", "height"):
                low, dash, high = word.partition("-")
                first = _number(setting, low, int)
                last = _number(setting, high, int) if dash else first
                if last - first >= MAX_CELLS:
                    raise InputError(f"{setting} {word}: more than {MAX_CELLS} values")
                values += range(first, last + 1)
            else:
                values.append(_number(setting, word, float))
        return cls(setting, tuple(values))

    def apply(self, request: Request, value: Any) -> Request:
        """The request with one of the values.

        Raises:
            InputError: it cannot have it.
        """
        head, _, which = self.setting.partition(" ")
        if head == "lora":
            number = _number("lora", which or "1", int)
            if not 0 < number <= len(request.loras):
                raise InputError(f"{self.setting}: the request has {len(request.loras)} LoRAs")
            uses = list(request.loras)
            uses[number - 1] = replace(uses[number - 1], scale=value)
            return replace(request, loras=tuple(uses))
        head, _, name = self.setting.partition(".")
        if head == "guide":
            if request.guide is None or name not in [f.name for f in fields(request.guide)]:
                raise InputError(f"{self.setting}: the request has no guide with such a setting")
            return replace(request, guide=replace(request.guide, **{name: value}))
        return replace(request, **{self.setting: value})

    def label(self, value: Any) -> str:
        """What stands at the side of the sheet."""
        text = f"{value:g}" if isinstance(value, float) else str(value)
        if self.setting == "model":
            text = re.split(r"[\\/]", text)[-1]  # of a path, what tells it apart
        return strict.shown(text).strip("'\"") if self.setting in ("prompt", "negative") else f"{self.setting} {text}"


def _number(setting: str, text: str, kind: type[Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"{setting}: expected {what}, got {strict.shown(text)}") from None


@dataclass(frozen=True)
class Grid:
    """Every pair of values of two settings; `requests` raises InputError for pairs that cannot be.

    Raises:
        InputError: both axes are the same setting, or there are more than `MAX_CELLS` pairs.
    """

    base: Request
    x: Axis
    y: Axis | None = None

    def __post_init__(self) -> None:
        if self.y is not None and self.y.setting == self.x.setting:
            raise InputError(f"both axes are {self.x.setting!r}; take two settings")
        count = len(self.x.values) * (1 if self.y is None else len(self.y.values))
        if count > MAX_CELLS:
            raise InputError(f"{count} pictures; a grid has at most {MAX_CELLS}")

    def requests(self) -> list[Request]:
        """Row by row; one picture each."""
        base = replace(self.base, images=1)
        rows = [base] if self.y is None else [self.y.apply(base, value) for value in self.y.values]
        return [self.x.apply(row, value) for row in rows for value in self.x.values]

    def picture(self, images: Sequence[Image.Image]) -> Image.Image:
        """The pictures, in the order of `requests`, on one sheet with the values at its sides."""
        return labelled(images, self.columns, self.rows)

    def save(self, path: str | Path, results: Sequence[Result], metadata: bool = True) -> Path:
        """Write that sheet with the settings of all its pictures inside, from which `replay` makes it again.

        Raises:
            OutputError: as `Result.save`.
        """
        path = checked_output(path)
        picture = self.picture([image for result in results for image in result.images])
        settings: list[dict[str, Any]] = []
        for result in results if metadata else ():
            result.hash_files()
            settings += result.settings
        if settings:
            settings[0] = {**settings[0], "sheet": {"columns": self.columns, "rows": self.rows}}
        save_picture(picture, path, settings or None)
        return path

    @property
    def columns(self) -> list[str]:
        """What stands above."""
        return [self.x.label(value) for value in self.x.values]

    @property
    def rows(self) -> list[str]:
        """What stands at the left."""
        return [""] if self.y is None else [self.y.label(value) for value in self.y.values]
