"""FLUX.1 Redux: a picture becomes words behind those of the prompt - variations of it, or its style with a text.

The release appends what SigLIP and two linears make of one picture to T5's tokens (`flux/modules/image_embedders.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from miniflux.checks import check_number, shown
from miniflux.conditions.condition import Added, Scene, flux1_only
from miniflux.conditions.seeing import seen
from miniflux.conditions.steering import Steering, placed, steering_of
from miniflux.errors import InputError
from miniflux.families import Family
from miniflux.models import redux
from miniflux.models.transformer import TransformerConfig
from miniflux.pictures import digest_of, on_white, open_picture
from miniflux.sampling import Schedule, Words

TOGETHER = ("appended", "diffusers")


@dataclass(frozen=True, eq=False)
class Redux:
    """Pictures to vary.

    Attributes:
        network: of `conditions.load`, with its vision tower.
        picture: a path or a Pillow picture; or several.
        scale: what its words are multiplied by; one for all pictures, or one for each.
        together: of several pictures, `appended`: the words of each, one behind the other; `diffusers`: the sum, over
            pictures, of prompt and words times scale, as its FluxPriorReduxPipeline makes it - prompt and summary count
            as often as there are pictures.
    """

    network: Steering
    picture: Image.Image | str | Sequence[Image.Image | str]
    scale: float | Sequence[float] = 1.0
    together: str = "appended"

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", steering_of(redux.Redux, self.network, vision=True))
        given = self.picture if isinstance(self.picture, list | tuple) else (self.picture,)
        if not given:
            raise InputError("Redux wants at least one picture, got none")
        object.__setattr__(self, "picture", tuple(on_white(open_picture(one)) for one in given))  # pyright: ignore
        scales = self.scale if isinstance(self.scale, Sequence) else (self.scale,) * len(given)
        if isinstance(scales, str) or len(scales) != len(given):
            raise InputError(
                f"scale must be a number, or one for each of {len(given)} pictures, got {shown(self.scale)}"
            )
        for one in scales:
            check_number("scale", one, -float("inf"))
        object.__setattr__(self, "scale", tuple(float(one) for one in scales))
        if self.together not in TOGETHER:
            raise InputError(f"together must be one of {', '.join(TOGETHER)}, got {shown(self.together)}")

    @property
    def _pictures(self) -> tuple[Image.Image, ...]:
        assert isinstance(self.picture, tuple)
        return cast(tuple[Image.Image, ...], self.picture)

    @property
    def _scales(self) -> tuple[float, ...]:
        assert isinstance(self.scale, tuple)
        return self.scale

    @property
    def _net(self) -> redux.Redux:
        assert isinstance(self.network.network, redux.Redux)
        return self.network.network

    @property
    def files(self) -> tuple[tuple[str, Any], ...]:
        return self.network.files

    def check(self, family: Family, config: TransformerConfig) -> None:
        config = flux1_only("Redux", config)
        own = self._net.config.txt_in_features
        if own != config.context_in_dim:
            raise InputError(
                f"this Redux makes words of width {own}, and the transformer reads {config.context_in_dim}"
            )

    def levels(self, levels: Schedule) -> Schedule:
        return levels

    def described(self) -> dict[str, Any]:
        return {
            "pictures": [digest_of(one) for one in self._pictures],
            "scale": list(self._scales),
            "together": self.together,
        }

    def tokens(self, rows: int, columns: int) -> int:
        assert self.network.vision is not None
        return self.network.vision.config.patches * (1 if self.together == "diffusers" else len(self._pictures))

    def added(self, scene: Scene) -> Added:
        made: list[Tensor] = []  # of the pictures, once for all prompts

        def with_pictures(words: Words) -> Words:
            made.extend(() if made else self._made(words.txt))
            return self._joined(words, made)

        return Added(words=with_pictures)

    @torch.inference_mode()
    def _made(self, like: Tensor) -> list[Tensor]:
        """The words (1, N, C) of each picture, in the precision and on the device of those of a prompt."""
        vision, network = self.network.vision, self._net
        assert vision is not None
        weight = placed(network, like)
        return [network(seen(vision, picture, like)[0].to(weight)).to(like) for picture in self._pictures]

    def _joined(self, words: Words, made: Sequence[Tensor]) -> Words:
        """The words of a prompt, and behind them those of the pictures."""
        if self.together == "diffusers":
            more = sum(scale * one for scale, one in zip(self._scales, made, strict=True))
            assert isinstance(more, Tensor)
            txt = torch.cat((sum(self._scales) * words.txt, more), dim=1)
            words = replace(words, vec=words.vec if words.vec is None else len(made) * words.vec)
        else:
            txt = torch.cat((words.txt, *(scale * one for scale, one in zip(self._scales, made, strict=True))), dim=1)
        count = txt.shape[1] - words.txt.shape[1]
        ids = torch.cat((words.txt_ids, words.txt_ids[:, :1].expand(-1, count, -1)), dim=1)
        mask = words.mask
        if mask is not None:
            mask = torch.cat((mask, torch.ones(len(mask), count, dtype=mask.dtype, device=mask.device)), dim=1)
        return replace(words, txt=txt, txt_ids=ids, mask=mask)
