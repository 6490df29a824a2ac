"""Settings as A1111's web UI, Forge, SD.Next and Civitai write them: the prompt, `Negative prompt: ...` at the
beginning of a line, and a line of `Name: value`.

Read from the grammar of `parse_generation_parameters` in A1111's `modules/infotext_utils.py` and of `parse_prompt` in
its `modules/extra_networks.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from miniflux.errors import SettingsError
from miniflux.sampling import guide
from miniflux.settings.foreign import Mapped, any_number
from miniflux.settings.request import Request

MAX_LINE = 20_000  # characters of the line of settings
NEGATIVE = "Negative prompt:"
TAG = re.compile(r"<(\w{1,40}):([^<>]{1,400})>")  # a LoRA or another network
LORAS = ("lora", "lyco")
# Names of which a line of settings has two at least, or `Steps: 20` alone. A prompt may hold colons, too.
KNOWN = (
    *("Steps", "Sampler", "Schedule type", "CFG scale", "Distilled CFG Scale", "Seed", "Size", "Model", "Model hash"),
    *("Version", "App", "Clip skip", "Denoising strength", "Shift", "Parser", "Pipeline", "VAE", "VAE hash"),
    *("Created Date", "Civitai resources", "Scheduler", "Guidance", "Batch-1", "Index", "Operations", "Backend"),
)
NAME = re.compile(r"[\s,|]*(\w[\w \-/.+#()]{0,80}?)\s*:")
STEPS = re.compile(r"Steps: *\d")


def looks_like_it(text: str) -> bool:
    """Whether a text can be of this kind."""
    return _settings_line(_lines(text)) is not None


def read(text: str) -> Mapped:
    """What of such a text can be understood.

    Raises:
        SettingsError: its line of settings is longer than is read.
    """
    lines = _lines(text)
    mapped = Mapped(Request(prompt=""))
    place = _settings_line(lines)
    if place is None:
        raise SettingsError("no line of settings, such as 'Steps: 20, Sampler: Euler'")
    above = _joined(lines[place])
    if above is not None:
        body, lines[place] = above
        if place == 0 and NEGATIVE in body:
            prompt, _, below = body.partition(NEGATIVE)
            body = f"{prompt.rstrip(' ,.')}\n{NEGATIVE}{below}"
        inserted = body.rstrip(" ,.").split("\n")
        lines[place:place] = inserted
        place += len(inserted)
        mapped.miss("prompt and settings stand on one line: where the one ends is a guess")
    begin = place
    while begin and _is_settings(lines[begin - 1]):  # SD.Next wrote two
        begin -= 1
    body, last, rest = lines[:begin], lines[begin : place + 1], lines[place + 1 :]
    longest = max(map(len, last))
    if longest > MAX_LINE:
        raise SettingsError(f"the line of settings has {longest} characters; at most {MAX_LINE} are read")
    begins = next((i for i, line in enumerate(body) if line.lstrip().startswith(NEGATIVE)), len(body))
    prompt = mapped.words("prompt", "\n".join(body[:begins]).strip())
    below = [body[begins].lstrip().removeprefix(NEGATIVE), *body[begins + 1 :]] if begins < len(body) else []
    negative = mapped.words("negative", "\n".join(below).strip())
    mapped.take("prompt", prompt=TAG.sub("", prompt).strip())
    pairs: dict[str, str] = {}
    for name, value in (pair for line in last for pair in _pairs(line)):
        if pairs.get(name, value) != value:
            mapped.miss(f"{name}: {pairs[name]}: is there twice, the last is read")
        pairs[name] = value
    mapped.model(pairs.pop("Model", "none"))  # first: what is allowed depends on it
    for kind, said in TAG.findall(prompt):
        _tag(mapped, kind, said)
    if TAG.search(negative):
        mapped.miss("networks such as <lora:name:1> in the negative prompt are read as they stand")
    scale = pairs.pop("CFG scale", "1")
    _cfg(mapped, scale, negative)
    for name, value in pairs.items():
        _take(mapped, name, value)
    mapped.weighted("prompt", prompt)
    for line in rest:
        if line.strip():
            mapped.miss(line.strip())
    return mapped


def _lines(text: str) -> list[str]:
    """Lines as those programs part them: by \\n alone."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").strip().split("\n")


