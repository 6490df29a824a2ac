"""How a network is called: the only functions that know the signature of a forward, one pair for each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from miniflux.models.flux1 import Flux1
from miniflux.models.flux2 import Flux2
from miniflux.models.flux3 import Flux3


@dataclass(frozen=True)
class Words:
    """What the network reads beside the picture.

    Attributes:
        txt: the text encoder's tokens (B, T, context_in_dim).
        txt_ids: their positions (B, T, A).
        vec: CLIP's summary (B, vec_in_dim); None for families without one.
        mask: which tokens count (B, T); None for all.
    """

    txt: Tensor
    txt_ids: Tensor
    vec: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def joined(cls, texts: Sequence[Words]) -> Words:
        """Texts of one length as one batch; a single one is itself."""
        if len(texts) == 1:
            return texts[0]
        vecs = [text.vec for text in texts if text.vec is not None]
        masks = [torch.ones(text.txt.shape[:2], dtype=torch.bool, device=text.txt.device) for text in texts]
        masks = [all_seen if text.mask is None else text.mask for text, all_seen in zip(texts, masks, strict=True)]
        return cls(
            torch.cat([text.txt for text in texts]),
            torch.cat([text.txt_ids for text in texts]),
            torch.cat(vecs) if vecs else None,
            None if all(text.mask is None for text in texts) else torch.cat(masks),
        )


@dataclass(frozen=True)
class Told:
    """All that a network is told in one call.

    Attributes:
        img: image tokens (B, L, C), and what is beside them.
        img_ids: their positions (B, L, A).
        words: of each picture.
        timesteps: the noise level (B,).
        target: the noise level (B,) that the prediction is used to jump to; None where it is a slope at one place.
        drawn: how many of the tokens, the first ones, are the picture's; those behind them are references.
        guidance: strength for models with that input (B,).
        texts: what the words are - positive, negative, empty, skipped -, one after the other along the batch.
    """

    img: Tensor
    img_ids: Tensor
    words: Words
    timesteps: Tensor
    guidance: Tensor | None
    target: Tensor | None = None
    drawn: int | None = None
    texts: tuple[str, ...] = ()


Velocity = Callable[..., Tensor]
"""(network, `Told`, run=, attend=) -> velocity (B, L, C)."""


def flux1_velocity(model: Flux1, told: Told, **hooks: Any) -> Tensor:
    words, vec = told.words, cast(Tensor, told.words.vec)  # FLUX.1's words have it
    inputs = (told.img, told.img_ids, words.txt, words.txt_ids, told.timesteps, vec, told.guidance, words.mask)
    return model(*inputs, **hooks)


def flux1_conditioning(model: Flux1, told: Told) -> Tensor:
    """The vector that all modulations see (B, hidden)."""
    return model.conditioning(told.timesteps, cast(Tensor, told.words.vec), told.guidance, told.img.dtype)


def flux2_velocity(model: Flux2, told: Told, **hooks: Any) -> Tensor:
    words = told.words
    inputs = (told.img, told.img_ids, words.txt, words.txt_ids, told.timesteps, told.guidance, words.mask)
    return model(*inputs, **hooks)


def flux2_conditioning(model: Flux2, told: Told) -> Tensor:
    """The vector that the three modulations see (B, hidden)."""
    return model.conditioning(told.timesteps, told.guidance, told.img.dtype)


def flux3_velocity(model: Flux3, told: Told, **hooks: Any) -> Tensor:
    """Only the picture's tokens come back: references are a stream of their own."""
    words, drawn = told.words, told.drawn or told.img.shape[1]
    seen = drawn < told.img.shape[1]
    return model(
        told.img[:, :drawn],
        told.img_ids[:, :drawn],
        words.txt,
        words.txt_ids,
        told.timesteps,
        told.img[:, drawn:] if seen else None,
        told.img_ids[:, drawn:] if seen else None,
        told.target if model.config.flow_map else None,
        **hooks,
    )


def flux3_conditioning(model: Flux3, told: Told) -> Tensor:
    """What the modulations of the picture see (B, hidden)."""
    return model.conditioning(told.timesteps, told.target if model.config.flow_map else None, told.img.dtype)[0]
