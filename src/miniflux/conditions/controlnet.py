"""ControlNets: a network beside the transformer sees a control picture, and adds to the image tokens after its blocks.

Residual i of n belongs to the blocks of the i-th of n equal parts (InstantX, Shakker; diffusers' rule), or, of XLabs'
networks, to every n-th block; of FLUX.2's see `flux2_controlnet`. Several ControlNets add up. What is computed from the
words is computed for each text of a guide on its own, as XLabs does it; diffusers reuses what it computed for the
prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from miniflux.checks import whole
from miniflux.conditions import flux2_controlnet as flux2
from miniflux.conditions.condition import Added, Picture, Scene, made_for
from miniflux.conditions.control import control_pixels
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
from miniflux.models import controlnet
from miniflux.models.flux1 import Flux1Config, RunBlock
from miniflux.models.flux2_controlnet import Flux2ControlNet
from miniflux.models.transformer import TransformerConfig
from miniflux.pictures import digest_of, on_white, open_picture
from miniflux.sampling import Schedule, Told

MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "low quality")
"""Kinds of control by their row in the table of InstantX's Union networks."""
USUAL_GUIDANCE = 3.5  # told to a ControlNet with that input beside a transformer without (schnell)


@dataclass(frozen=True, eq=False)
class ControlNet:
    """A control picture, and the network that sees it.

    Attributes:
        network: of `conditions.load`.
        picture: as of `Control`; FLUX.2's network does without one, too.
        scale: how strongly; or for each of its blocks, double ones first; or a function of the noise level.
        window: (start, stop) in shares of the steps that are made.
        mode: the kind of control, for Union networks of FLUX.1: a name of `MODES` or a row of their table.
        image: a picture that is to be completed, for FLUX.2's network; as of `picture`.
        mask: where it is drawn anew, white or 1: a path, a Pillow picture, or a tensor (H, W) from 0 to 1, of its size.
            It is cut off at a half, as the network was trained; a soft edge has no effect.

    Raises:
        InputError: a number is out of its range, the network takes no such thing, or one is missing that it needs.
    """

    network: Steering | controlnet.ControlNet | Flux2ControlNet
    picture: Picture | str | None = None
    scale: Strength = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    mode: int | str | None = None
    image: Picture | str | None = None
    mask: Image.Image | Tensor | str | None = None

    def __post_init__(self) -> None:
        steering = steering_of((controlnet.ControlNet, Flux2ControlNet), self.network)
        object.__setattr__(self, "network", steering)
        check_strength(self.scale, len(self._net.config.blocks))
        Window(*self.window)
        if isinstance(self._net, controlnet.ControlNet):
            object.__setattr__(self, "mode", mode_of(self.mode, self._net.config.modes))
            if self.picture is None:
                raise InputError("this ControlNet sees a control picture, and none is given")
            if self.image is not None or self.mask is not None:
                raise InputError("this ControlNet completes no picture: image and mask are for that of FLUX.2")
        elif self.mode is not None:
            raise InputError(f"mode {self.mode!r} has no effect: this ControlNet tells kinds of control by itself")
        if (self.image is None) != (self.mask is None):
            raise InputError("image is what is completed and mask says where: give both or none of them")
        for name in ("picture", "image"):
            given = getattr(self, name)
            if given is not None and not isinstance(given, Tensor):
                object.__setattr__(self, name, on_white(open_picture(given)))
        if self.mask is not None:
            assert isinstance(self.image, Image.Image | Tensor)
            object.__setattr__(self, "mask", flux2.mask_picture(self.mask, self.image))

    @property
    def _net(self) -> controlnet.ControlNet | Flux2ControlNet:
        assert isinstance(self.network, Steering)
        assert isinstance(self.network.network, controlnet.ControlNet | Flux2ControlNet)
        return self.network.network

    @property
    def files(self) -> tuple[tuple[str, Any], ...]:
        assert isinstance(self.network, Steering)
        return self.network.files

    @property
    def added_numbers(self) -> int:
        """How many it adds to each image token, over all blocks: they are held while a call is computed."""
        return len(self._net.config.blocks) * self._net.config.hidden_size

    def check(self, family: Family, config: TransformerConfig) -> None:
        if isinstance(self._net, Flux2ControlNet):
            flux2.check(self._net.config, config)
            return
        config = made_for(Flux1Config, "this ControlNet was made for FLUX.1", config)
        for name in ("hidden_size", "vec_in_dim", "context_in_dim"):
            own, other = getattr(self._net.config, name), getattr(config, name)
            if own != other:
                raise InputError(f"this ControlNet is for transformers of {name} {own}, got one of {other}")

    def levels(self, levels: Schedule) -> Schedule:
        return levels

    def described(self) -> dict[str, Any]:
        pictures = {name: given for name in ("picture", "image", "mask") if (given := getattr(self, name)) is not None}
        about = {name: digest_of(given) for name, given in pictures.items()}
        about |= {"scale": told_of(self.scale), "window": list(self.window)}
        return about | ({} if self.mode is None else {"mode": self.mode})

    def tokens(self, rows: int, columns: int) -> int:
        return 0

    def added(self, scene: Scene) -> Added:
        net = self._net
        if isinstance(net, Flux2ControlNet):
            assert not isinstance(self.picture, str) and not isinstance(self.image, str)
            assert not isinstance(self.mask, Tensor | str)
            tokens = flux2.control_tokens(scene, self.picture, self.image, self.mask)
            run = flux2.Flux2Run(net, self.scale, Window(*self.window), scene, tokens)
        else:
            assert self.picture is not None
            pixels = control_pixels(self.picture, scene)
            seen = pixels[None] if net.config.hint_channels else scene.family.pack(scene.encode(pixels))
            run = _Run(self, net, seen, scene)
        return Added(hears=(run.hear,), wraps=(run.wrap,))


