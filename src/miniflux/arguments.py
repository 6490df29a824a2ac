"""The arguments of `Pipeline.generate`, each checked by itself and made into what the library works with."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miniflux.checks import check_number, finite, plain, several, shown, whole
from miniflux.conditions import Condition, Control, Fill
from miniflux.conditions.img2img import check_pixels
from miniflux.conditions.masks import check_mask
from miniflux.errors import InputError
from miniflux.families import FAMILIES
from miniflux.lora.adapters import adapters_of
from miniflux.models.autoencoder import AutoencoderSizes
from miniflux.models.transformer import Transformer
from miniflux.pictures import open_picture
from miniflux.sampling import CACHES, GUIDES, Moment, Schedule, Solver, custom_schedule
from miniflux.sampling import cache as find_cache
from miniflux.sampling import schedule as make_schedule
from miniflux.sampling.caches import Cache
from miniflux.sampling.guidance import Cfg, Scale, named_guide
from miniflux.sampling.latents import MAX_SEED
from miniflux.sampling.schedules import SPACINGS, static_shift, unshifted
from miniflux.sampling.solvers import SOLVERS
from miniflux.text.decoding import repaired
from miniflux.variants import Variant

log = logging.getLogger(__name__)

CONDITION = ("check", "levels", "described", "tokens", "added")  # what a condition can be asked

MAX_SIDE = 8192  # pixels; far beyond what the models were trained on, small enough to catch a slip of the finger
MAX_STEPS = 1000
MAX_IMAGES = 1000
MAX_TEXT = 16384  # T5 tokens; the ledger refuses far fewer of the full-size encoder

Progress = Callable[[int, int], None]
"""Called after every step with (steps done, steps in all), over all pictures of a call. May raise to stop the run."""

Callback = Callable[[int, Moment], "Tensor | None"]
"""Called after every step with (number of the picture, moment); latents (1, L, C) it returns replace the run's."""

Watch = Callable[[int, Moment], None]
"""As `Callback`, but it only looks on."""


def prompts_for(prompt: str | Iterable[str]) -> list[str]:
    """One prompt or several - a list, tuple, array, generator - as a list of Python's own strings.

    Raises:
        InputError: there is none, or one is no string or holds half a character.
    """
    prompt = plain(prompt)
    several = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(several, (bytes, Mapping, AbstractSet)) or not isinstance(several, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"prompt must be a string or a list of strings, got {shown(several)}")
    prompts = list(several)
    if not prompts:
        raise InputError("prompt must be a string or a list of at least one, got an empty list")
    return [str(repaired("a prompt", text)) for text in prompts]


def seeds_for(seed: int | Sequence[int], total: int) -> tuple[int, ...]:
    """The seeds of so many pictures: those given, one for each; or one for the first, and one more for each after it.

    Raises:
        InputError: it is neither, or a seed is too large.
    """
    if isinstance(seed, torch.Generator):
        raise InputError(
            "seed must be a whole number, got a torch.Generator, whose place in its numbers no file can keep: give "
            "generator.initial_seed()"
        )
    seed = plain(seed)
    if (isinstance(seed, Sequence) and not isinstance(seed, (str, bytes))) or getattr(seed, "ndim", None) == 1:
        seeds = list(cast("Sequence[int]", seed))
        if len(seeds) != total:
            raise InputError(f"seed: {len(seeds)} seeds for {total} pictures; give one for each, or a single number")
        return tuple(whole(f"seed[{i}]", one, 0, MAX_SEED) for i, one in enumerate(seeds))
    first = whole("seed", cast(int, seed), 0, MAX_SEED + 1 - total)
    return tuple(range(first, first + total))


def guide_for(guide: Cfg | str | None) -> Cfg | None:
    """A guide, given or by its name; then at the usual strength of its kind (`sampling.guidance.USUAL`).

    Raises:
        InputError: it is neither.
    """
    if isinstance(guide, str):
        return named_guide(guide)
    if guide is not None and type(guide) not in GUIDES.values():
        raise InputError(f"guide must be one of {', '.join(GUIDES)}, or made by sampling.guide, got {shown(guide)}")
    return guide


def variation_for(variation: tuple[int, float] | None, total: int) -> tuple[int, float] | None:
    """(the other seed of the first picture, how far to go towards its noise)."""
    if variation is None:
        return None
    seed, amount = several("variation", variation, "seed, amount")
    if not finite(amount) or not 0 <= amount <= 1:
        raise InputError(f"the amount of variation must be a number from 0 to 1, got {shown(amount)}")
    return whole("the seed of variation", seed, 0, MAX_SEED + 1 - total), amount


def negative_for(negative: str | None, guide: Cfg | None) -> str | None:
    """What a picture should not show, of whole characters.

    Raises:
        InputError: it is no string or holds half a character, or there is no guide to read it.
    """
    if negative is not None and guide is None:
        raise InputError(
            f"negative {shown(negative)} has no effect without a guide, such as sampling.guide('cfg', scale=3)"
        )
    return None if negative is None else repaired("negative", negative)


