"""Settings of other programs, field by field: what fits is taken, everything else is listed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from miniflux.errors import InputError
from miniflux.settings import strict
from miniflux.settings.request import MAX_LORAS, LoraUse, Request
from miniflux.variants import VARIANTS

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

    def number(self, name: str, said: object, **keep: Any) -> None:
        """Set one field to a number, which may be written as a string."""
        kind = int if next(f.type for f in fields(Request) if f.name == name) in ("int", "int | None") else float
        try:
            self.take(f"{name} {strict.shown(said)}", **{name: kind(said), **keep})  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError, OverflowError):
            self.miss(f"{name} {strict.shown(said)}: no number")

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

    def lora(self, file: str, scale: object) -> None:
        """Add a LoRA."""
        said = f"LoRA {strict.shown(file)} at {strict.shown(scale)}"
        try:
            use = LoraUse(file, float(scale))  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError) as error:
            self.miss(f"{said}: {error}")
            return
        if len(self.request.loras) >= MAX_LORAS:
            self.miss(said)
        else:
            self.take(said, loras=(*self.request.loras, use))


def _simple(name: object) -> str:
    return "".join(str(name)[:100].lower().split()).replace("_", "")
