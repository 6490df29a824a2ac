"""Everything that makes a picture, as one frozen record that can be checked without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from miniflux.arguments import AUTO, MAX_IMAGES
from miniflux.checks import check_number, made, whole
from miniflux.conditions import Condition
from miniflux.errors import InputError, SettingsError
from miniflux.plan import Plan
from miniflux.sampling import CACHES, GUIDES, solver
from miniflux.sampling.caches import Cache, Measure
from miniflux.sampling.guidance import Cfg
from miniflux.sampling.latents import MAX_SEED
from miniflux.settings import strict
from miniflux.settings.steered import ConditionUse, conditions
from miniflux.text import Padding, check_padding
from miniflux.variants import ALIASES, VARIANTS, Variant, variant

MAX_LORAS = 32
NEAR = 1e-9  # noise levels closer than that are the same
MAX_LEVELS = 2001  # noise levels of one's own
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class AtLevels:
    """A strength that is known at some noise levels: what a file keeps of a function of the noise level.

    Raises:
        InputError: a strength is no number of at least 0; or, when called, a level is asked for that is not known.
    """

    sigmas: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.values) or not self.values:
            raise SettingsError(f"{len(self.values)} strengths for {len(self.sigmas)} noise levels")
        for value in self.values:
            check_number("a strength", value, 0)

    def __call__(self, sigma: float) -> float:
        for known, value in zip(self.sigmas, self.values, strict=True):
            if abs(known - sigma) < NEAR:
                return value
        raise InputError(f"the strength at the noise level {sigma!r} is not known; levels are {list(self.sigmas)}")


@dataclass(frozen=True)
class LoraUse:
    """One LoRA of a picture.

    Attributes:
        file: a path, or the name of a bundled one.
        scale: its strength; or (beginning of a module's name, strength) for each.
        sha256: of the file, in hexadecimal; None if it does not matter which it is.
    """

    file: str
    scale: float | tuple[tuple[str, float], ...] = 1.0
    sha256: str | None = None

    def __post_init__(self) -> None:
        if not strict.text("a LoRA's file", self.file):
            raise SettingsError("a LoRA's file must be named, got ''")
        if isinstance(self.scale, tuple):
            for start, value in self.scale:
                strict.text("the beginning of a module's name", start)
                check_number(f"the scale of {start}", value, -float("inf"))
        else:
            check_number("the scale of a LoRA", self.scale, -float("inf"))
        if self.sha256 is not None:
            strict.sha256("sha256", self.sha256)

    @property
    def strength(self) -> float | dict[str, float]:
        """The scale as `miniflux.lora.attach` takes it."""
        return dict(self.scale) if isinstance(self.scale, tuple) else self.scale


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of `Pipeline.generate`, whose arguments the fields are, with the model and the LoRAs it is made on.

    Attributes:
        prompt: at most `strict.MAX_PROMPT` characters of any kind.
        model: what `miniflux.load` takes: a variant's name, or a path.
        loras: in the order in which they are attached.
        images: how many; picture i is drawn from seed + i.
        image, mask: SHA-256 of the picture (or latents) that is changed and of where, which are given to whoever draws.
        conditions: what else steers it, as plain data; whoever draws has the pictures and the networks.
        dtype: as of `miniflux.load`; None to choose for the device.

    Raises:
        InputError: a field is not what it may be; the message names it and its value. What depends on the model is
            checked by `check`.
    """

    prompt: str
    negative: str | None = None
    model: str = "nano-dev"
    loras: tuple[LoraUse, ...] = ()
    seed: int = 0
    images: int = 1
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    guidance: float | AtLevels | None = None
    guide: Cfg | None = None
    solver: str = "euler"
    schedule: str | tuple[float, ...] = AUTO
    shift: float | None = None
    restart: tuple[float, float, int] | None = None
    variation: tuple[int, float] | None = None
    cache: Cache | None = None
    t5_length: int | None = None
    padding: Padding = "released"
    image: str | None = None
    mask: str | None = None
    strength: float = 1.0
    conditions: tuple[ConditionUse, ...] = ()
    stop: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", strict.text("prompt", self.prompt, strict.MAX_PROMPT))
        if self.negative is not None:
            object.__setattr__(self, "negative", strict.text("negative", self.negative, strict.MAX_PROMPT))
        if not strict.text("model", self.model):
            raise SettingsError("model must be named, got ''")
        if len(self.loras) > MAX_LORAS:
            raise InputError(f"{len(self.loras)} LoRAs at once; at most {MAX_LORAS} are taken")
        whole("images", self.images, 1, MAX_IMAGES)
        whole("seed", self.seed, 0, MAX_SEED + 1 - self.images)
        solver(strict.text("solver", self.solver, 100))
        if self.variation is not None:
            whole("the seed of variation", self.variation[0], 0, MAX_SEED + 1 - self.images)
            check_number("the amount of variation", self.variation[1], 0, 1)
        if self.t5_length is not None:
            whole("t5_length", self.t5_length, 1)
        check_padding(self.padding)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.image is None and self.strength != 1:
            raise InputError(f"strength {self.strength!r} says how much of an image to change, and there is no image")
        if isinstance(self.cache, Measure):
            raise InputError("the cache 'measure' measures and spares nothing: it makes no picture of its own")
        for i, use in enumerate(self.conditions):
            if not isinstance(use, ConditionUse):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError(f"conditions[{i}] must be a ConditionUse, got {strict.shown(use)}")
        for f in fields(self):
            try:
                hash(getattr(self, f.name))
            except TypeError as error:
                raise InputError(f"{f.name} must be made of tuples, not of lists: {error}") from None
        if self.model in VARIANTS or self.model in ALIASES:
            self.check(variant(self.model))

    def check(self, chosen: Variant) -> None:
        """Check what depends on the model, without its weights. Done when the record is made if it names a variant.

        Raises:
            InputError: as `Pipeline.generate`.
        """
        self.plan(chosen)

    def plan(self, chosen: Variant, conditions: Sequence[Condition] = ()) -> Plan:
        """The call that it stands for, resolved for a model.

        Args:
            conditions: those that `Request.conditions` tells of, if they are at hand: their tokens count.

        Raises:
            InputError: as `Pipeline.generate`.
        """
        return Plan.of(
            chosen,
            **self.arguments(),
            image=self.image,
            mask=self.mask,
            strength=self.strength,
            conditions=conditions,
        )

    @property
    def pictures(self) -> tuple[str, ...]:
        """The SHA-256 of every picture that it needs."""
        given = tuple(digest for digest in (self.image, self.mask) if digest is not None)
        return (*given, *(digest for use in self.conditions for digest in use.pictures))

    @property
    def _spacing(self) -> str | list[float]:
        return self.schedule if isinstance(self.schedule, str) else list(self.schedule)

    def size(self, chosen: Variant) -> tuple[int, int]:
        """Width and height that will be drawn, in pixels."""
        plan = self.plan(chosen)
        return plan.width, plan.height

    def steps_in_all(self, chosen: Variant) -> int:
        """Steps of all pictures together, as `progress` counts them."""
        return self.images * self.plan(chosen).steps

    def single(self, i: int) -> Request:
        """Picture i of this request, as a request of its own."""
        varied = None if self.variation is None else (self.variation[0] + i, self.variation[1])
        return replace(self, images=1, seed=self.seed + i, variation=varied)

    def arguments(self) -> dict[str, Any]:
        """What to call `Pipeline.generate` with; pictures and conditions are to be added by whoever has them."""
        elsewhere = ("model", "loras", "dtype", "image", "mask", "strength", "conditions")
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in elsewhere}
        found["schedule"] = self._spacing
        return found

    # As JSON

    def as_json(self) -> dict[str, Any]:
        """As plain JSON, without what is None or the default; `from_json` inverts it."""
        found: dict[str, Any] = {"prompt": self.prompt}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "prompt" and value != f.default:
                found[f.name] = _WRITE.get(f.name, _same)(value)
        return found

    def text(self) -> str:
        """As one line of JSON."""
        return json.dumps(self.as_json(), ensure_ascii=False)

    @classmethod
    def from_json(cls, given: str | bytes | Mapping[str, Any]) -> Request:
        """The request that a JSON text or object stands for.

        Raises:
            SettingsError: a field is unknown or of another kind than it should be.
            InputError: a value is out of its range.
        """
        about = strict.record(
            "settings", strict.parsed("settings", given) if isinstance(given, (str, bytes)) else given
        )
        strict.only("settings", about, [f.name for f in fields(cls)])
        if about.get("prompt") is None:
            raise SettingsError("settings: the field 'prompt' is missing")
        return cls(**{name: taken(name, value) for name, value in about.items() if value is not None})


