"""Controls into requests and back. Pure functions: nothing in here knows of Gradio."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from miniflux.apps.ui.fitting import FAR, SIDE, listed_as, name_of
from miniflux.apps.ui.site import BUNDLED, Shelf
from miniflux.arguments import AUTO, cache_for
from miniflux.errors import InputError
from miniflux.sampling import GUIDES
from miniflux.sampling.caches import check_cached
from miniflux.sampling.guidance import Cfg
from miniflux.sampling.latents import MAX_SEED
from miniflux.service import Listed
from miniflux.settings import AtLevels, LoraUse, Request
from miniflux.settings.strict import shown

PLAIN = "none"
"""The guidance method of who wants none beside the model's own."""

METHODS = {
    PLAIN: "none: the model's own guidance alone",
    "cfg": "cfg: away from the negative prompt",
    "cfg-zero": "cfg-zero: cfg, scaled to fit, gentle at the start",
    "apg": "apg: cfg without over-saturation",
    "perp-neg": "perp-neg: only what is truly negative",
    "skip-layer": "skip-layer: away from a weaker model",
    "nag": "nag: inside attention, also for few steps",
}
NO_CACHE = "none"
STEP_CACHES = {
    NO_CACHE: "none: every block is computed",
    "first-block": "first-block: skip where the first one changes little",
    "tea": "tea: skip by how the time steps differ",
    "mag": "mag: skip by what was measured of the model",
    "taylor": "taylor: every second step, the others estimated",
}
ASPECTS = {"1:1": (1, 1), "4:3": (4, 3), "3:4": (3, 4), "3:2": (3, 2), "2:3": (2, 3), "16:9": (16, 9), "9:16": (9, 16)}
CFG = "cfg"
"""The method that base models are drawn with."""
CARRIED = ("variation", "t5_length", "padding", "stop")
"""Settings that the page has no control for, and keeps when they come with a picture."""
STEERING = ("image", "mask", "strength", "conditions")
"""Settings that go with pictures, which are in slots of the page, or known by their SHA-256."""
KEPT = (*CARRIED, *STEERING, "guidance", "guide", "cache")  # the last three where controls show less

SEEDS = 2**32  # new seeds are below it: short enough to be written down
RANDOM = ("", "-1")
TOLD = ("guide", "shift", "restart", "cache", *STEERING)
"""Settings that a picture is said to have, where it has them."""

Networks = Mapping[str, tuple[str, Path]]
"""What steers, by its name: the kind of condition that it is for, and its path, which the page is not told."""


def request_from(
    given: Mapping[str, Any], shelf: Shelf, listed: Mapping[str, Listed], networks: Networks | None = None
) -> Request:
    """What the controls ask for.

    Args:
        given: values by the names of the controls: `prompt`, `negative`, `model`, `loras`, `steps`, `guidance`,
            `method`, `scale`, `window_from`, `window_to`, `solver`, `schedule`, `shift`, `step_cache`, `restart`,
            `seed`, `images`, `width`, `height`, and `rest`, what none shows; `steering`, what the slots say.
        networks: that steer; none if there are none.

    Raises:
        InputError: a value is not what it may be; the message names it.
    """
    model = listed.get(str(given["model"]))
    if model is None:
        raise InputError(f"model {shown(given['model'])} is not on this machine; there are {', '.join(listed)}")
    rest = {name: value for name, value in (given.get("rest") or {}).items() if name in KEPT}
    guide, guidance, cache = dict(rest.pop("guide", {})), rest.pop("guidance", None), rest.pop("cache", {})
    about: dict[str, Any] = {
        **rest,
        "prompt": given["prompt"] or "",
        "model": model.model,
        "loras": [use_as_json(use) for use in uses_from(given["loras"], shelf, model.name)],
        "steps": whole("steps", given["steps"]),
        "solver": given["solver"],
        "schedule": levels_from(given["schedule"]),
        "seed": seed_from(given["seed"]),
        "images": whole("number of images", given["images"]),
        "width": whole("width", given["width"]),
        "height": whole("height", given["height"]),
    }
    if model.guided:
        about["guidance"] = number("guidance", given["guidance"]) if guidance is None else guidance
    method = given["method"]
    if method != PLAIN:
        extra = guide if guide.get("method") == method else {}
        scale = extra["scale"] if isinstance(extra.get("scale"), dict) else number("scale", given["scale"])
        window = [number(f"the method's {end}", given[f"window_{end}"]) for end in ("from", "to")]
        about["guide"] = {**extra, "method": method, "scale": scale, "window": window}
        about["negative"] = given["negative"] or None
    elif model.variant.cfg is not None:  # it has no guidance of its own but this method
        about["guidance"] = 1.0
    if given["step_cache"] != NO_CACHE:
        name = given["step_cache"]
        about["cache"] = cache if cache.get("name") == name else cache_as_json(name, model)
    if given["shift"]:
        about["shift"] = number_from("shift", given["shift"])
    if given["restart"]:
        about["restart"] = restart_from(given["restart"])
    steering = given.get("steering") or {}
    if "image" in steering:
        about = {name: value for name, value in about.items() if name not in ("image", "mask", "strength")}
    request = Request.from_json({**about, **steering})
    uses = tuple(replace(use, network=path_of(use.network, networks or {})) for use in request.conditions)
    return replace(request, conditions=uses)