def mode_of(mode: int | str | None, modes: int) -> int | None:
    """The row of a Union network's table.

    Raises:
        InputError: there is no such row, no table, or no mode for it.
    """
    if not modes:
        if mode is not None:
            raise InputError(f"mode {mode!r} has no effect: this ControlNet sees one kind of control")
        return None
    known = ", ".join(f"{name} ({i})" for i, name in enumerate(MODES[:modes]))
    if mode is None or (isinstance(mode, str) and mode not in MODES[:modes]):
        raise InputError(f"this ControlNet sees several kinds of control: mode must be one of {known}, got {mode!r}")
    return whole("mode", MODES.index(mode) if isinstance(mode, str) else mode, 0, modes - 1)


@dataclass
class _Run:
    """A ControlNet at work on the pictures of one call: it is asked when the first block of a call is computed.

    Attributes:
        seen: tokens (1, L, C) of the control picture's latents; or its pixels (1, 3, H, W), for XLabs' networks.
        control: the tokens that become of it, once they are known.
        told: what the network is told in the call that is being made; None outside of the window.
        found: what is added in this call after the blocks of each kind; None until it is asked for.
    """

    condition: ControlNet
    network: controlnet.ControlNet
    seen: Tensor
    scene: Scene
    control: Tensor | None = None
    told: Told | None = None
    found: dict[str, list[Tensor]] | None = field(default=None, repr=False)

    def hear(self, told: Told) -> None:
        inside = Window(*self.condition.window).holds(told.timesteps, self.scene.levels)
        self.told, self.found = (told if inside else None), None

    def wrap(self, run: RunBlock) -> RunBlock:
        def add(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
            out = run(name, block, streams, context)
            if self.told is None:
                return out
            if self.found is None:
                self.found = self._ask(self.told)
            kind, _, number = name.partition(".")
            found = self.found[kind]
            if not found:
                return out
            addition = found[self._place(kind, int(number))]
            return with_added(out, addition, self.told.words.txt.shape[1])

        return add

    def _place(self, kind: str, number: int) -> int:
        """Which residual is added after a block of the transformer."""
        double = kind == "double_blocks"
        own = self.network.config.depth if double else self.network.config.depth_single_blocks
        all_of_them = self.scene.transformer.depth if double else self.scene.transformer.depth_single_blocks
        return number % own if self.network.config.hint_channels else number // -(-all_of_them // own)

    @torch.inference_mode()
    def _ask(self, told: Told) -> dict[str, list[Tensor]]:
        """What is to be added, weighted."""
        network, config, words = self.network, self.network.config, told.words
        like, sees = placed(network, told.img), self.scene.rows * self.scene.columns
        guidance = None
        if config.guidance_embed:
            guidance = torch.full_like(told.timesteps, USUAL_GUIDANCE) if told.guidance is None else told.guidance
            guidance = guidance.to(like)
        if self.control is None:
            self.control = network.control_tokens(self.seen.to(like))
        vec = words.vec
        assert vec is not None
        double, single = network(
            told.img[:, :sees, : config.in_channels].to(like),
            told.img_ids[:, :sees],
            words.txt.to(like),
            words.txt_ids,
            told.timesteps.to(like),
            vec.to(like),
            self.control.expand(len(told.img), -1, -1),
            guidance,
            words.mask,
            self.condition.mode if isinstance(self.condition.mode, int) else None,
        )
        sigma = float(told.timesteps[0])
        weigh: Callable[[int, Tensor], Tensor] = lambda i, x: strength_of(self.condition.scale, i, sigma) * x  # noqa: E731
        return {
            "double_blocks": [weigh(i, x) for i, x in enumerate(double)],
            "single_blocks": [weigh(len(double) + i, x) for i, x in enumerate(single)],
        }