def _same(value: Any) -> Any:
    return value


def _strength_as_json(value: Any) -> Any:
    if isinstance(value, AtLevels):
        return {"sigmas": list(value.sigmas), "values": list(value.values)}
    if callable(value):
        raise SettingsError("a function has no form as JSON; AtLevels has")
    return value


def _guide_as_json(guide: Cfg) -> dict[str, Any]:
    method = next(name for name, kind in GUIDES.items() if kind is type(guide))
    return {"method": method, **{f.name: _listed(_strength_as_json(getattr(guide, f.name))) for f in fields(guide)}}


def _cache_as_json(cache: Cache) -> dict[str, Any]:
    name = next(name for name, kind in CACHES.items() if kind is type(cache))
    return {"name": name, **{f.name: _listed(getattr(cache, f.name)) for f in fields(cache)}}  # pyright: ignore[reportArgumentType]


def _lora_as_json(use: LoraUse) -> dict[str, Any]:
    about: dict[str, Any] = {"file": use.file, "scale": use.strength}
    return about if use.sha256 is None else {**about, "sha256": use.sha256}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_WRITE = {
    "guidance": _strength_as_json,
    "guide": _guide_as_json,
    "cache": _cache_as_json,
    "loras": lambda uses: [_lora_as_json(use) for use in uses],
    "conditions": lambda uses: [use.as_json() for use in uses],
    "schedule": _listed,
    "restart": _listed,
    "variation": _listed,
}


