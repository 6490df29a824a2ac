"""IP-Adapters: the image tokens of blocks look at words of a picture, beside what they attend to anyway.

The queries are those of the block, after its norm and before positions; what is found is added after the block, times
`scale` and without its gate. Of a guide's other texts the picture is a black one, as in XLabs' sampler and diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from miniflux.conditions.condition import Added, Scene, flux1_only
from miniflux.conditions.seeing import seen
from miniflux.conditions.steering import (
    Steering,
    Strength,
    Window,
    check_strength,
    placed,
    steering_of,
    strength_of,
    told_of,
    with_added,
)
from miniflux.errors import InputError
from miniflux.families import Family
from miniflux.models.flux1 import RunBlock
from miniflux.models.ip_adapter import InstantxIPAdapter, XlabsIPAdapter
from miniflux.models.transformer import TransformerConfig
from miniflux.pictures import digest_of, on_white, open_picture
from miniflux.sampling import Schedule, Told

KINDS = (XlabsIPAdapter, InstantxIPAdapter)


@dataclass(frozen=True, eq=False)
class IPAdapter:
    """A picture to look at.

    Attributes:
        network: of `conditions.load`, with its vision tower.
        picture: a path or a Pillow picture.
        scale: how strongly; or for each of its blocks; or a function of the noise level.
        window: (start, stop) in shares of the steps that are made.
        negative: the picture of other texts that a guide wants; None for a black one.
    """

    network: Steering
    picture: Image.Image | str
    scale: Strength = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    negative: Image.Image | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", steering_of(KINDS, self.network, vision=True))
        config = self._net.config
        check_strength(self.scale, config.double + config.single)
        Window(*self.window)
        for name in ("picture", "negative"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else on_white(open_picture(given)))

    @property
    def _net(self) -> XlabsIPAdapter | InstantxIPAdapter:
        assert isinstance(self.network.network, KINDS)
        return self.network.network

    @property
    def files(self) -> tuple[tuple[str, Any], ...]:
        return self.network.files

    def check(self, family: Family, config: TransformerConfig) -> None:
        config = flux1_only("IP-Adapters", config)
        own = self._net.config
        if own.hidden_size != config.hidden_size:
            raise InputError(
                f"this IP-Adapter is for transformers of hidden_size {own.hidden_size}, got one of {config.hidden_size}"
            )
        if own.double > config.depth or own.single > config.depth_single_blocks:
            raise InputError(
                f"this IP-Adapter is for {own.double} + {own.single} blocks, and the transformer has {config.depth} + "
                f"{config.depth_single_blocks}"
            )

    def levels(self, levels: Schedule) -> Schedule:
        return levels

    def described(self) -> dict[str, Any]:
        assert isinstance(self.picture, Image.Image)
        about = {"picture": digest_of(self.picture), "scale": told_of(self.scale), "window": list(self.window)}
        return about | ({"negative": digest_of(self.negative)} if isinstance(self.negative, Image.Image) else {})

    def tokens(self, rows: int, columns: int) -> int:
        return 0

    def added(self, scene: Scene) -> Added:
        run = _Run(self, self._net, scene)
        return Added(hears=(run.hear,), wraps=(run.wrap,))


@dataclass
class _Run:
    """An IP-Adapter at work on the pictures of one call.

    Attributes:
        told: what the network is told in the call that is being made; None outside of the window.
        words: of the pictures, for each row of this call (B, P, context); None until they are asked for.
        known: words (1, P, context) of the picture (True), and of the one for a guide's other texts (False).
    """

    condition: IPAdapter
    network: XlabsIPAdapter | InstantxIPAdapter
    scene: Scene
    told: Told | None = None
    words: Tensor | None = field(default=None, repr=False)
    known: dict[bool, Tensor] = field(default_factory=dict[bool, Tensor], repr=False)

    def hear(self, told: Told) -> None:
        inside = Window(*self.condition.window).holds(told.timesteps, self.scene.levels)
        self.told, self.words = (told if inside else None), None

    def wrap(self, run: RunBlock) -> RunBlock:
        def look(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
            if self.told is None:
                return run(name, block, streams, context)
            queries: list[Tensor] = []
            *others, attend = context

            def caught(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
                queries.append(q)
                return attend(q, k, v, pe, mask)

            out = run(name, block, streams, (*others, caught))
            if not queries:  # the block was left out
                return out
            text, count = self.told.words.txt.shape[1], self.scene.rows * self.scene.columns
            if self.words is None:
                self.words = self._words(self.told)
            found = self.network.look(name, queries[0][:, :, text : text + count], self.words)
            if found is None:
                return out
            kind, _, number = name.partition(".")
            place = int(number) + (0 if kind == "double_blocks" else self.network.config.double)
            scale = strength_of(self.condition.scale, place, float(self.told.timesteps[0]))
            return with_added(out, scale * found, text)

        return look

    def _words(self, told: Told) -> Tensor:
        """The words of the picture for each row of a call (B, P, context)."""
        texts = told.texts or ("positive",)
        each = len(told.img) // len(texts)
        return torch.cat([self._of(text in ("positive", "skipped"), told).expand(each, -1, -1) for text in texts])

    @torch.inference_mode()
    def _of(self, positive: bool, told: Told) -> Tensor:
        if positive not in self.known:
            picture = self.condition.picture if positive else self.condition.negative
            if picture is None:
                picture = Image.new("RGB", (self.scene.width, self.scene.height))
            vision = self.condition.network.vision
            assert isinstance(picture, Image.Image) and vision is not None
            like = placed(self.network, told.img)
            self.known[positive] = self.network.words(seen(vision, picture, told.img)[1].to(like))
        return self.known[positive]
