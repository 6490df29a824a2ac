"""From noise to latents: the loop that follows the velocity field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from miniflux.checks import shown
from miniflux.errors import InputError
from miniflux.models.flux1 import Attend, RunBlock, run_block
from miniflux.models.layers import attention, rotations_kept
from miniflux.models.transformer import Transformer, TransformerConfig
from miniflux.sampling.caches import OTHERWISE, Bill, Branch, Cache
from miniflux.sampling.forwards import Told, Velocity, Words, flux1_velocity
from miniflux.sampling.guidance import Cfg, Nag, Scale, SkipLayer, scale_at
from miniflux.sampling.observing import Call, Observer
from miniflux.sampling.running import advance, start
from miniflux.sampling.schedules import Schedule, custom_schedule
from miniflux.sampling.solvers import Solver, State, StepNoise, data, solver

RESTART_KEY = 2**32  # steps of this number on are those of `StepNoise` for restarts


@dataclass(frozen=True)
class Moment:
    """A run between two steps: enough to go on from, bit for bit.

    Attributes:
        step, steps: steps done, and in all.
        sigma: the noise level reached.
        x: the latents (B, L, C), float32.
        picture: the finished latents that the last prediction points to.
        state: what the solver remembers.
        memory: what the guide remembers.
    """

    step: int
    steps: int
    sigma: float
    x: Tensor
    picture: Tensor
    state: State = field(repr=False)
    memory: Tensor | None = field(repr=False)

    def rows(self) -> list[Moment]:
        """The moment of each picture of a batch."""
        if len(self.x) == 1:
            return [self]

        def of(i: int) -> Moment:
            row = slice(i, i + 1)
            memory = None if self.memory is None else self.memory[row]
            return replace(self, x=self.x[row], picture=self.picture[row], state=self.state.row(i), memory=memory)

        return [of(i) for i in range(len(self.x))]


Wrap = Callable[[RunBlock], RunBlock]
"""From what runs a block to what does so in its place: looks on, adds, or leaves the block out."""

StepCallback = Callable[[Moment], "Tensor | None"]
"""Called after each step. Latents that it returns take the place of `moment.x`; raising stops the run."""


@torch.inference_mode()
@rotations_kept()
def denoise(
    model: Transformer,
    img: Tensor,
    img_ids: Tensor,
    txt: Words | Tensor,
    txt_ids: Tensor | None = None,
    vec: Tensor | None = None,
    timesteps: Sequence[float] = (),
    guidance: Scale | None = 4.0,
    img_cond: Tensor | None = None,
    img_cond_seq: Tensor | None = None,
    img_cond_seq_ids: Tensor | None = None,
    txt_mask: Tensor | None = None,
    callback: StepCallback | None = None,
    *,
    method: Solver | str = "euler",
    rng: StepNoise | None = None,
    guide: Cfg | None = None,
    negative: Words | None = None,
    empty: Words | None = None,
    batched: bool | None = None,
    cache: Cache | None = None,
    bill: Bill | None = None,
    resume: Moment | None = None,
    stop: int | None = None,
    run: RunBlock = run_block,
    wraps: Sequence[Wrap] = (),
    attend: Attend = attention,
    velocity: Velocity = flux1_velocity,
    observers: Sequence[Observer] = (),
) -> Tensor:
    """Integrate the flow from the first to the last of `timesteps`.

    The first arguments are named as in `flux/sampling.py` of the original release.

    What runs a block is built from the inside out: `run`, each of `wraps` and of the observers, the bill, and
    outermost the step cache or skip-layer guidance, which may leave out all that is inside.

    Args:
        img: noise (B, L, C), packed.
        img_ids: positions of the image tokens, see `Flux1.forward`.
        txt: all that the network reads beside the picture, or T5's tokens alone; then with txt_ids, vec and txt_mask,
            see `Flux1.forward` (vec is its y).
        timesteps: noise levels, 1.0 ... 0.0, or a `Schedule`.
        guidance: strength for models with a guidance input, or a function of the noise level; the others ignore it.
        img_cond: tokens (B, L, C') appended on the channels of every step (Fill, Canny, Depth).
        img_cond_seq, img_cond_seq_ids: tokens (B, L', C) appended to the sequence of every step (Kontext).
        callback: called with the `Moment` after every step; what it returns replaces the latents; it may raise to stop.
        method: the solver, or its name.
        rng: noise for the steps of stochastic solvers and for restarts (`sampling.step_noise`).
        guide: how predictions for several texts are combined; None for the prompt's alone.
        negative, empty: the other texts a guide may want.
        batched: whether those predictions are made in one call of the network. None: where there is an accelerator with
            room for it. On a CPU one after the other takes the same time and half the memory.
        cache: a step cache, see `sampling.caches`.
        bill: counts blocks computed and skipped.
        resume: go on from here; `img` only says the dtype then.
        stop: end after so many steps.
        run: called in place of every block that is computed, see `Flux1.forward`.
        wraps: around it, for those who want to look on or add.
        attend: called in place of `attention`, likewise.
        velocity: calls the network, see `sampling.forwards`.
        observers: those who look on, see `sampling.observing`.

    Returns:
        (B, L, C), of float32 at least: rounding the sum of many small steps to bfloat16 would cost visible detail.

    Raises:
        InputError: noise levels that do not fall, an unknown solver, a text or noise that the guide or the solver needs
            and that is not there, or only one of img_cond_seq and img_cond_seq_ids.
        ConfigError: the model has a guidance input and guidance is None.
    """
    if (img_cond_seq is None) != (img_cond_seq_ids is None):
        raise InputError("img_cond_seq and img_cond_seq_ids belong together: got only one of them")
    schedule = timesteps if isinstance(timesteps, Schedule) else custom_schedule(timesteps)
    method = solver(method) if isinstance(method, str) else method
    guide = Cfg() if guide is None else guide
    steps = schedule.steps
    if not isinstance(txt, Words):
        txt = Words(txt, cast(Tensor, txt_ids), vec, txt_mask)
    words = {"positive": txt, "negative": negative, "empty": empty}
    _check(model, schedule, method, guide, words, rng)
    check_part(schedule, cache, resume, stop)

    around = [*wraps, *(observer.wrap for observer in observers)]
    tell = _Network(
        model,
        img.dtype,
        img_ids if img_cond_seq_ids is None else torch.cat((img_ids, img_cond_seq_ids), dim=1),
        {name: text for name, text in words.items() if text is not None},
        guidance,
        img_cond,
        img_cond_seq,
        _on_accelerator(img) if batched is None else batched,
        guide,
        cache,
        method.model_calls(schedule.falling),
        bill,
        wrapped(run, [*around, *([] if bill is None else [partial(_counting, bill)])]),
        attend,
        velocity,
        observers,
    )
    x, state, memory = img.float(), start(schedule), None
    if resume is not None:
        x, state, memory = resume.x, resume.state, resume.memory

    for sigma, sigma_next in schedule.remaining(state.step):
        if sigma_next > sigma:
            assert rng is not None
            x, state = (
                add_noise(x, sigma, sigma_next, rng(RESTART_KEY + state.skipped + state.step, x)),
                replace(state, past=(), kept=(), twin=None, share=1.0),
            )
            continue
        place, share = schedule.skipped + state.step, state.share if state.step == 0 else 1.0
        v, memory = tell(x, sigma, method.target(sigma_next), place, schedule.skipped + steps, memory)
        picture = data(x, v, sigma)
        x, state = advance(method, x, v, sigma, sigma_next, state, rng)
        while state.ask is not None:
            v, memory = tell(x, state.ask, None, place, schedule.skipped + steps, memory)
            x, state = advance(method, x, v, sigma, sigma_next, state, rng)
        if memory is not None and share < 1:  # of a shortened first step as much is remembered as was left of it
            memory = share * memory
        if callback is not None:
            replacement = callback(Moment(state.step, steps, sigma_next, x, picture, state, memory))
            x = x if replacement is None else replacement.to(x)
        if state.step == stop:
            break
    return x


ALONG_TOKENS = ("img", "img_ids", "img_cond", "img_cond_seq", "img_cond_seq_ids")


def model_calls(model: Transformer, **arguments: Any) -> list[Told]:
    """What the network is told in every call that `denoise` with these arguments, by name, is going to make.

    Solvers and guides are pure and choose noise levels without looking at the latents: so the run is rehearsed with one
    token of everything and a network that answers nothing but zeros.
    """
    calls: list[Told] = []

    def noted(model: Transformer, told: Told, **_: Any) -> Tensor:
        calls.append(told)
        return told.img.new_zeros(*told.img.shape[:2], model.config.out_channels)

    for name in ALONG_TOKENS:
        if arguments.get(name) is not None:
            arguments[name] = arguments[name][:, :1]
    denoise(model, **arguments, velocity=noted, rng=lambda step, x: torch.zeros_like(x))
    return calls


def add_noise(x: Tensor, sigma: float, sigma_next: float, noise: Tensor) -> Tensor:
    """Latents at a noise level, raised to a higher one by standard normal noise; from 0, x is the picture itself."""
    if sigma_next == 1:
        return noise
    keep = (1 - sigma_next) / (1 - sigma)
    return keep * x + math.sqrt(sigma_next**2 - (keep * sigma) ** 2) * noise


def _needed(name: str, words: Mapping[str, Words | None]) -> Words:
    text = words.get(name)
    if text is None:
        raise InputError(f"this guidance needs the {name} text, got None")
    return text


def _check(
    model: Transformer,
    schedule: Schedule,
    method: Solver,
    guide: Cfg,
    words: Mapping[str, Words | None],
    rng: StepNoise | None,
) -> None:
    """What texts and noise must be there, before the network is called."""
    wanted = _wanted(guide, schedule)
    for name in sorted({"negative" if name == "attended" else name for name in wanted} - {"skipped"}):
        _needed(name, words)
    if "attended" in wanted:
        positive, negative = (_needed(name, words).txt.shape[1] for name in ("positive", "negative"))
        if positive != negative:
            raise InputError(
                f"NAG needs texts of one length, got {positive} and {negative} tokens: pad them; pictures that stand "
                "behind the words (Redux) stand behind those of the prompt alone, and cannot be used with it"
            )
        if not model.config.joined:
            raise InputError(f"NAG guides attention of text and picture together, {OTHERWISE}")
    if isinstance(guide, SkipLayer):
        check_skipped(model.config, guide, schedule)
    if rng is None and (method.noisy or schedule.restarts):
        raise InputError(f"{method.name} with this schedule draws noise on the way: rng must be given, got None")


def _wanted(guide: Cfg, schedule: Schedule) -> set[str]:
    """The predictions that a guide wants at any level of a run."""
    places = range(schedule.skipped, schedule.skipped + schedule.steps)
    levels = zip(places, schedule.falling[:-1], strict=True)
    return {name for i, sigma in levels for name in guide.wants(sigma, i, places.stop)}


def check_skipped(config: TransformerConfig, guide: SkipLayer, schedule: Schedule) -> None:
    """Raises InputError unless the network has the blocks that are to be skipped, if any are in this run."""
    known = config.blocks
    for layer in guide.layers if "skipped" in _wanted(guide, schedule) else ():
        if layer not in known:
            raise InputError(f"no block {layer!r} to skip; known: {known[0]} to {known[-1]}")


def check_part(schedule: Schedule, cache: Cache | None, resume: Moment | None, stop: int | None) -> None:
    """Raises InputError unless a run may go on from there, and stop after so many steps."""
    if resume is not None and resume.steps != schedule.steps:
        raise InputError(f"resume is from a run of {resume.steps} steps; this one has {schedule.steps}")
    done = 0 if resume is None else resume.step
    if done == schedule.steps:
        raise InputError(f"resume is at the end of its run of {schedule.steps} steps: nothing is left to do")
    if stop is not None and not done < stop <= schedule.steps:
        raise InputError(f"stop must be a number of steps from {done + 1} to {schedule.steps}, got {shown(stop)}")
    if cache is not None and resume is not None:
        raise InputError("resume cannot be exact with a step cache: its memory is not part of a moment")


def _on_accelerator(x: Tensor) -> bool:
    """Whether two predictions at once are worth their memory: on CUDA, while a third of its memory is free."""
    if x.device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(x.device)
    return free > total / 3


@dataclass
class _Network:
    """The network with all that it is told in one run; called with latents and a noise level."""

    model: Transformer
    dtype: torch.dtype
    ids: Tensor
    words: dict[str, Words]
    guidance: Scale | None
    img_cond: Tensor | None
    img_cond_seq: Tensor | None
    batched: bool
    guide: Cfg
    cache: Cache | None
    calls: int
    bill: Bill | None
    run: RunBlock
    attend: Attend
    velocity: Velocity
    observers: Sequence[Observer]
    steps: int = 0
    call: int = -1
    step: int = -1
    number: int = 0  # of calls of the network in this step
    branches: dict[tuple[str, ...], Branch] = field(default_factory=dict[tuple[str, ...], Branch])

    def __call__(
        self, x: Tensor, sigma: float, target: float | None, step: int, steps: int, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The guided velocity (B, L, C) in float32, and what the guide remembers. `target`: the noise level that it is
        used to jump to."""
        self.call += 1
        if step != self.step:
            self.step, self.number = step, 0
        self.steps = steps
        wanted = self.guide.wants(sigma, step, steps)
        parts: dict[str, Tensor] = {}
        together = tuple(name for name in wanted if name not in ("skipped", "attended"))
        lengths = {_needed(name, self.words).txt.shape[1] for name in together}
        for names in [together] if self.batched and len(lengths) == 1 else [(name,) for name in together]:
            parts |= zip(names, self.predict(names, x, sigma, target).chunk(len(names)), strict=True)
        if "skipped" in wanted and isinstance(self.guide, SkipLayer):
            first = [name for name in self.model.config.blocks if name.startswith("double_blocks.")]
            first = first or self.model.config.blocks
            layers = self.guide.layers or (first[len(first) // 2],)
            parts["skipped"] = self.predict(("positive",), x, sigma, target, partial(_skip, layers, self.run))
        if "attended" in wanted and isinstance(self.guide, Nag):
            _needed("negative", self.words)
            attend = self.guide.attend(sigma, self.words["positive"].txt.shape[1], self.attend)
            v = self.predict(("positive", "negative"), x, sigma, target, attend=attend)
            parts["attended"] = v.chunk(2)[0]
        return self.guide.combine(parts, sigma, step, memory)

    def predict(
        self,
        names: tuple[str, ...],
        x: Tensor,
        sigma: float,
        target: float | None,
        run: RunBlock | None = None,
        **more: Any,
    ) -> Tensor:
        """One call of the network, for the texts of these names side by side: (len(names) * B, L, C)."""
        if run is None and self.cache is not None:
            if names not in self.branches:
                self.branches[names] = self.cache.start(self.model, self.calls, self.bill or Bill())
            run = branch = self.branches[names]
            branch.call, branch.inner = self.call, self.run
        run = self.run if run is None else run
        if run is not run_block:
            more["run"] = run
        if self.attend is not attention:
            more.setdefault("attend", self.attend)
        tokens = x.to(self.dtype)
        if self.img_cond is not None:
            tokens = torch.cat((tokens, self.img_cond), dim=-1)
        if self.img_cond_seq is not None:
            tokens = torch.cat((tokens, self.img_cond_seq), dim=1)
        rows = len(names) * len(x)
        strength = None if self.guidance is None else scale_at(self.guidance, sigma)
        told = Told(
            _joined([tokens] * len(names)),
            _joined([self.ids] * len(names)),
            Words.joined([self.words[name] for name in names]),
            torch.full((rows,), sigma, device=x.device, dtype=self.dtype),
            None if strength is None else torch.full((rows,), strength, device=x.device, dtype=self.dtype),
            None if target is None else torch.full((rows,), target, device=x.device, dtype=self.dtype),
            x.shape[1],
            names,
        )
        for observer in self.observers:
            observer.calling(Call(step=self.step, steps=self.steps, number=self.number, sigma=sigma, told=told))
        self.number += 1
        v = self.velocity(self.model, told, **more)
        return v[:, : x.shape[1]].float()


def _joined(parts: list[Tensor]) -> Tensor:
    """One batch; a single part is itself."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def wrapped(run: RunBlock, wraps: Sequence[Wrap]) -> RunBlock:
    """What runs a block, with each of the wraps around those before it."""
    for wrap in wraps:
        run = wrap(run)
    return run


def _counting(bill: Bill, run: RunBlock) -> RunBlock:
    """Writes every block that is computed on the bill."""

    def count(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
        bill.evaluated += 1
        return run(name, block, streams, context)

    return count


def _skip(
    layers: Sequence[str], run: RunBlock, name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]
) -> Any:
    return streams if name in layers else run(name, block, streams, context)
