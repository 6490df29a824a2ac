"""Which model of the list is meant, which sizes suit it, and what a browser has kept of the controls."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from miniflux.service import Listed
from miniflux.settings import Request
from miniflux.variants import ALIASES

FAR = 2**53  # larger numbers are no longer exact in a browser
SIDE = 16  # width and height are multiples of it, in pixels


def name_of(model: str) -> str:
    """A model's name; of a path its end, which tells nothing of the machine."""
    return re.split(r"[\\/]", model)[-1]


def listed_as(model: str, listed: Mapping[str, Listed]) -> Listed | None:
    """Which model of the list a request means: by its name, its path, or the name of its file. A path is not opened."""
    model = ALIASES.get(model, model)
    paths = [one for one in listed.values() if one.path]
    exact = listed.get(model) or next((one for one in paths if one.path == model), None)
    return exact or next((one for one in paths if name_of(one.path) == name_of(model) != model), None)


def sides_of(model: Listed) -> tuple[int, int]:
    """The shortest and the longest side that the page offers: what the model learned, at most twice as wide as high."""
    learned = model.variant.learned
    low, high = learned.sides or (SIDE, 2 * model.size)
    if learned.sides is None and learned.area is not None:
        low, high = (math.sqrt(area * share) for area, share in zip(learned.area, (0.5, 2), strict=True))
    return max(SIDE, SIDE * math.ceil(low / SIDE)), max(SIDE, SIDE * math.floor(high / SIDE))


def size_like(size: tuple[int, int], model: Listed) -> tuple[int, int]:
    """Width and height of about the shape of a picture, and of its size where the model can draw that."""
    least, most = sides_of(model)
    scale = min(1.0, most / max(size))
    scale = max(scale, least / min(size)) if min(size) * scale < least else scale
    width, height = (min(max(SIDE * round(side * scale / SIDE), least), most) for side in size)
    return width, height


def unlearned(request: Request, model: Listed) -> str:
    """What to say of a size that the model never learned; empty if it did."""
    width, height = request.size(model.variant)
    learned = model.variant.learned
    if (width, height) in learned:
        return ""
    return f"{width} × {height} is not a size that {model.name} learned, and may come out wrong; it learned {learned}."


def left_from(given: Any) -> dict[str, Any]:
    """What a browser has kept of the controls, by name; of what is not its own, nothing."""
    try:
        left = json.loads(given or "{}")
    except ValueError:
        return {}
    return left if isinstance(left, dict) else {}


def bound(given: Any, usual: float, farther: Callable[[float, float], float]) -> float:
    """How far a slider must reach for a number that a browser has kept; `farther` is min or max."""
    sound = isinstance(given, (int, float)) and not isinstance(given, bool) and 0 <= given < FAR
    return farther(given, usual) if sound else usual
