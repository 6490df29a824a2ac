"""Settings of other programs, field by field: what fits is taken, everything else is listed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from miniflux.errors import InputError
from miniflux.settings import strict
from miniflux.settings.request import MAX_LORAS, LoraUse, Request
from miniflux.variants import VARIANTS

WEIGHTED = re.compile(r"\([^()]{1,200}:\s*\d|\[[^\[\]]{0,200}:\s*\d|\(\(|\[\[|\bBREAK\b|\bembedding:")
MAX_LISTED = 200  # lines of what was not understood

# Names of samplers and schedulers in A1111 (and Forge) and in ComfyUI, without blanks, _ and case; and ours.
SOLVERS = {
    "euler": "euler",
    "eulera": "euler-ancestral",
    "eulerancestral": "euler-ancestral",
    "heun": "heun",
    "dpm++2m": "dpmpp-2m",
    "dpmpp2m": "dpmpp-2m",
    "dpm++2msde": "dpmpp-2m-sde",
    "dpmpp2msde": "dpmpp-2m-sde",
    "dpmpp2msdegpu": "dpmpp-2m-sde",
    "unipc": "unipc",
    "ddim": "ddim",
    "lcm": "lcm",
    "ipndm": "ipndm",
    "resmultistep": "res-multistep",
}
SCHEDULES = {
    "simple": "simple",
    "normal": "normal",
    "sgmuniform": "sgm-uniform",
    "ddimuniform": "ddim-uniform",
    "ddim": "ddim-uniform",
    "beta": "beta-comfyui",
    "linearquadratic": "linear-quadratic",
    "optimalsteps": "optimal-steps",
    "karras": "karras",
    "exponential": "exponential",
}
RANGED = ("karras", "exponential")  # there between the ends of the whole table, here between those of the steps


@dataclass
class Mapped:
    """A request that grows field by field.

    Attributes:
        request: what was understood.
        not_understood: the rest, a line each.
    """

    request: Request
    not_understood: list[str] = field(default_factory=list[str])

    def miss(self, line: str) -> None:
        """List something that has no meaning here."""
        line = " ".join(line.split()) if "\n" in line or "\r" in line else line
        line = line if len(line) <= 200 else line[:200] + "..."
        if len(self.not_understood) < MAX_LISTED:
            self.not_understood.append(line)
        elif len(self.not_understood) == MAX_LISTED:
            self.not_understood.append("and more")

    def take(self, said: str, **values: Any) -> None:
        """Set fields of the request; if it cannot have them, list what the file said."""
        try:
            self.request = replace(self.request, **values)
        except (InputError, TypeError) as error:
            self.miss(f"{said}: {error}")

    def words(self, name: str, text: str) -> str:
        """A text of the file as a request can hold it; empty and listed if it cannot."""
        try:
            return strict.text(name, text.replace("\r\n", "\n"), strict.MAX_PROMPT)
        except InputError as error:
            self.miss(str(error))
            return ""

    def weighted(self, name: str, text: str) -> None:
        """List that signs which weigh words elsewhere are words here."""
        if WEIGHTED.search(text):
            self.miss(f"weights in the {name}, such as (word:1.2), are read as they stand")

    def number(self, name: str, said: object) -> None:
        """Set one field to a number, which may be written as a string."""
        whole_one = next(f.type for f in fields(Request) if f.name == name) in ("int", "int | None")
        value = whole_number(said) if whole_one else any_number(said)
        if value is None:
            self.miss(f"{name} {strict.shown(said)}: no {'whole ' if whole_one else ''}number")
        else:
            self.take(f"{name} {strict.shown(said)}", **{name: value})

    def solver(self, said: object) -> None:
        """Set the solver, and the schedule where old names hold both (`DPM++ 2M Karras`)."""
        name = _simple(said)
        for schedule in RANGED:
            if name.endswith(schedule) and name != schedule:
                self.schedule(schedule)
                name = name.removesuffix(schedule)
        if name in SOLVERS:
            self.take(f"sampler {strict.shown(said)}", solver=SOLVERS[name])
        else:
            self.miss(f"sampler {strict.shown(said)}")

    def schedule(self, said: object) -> None:
        """Set the schedule."""
        name = _simple(said)
        if name not in SCHEDULES:
            self.miss(f"schedule {strict.shown(said)}")
            return
        self.take(f"schedule {strict.shown(said)}", schedule=SCHEDULES[name])
        if name in RANGED:
            self.miss(f"schedule {name}: begins and ends at other noise levels there")

    def model(self, said: object) -> None:
        """Set the model, if it is one of ours by its name or its file."""
        name = str(said).replace("\\", "/").rpartition("/")[2].rpartition(".safetensors")[0] or str(said)
        known = {v.name: v.name for v in VARIANTS.values()} | {
            v.file.rpartition(".")[0]: v.name for v in VARIANTS.values()
        }
        if name.lower() in known:
            self.take(f"model {strict.shown(said)}", model=known[name.lower()])
        else:
            self.miss(f"model {strict.shown(said)}")

    def lora(self, file: object, scale: object) -> None:
        """Add a LoRA."""
        said = f"LoRA {strict.shown(file)} at {strict.shown(scale)}"
        strength = any_number(scale)
        if not isinstance(file, str) or strength is None:
            self.miss(f"{said}: expected a name and a number")
            return
        try:
            use = LoraUse(file, strength)
        except InputError as error:
            self.miss(f"{said}: {error}")
            return
        if len(self.request.loras) >= MAX_LORAS:
            self.miss(said)
        else:
            self.take(said, loras=(*self.request.loras, use))


def any_number(said: object) -> float | None:
    """A finite number, also from a string."""
    if isinstance(said, bool) or not isinstance(said, (int, float, str)):
        return None
    try:
        value = float(said)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def whole_number(said: object) -> int | None:
    """A whole number, also from a string or written as 20.0; large ones without rounding."""
    if isinstance(said, (str, int)) and not isinstance(said, bool):
        try:
            return int(said)
        except ValueError:
            pass
    value = any_number(said)
    return int(value) if value is not None and value.is_integer() and abs(value) < 2**53 else None


def _simple(name: object) -> str:
    return "".join(str(name)[:100].lower().split()).replace("_", "")