def _lora(what: str, value: object) -> LoraUse:
    about = strict.record(what, value)
    strict.only(what, about, ("file", "scale", "sha256"))
    if "file" not in about:
        raise SettingsError(f"{what}: the field 'file' is missing")
    scale = about.get("scale", 1.0)
    if isinstance(scale, dict):
        scale = tuple(
            (start, strict.number(f"{what}: the scale of {strict.shown(start)}", x)) for start, x in scale.items()
        )
    else:
        scale = strict.number(f"{what}: scale", scale)
    return LoraUse(strict.text(f"{what}: file", about["file"]), scale, about.get("sha256"))


def loras(what: str, value: object) -> tuple[LoraUse, ...]:
    return tuple(_lora(f"{what}[{i}]", use) for i, use in enumerate(strict.items(what, value, MAX_LORAS)))


def _settings_of(what: str, kinds: Mapping[str, type[Any]], tag: str, value: object) -> Any:
    """One of several dataclasses from an object that names it in the field `tag`."""
    about = dict(strict.record(what, value))
    name = strict.text(f"{what}: {tag}", about.pop(tag, None), 100)
    for setting, x in about.items():
        if isinstance(x, list):
            about[setting] = tuple(
                strict.text(f"{what}: {setting}", part)
                if isinstance(part, str)
                else strict.number(f"{what}: {setting}", part)
                for part in strict.items(f"{what}: {setting}", x, MAX_LEVELS)
            )
        elif setting == "scale":
            about[setting] = _strength(f"{what}: {setting}", x)
        elif isinstance(x, (str, dict)):
            raise SettingsError(f"{what}: {setting} must be a number or a list, got {strict.shown(x)}")
    try:
        return made(what, kinds, name, about)
    except TypeError as error:
        raise SettingsError(f"{what} {strict.shown(name)}: a setting is of the wrong kind: {error}") from None


def _strength(what: str, value: object) -> float | AtLevels:
    if not isinstance(value, dict):
        return strict.number(what, value)
    strict.only(what, value, ("sigmas", "values"))
    sigmas, values = (strict.items(f"{what}: {name}", value.get(name), MAX_LEVELS) for name in ("sigmas", "values"))
    return AtLevels(
        tuple(strict.number(f"{what}: sigmas", x) for x in sigmas),
        tuple(strict.number(f"{what}: values", x) for x in values),
    )


def _spacing(what: str, value: object) -> str | tuple[float, ...]:
    if isinstance(value, str):
        return strict.text(what, value, 100)
    return tuple(strict.number(f"{what}[{i}]", level) for i, level in enumerate(strict.items(what, value, MAX_LEVELS)))


def _restart(what: str, value: object) -> tuple[float, float, int]:
    parts = strict.items(what, value, 3)
    if len(parts) != 3:
        raise SettingsError(f"{what} must be [low, high, times], got {strict.shown(parts)}")
    return strict.number(what, parts[0]), strict.number(what, parts[1]), strict.integer(what, parts[2])


def _variation(what: str, value: object) -> tuple[int, float]:
    parts = strict.items(what, value, 2)
    if len(parts) != 2:
        raise SettingsError(f"{what} must be [seed, amount], got {strict.shown(parts)}")
    return strict.integer(what, parts[0]), strict.number(what, parts[1])


def _prompt(what: str, value: object) -> str:
    return strict.text(what, value, strict.MAX_PROMPT)


def taken(name: str, value: object, said: str | None = None) -> Any:
    """The value of one field of a request from its JSON; errors name the field, as `said` if given."""
    said = name if said is None else said
    try:
        return READ[name](said, value)
    except InputError as error:
        raise error if said in str(error) else SettingsError(f"{said}: {error}") from None


READ: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _prompt,
    "negative": _prompt,
    "model": strict.text,
    "loras": loras,
    "seed": strict.integer,
    "images": strict.integer,
    "steps": strict.integer,
    "width": strict.integer,
    "height": strict.integer,
    "guidance": _strength,
    "guide": lambda what, value: _settings_of(what, GUIDES, "method", value),
    "solver": strict.text,
    "schedule": _spacing,
    "shift": strict.number,
    "restart": _restart,
    "variation": _variation,
    "cache": lambda what, value: _settings_of(what, CACHES, "name", value),
    "t5_length": strict.integer,
    "padding": strict.text,
    "image": strict.text,
    "mask": strict.text,
    "strength": strict.number,
    "conditions": conditions,
    "stop": strict.integer,
    "dtype": strict.text,
}