def check_resumed(resume: Moment | None, stop: int | None, total: int, tokens: int) -> None:
    """Raises InputError unless a run of so many pictures and tokens may go on from there, and stop at a whole step."""
    if stop is not None:
        whole("stop", stop, 1)
    if resume is None:
        return
    if not isinstance(resume, Moment):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"resume must be the moment of an earlier result, got {shown(resume)}")
    if total > 1:
        raise InputError(f"resume is for a single picture, got {total}")
    if resume.x.shape[:2] != (1, tokens):
        raise InputError(f"resume is from a picture of {resume.x.shape[1]} tokens; this one has {tokens}")


def check_called(**functions: object) -> None:
    """Raises InputError unless each is a function or None."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise InputError(f"{name} must be a function, got {shown(function)}")


def listed_for(name: str, given: Any) -> tuple[Any, ...]:
    """A list or tuple as a tuple.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(given, list | tuple):
        raise InputError(f"{name} must be a list, got {shown(given)}")
    return tuple(given)  # pyright: ignore[reportUnknownArgumentType]


def conditions_for(conditions: Sequence[Condition]) -> tuple[Condition, ...]:
    """What steers the pictures beside their words.

    Raises:
        InputError: it is no list, or something in it is no condition.
    """
    given = listed_for("conditions", conditions)
    for i, one in enumerate(given):
        if isinstance(one, type) or not all(callable(getattr(one, name, None)) for name in CONDITION):
            raise InputError(f"conditions[{i}] must be one of miniflux.conditions, got {shown(one)}")
    return given


def check_channels(transformer: Transformer, conditions: Sequence[Condition]) -> None:
    """Raises InputError if the network reads more than the noisy picture, and no condition gives that."""
    more = transformer.config.in_channels - transformer.config.out_channels
    if not more or any(isinstance(condition, Control | Fill) for condition in conditions):
        return
    widened = (name for name, adapter in adapters_of(transformer).items() if adapter.config is not None)
    name = next(widened, None)
    if name is None and more != transformer.config.out_channels:
        raise InputError("this is a Fill model: it completes pictures, and wants image= and mask=")
    who = "this model reads" if name is None else f"LoRA {name!r} is a control LoRA: with it the network reads"
    raise InputError(
        f"{who} {more} channels of a control picture beside the noisy one: give "
        "conditions=[conditions.Control(picture)]" + ("" if name is None else ", or detach it")
    )


AUTO = "auto"


def spacing_for(variant: Variant, method: Solver, spacing: str) -> str:
    """How the steps are spread: of `auto`, the way that suits the solver. Models made for a few levels keep those."""
    if spacing not in (AUTO, *SPACINGS):
        raise InputError(f"unknown schedule {shown(spacing)}; known: {', '.join((AUTO, *SPACINGS))}")
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
            raise InputError(f"shift {shown(shift)} cannot be applied to noise levels of your own")
        return levels
    steps = variant.steps if steps is None else steps
    own = FAMILIES[variant.family].shift(tokens, steps) if variant.shift else unshifted
    curve = own if shift is None else static_shift(shift)
    if shift is None and steps > 1 and curve(1 - 1 / steps) == 1:  # 0.99... rounds to it
        raise InputError(
            f"a picture of {tokens} tokens is beyond the noise levels of {variant.name}, which all become 1: ask for a "
            f"smaller one, or give a shift"
        )
    return make_schedule(spacing_for(variant, method, spacing), steps, curve)


def guiding_for(variant: Variant, guide: Cfg | str | None, guidance: Scale | None) -> tuple[Cfg | None, Scale | None]:
    """How other texts steer, and what the guidance input is told; None for networks without one. Models that are drawn
    with classifier-free guidance have that, of the scale `guidance`, unless another guide is given.

    Raises:
        InputError: they are neither, or guidance would have no effect.
    """
    scale = guidance if guidance is None or callable(guidance) else float(check_number("guidance", guidance, 0))
    chosen = guide_for(guide)
    if variant.transformer.guidance_embed:
        return chosen, variant.guidance if scale is None else scale
    if variant.cfg is not None and chosen is None:
        return Cfg(scale=variant.cfg if scale is None else scale), None
    if scale is not None and variant.cfg is None:
        raise InputError(f"{variant.name} has no guidance input: leave guidance out, got {shown(guidance)}")
    if scale is not None:
        raise InputError(
            f"guidance {shown(guidance)} is the scale of the usual guide of {variant.name}, and another is given"
        )
    return chosen, None


def check_jumps(variant: Variant, method: Solver) -> None:
    """Raises InputError if a flow map, which is told where each step leads, is to be drawn by a solver that asks it for
    slopes at single places."""
    if getattr(variant.transformer, "flow_map", False) and method.jumps is None:
        jumping = ", ".join(name for name, one in SOLVERS.items() if one.jumps is not None)
        raise InputError(
            f"{variant.name} is a flow map: it is told which noise level a step leads to, and {method.name} needs "
            f"slopes at single levels; solvers for it are {jumping}"
        )


