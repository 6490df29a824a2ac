"""The ControlNet of FLUX.2 dev at work: what it is shown, and how what it says is added.

A control token holds the latents of a control picture, four places of a mask (1 where a picture stays) and the latents
of that picture, grey where it is drawn anew: so one network follows edges, depth or a pose, completes a picture, or
does both. What is not given is shown as in VideoX-Fun's example: no control picture as zeros, no picture to complete as
an even grey that is drawn anew everywhere. Tokens of references are zeros.
Source: `videox_fun/pipeline/pipeline_flux2_control.py` of aigc-apps/VideoX-Fun.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from miniflux.conditions.condition import Picture, Scene, made_for
from miniflux.conditions.control import control_pixels
from miniflux.conditions.masks import HARD, check_mask
from miniflux.conditions.steering import Strength, Window, placed, strength_of, with_added
from miniflux.errors import InputError
from miniflux.models.flux1 import RunBlock
from miniflux.models.flux2 import Flux2Config
from miniflux.models.flux2_controlnet import EVERY, Flux2ControlNet, Flux2ControlNetConfig
from miniflux.models.layers import Shift
from miniflux.models.transformer import TransformerConfig
from miniflux.pictures import on_white, open_picture
from miniflux.sampling import Told

SIDE = 2  # rows and columns of the mask in a token


def check(own: Flux2ControlNetConfig, config: TransformerConfig) -> None:
    """Raises InputError unless a ControlNet with these sizes was made for a network with that config."""
    config = made_for(Flux2Config, "this ControlNet was made for FLUX.2 dev", config)
    for name in ("hidden_size", "num_heads", "mlp_ratio"):
        mine, other = getattr(own, name), getattr(config, name)
        if mine != other:
            raise InputError(f"this ControlNet is for transformers of {name} {mine}, got one of {other}")
    if EVERY * (own.depth - 1) >= config.depth:
        raise InputError(
            f"this ControlNet adds after every second of {EVERY * own.depth} double blocks, and the transformer has "
            f"{config.depth}"
        )
    reads = 2 * config.out_channels + SIDE**2
    if own.control_channels != reads:
        raise InputError(
            f"this ControlNet reads control tokens of {own.control_channels} channels, and two pictures and a mask of "
            f"this transformer have {reads}"
        )


def mask_picture(mask: Image.Image | Tensor | str, image: Image.Image | Tensor) -> Image.Image:
    """A mask as an RGB picture, white where `image` is drawn anew.

    Args:
        mask: a path or a Pillow picture, or a tensor (H, W) from 0 to 1, of the size of `image`.

    Raises:
        InputError: it has another size, is transparent in places, or none of these.
    """
    if isinstance(mask, Tensor):
        check_mask(mask)
        seen = Image.fromarray((mask * 255).round().byte().cpu().numpy()).convert("RGB")
    else:
        opened = open_picture(mask)
        if opened.mode == "RGBA":
            raise InputError("a mask is grey, white for what is drawn anew; this one is transparent in places")
        seen = on_white(opened)
    size = (image.shape[2], image.shape[1]) if isinstance(image, Tensor) else image.size
    if seen.size != size:
        raise InputError("the mask is {}x{}, the image {}x{}: make them equal".format(*seen.size, *size))
    return seen


def control_tokens(scene: Scene, picture: Picture | None, image: Picture | None, mask: Image.Image | None) -> Tensor:
    """The control tokens (1, L, C) of a picture to be drawn.

    Args:
        picture: the control picture; None for none.
        image, mask: a picture to be completed, and where; None for none.

    Raises:
        InputError: pixels of another size than the picture has.
    """
    size = (scene.width, scene.height)
    anew = torch.ones(scene.height, scene.width, dtype=torch.bool)
    if mask is not None:
        grey = mask if mask.size == size else mask.resize(size, Image.Resampling.BICUBIC)
        anew = (control_pixels(grey, scene)[0] + 1) / 2 >= HARD
    hidden = torch.zeros(3, *anew.shape) if image is None else control_pixels(image, scene) * ~anew
    latents = scene.family.pack(scene.encode(hidden))
    control = torch.zeros_like(latents) if picture is None else _packed(scene, picture)
    stays = F.interpolate((~anew).float()[None, None], (SIDE * scene.rows, SIDE * scene.columns), mode="nearest")
    places = rearrange(stays, "1 1 (h p) (w q) -> 1 (h w) (p q)", p=SIDE, q=SIDE)
    return torch.cat((control, places, latents), dim=-1)


def _packed(scene: Scene, picture: Picture) -> Tensor:
    return scene.family.pack(scene.encode(control_pixels(picture, scene)))


@dataclass
class Flux2Run:
    """The ControlNet at work on the pictures of one call: it sees what the first block of a call is given.

    Attributes:
        tokens: control tokens (1, L, C) of the picture that is drawn.
        told: what the network is told in the call that is being made; None outside of the window.
        hints: what is added in this call, one for every `EVERY`-th double block; none until the first is computed.
    """

    network: Flux2ControlNet
    scale: Strength
    window: Window
    scene: Scene
    tokens: Tensor
    told: Told | None = None
    hints: list[Tensor] = field(default_factory=list[Tensor], repr=False)

    def hear(self, told: Told) -> None:
        inside = self.window.holds(told.timesteps, self.scene.levels)
        self.told, self.hints = (told if inside else None), []

    def wrap(self, run: RunBlock) -> RunBlock:
        first, *_ = self.scene.transformer.blocks

        def add(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
            if self.told is None:
                return run(name, block, streams, context)
            if name == first:
                self.hints = self._ask(streams, context)
            out = run(name, block, streams, context)
            kind, _, number = name.partition(".")
            place, between = divmod(int(number), EVERY)
            if kind != "double_blocks" or between or place >= len(self.hints):
                return out
            scale = strength_of(self.scale, place, float(self.told.timesteps[0]))
            return with_added(out, scale * self.hints[place], 0)

        return add

    @torch.inference_mode()
    def _ask(self, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> list[Tensor]:
        """What is to be added; computed in the network's own precision."""
        (img, txt), (*mods, pe, mask, _) = streams, context
        like = placed(self.network, img)
        if self.tokens.shape[1] < img.shape[1]:  # nothing for references
            self.tokens = F.pad(self.tokens, (0, 0, 0, img.shape[1] - self.tokens.shape[1]))
        self.tokens = self.tokens.to(like)
        img_mods, txt_mods = ([_like(shift, like) for shift in shifts] for shifts in mods)
        control = self.tokens.expand(len(img), -1, -1)
        return self.network(control, img.to(like), txt.to(like), img_mods, txt_mods, pe, mask)


def _like(shift: Shift, like: Tensor) -> Shift:
    return Shift(shift.shift.to(like), shift.scale.to(like), shift.gate.to(like))
