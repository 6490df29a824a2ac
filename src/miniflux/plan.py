"""What one call of `Pipeline.generate` asks for, checked before anything is computed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from PIL import Image
from torch import Tensor

from miniflux.errors import InputError
from miniflux.memory.ledger import Run
from miniflux.models.autoencoder import AutoencoderConfig
from miniflux.sampling import CACHES, GUIDES, Moment, Schedule, Solver, custom_schedule
from miniflux.sampling import cache as find_cache
from miniflux.sampling import schedule as make_schedule
from miniflux.sampling.caches import Cache
from miniflux.sampling.checks import check_number, whole
from miniflux.sampling.guidance import Cfg, Nag, Scale
from miniflux.sampling.latents import PATCH, PIXELS_PER_TOKEN
from miniflux.sampling.schedules import SPACINGS, dynamic_shift, flux1_mu, static_shift, unshifted
from miniflux.variants import Variant

log = logging.getLogger(__name__)

MAX_SIDE = 8192  # pixels; far beyond what the models were trained on, small enough to catch a slip of the finger
MAX_STEPS = 1000
MAX_IMAGES = 1000

Progress = Callable[[int, int], None]
"""Called after every step with (steps done, steps in all), over all pictures of a call. May raise to stop the run."""

Callback = Callable[[int, Moment], "Tensor | None"]
"""Called after every step with (number of the picture, moment); latents (1, L, C) it returns replace the run's."""

Watch = Callable[[int, Moment], None]
"""As `Callback`, but it only looks on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all pictures of a call share."""

    rows: int
    columns: int
    levels: Schedule
    guidance: Scale | None
    method: Solver
    guide: Cfg | None
    cache: Cache | None
    resume: Moment | None
    stop: int | None

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width in the pixels that `initial_noise` and `unpack` count in."""
        return self.rows * PIXELS_PER_TOKEN, self.columns * PIXELS_PER_TOKEN

    def needs(self, width: int, height: int, text_tokens: int) -> Run:
        """What the memory that a picture takes depends on."""
        calls = self.method.model_calls(self.levels.falling)
        texts = 2 if isinstance(self.guide, Nag) else 1
        return Run(width=width, height=height, text_tokens=text_tokens, calls=calls, batch=texts)

    def described(self) -> dict[str, Any]:
        """As plain JSON: functions as their values at the noise levels."""

        def plain(value: Any) -> Any:
            if callable(value):
                return [value(sigma) for sigma in self.levels[:-1]]
            return _listed(value)

        guide = None
        if self.guide is not None:
            method = next(name for name, kind in GUIDES.items() if kind is type(self.guide))
            guide = {"method": method, **{f.name: plain(getattr(self.guide, f.name)) for f in fields(self.guide)}}
        return {
            "steps": self.levels.steps,
            "sigmas": list(self.levels),
            "solver": self.method.name,
            "guidance": plain(self.guidance),
            "guide": guide,
            "stop": self.stop,
            **({} if self.cache is None else {"cache": self.cache_described()}),
        }

    def tell(self, progress: Progress | None, done: int, total: int) -> None:
        """Tell how many of all pictures are done, in steps."""
        if progress is not None:
            steps = self.levels.steps
            progress(done * steps, total * steps)

    def cache_described(self) -> dict[str, Any]:
        name = next(name for name, kind in CACHES.items() if kind is type(self.cache))
        return {"name": name, **{f.name: _listed(getattr(self.cache, f.name)) for f in fields(self.cache)}}  # pyright: ignore


def _listed(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownArgumentType]


@dataclass
class Watcher:
    """Tells the caller's functions about every step of one picture, and keeps the last moment."""

    index: int
    total: int
    progress: Progress | None = None
    callback: Callback | None = None
    watch: Watch | None = None
    moment: Moment | None = None
    replaced: bool = False

    def __call__(self, moment: Moment) -> Tensor | None:
        replacement = None if self.callback is None else self.callback(self.index, moment)
        self.moment = moment if replacement is None else replace(moment, x=replacement.to(moment.x))
        self.replaced |= replacement is not None
        if self.watch is not None:
            self.watch(self.index, self.moment)
        if self.progress is not None:
            self.progress(self.index * moment.steps + moment.step, self.total * moment.steps)
        return replacement


