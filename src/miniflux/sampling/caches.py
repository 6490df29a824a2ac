"""Step caches: blocks whose outcome hardly changed since the last step are not computed again - and the bill for it.

What the blocks add to the image tokens changes slowly from step to step. Each cache is a frozen record of settings
that says when last time's addition (or an extrapolation of it) is used instead. `start` makes the working part for one
run, which is handed to `Flux1.forward` as `run` and counts every block it runs and every one it skips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from miniflux.checks import check_number, made, plain_fields, whole
from miniflux.errors import InputError
from miniflux.models.flux1 import RunBlock, run_block
from miniflux.models.transformer import Transformer, TransformerConfig

OTHERWISE = "and in this network each goes through blocks of its own first: leave it out"


@dataclass
class Bill:
    """What a run cost: blocks that were computed, and blocks that a cache spared."""

    evaluated: int = 0
    skipped: int = 0


class Branch:
    """What a cache does for one text (positive, negative ...) of one run; made by `Cache.start`.

    Subclasses decide. `reuse` is asked once per call of the network and `learn` told after every full one. All pictures
    of a batch share the decision.

    Attributes:
        after_first: decide after the first block, and take the addition from there.
        call: number of the run's call of the network, from 0; set from outside before each. A text that is wanted in a
            part of the steps only does not see all of them.
        inner: what runs the blocks that are computed, and writes them on the bill.
    """

    after_first = False
    call = 0
    inner: RunBlock = staticmethod(run_block)

    def __init__(self, network: Transformer, calls: int, bill: Bill) -> None:
        check_cached(network.config)
        names = network.config.blocks
        self.first, self.last = names[0], names[-1]
        self.calls, self.bill, self.learned = calls, bill, False
        self.text_tokens = 0
        self.base = self.kept = torch.empty(0)
        self.reusing = False

    def reuse(self, change: Tensor, block: nn.Module, about: Any) -> bool:
        """Whether this call may do without the blocks.

        Args:
            change: what the first block adds to the image tokens if `after_first`, else the tokens before it.
            block: the first one.
            about: what its modulations are, or are made of.
        """
        raise NotImplementedError

    def learn(self, addition: Tensor) -> None:
        """What the blocks added to the image tokens (B, L, hidden), in a full call."""
        self.kept = addition

    def addition(self) -> Tensor:
        """What they would have added, in a call without them; the same again, unless a subclass knows better."""
        return self.kept

    def __call__(
        self, name: str, block: nn.Module, streams: tuple[Tensor, ...], context: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        first = name == self.first
        if first:
            self.reusing = False
            self.text_tokens = streams[1].shape[1] if len(streams) == 2 else 0
            if not self.after_first:
                self.base = streams[0]
                self.reusing = self.reuse(streams[0], block, context[0]) and self.learned
        if self.reusing:
            self.bill.skipped += 1
            out = streams
        else:
            out = self.inner(name, block, streams, context)
        if first and self.after_first:
            self.base = out[0]
            self.reusing = self.reuse(out[0] - streams[0], block, context[0])
        if name == self.last:
            if self.reusing:
                out = self._with_image(out, self.base + self.addition())
            else:
                self.learn(self._image(out) - self.base)
                self.learned = True
        return out

    def _image(self, streams: tuple[Tensor, ...]) -> Tensor:
        return streams[0] if len(streams) == 2 else streams[0][:, self.text_tokens :]

    def _with_image(self, streams: tuple[Tensor, ...], image: Tensor) -> tuple[Tensor, ...]:
        if len(streams) == 2:
            return image, streams[1]
        return (torch.cat((streams[0][:, : self.text_tokens], image), dim=1),)


def _relative(new: Tensor, old: Tensor) -> float:
    return float((new - old).abs().mean() / old.abs().mean())


class _FirstBlock(Branch):
    after_first = True
    settings: FirstBlockCache

    def __init__(self, network: Transformer, calls: int, bill: Bill, settings: FirstBlockCache) -> None:
        super().__init__(network, calls, bill)
        self.settings = settings
        self.change: Tensor | None = None

    def reuse(self, change: Tensor, block: nn.Module, about: Any) -> bool:
        if self.change is not None and _relative(change, self.change) < self.settings.threshold:
            return True
        self.change = change
        return False


class _Tea(Branch):
    def __init__(self, network: Transformer, calls: int, bill: Bill, settings: TeaCache) -> None:
        super().__init__(network, calls, bill)
        self.settings = settings
        self.before: Tensor | None = None
        self.distance = 0.0

    def reuse(self, change: Tensor, block: nn.Module, about: Any) -> bool:
        modulated = cast(Tensor, cast(Any, block).modulated(change, about))
        before, self.before = self.before, modulated
        if before is None or self.call == self.calls - 1:
            self.distance = 0.0
            return False
        x = _relative(modulated, before)
        self.distance += sum(c * x**i for i, c in enumerate(reversed(self.settings.coefficients)))
        if self.distance < self.settings.threshold:
            return True
        self.distance = 0.0
        return False


class _Mag(Branch):
    def __init__(self, network: Transformer, calls: int, bill: Bill, settings: MagCache) -> None:
        super().__init__(network, calls, bill)
        self.settings = settings
        self.ratio, self.error, self.run = 1.0, 0.0, 0

    def reuse(self, change: Tensor, block: nn.Module, about: Any) -> bool:
        ratios, settings = self.settings.ratios, self.settings
        if self.call >= max(1, int(settings.retention * self.calls)):
            place = round(self.call * (len(ratios) - 1) / max(1, self.calls - 1))
            self.ratio *= ratios[place]
            self.error += abs(1 - self.ratio)
            self.run += 1
            if self.error < settings.threshold and self.run <= settings.longest:
                return True
        self.ratio, self.error, self.run = 1.0, 0.0, 0
        return False


class _Taylor(Branch):
    def __init__(self, network: Transformer, calls: int, bill: Bill, settings: TaylorSeer) -> None:
        super().__init__(network, calls, bill)
        self.settings = settings
        self.learned_at = -1
        self.differences: list[Tensor] = []

    def reuse(self, change: Tensor, block: nn.Module, about: Any) -> bool:
        if self.call < self.settings.warmup or self.call == self.calls - 1:
            return False
        return self.call - self.learned_at < self.settings.interval

    def learn(self, addition: Tensor) -> None:
        gap = self.call - self.learned_at
        new = [addition]
        for old in self.differences[: self.settings.order]:
            new.append((new[-1] - old) / gap)
        self.differences, self.learned_at = new, self.call

    def addition(self) -> Tensor:
        ahead = self.call - self.learned_at
        result = self.differences[0]
        for i, difference in enumerate(self.differences[1:], start=1):
            result = result + difference * (ahead**i / math.factorial(i))
        return result


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache:
    """Skip the others when the first block adds nearly what it added before (ParaAttention's first-block cache).

    Attributes:
        threshold: largest relative L1 change of that addition.
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        plain_fields(self)
        check_number("threshold", self.threshold, 0)

    def start(self, network: Transformer, calls: int, bill: Bill) -> Branch:
        """The working part for one text of a run with so many calls of the network.

        Raises:
            InputError: the cache lacks what it needs for this network.
        """
        return _FirstBlock(network, calls, bill, self)


@dataclass(frozen=True, kw_only=True)
class TeaCache:
    """Skip all blocks until the modulated input has moved far enough (arXiv 2411.19108).

    Attributes:
        threshold: of the summed, rescaled relative L1 changes.
        coefficients: of the polynomial that rescales them, the highest power first; FLUX.1's from the authors' code.
    """

    threshold: float = 0.25
    coefficients: Sequence[float] = (
        4.98651651e02,
        -2.83781631e02,
        5.58554382e01,
        -3.82021401e00,
        2.64230861e-01,
    )

    def __post_init__(self) -> None:
        plain_fields(self)
        check_number("threshold", self.threshold, 0)
        for coefficient in self.coefficients:
            check_number("a coefficient", coefficient, -math.inf)

    def start(self, network: Transformer, calls: int, bill: Bill) -> Branch:
        """See `FirstBlockCache.start`."""
        if not network.config.depth:
            raise InputError("TeaCache watches the first double block, and this network has none")
        return _Tea(network, calls, bill, self)


@dataclass(frozen=True, kw_only=True)
class MagCache:
    """Skip all blocks while the length of what they add is known to stay the same (arXiv 2506.09045).

    Attributes:
        ratios: by how much that length changes from each step to the next, measured once per model (`Measure`);
            spread over the steps of a run of another length.
        threshold: of the summed errors.
        longest: steps skipped in a row.
        retention: share of the steps at the start that are all computed.
    """

    ratios: Sequence[float] = ()
    threshold: float = 0.1
    longest: int = 3
    retention: float = 0.2

    def __post_init__(self) -> None:
        plain_fields(self)
        check_number("threshold", self.threshold, 0)
        whole("longest", self.longest, 1)
        check_number("retention", self.retention, 0, 1)
        for ratio in self.ratios:
            check_number("a ratio", ratio, 0)

    def start(self, network: Transformer, calls: int, bill: Bill) -> Branch:
        """See `FirstBlockCache.start`."""
        if not self.ratios:
            raise InputError("MagCache needs the ratios of its model: let a run with the cache `measure` find them")
        return _Mag(network, calls, bill, self)


@dataclass(frozen=True, kw_only=True)
class TaylorSeer:
    """Compute every n-th step and extrapolate in between (arXiv 2503.06923, here for the sum of all blocks).

    Attributes:
        interval: n.
        order: of the Taylor polynomial, from finite differences; 0 repeats the last one.
        warmup: steps at the start that are all computed.
    """

    interval: int = 2
    order: int = 1
    warmup: int = 3

    def __post_init__(self) -> None:
        plain_fields(self)
        whole("interval", self.interval, 1)
        whole("order", self.order, 0)
        whole("warmup", self.warmup, 1)

    def start(self, network: Transformer, calls: int, bill: Bill) -> Branch:
        """See `FirstBlockCache.start`."""
        return _Taylor(network, calls, bill, self)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Compute everything, and note how the length of what the blocks add changes: what `MagCache` wants to know.

    Attributes:
        runs: filled by runs, a list for each text of each: one ratio per call of the network.
    """

    runs: list[list[float]] = field(default_factory=list[list[float]])

    @property
    def ratios(self) -> list[float]:
        """Those of the last text of the last run."""
        return self.runs[-1]

    def start(self, network: Transformer, calls: int, bill: Bill) -> Branch:
        """See `FirstBlockCache.start`."""
        self.runs.append([])
        return _Watch(network, calls, bill, self.runs[-1])


class _Watch(Branch):
    def __init__(self, network: Transformer, calls: int, bill: Bill, ratios: list[float]) -> None:
        super().__init__(network, calls, bill)
        self.ratios, self.before = ratios, torch.empty(0)

    def reuse(self, change: Tensor, block: nn.Module, about: Any) -> bool:
        return False

    def learn(self, addition: Tensor) -> None:
        length = addition.norm(dim=-1)
        self.ratios.append(float((length / self.before).mean()) if len(self.before) else 1.0)
        self.before = length


Cache = FirstBlockCache | TeaCache | MagCache | TaylorSeer | Measure

CACHES: dict[str, type[Any]] = {
    "first-block": FirstBlockCache,
    "tea": TeaCache,
    "mag": MagCache,
    "taylor": TaylorSeer,
    "measure": Measure,
}


def check_cached(config: TransformerConfig) -> None:
    """Raises InputError unless image and text tokens go through all blocks together."""
    if not config.joined:
        raise InputError(f"step caches watch text and picture go through all blocks together, {OTHERWISE}")


def cache(name: str, **settings: Any) -> Cache:
    """A cache by name, with its settings.

    Raises:
        InputError: an unknown name or setting, or a value out of its range.
    """
    return made("cache", CACHES, name, settings)
