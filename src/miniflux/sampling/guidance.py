"""Guidance: how the predictions for several texts become one velocity.

A guide is a frozen record of settings. `wants` says which predictions a step needs, `combine` makes one of them:

    positive  the network with the prompt
    negative  with the negative prompt (empty if none is given)
    empty     with the empty prompt
    skipped   with the prompt, some blocks left out

At its neutral setting, and outside its window, a guide wants only the positive one and hands it on untouched. Any guide
goes with any solver and any model. The guidance input of distilled models is not among them: it is a number that
the network reads (arXiv 2210.03142), and stands beside any guide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from miniflux.checks import check_number, check_window, made, plain_fields, shown, whole
from miniflux.errors import InputError
from miniflux.models.flux1 import Attend
from miniflux.models.layers import attention

Scale = float | Callable[[float], float]
"""A strength, or a function from the noise level to it."""


TINY = 1e-12  # keeps a division by the length of nothing finite


def scale_at(scale: Scale, sigma: float) -> float:
    """The strength at a noise level; what a function gives is checked as a number would be."""
    if not callable(scale):
        return scale
    return check_number("scale", scale(sigma), 0)


@dataclass(frozen=True, kw_only=True)
class Cfg:
    """Classifier-free guidance (arXiv 2207.12598): negative + scale * (positive - negative).

    Attributes:
        scale: 1 is neutral; also a function of the noise level.
        window: the share of the steps it works in: from int(start * steps) up to, not including, int(stop * steps). Of
            a run that begins in the middle (`from_strength`), the steps of the whole schedule are counted.
        rescale: how far the result is brought back to the spread of the positive one, 0 to 1 (arXiv 2305.08891, 3.4).

    Raises:
        InputError: a number out of its range, or a window that is empty or reversed.
    """

    scale: Scale = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __post_init__(self) -> None:
        plain_fields(self)
        if not callable(self.scale):
            check_number("scale", self.scale, 0)
        check_window("window", self.window)
        check_number("rescale", self.rescale, 0, 1)

    def within(self, step: int, steps: int) -> bool:
        return int(self.window[0] * steps) <= step < int(self.window[1] * steps)

    def active(self, sigma: float, step: int, steps: int) -> bool:
        return self.within(step, steps) and scale_at(self.scale, sigma) != 1

    def wants(self, sigma: float, step: int, steps: int) -> tuple[str, ...]:
        """Names of the predictions needed at this noise level, in this step of so many."""
        return ("positive", "negative") if self.active(sigma, step, steps) else ("positive",)

    def combine(
        self, parts: Mapping[str, Tensor], sigma: float, step: int, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One velocity (B, L, C) from the predictions, and what the next call is to be given as `memory`."""
        positive = parts["positive"]
        if len(parts) == 1:
            return positive, memory
        v, memory = self.mix(parts, sigma, step, memory)
        if self.rescale:
            dims = tuple(range(1, v.ndim))
            spread = positive.std(dims, keepdim=True) / v.std(dims, keepdim=True).clamp(min=TINY)
            v = self.rescale * (v * spread) + (1 - self.rescale) * v
        return v, memory

    def mix(
        self, parts: Mapping[str, Tensor], sigma: float, step: int, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        negative = parts["negative"]
        return negative + scale_at(self.scale, sigma) * (parts["positive"] - negative), memory


@dataclass(frozen=True, kw_only=True)
class CfgZero(Cfg):
    """CFG-Zero* (arXiv 2503.18886): the negative prediction is scaled to fit the positive one; first steps stand still.

    Attributes:
        zero_steps: steps whose velocity is zero.
    """

    zero_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("zero_steps", self.zero_steps, 0)

    def mix(
        self, parts: Mapping[str, Tensor], sigma: float, step: int, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        positive, negative = parts["positive"], parts["negative"]
        if step < self.zero_steps:
            return torch.zeros_like(positive), memory
        dims = tuple(range(1, positive.ndim))
        fit = (positive * negative).sum(dims, keepdim=True) / (negative.square().sum(dims, keepdim=True) + 1e-8)
        return negative * fit + scale_at(self.scale, sigma) * (positive - negative * fit), memory


@dataclass(frozen=True, kw_only=True)
class Apg(Cfg):
    """Adaptive projected guidance (arXiv 2410.02416): the part of the push that lies along the prediction is weakened.

    Attributes:
        eta: weight of that part; 1 with momentum 0 and threshold 0 is plain guidance.
        threshold: longest push, as a norm over the whole picture; 0 for no limit.
        momentum: share of the pushes of earlier steps that is added; negative to take away.
    """

    eta: float = 1.0
    threshold: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eta", self.eta, -math.inf)
        check_number("threshold", self.threshold, 0)
        check_number("momentum", self.momentum, -1, 1)

    def mix(
        self, parts: Mapping[str, Tensor], sigma: float, step: int, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        positive, negative = parts["positive"], parts["negative"]
        dims = tuple(range(1, positive.ndim))
        push = positive - negative
        if self.momentum:
            push = memory = push if memory is None else push + self.momentum * memory
        if self.threshold:
            push = push * (self.threshold / push.norm(dim=dims, keepdim=True)).clamp(max=1)
        if self.eta != 1:
            direction = positive / positive.norm(dim=dims, keepdim=True).clamp(min=TINY)
            along = (push * direction).sum(dims, keepdim=True) * direction
            push = push - along + self.eta * along
        return negative + scale_at(self.scale, sigma) * push, memory


@dataclass(frozen=True, kw_only=True)
class PerpNeg(Cfg):
    """Perpendicular negative (arXiv 2304.04968): away only from what the negative prompt has beyond the positive one.

    Attributes:
        negative_scale: how strongly.
    """

    negative_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("negative_scale", self.negative_scale, 0)

    def wants(self, sigma: float, step: int, steps: int) -> tuple[str, ...]:
        return ("positive", "negative", "empty") if self.active(sigma, step, steps) else ("positive",)

    def mix(
        self, parts: Mapping[str, Tensor], sigma: float, step: int, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        positive, negative = parts["positive"] - parts["empty"], parts["negative"] - parts["empty"]
        dims = tuple(range(1, positive.ndim))
        share = (negative * positive).sum(dims, keepdim=True) / positive.square().sum(dims, keepdim=True).clamp(
            min=TINY
        )
        away = self.negative_scale * (negative - share * positive)
        return parts["empty"] + scale_at(self.scale, sigma) * (positive - away), memory


@dataclass(frozen=True, kw_only=True)
class SkipLayer(Cfg):
    """Skip-layer guidance: away from what the network predicts without some of its blocks (Stability's SD3.5).

    Attributes:
        skip_scale: 0 is neutral.
        layers: names of the blocks left out, such as `double_blocks.9`; empty for the middle double block.
        skip_window: as `window`, but without its first step, as in diffusers.
    """

    skip_scale: float = 2.8
    layers: tuple[str, ...] = ()
    skip_window: tuple[float, float] = (0.01, 0.2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("skip_scale", self.skip_scale, 0)
        check_window("skip_window", self.skip_window)
        if not isinstance(self.layers, tuple) or not all(isinstance(layer, str) for layer in self.layers):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"layers must be a tuple of names, got {shown(self.layers)}")

    def wants(self, sigma: float, step: int, steps: int) -> tuple[str, ...]:
        start, stop = self.skip_window
        skipping = self.skip_scale != 0 and int(start * steps) < step < int(stop * steps)
        return (*super().wants(sigma, step, steps), *(("skipped",) if skipping else ()))

    def mix(
        self, parts: Mapping[str, Tensor], sigma: float, step: int, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        v = super().mix(parts, sigma, step, memory)[0] if "negative" in parts else parts["positive"]
        if "skipped" in parts:
            v = v + self.skip_scale * (parts["positive"] - parts["skipped"])
        return v, memory


@dataclass(frozen=True, kw_only=True)
class Nag(Cfg):
    """Normalised attention guidance (arXiv 2505.21179): the negative prompt acts inside attention, so it also works on
    models of few steps that classifier-free guidance breaks.

    Attributes:
        scale: of the extrapolation in every attention; 1 is neutral.
        tau: longest the extrapolated features may become, as a ratio of L1 norms.
        alpha: share of the extrapolated features in the result; 0 is neutral.
    """

    tau: float = 2.5
    alpha: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau, 0)
        check_number("alpha", self.alpha, 0, 1)

    def wants(self, sigma: float, step: int, steps: int) -> tuple[str, ...]:
        """One prediction, made from both texts at once."""
        return ("attended",) if self.active(sigma, step, steps) and self.alpha else ("positive",)

    def combine(
        self, parts: Mapping[str, Tensor], sigma: float, step: int, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        (v,) = parts.values()
        return v, memory

    def attend(self, sigma: float, text_tokens: int, inner: Attend = attention) -> Attend:
        """Attention over a batch of pictures with the positive text and then the same ones with the negative: all image
        tokens get the guided features, so both halves see the same picture. `inner` attends for each half."""
        scale = scale_at(self.scale, sigma)

        def guided(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
            x = inner(q, k, v, pe, mask)
            text, image = x[:, :text_tokens], x[:, text_tokens:]
            positive, negative = rearrange(image, "(N B) L D -> N B L D", N=2)
            pushed = scale * positive - (scale - 1) * negative
            ratio = pushed.norm(p=1, dim=-1, keepdim=True) / (positive.norm(p=1, dim=-1, keepdim=True) + 1e-7)
            pushed = pushed * (ratio.clamp(max=self.tau) / ratio.clamp(min=1e-7))
            image = self.alpha * pushed + (1 - self.alpha) * positive
            return torch.cat((text, torch.cat((image, image))), dim=1)

        return guided


GUIDES: dict[str, type[Cfg]] = {
    "cfg": Cfg,
    "cfg-zero": CfgZero,
    "apg": Apg,
    "perp-neg": PerpNeg,
    "skip-layer": SkipLayer,
    "nag": Nag,
}


def guide(method: str, **settings: Any) -> Cfg:
    """A guide by name, with its settings.

    Raises:
        InputError: an unknown name or setting, or a value out of its range.
    """
    return made("guidance method", GUIDES, method, settings)


USUAL: dict[str, float] = {"cfg": 3.0, "cfg-zero": 3.0, "apg": 3.0, "perp-neg": 3.0, "nag": 5.0}
"""Scales of guides that are asked for by name alone: at their own default, 1, they would do nothing. That of NAG is its
authors' (https://github.com/ChenDarYen/Normalized-Attention-Guidance); skip-layer has one of its own, 2.8."""


def named_guide(method: str) -> Cfg:
    """A guide by name alone, at a usual strength.

    Raises:
        InputError: an unknown name.
    """
    return guide(method, **({"scale": USUAL[method]} if method in USUAL else {}))