def cache_for(variant: Variant, cache: Cache | str | None) -> Cache | None:
    """A step cache, given or by its name; MagCache with the table of the variant.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(cache, str):
        if cache is not None and type(cache) not in CACHES.values():
            raise InputError(f"cache must be one of {', '.join(CACHES)}, or made by sampling.cache, got {shown(cache)}")
        return cache
    return find_cache(cache, ratios=variant.mag_ratios) if cache == "mag" else find_cache(cache)


Source = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor
"""A picture to change: a path, a Pillow picture, an array (H, W, 3) of 8-bit RGB, pixels (3, H, W) in [-1, 1]; or
latents (1, C, h, w)."""


def image_for(image: Source | None, config: AutoencoderSizes) -> Image.Image | Tensor | None:
    """A picture as `open_picture` gives it; pixels and latents are themselves.

    Raises:
        InputError: it is none of what `Source` says, or its numbers are not in their range.
    """
    if image is None or isinstance(image, (str, os.PathLike, bytes, Image.Image)):
        return None if image is None else open_picture(image)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise InputError(
                f"an image as an array must be (H, W, 3) of uint8, RGB from 0 to 255, got {image.shape} of "
                f"{image.dtype}; pixels in [-1, 1] are given as a tensor (3, H, W)"
            )
        return open_picture(Image.fromarray(image))
    if not isinstance(image, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"image must be a path, a Pillow picture, an array (H, W, 3) of uint8, pixels (3, H, W) in [-1, 1] or "
            f"latents (1, {config.latent_channels}, h, w), got {shown(image)}"
        )
    is_latent, shape = image.ndim == 4, tuple(image.shape)
    if shape[: image.ndim - 2] != ((1, config.latent_channels) if is_latent else (3,)) or not image.numel():
        raise InputError(
            f"pixels must be (3, H, W), and latents must be (1, {config.latent_channels}, h, w), got a tensor {shape}"
        )
    if not is_latent:
        check_pixels("pixels", image)
    elif not image.is_floating_point() or not bool(torch.isfinite(image).all()):
        raise InputError(f"latents must be of finite floating-point numbers, got a tensor {shape} of {image.dtype}")
    return image.detach()


Mask = str | os.PathLike[str] | Image.Image | Tensor
"""Where a picture is changed: a grey picture or its path, white (or a tensor (H, W) of 1) for what is drawn anew."""


def mask_for(mask: Mask | None, image: Image.Image | Tensor | None, downscale: int = 1) -> Tensor | None:
    """A mask (H, W) from 0 to 1, of the size of the picture.

    Args:
        image: as `image_for` gives it.
        downscale: pixels of a side of the picture for one of latents.

    Raises:
        InputError: it is none of what `Mask` says, of another size, empty, or there is no picture.
    """
    if mask is None:
        return None
    if image is None:
        raise InputError("a mask says where a picture is changed, and no image is given")
    if isinstance(mask, Tensor):
        check_mask(mask)
        given = mask.detach().float().cpu()
    else:
        seen = open_picture(mask)
        if seen.mode == "RGBA":
            raise InputError("a mask is grey, white for what is drawn anew; this one is transparent in places")
        white = 65535 if seen.mode == "I;16" else 255
        grey = seen if seen.mode == "I;16" else seen.convert("L")
        given = torch.from_numpy(np.asarray(grey).astype(np.float32)) / white
    if isinstance(image, Tensor):
        height, width = (side * (downscale if image.ndim == 4 else 1) for side in image.shape[-2:])
    else:
        width, height = image.size
    check_mask(given, (width, height))
    if not bool(given.any()):
        raise InputError("the mask is black everywhere: nothing would be drawn")
    return given


def size_for(
    variant: Variant,
    config: AutoencoderSizes,
    width: int | None,
    height: int | None,
    image: Image.Image | Tensor | None = None,
) -> tuple[int, int]:
    """Width and height to draw, in pixels: as asked for and rounded up to whole tokens, or those of the image, which is
    of the kinds that `image_for` gives."""
    scale = config.downscale
    multiple = config.unit
    if image is None:
        return _side("width", width, variant.size, multiple), _side("height", height, variant.size, multiple)
    if isinstance(image, Tensor):
        scale = scale if image.ndim == 4 else 1
        given = image.shape[-1] * scale, image.shape[-2] * scale
    else:
        given = image.size
    size, wanted = "x".join(map(str, given)), f"{width or given[0]}x{height or given[1]}"
    if any(side % multiple for side in given):
        raise InputError(f"the image is {size}: resize it to multiples of {multiple}")
    if size != wanted:
        raise InputError(f"the image is {size}, to be drawn at {wanted}: resize it to that")
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