AUTO = "auto"


def spacing_for(variant: Variant, method: Solver, spacing: str) -> str:
    """How the steps are spread: of `auto`, the way that suits the solver. Models made for a few levels keep those."""
    if spacing not in (AUTO, *SPACINGS):
        raise InputError(f"unknown schedule {spacing!r}; known: {', '.join((AUTO, *SPACINGS))}")
    if spacing != AUTO:
        return spacing
    return method.spacing if variant.shift else "uniform"


def levels_for(
    variant: Variant,
    spacing: str | Sequence[float],
    steps: int | None,
    tokens: int,
    shift: float | None,
    method: Solver,
) -> Schedule:
    """The noise levels of a whole picture of so many tokens; None for what the variant was made for."""
    steps = None if steps is None else whole("steps", steps, 1, MAX_STEPS)
    if not isinstance(spacing, str):
        levels = custom_schedule(spacing)
        if levels.steps != (steps or levels.steps):
            raise InputError(f"steps {steps} and a schedule of {levels.steps} steps contradict each other")
        if shift is not None:
            raise InputError(f"shift {shift!r} cannot be applied to noise levels of your own")
        return levels
    own = dynamic_shift(flux1_mu(tokens)) if variant.shift else unshifted
    curve = own if shift is None else static_shift(shift)
    return make_schedule(spacing_for(variant, method, spacing), variant.steps if steps is None else steps, curve)


def guidance_for(variant: Variant, embedded: bool, guidance: Scale | None) -> Scale | None:
    """What the guidance input is told; None for networks without one."""
    if not embedded:
        if guidance is not None:
            raise InputError(f"{variant.name} has no guidance input: leave guidance out, got {guidance!r}")
        return None
    if guidance is None:
        return variant.guidance
    if callable(guidance):
        return guidance
    check_number("guidance", guidance, 0)
    return float(guidance)


def cache_for(variant: Variant, cache: Cache | str | None) -> Cache | None:
    """A step cache, given or by its name; MagCache with the table of the variant."""
    if not isinstance(cache, str):
        return cache
    return find_cache(cache, ratios=variant.mag_ratios) if cache == "mag" else find_cache(cache)


def size_for(
    variant: Variant,
    config: AutoencoderConfig,
    width: int | None,
    height: int | None,
    image: Image.Image | Tensor | None = None,
) -> tuple[int, int]:
    """Width and height to draw, in pixels: as asked for and rounded up to whole tokens, or those of the image."""
    scale = config.downscale
    multiple = scale * PATCH
    if image is None:
        return _side("width", width, variant.size, multiple), _side("height", height, variant.size, multiple)
    if isinstance(image, Tensor):
        if image.ndim != 4 or image.shape[:2] != (1, config.z_channels):
            raise InputError(f"latents must be (1, {config.z_channels}, h, w), got {tuple(image.shape)}")
        given = image.shape[3] * scale, image.shape[2] * scale
    else:
        given = image.size
    if any(side % multiple for side in given) or (width or given[0], height or given[1]) != given:
        wanted = f"{width or given[0]}x{height or given[1]}"
        raise InputError(
            f"the image is {given[0]}x{given[1]}, to be drawn at {wanted}: resize it to the size wanted, multiples of "
            f"{multiple}"
        )
    return given


def warn_of_result(variant: Variant, width: int, height: int, levels: Schedule) -> None:
    """Say what is allowed and seldom meant: a size that the model never learned, noise that is left in the picture."""
    if (width, height) not in variant.learned:
        log.warning(
            "%dx%d is not a size that %s was trained on, and may come out wrong; it learned %s",
            width,
            height,
            variant.name,
            variant.learned,
        )
    if levels[-1] > 0:
        log.warning("the noise levels end at %g, not at 0: so much noise is left in the picture", levels[-1])


def _side(name: str, side: int | None, default: int, multiple: int) -> int:
    side = default if side is None else whole(name, side, multiple, MAX_SIDE)
    rounded = multiple * math.ceil(side / multiple)
    if rounded != side:
        log.warning("%s %d is not a multiple of %d: drawing %d", name, side, multiple, rounded)
    return rounded
