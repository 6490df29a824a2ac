"""The protocol of conditions, what they may add to a run, and how several are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from miniflux.errors import InputError
from miniflux.families import Family
from miniflux.models.flux1 import Flux1Config
from miniflux.models.flux2 import Flux2Config
from miniflux.models.transformer import TransformerConfig
from miniflux.sampling import Schedule, Told, Words, Wrap

Picture = Image.Image | Tensor
Config = TypeVar("Config", Flux1Config, Flux2Config)


@dataclass(frozen=True)
class Scene:
    """What a condition is asked for: a picture of this size, with whose networks.

    Attributes:
        width, height: in pixels; rows, columns: in image tokens.
        transformer: the sizes of the network that draws.
        levels: the noise levels that are gone through.
        encode: a picture, or latents, to latents (1, C, h, w), float32 on the CPU.
    """

    family: Family
    transformer: TransformerConfig
    width: int
    height: int
    rows: int
    columns: int
    levels: Schedule
    encode: Callable[[Picture], Tensor]


@dataclass(frozen=True, kw_only=True)
class Added:
    """What a condition adds to a run; nothing, unless it is said.

    Attributes:
        start: latents (1, C, h, w) that the noise is added to, instead of noise alone.
        channels: tokens (1, L, C') beside those of the picture, at every step.
        tokens, ids: tokens (1, L', C) behind them, and their positions.
        words: what becomes of the words of the prompt.
        hears: told of every call of the network before it is made, with what the network is told.
        wraps: around the network's blocks.
        keep: (latents (1, C, h, w), the picture's noise, noise level) -> latents, after every step.
        paste: pixels (3, H, W) -> pixels, after decoding.
    """

    start: Tensor | None = None
    channels: Tensor | None = None
    tokens: Tensor | None = None
    ids: Tensor | None = None
    words: Callable[[Words], Words] | None = None
    hears: tuple[Callable[[Told], None], ...] = ()
    wraps: tuple[Wrap, ...] = ()
    keep: Callable[[Tensor, Tensor, float], Tensor] | None = None
    paste: Callable[[Tensor], Tensor] | None = None


class Condition(Protocol):
    """What steers a picture beside its words. One with a network of its own has `files`, too: (what, file) of all that
    it was loaded from, see `conditions.Steering`; and one that holds numbers for every image token `added_numbers`."""

    def check(self, family: Family, config: TransformerConfig) -> None:
        """Raises InputError if a network with this config cannot be steered so."""
        ...

    def levels(self, levels: Schedule) -> Schedule:
        """The noise levels that are gone through, of those of a whole picture."""
        ...

    def described(self) -> dict[str, Any]:
        """For settings, the cache's key and replay: plain JSON that tells it from every other."""
        ...

    def tokens(self, rows: int, columns: int) -> int:
        """How many tokens it adds to a picture of so many rows and columns: memory depends on it."""
        ...

    def added(self, scene: Scene) -> Added:
        """What it adds; called once for all pictures of a call."""
        ...


def flux1_only(what: str, config: TransformerConfig) -> Flux1Config:
    """The config, of a network of FLUX.1.

    Raises:
        InputError: it is of another family.
    """
    return made_for(Flux1Config, f"{what} that can be loaded here were made for FLUX.1", config)


def made_for(kind: type[Config], said: str, config: TransformerConfig) -> Config:
    """The config, of a network of this kind.

    Args:
        said: what was made for that kind, as the refusal begins.

    Raises:
        InputError: it is of another kind.
    """
    if not isinstance(config, kind):
        raise InputError(f"{said}, and this network is a {type(config).__name__.removesuffix('Config')}")
    return config


def joined(added: Sequence[Added]) -> Added:
    """What several conditions add, together: tokens one behind the other, wraps one around the other.

    Raises:
        InputError: two of them want the same place: a start, channels, a mask.
    """
    whole = Added()
    for one in added:
        for name in ("start", "channels", "keep", "paste"):
            if getattr(whole, name) is not None and getattr(one, name) is not None:
                raise InputError(f"two conditions give {name} to one picture: leave one of them out")
        taken = {f.name: value for f in fields(one) if (value := getattr(one, f.name)) is not None}
        if one.tokens is not None and whole.tokens is not None:
            assert one.ids is not None and whole.ids is not None
            taken |= {
                "tokens": torch.cat((whole.tokens, one.tokens), dim=1),
                "ids": torch.cat((whole.ids, one.ids), dim=1),
            }
        if one.words is not None and whole.words is not None:
            taken["words"] = partial(_one_after_the_other, whole.words, one.words)
        taken |= {"wraps": (*whole.wraps, *one.wraps), "hears": (*whole.hears, *one.hears)}
        whole = replace(whole, **taken)
    return whole


def _one_after_the_other(first: Callable[[Words], Words], second: Callable[[Words], Words], words: Words) -> Words:
    return second(first(words))