def path_of(network: str | None, networks: Networks) -> str | None:
    """The path of a network that is known by its name.

    Raises:
        InputError: it is not in the list.
    """
    if network is None or network in networks:
        return None if network is None else str(networks[network][1])
    raise InputError(f"the network {shown(network)} is not in the folder of models")


def values_from(
    request: Request, shelf: Shelf, listed: Mapping[str, Listed], networks: Networks | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The values of the controls for a request, and what of it the page cannot have, a line each."""
    notes: list[str] = []
    model = listed_as(request.model, listed)
    request = _told(request, model)
    about = request.as_json()
    if model is None:
        notes.append(f"the model {shown(name_of(request.model))} is not on this machine")
        model = next(iter(listed.values()))
    elif model.path not in ("", request.model):
        notes.append(f"the model {model.name} was taken for its name: whether it is the same file is not known")
    guide, cache = about.get("guide"), about.get("cache")
    rest: dict[str, Any] = {name: about[name] for name in CARRIED if name in about}
    if "t5_length" in rest and rest["t5_length"] == model.variant.t5_length:  # saved pictures state it
        del rest["t5_length"]
    if guide is not None:
        usual = {**guide_as_json(guide["method"], guide["scale"]), "window": guide["window"]}
        if guide != usual or isinstance(guide["scale"], dict):
            rest["guide"] = guide
    if cache is not None and cache != cache_as_json(cache["name"], model):
        rest["cache"] = cache
    if isinstance(request.guidance, AtLevels):
        rest["guidance"] = about["guidance"]
    if all(digest in shelf.given for digest in request.pictures):
        rest |= {name: about[name] for name in STEERING if name in about and name != "conditions"}
        rest |= _steered(request, networks or {}, notes)
    else:
        notes.append("it was made from another picture, which is not inside it")
    if request.dtype is not None:
        notes.append(f"dtype {request.dtype}: the page draws in the precision it was started with")
    schedule = request.schedule
    return {
        "prompt": request.prompt,
        "negative": request.negative or "",
        "model": model.name,
        "loras": rows(shelf, model.name, _matched(request, shelf, notes)),
        "steps": request.steps or (model.steps if isinstance(schedule, str) else len(schedule) - 1),
        "guidance": request.guidance if isinstance(request.guidance, (int, float)) else model.guidance,
        "method": PLAIN if guide is None else guide["method"],
        "scale": 3.0 if guide is None or not isinstance(guide["scale"], (int, float)) else guide["scale"],
        "window_from": 0.0 if guide is None else guide["window"][0],
        "window_to": 1.0 if guide is None else guide["window"][1],
        "shift": "" if request.shift is None else str(request.shift),
        "step_cache": NO_CACHE if cache is None else cache["name"],
        "restart": "" if request.restart is None else ", ".join(map(str, request.restart)),
        "solver": request.solver,
        "schedule": schedule if isinstance(schedule, str) else ", ".join(f"{level:g}" for level in schedule),
        "seed": str(request.seed),
        "images": request.images,
        "width": request.width or model.size,
        "height": request.height or model.size,
        "rest": rest,
    }, notes


def usual_method(model: Listed) -> tuple[str, float]:
    """The guidance method that a model is drawn with unless another is chosen, and its scale."""
    return (PLAIN, 3.0) if model.variant.cfg is None else (CFG, model.variant.cfg)


def _told(request: Request, model: Listed | None) -> Request:
    """A request with the method that a base model is drawn with, where it says none."""
    if model is None or model.variant.cfg is None or request.guide is not None:
        return request
    scale: Any = model.variant.cfg if request.guidance is None else request.guidance
    return replace(request, guide=Cfg(scale=scale), guidance=None)


def _steered(request: Request, networks: Networks, notes: list[str]) -> dict[str, Any]:
    """Conditions as the page keeps them, networks by their names; those whose network is not here are left out."""
    names = {str(path): name for name, (_, path) in networks.items()}
    kept: list[dict[str, Any]] = []
    for use in request.conditions:
        if use.network in (None, *names):
            kept.append(replace(use, network=None if use.network is None else names[use.network]).as_json())
        else:
            notes.append(f"the network {shown(name_of(use.network))} of a {use.kind} is not here")
    return {"conditions": kept} if kept else {}


def _matched(request: Request, shelf: Shelf, notes: list[str]) -> dict[str, LoraUse]:
    """LoRAs of a request by their ids on the shelf; a path in a picture is never opened."""
    found: dict[str, LoraUse] = {}
    for use in request.loras:
        name = Path(use.file.replace("\\", "/")).name
        for lora in shelf.loras.values():
            if (
                use.sha256 == lora.sha256
                if use.sha256
                else name in (lora.file, Path(lora.file).name, f"{lora.id}.safetensors")
            ):
                found[lora.id] = use
                break
        else:
            notes.append(f"the LoRA {shown(name)} is not here: drop its file on the page")
    return found


def rows(
    shelf: Shelf,
    model: str,
    uses: Mapping[str, LoraUse] | None = None,
    given: Any = None,
    on: Collection[str] = (),
) -> list[dict[str, Any]]:
    """The list of LoRAs as the page shows it.

    Args:
        model: those that do not fit it are greyed, with the reason.
        uses: switch on exactly these, by their ids.
        given: the list as the page has it, whose switches and strengths are kept.
        on: ids to switch on beside.
    """
    before = (
        {row["id"]: row for row in given if isinstance(row, dict) and "id" in row} if isinstance(given, list) else {}
    )
    found: list[dict[str, Any]] = []
    for lora in shelf.loras.values():
        old = before.get(lora.id, {})
        switched, strength = old.get("on", False), old.get("strength", 1.0)
        if uses is not None:
            switched, strength = lora.id in uses, uses[lora.id].strength if lora.id in uses else strength
        found.append({
            "id": lora.id,
            "label": lora.label,
            "on": bool(switched) or lora.id in on,
            "strength": strength,
            "about": lora.about,
            "reason": lora.reasons.get(model, ""),
            "receipt": lora.receipt,
            "dropped": lora.id not in BUNDLED,
        })  # fmt: skip
    return found


def uses_from(given: Any, shelf: Shelf, model: str) -> list[LoraUse]:
    """The LoRAs that are switched on, from the list as the page sent it: ids and strengths only are believed."""
    uses: list[LoraUse] = []
    for row in given if isinstance(given, list) else []:
        lora = shelf.loras.get(str(row.get("id"))) if isinstance(row, dict) else None
        if lora is None or not row.get("on") or lora.reasons.get(model):
            continue
        strength = row.get("strength")
        if isinstance(strength, dict):
            scale: Any = tuple((str(start), number("strength", value)) for start, value in strength.items())
        else:
            scale = number(f"the strength of {lora.label}", strength)
        uses.append(LoraUse(lora.file, scale, lora.sha256))
    return uses


def use_as_json(use: LoraUse) -> dict[str, Any]:
    return {"file": use.file, "scale": use.strength, "sha256": use.sha256}


def greyed(model: Listed, method: str) -> dict[str, str]:
    """Controls without effect, and why."""
    found: dict[str, str] = {}
    if not model.guided:
        found["guidance"] = f"{model.name} was made without guidance: it has no input for it"
        if model.variant.cfg is not None:
            found["guidance"] = f"{model.name} has no input for guidance: it is drawn with the method {CFG}, below"
    try:
        check_cached(model.variant.transformer)
    except InputError as error:
        found["step_cache"] = str(error)
    if method == PLAIN:
        found["scale"] = "Without effect while the guidance method is none"
        for name in ("negative", "window_from", "window_to"):
            found[name] = found["scale"]
    return found


def size_of(aspect: str, base: int) -> tuple[int, int]:
    """Width and height of about base x base pixels in all, multiples of 16."""
    wide, high = ASPECTS[aspect]
    width = base * math.sqrt(wide / high)
    return max(SIDE, SIDE * round(width / SIDE)), max(SIDE, SIDE * round(base * base / width / SIDE))


def aspect_of(width: int, height: int, base: int) -> str | None:
    """The preset that has this size, if any."""
    return next((name for name in ASPECTS if size_of(name, base) == (width, height)), None)


def levels_from(given: Any) -> str | list[float]:
    """A schedule's name; or noise levels between commas."""
    text = str(given or "")
    if "," not in text:
        return text
    try:
        return [float(level) for level in text.split(",")]
    except ValueError:
        raise InputError(f"schedule: expected a name, or noise levels as 1, 0.6, 0.3, 0, got {shown(text)}") from None


def number_from(name: str, given: str) -> float:
    """A number, as a field of text gives it."""
    try:
        return float(given)
    except ValueError:
        raise InputError(f"{name}: expected a number, got {shown(given)}") from None


def restart_from(given: str) -> list[float]:
    """Two noise levels and a number, between commas."""
    try:
        low, high, times = given.split(",")
        return [float(low), float(high), int(times)]
    except ValueError:
        raise InputError(f"restart: expected low, high, times as 0.3, 0.6, 2, got {shown(given)}") from None


def more_than_usual(values: Mapping[str, Any]) -> bool:
    """Whether a control under *More* is not as it is at first."""
    usual = {"window_from": 0.0, "window_to": 1.0, "shift": "", "step_cache": NO_CACHE, "restart": ""}
    return any(values.get(name, value) != value for name, value in usual.items())


def cache_as_json(name: str, model: Listed) -> dict[str, Any]:
    """A step cache as it is for a model unless told otherwise."""
    usual = cache_for(model.variant, name)
    return Request(prompt="", model=model.model, cache=usual).as_json()["cache"]


def guide_as_json(method: str, scale: Any) -> dict[str, Any]:
    """A guide whose other settings are the default ones."""
    usual = {f.name: f.default for f in fields(GUIDES[method])}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
    return {**listed, "method": method, "scale": scale}


def new_seed() -> int:
    """A random seed."""
    return secrets.randbelow(SEEDS)


def is_random(given: Any) -> bool:
    """Whether the field for the seed leaves it to chance: it is empty, or -1 as other programs write it."""
    return given is None or str(given).strip() in RANDOM


def seed_from(given: Any) -> int:
    """A seed, as the field of text gives it; a random one where the field leaves it to chance."""
    if is_random(given):
        return new_seed()
    text = str(given).strip()
    if not re.fullmatch("[0-9]{1,20}", text, re.ASCII):
        raise InputError(
            f"seed must be a whole number from 0 to {MAX_SEED}, or empty or -1 for a random one, got {shown(given)}"
        )
    return int(text)


def whole(name: str, value: Any) -> int:
    """A whole number, as a field of numbers gives it."""
    if number(name, value) != int(value):
        raise InputError(f"{name} must be a whole number, got {shown(value)}")
    return int(value)


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < FAR:
        raise InputError(f"{name} must be a number, got {shown(value)}")
    return float(value)


def described(request: Request, model: Listed | None) -> list[tuple[str, str]]:
    """All settings of a picture, as (name, value) lines of text for people."""
    request = _told(request, model)
    about = request.as_json()
    if request.conditions:
        about["conditions"] = [
            use.as_json() | ({} if use.network is None else {"network": name_of(use.network)})
            for use in request.conditions
        ]
    steps, guidance = request.steps, request.guidance
    if model is not None:
        steps, guidance = steps or model.steps, model.guidance if guidance is None else guidance
    lines = [
        ("prompt", request.prompt),
        ("negative prompt", request.negative or ""),
        ("model", name_of(request.model) if model is None else model.name),
        ("seed", str(request.seed)),
        ("steps", "" if steps is None else str(steps)),
        ("guidance", f"{guidance:g}" if isinstance(guidance, (int, float)) else plainly(about.get("guidance", ""))),
        ("size", f"{request.width} × {request.height}" if request.width and request.height else ""),
        *((f"LoRA {Path(use.file).stem}", f"strength {plainly(use.strength)}") for use in request.loras),
        ("solver", request.solver),
        ("schedule", plainly(about.get("schedule", AUTO))),
        *((name, plainly(about[name])) for name in (*TOLD, *CARRIED) if name in about),
    ]
    return [line for line in lines if line[1]]


def plainly(value: Any) -> str:
    """A value of plain JSON as words."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:12]}…"
    if isinstance(value, dict):
        return ", ".join(f"{name} {plainly(part)}" for name, part in value.items())
    return ", ".join(map(plainly, value)) if isinstance(value, list) else str(value)


def caption(request: Request) -> str:
    """The beginning of the prompt."""
    return request.prompt if len(request.prompt) <= 300 else request.prompt[:300] + " …"


def line(request: Request) -> str:
    """The settings that people look for first."""
    parts = [f"seed {request.seed}", name_of(request.model)]
    parts += [f"{Path(use.file).stem} {use.strength:g}" for use in request.loras if isinstance(use.strength, float)]
    return " · ".join(parts)


def with_new_seed(request: Request, seed: int) -> Request:
    """The same with another seed."""
    return replace(request, seed=seed)
