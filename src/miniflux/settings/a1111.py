"""Settings as A1111's web UI and Forge write them: the prompt, `Negative prompt: ...`, and a line of `Name: value`.

Read from the grammar of `parse_generation_parameters` in A1111's `modules/infotext_utils.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from miniflux.errors import SettingsError
from miniflux.sampling import guide
from miniflux.settings import strict
from miniflux.settings.foreign import Mapped
from miniflux.settings.request import Request

MAX_LINE = 20_000  # characters of the last line
LORA = re.compile(r"<lora:([^:<>]{1,200}):([^:<>]{1,20})>")
WEIGHTED = re.compile(r"\([^()]{1,200}:\d")


def looks_like_it(text: str) -> bool:
    """Whether a text can be of this kind."""
    return text.startswith("Steps: ") or "\nSteps: " in text


def read(text: str) -> Mapped:
    """What of such a text can be understood.

    Raises:
        SettingsError: its prompts or its last line are longer than is read.
    """
    body, _, last = ("\n" + text.strip()).rpartition("\nSteps: ")
    if len(last) > MAX_LINE:
        raise SettingsError(f"the line of settings has {len(last)} characters; at most {MAX_LINE} are read")
    prompt, _, negative = body.strip("\n").partition("Negative prompt:")
    prompt = strict.text("prompt", prompt.strip(), strict.MAX_PROMPT)
    negative = strict.text("negative", negative.strip(), strict.MAX_PROMPT)
    mapped = Mapped(Request(prompt=LORA.sub("", prompt).strip()))
    pairs = dict(_pairs("Steps: " + last))
    mapped.model(pairs.pop("Model", "none"))  # first: what is allowed depends on it
    for name, scale in LORA.findall(prompt):
        mapped.lora(name, scale)
    scale = pairs.pop("CFG scale", "1")
    try:
        if float(scale) != 1:
            mapped.take(f"CFG scale: {scale}", guide=guide("cfg", scale=float(scale)), negative=negative or None)
        elif negative:
            mapped.miss("Negative prompt: has no effect at CFG scale 1")
    except ValueError as error:
        mapped.miss(f"CFG scale: {scale}: {error}")
    for name, value in pairs.items():
        _take(mapped, name, value)
    if WEIGHTED.search(prompt):
        mapped.miss("weights in the prompt, such as (word:1.2), are read as they stand")
    return mapped


def _take(mapped: Mapped, name: str, value: str) -> None:
    if name == "Steps":
        mapped.number("steps", value)
    elif name == "Sampler":
        mapped.solver(value)
    elif name == "Schedule type":
        mapped.schedule(value)
    elif name == "Distilled CFG Scale":
        mapped.number("guidance", value)
    elif name == "Seed":
        mapped.number("seed", value)
        mapped.miss("Seed: noise is drawn otherwise there, so it gives another picture here")
    elif name == "Size" and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
        width, height = value.split("x")
        mapped.take(f"Size: {value}", width=int(width), height=int(height))
    elif name == "Shift":
        mapped.number("shift", value)
    else:
        mapped.miss(f"{name}: {value}")


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """Names and values; a value with a comma in it stands between quotes."""
    place = 0
    while place < len(line):
        name, colon, _ = line[place : place + 200].partition(":")
        if not colon:
            return
        place += len(name) + 1
        place += len(line[place:]) - len(line[place:].lstrip())
        if line[place : place + 1] == '"':
            try:
                value, end = json.JSONDecoder().raw_decode(line, place)
            except ValueError:
                value, end = line[place + 1 :], len(line)
            yield name.strip(" ,"), str(value)
            place = end + 1
        else:
            end = line.find(",", place)
            end = len(line) if end < 0 else end
            yield name.strip(" ,"), line[place:end].strip()
            place = end + 1