def _settings_line(lines: list[str]) -> int | None:
    """The last line that is one of settings; extensions write theirs below it."""
    return next((i for i in reversed(range(len(lines))) if _is_settings(lines[i])), None)


def _is_settings(line: str) -> bool:
    line = line.strip()
    return bool(STEPS.match(line)) or len({name for name, _ in _pairs(line[:MAX_LINE]) if name in KNOWN}) >= 2


def _joined(line: str) -> tuple[str, str] | None:
    """What stands before the settings on their line, and these; None if nothing does."""
    begins = [found.start() for found in re.finditer(r"(?<=[\s,.])Steps: *\d+\s*[,|]", line)]
    body, last = (line[: begins[-1]], line[begins[-1] :]) if begins else ("", line)
    known = [len({name for name, _ in _pairs(part[:MAX_LINE]) if name in KNOWN}) for part in (body, last)]
    return (body, last) if body and known[0] == 0 and known[1] >= 3 else None


def _cfg(mapped: Mapped, said: str, negative: str) -> None:
    scale = any_number(said)
    try:
        if scale is None:
            mapped.miss(f"CFG scale: {said}: no number")
        elif scale != 1:
            mapped.take(f"CFG scale: {said}", guide=guide("cfg", scale=scale), negative=negative or None)
    except ValueError as error:
        mapped.miss(f"CFG scale: {said}: {error}")
    if negative and mapped.request.negative is None:
        mapped.miss("Negative prompt: has no effect at CFG scale 1" if scale == 1 else "Negative prompt")


def _tag(mapped: Mapped, kind: str, said: str) -> None:
    """`name`, then strengths in the order text encoders, network, or as te=, unet=; 1 where nothing is said."""
    whole = f"<{kind}:{said}>"
    if kind not in LORAS:
        mapped.miss(whole)
        return
    name, *parts = (part.strip() for part in said.split(":"))
    plain = [part for part in parts if "=" not in part]
    named = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts if "=" in part)}
    text = named.pop("te", plain[0] if plain else "1")
    strength = named.pop("unet", plain[1] if len(plain) > 1 else text)
    mapped.lora(name, strength)
    if any_number(text) != any_number(strength):
        mapped.miss(f"{whole}: the strength {text} of its text encoders")
    if named or len(plain) > 2:
        mapped.miss(f"{whole}: {', '.join([*plain[2:], *named])}")


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
    elif name == "Size" and re.fullmatch(r"\d{1,6} ?[x×] ?\d{1,6}", value):
        width, height = re.split("[x×]", value)
        mapped.take(f"Size: {value}", width=int(width), height=int(height))
    elif name == "Shift":
        mapped.number("shift", value)
    else:
        mapped.miss(f"{name}: {value}" if name else value)


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """Names and values; a value with a comma in it stands between quotes, or is JSON. What has no name has ''."""
    commas, bars = (len(re.findall(rf"{sign}\s*\w[\w ]*:", line)) for sign in (",", r"\|"))
    mark = "|" if bars > commas else ","  # SD.Next wrote bars
    place = 0
    while place < len(line):
        found = NAME.match(line, place)
        end = line.find(mark, place)
        end = len(line) if end < 0 else end
        if found is None or found.end() > end > found.start(1):
            if line[place:end].strip(" ,|"):
                yield "", line[place:end].strip()
            place = end + 1
            continue
        place = found.end()
        while line[place : place + 1].isspace():
            place += 1
        end = line.find(mark, place)
        end = len(line) if end < 0 else end
        value = line[place:end].strip()
        if line[place : place + 1] in ('"', "[", "{"):
            try:
                parsed, stop = json.JSONDecoder().raw_decode(line, place)
            except (ValueError, RecursionError):
                pass  # as it stands, up to the next comma
            else:
                value, end = parsed if isinstance(parsed, str) else line[place:stop], stop
                if line[end : end + 1] not in (mark, ""):  # words behind the quotes
                    end = line.find(mark, end)
                    end = len(line) if end < 0 else end
                    value = line[place:end].strip()
        yield found[1].strip(), value
        place = end + 1
