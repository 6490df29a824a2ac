"""What one call of `Pipeline.generate` asks for, resolved in one place before anything is computed: `Plan.of`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from miniflux.arguments import (
    AUTO,
    MAX_IMAGES,
    MAX_STEPS,
    MAX_TEXT,
    Callback,
    Progress,
    Watch,
    cache_for,
    check_called,
    check_jumps,
    check_resumed,
    conditions_for,
    guiding_for,
    levels_for,
    listed_for,
    negative_for,
    prompts_for,
    seeds_for,
    size_for,
    spacing_for,
    variation_for,
)
from miniflux.checks import plain, several, shown, whole
from miniflux.conditions import Condition, Fill, Img2Img, Inpaint, Reference, fill_channels
from miniflux.conditions.condition import Picture
from miniflux.conditions.steering import waiting
from miniflux.errors import InputError
from miniflux.families import FAMILIES, Family
from miniflux.families.family import Box, Size
from miniflux.memory.ledger import Run
from miniflux.models.flux1 import Attend, RunBlock
from miniflux.sampling import (
    CACHES,
    GUIDES,
    Moment,
    Schedule,
    Solver,
    Wrap,
    custom_schedule,
    with_restarts,
)
from miniflux.sampling import solver as find_solver
from miniflux.sampling.caches import Cache, check_cached
from miniflux.sampling.denoising import check_part, check_skipped
from miniflux.sampling.guidance import Cfg, Nag, Scale, SkipLayer, scale_at
from miniflux.sampling.latents import PIXELS_PER_TOKEN
from miniflux.sampling.observing import Observer
from miniflux.text import ChatForm, Padding, Text, check_padding
from miniflux.variants import Variant


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A call of `generate` as it will be made: every argument checked, and what follows from them.

    Attributes:
        prompts: one per picture, before `images` of each.
        images: pictures per prompt.
        seeds: one per picture.
        variation: (other seed of the first picture, how far to go towards its noise).
        width, height: in pixels; rows, columns: in tokens.
        family: what its kind of models is like.
        chat: the form in which a language model reads prompts; None if none does.
        conditions: what steers the pictures beside their words.
        once: whether references are looked at once, for all steps.
        crop: what is kept of the picture that is drawn: left, top, right, bottom in pixels; None for all of it.
        spacing: the name of the schedule, or noise levels of the caller's own.
        steps_asked: what was asked for, or what the variant was made for.
        levels: the noise levels that are gone through.
        run, wraps, attend: functions of the caller's in place of, and around, those that run a block and attend.
        observers: those who look on, or change what happens.
        batch: pictures that are drawn together at most; None for what is fastest, "auto" also where somebody looks on.
    """

    prompts: list[str]
    images: int
    seeds: tuple[int, ...]
    variation: tuple[int, float] | None
    width: int
    height: int
    rows: int
    columns: int
    t5_length: int | None
    padding: Padding
    negative: str | None
    family: Family
    chat: ChatForm | None
    conditions: tuple[Condition, ...]
    once: bool
    crop: Box | None
    spacing: str | list[float]
    steps_asked: int | None
    shift: float | None
    restart: tuple[float, float, int] | None
    levels: Schedule
    guidance: Scale | None
    method: Solver
    guide: Cfg | None
    cache: Cache | None
    check_cache: bool
    resume: Moment | None
    stop: int | None
    run: RunBlock | None
    wraps: tuple[Wrap, ...]
    attend: Attend | None
    observers: tuple[Observer, ...]
    batch: int | Literal["auto"] | None

    @classmethod
    def of(
        cls,
        variant: Variant,
        prompt: str | Iterable[str],
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: Scale | None = None,
        width: int | None = None,
        height: int | None = None,
        images: int = 1,
        t5_length: int | None = None,
        padding: Padding = "released",
        solver: str = "euler",
        schedule: str | Sequence[float] = AUTO,
        shift: float | None = None,
        restart: tuple[float, float, int] | None = None,
        guide: Cfg | str | None = None,
        negative: str | None = None,
        variation: tuple[int, float] | None = None,
        image: Picture | str | None = None,
        mask: Tensor | str | None = None,
        strength: float = 1.0,
        conditions: Sequence[Condition] = (),
        cache: Cache | str | None = None,
        check_cache: bool = False,
        resume: Moment | None = None,
        stop: int | None = None,
        run: RunBlock | None = None,
        wraps: Sequence[Wrap] = (),
        attend: Attend | None = None,
        batch: int | Literal["auto"] | None = None,
    ) -> Plan:
        """Resolve a call. Needs no weights: whoever wants to know what a call will do asks here.

        Args:
            variant: the model, with the configs of its networks as they are.
            image: as `arguments.image_for` gives it, or its SHA-256; the others are those of `Pipeline.generate`.
            mask: as `arguments.mask_for` gives it, or its SHA-256.
            conditions: beside `image`, which is one.

        Raises:
            InputError: see `Pipeline.generate`.
        """
        # Which pictures, how large.
        prompts, images = prompts_for(prompt), whole("images", images, 1, MAX_IMAGES)
        total = images * len(prompts)
        seeds, variation = seeds_for(seed, total), variation_for(variation, total)
        wraps, conditions = listed_for("wraps", wraps), conditions_for(conditions)
        family, seen = FAMILIES[variant.family], sum(isinstance(c, Reference) for c in conditions)
        conditions = tuple(c.framed(family, seen) if isinstance(c, Reference) else c for c in conditions)
        changes = [c.known for c in conditions if isinstance(c, Img2Img)] if image is None else [image]
        known = next((one for one in changes if one is not None and not isinstance(one, str)), None)
        follows = not changes and width is None and height is None
        if follows:  # that of the first reference, if there is one
            width, height = next((c.shown_at for c in conditions if isinstance(c, Reference)), (None, None))
        width, height = size_for(variant, variant.autoencoder, width, height, known)
        conditions, crop = crop_for(family, conditions, (width, height), follows)
        rows, columns = (side // variant.autoencoder.unit for side in (height, width))
        steps = None if steps is None else whole("steps", steps, 1, MAX_STEPS)
        t5_length = variant.t5_length if t5_length is None else whole("t5_length", t5_length, 1, MAX_TEXT)
        strength, shift = plain(strength), plain(shift)
        guide, guidance = guiding_for(variant, guide, guidance)
        cache = cache_for(variant, cache)
        check_called(run=run, attend=attend, **{f"wraps[{i}]": wrap for i, wrap in enumerate(wraps)})
        negative = negative_for(negative, guide)
        check_resumed(resume, stop, total, rows * columns)
        check_padding(padding, Text.paddings if variant.chat is None else variant.chat.paddings)
        if check_cache and cache is None:
            raise InputError("check_cache compares with the run without a cache, and no cache is given")
        if image is None and strength != 1:
            raise InputError(f"strength {shown(strength)} says how much of an image to change, and no image is given")

        # Noise levels, from 1 to 0, and how to step from each to the next.
        method = find_solver(solver)
        check_jumps(variant, method)
        named = isinstance(schedule, str)
        spacing = spacing_for(variant, method, schedule) if named else list(custom_schedule(schedule))
        levels = levels_for(variant, spacing, steps, rows * columns, shift, method)
        if image is None and mask is not None:
            raise InputError("a mask says where a picture is changed, and no image is given")
        steered = conditions
        indices = [c.index for c in conditions if isinstance(c, Reference)]
        twice = next((index for index in indices if indices.count(index) > 1), None)
        if twice is not None:
            raise InputError(f"two references have index {twice}: give each its own, Reference(picture, index=2)")
        if image is not None:
            reads = variant.transformer.in_channels - variant.transformer.out_channels
            fills = reads == fill_channels(family, variant.transformer, variant.autoencoder.downscale)
            inpaint = Fill if fills else Inpaint
            changed = Img2Img(image, strength) if mask is None else inpaint(image, strength, mask)
            steered = (changed, *steered)
        for condition in steered:
            condition.check(family, variant.transformer)
            levels = condition.levels(levels)
        if restart is not None:
            restart = several("restart", restart, "low, high, times")
            levels = with_restarts(levels, *restart)
        if cache is not None:
            check_cached(variant.transformer)
        check_part(levels, cache, resume, plain(stop))
        if isinstance(guide, SkipLayer):
            check_skipped(variant.transformer, guide, levels)
        return cls(
            prompts=prompts,
            images=images,
            seeds=seeds,
            variation=variation,
            width=width,
            height=height,
            rows=rows,
            columns=columns,
            t5_length=t5_length,
            padding=padding,
            negative=negative,
            family=family,
            chat=variant.chat,
            conditions=steered,
            once=once_for(variant, family, conditions),
            crop=crop,
            spacing=spacing,
            steps_asked=variant.steps if steps is None and named else steps,
            shift=shift,
            restart=restart,
            levels=levels,
            guidance=guidance,
            method=method,
            guide=guide,
            cache=cache,
            check_cache=check_cache,
            resume=resume,
            stop=plain(stop),
            run=run,
            wraps=wraps,
            attend=attend,
            observers=(),
            batch=batch if batch is None or batch == "auto" else whole("batch", batch, 1, MAX_IMAGES),
        )

    def seen_by(self, observers: Sequence[Observer]) -> Plan:
        """The same call, with those who look on.

        Raises:
            InputError: they would alter less than they say.
        """
        altered = next((observer.alters for observer in observers if observer.alters is not None), None)
        if altered is not None and self.cache is not None:
            raise InputError(
                f"{altered}: a step cache leaves blocks out, and these are not altered: draw without cache"
            )
        if altered is not None and self.once:
            raise InputError(f"{altered}: references that are looked at once are not altered: give them once=False")
        return replace(self, observers=tuple(observers))

    @property
    def total(self) -> int:
        """Pictures of the call."""
        return self.images * len(self.prompts)

    @property
    def steps(self) -> int:
        """Steps of one picture, as `progress` counts them."""
        return self.levels.steps if self.stop is None else self.stop

    @property
    def calls(self) -> int:
        """Rows that go through the network for one picture: a call of it for each text that the guide wants, at each
        level that the solver asks for."""
        guide, done = self.guide or Cfg(), 0 if self.resume is None else self.resume.step
        rows, last = 0, self.levels.skipped + self.levels.steps
        for sigma, sigma_next in self.levels.remaining(done):
            if sigma_next > sigma or done == self.steps:
                continue
            wanted = guide.wants(sigma, self.levels.skipped + done, last)
            texts = sum(2 if name == "attended" else 1 for name in wanted)
            rows += texts * (self.method.calls if sigma_next > 0 else self.method.last_calls)
            done += 1
        return rows

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width in the pixels that `initial_noise` and `unpack` count in."""
        return self.rows * PIXELS_PER_TOKEN, self.columns * PIXELS_PER_TOKEN

    @property
    def wrapped(self) -> list[str]:
        """Which of the network's functions the caller replaced, and what observers change."""
        given = {"run": self.run, "wraps": self.wraps or None, "attend": self.attend}
        names = [name for name, function in given.items() if function is not None]
        return [*names, *(observer.alters for observer in self.observers if observer.alters is not None)]

    def longest(self, prompt: str) -> int:
        """Tokens that a prompt has at most, where it has as many as it needs: each byte one, and its form."""
        assert self.chat is not None
        tokens = len(self.chat.text(prompt).encode("utf-8", "surrogatepass"))
        return self.chat.multiple * -(-tokens // self.chat.multiple)

    def needs(self, device: torch.device | None = None) -> Run:
        """What the memory that a picture takes depends on; `device`: where it is drawn."""
        more = sum(condition.tokens(self.rows, self.columns) for condition in self.conditions)
        return Run(
            width=self.width,
            height=self.height,
            text_tokens=self.t5_length or max(map(self.longest, self.prompts)),
            more_tokens=0 if self.once else more,
            kept_tokens=more if self.once else 0,
            calls=self.calls,
            batch=2 if isinstance(self.guide, Nag) else 1,
            steering=waiting(self.conditions, device),
            added=sum(getattr(condition, "added_numbers", 0) for condition in self.conditions),
        )

    def described(self) -> dict[str, Any]:
        """As plain JSON: functions as their values at the noise levels."""

        def told(value: Any) -> Any:
            if callable(value):
                return [scale_at(cast(Scale, value), sigma) for sigma in self.levels[:-1]]
            return _listed(value)

        guide = None
        if self.guide is not None:
            method = next(name for name, kind in GUIDES.items() if kind is type(self.guide))
            guide = {"method": method, **{f.name: told(getattr(self.guide, f.name)) for f in fields(self.guide)}}
        changed = next((condition for condition in self.conditions if isinstance(condition, Img2Img)), None)
        others = [{"kind": type(c).__name__, **c.described()} for c in self.conditions if c is not changed]
        return {
            "width": self.width,
            "height": self.height,
            "t5_length": self.t5_length,
            "padding": self.padding,
            "steps": self.levels.steps,
            "sigmas": list(self.levels),
            "solver": self.method.name,
            "guidance": told(self.guidance),
            "guide": guide,
            "stop": self.stop,
            **({} if self.cache is None else {"cache": self.cache_described()}),
            **({"wrapped": self.wrapped} if self.wrapped else {}),
            "steps_asked": self.steps_asked,
            "schedule": self.spacing,
            "shift": self.shift,
            "restart": None if self.restart is None else list(self.restart),
            "negative": self.negative,
            **({"image": None, "strength": 1.0} if changed is None else changed.described()),
            **({"conditions": others} if others else {}),
        }

    def varied(self, i: int) -> tuple[int, float] | None:
        """The variation of picture i."""
        return None if self.variation is None else (self.variation[0] + i, self.variation[1])

    def described_picture(self, i: int) -> dict[str, Any]:
        """What the settings of picture i say beside those of the call."""
        varied = self.varied(i)
        return {
            "prompt": self.prompts[i // self.images],
            "seed": self.seeds[i],
            "variation": None if varied is None else list(varied),
        }

    def cache_described(self) -> dict[str, Any]:
        name = next(name for name, kind in CACHES.items() if kind is type(self.cache))
        return {"name": name, **{f.name: _listed(getattr(self.cache, f.name)) for f in fields(self.cache)}}  # pyright: ignore


def once_for(variant: Variant, family: Family, conditions: Sequence[Condition]) -> bool:
    """Whether references are looked at once.

    Raises:
        InputError: the network cannot, or they are not of one mind.
    """
    asked = {c.once for c in conditions if isinstance(c, Reference)} - {None}
    if len(asked) > 1:
        raise InputError("references see each other: look at all of them once, or at all of them at every step")
    once = asked.pop() if asked else variant.once
    if once and (not family.once or variant.transformer.guidance_embed):
        raise InputError(f"{variant.name} looks at references at every step: once=True is for FLUX.2 klein")
    return bool(once) and any(isinstance(c, Reference) for c in conditions)


def crop_for(
    family: Family, conditions: tuple[Condition, ...], size: Size, follows: bool
) -> tuple[tuple[Condition, ...], Box | None]:
    """What is kept of a picture whose only reference was mirrored around itself. The conditions say so, too: settings
    state every size, and one that somebody asks for is not cut.

    Args:
        conditions: references in their frames.
        size: width and height that are drawn.
        follows: whether they are those of the first reference, because nobody asked for others.

    Raises:
        InputError: it is to be cut back, and there is nothing to cut it back to.
    """
    seen = [c for c in conditions if isinstance(c, Reference)]
    if any(c.crop for c in seen):
        if not family.whole:
            raise InputError(
                "crop=True cuts a picture back to its reference, and models of this family see a part of it"
            )
        if len(seen) > 1:
            raise InputError(f"crop=True cuts a picture back to its only reference, and there are {len(seen)}")
        if seen[0].shown_at != size:
            shown_at, drawn = ("x".join(map(str, one)) for one in (seen[0].shown_at, size))
            raise InputError(
                f"crop=True cuts a picture of {shown_at} back to its reference, and it is drawn at {drawn}"
            )
        return conditions, seen[0].inside
    if not follows or not family.whole or len(seen) != 1 or seen[0].crop is False or seen[0].inside is None:
        return conditions, None
    return tuple(c.cropping() if isinstance(c, Reference) else c for c in conditions), seen[0].inside


def _listed(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownArgumentType]


class Steps:
    """Tells the caller how many steps of a call are done, never fewer than before."""

    def __init__(self, plan: Plan, progress: Progress | None) -> None:
        self.each, self.total, self.progress, self.done = plan.levels.steps, plan.total, progress, 0

    def reached(self, pictures: int, more: int) -> None:
        """So many pictures, and so many steps of others."""
        self.done = max(self.done, pictures * self.each + more)
        if self.progress is not None:  # even where it is nothing new: it may raise to stop
            self.progress(self.done, self.total * self.each)


class Watchers:
    """Tells the caller's functions about every step of pictures that are drawn together, and keeps their last moments.

    Attributes:
        moments: one for each picture.
        replaced: which pictures have latents that the callback returned.
    """

    def __init__(
        self,
        pictures: Sequence[int],
        progress: Callable[[int], None] | None = None,
        callback: Callback | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.pictures, self.progress, self.callback, self.watch = pictures, progress, callback, watch
        self.moments: list[Moment] = []
        self.replaced = [False] * len(pictures)

    def __call__(self, moment: Moment) -> Tensor | None:
        self.moments = moment.rows()
        replaced = [self._told(place) for place in range(len(self.pictures))]
        if self.progress is not None:
            for one in range(1, len(self.pictures) + 1):
                self.progress(len(self.pictures) * (moment.step - 1) + one)
        return torch.cat([moment.x for moment in self.moments]) if any(replaced) else None

    def _told(self, place: int) -> bool:
        """Whether the callback returned other latents for the picture at this place of the batch."""
        index, moment = self.pictures[place], self.moments[place]
        replacement = None if self.callback is None else self.callback(index, moment)
        if replacement is not None and getattr(replacement, "shape", None) != moment.x.shape:
            given = shown(getattr(replacement, "shape", replacement))
            raise InputError(f"callback must return None or latents {tuple(moment.x.shape)}, got {given}")
        if replacement is not None and not isinstance(replacement, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"callback must return None or a torch tensor, got {type(replacement).__name__}")
        if replacement is not None:
            self.moments[place], self.replaced[place] = replace(moment, x=replacement.to(moment.x)), True
        if self.watch is not None:
            self.watch(index, self.moments[place])
        return replacement is not None
