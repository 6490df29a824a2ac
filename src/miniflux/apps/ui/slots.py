"""Pictures that people put into the page's slots: from Gradio's components to what a request says of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from miniflux.apps.ui.form import number, whole
from miniflux.conditions import Reference
from miniflux.conditions.controlnet import MODES
from miniflux.conditions.masks import feathered, grown, outpainted
from miniflux.errors import InputError
from miniflux.families import Family
from miniflux.pictures import on_white, open_picture
from miniflux.settings.strict import shown

ITSELF = "the model itself"
"""What sees the control picture where no network is chosen: Canny and Depth models."""


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What is in the slots, as files.

    Attributes:
        background: the picture to change; None if there is none.
        layers: what was painted on it.
        references: pictures to look at.
        control: the control picture, or the one that a network sees.
    """

    background: str | None = None
    layers: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    control: str | None = None

    @classmethod
    def of(cls, image: Any, references: Any, control: Any) -> Slots:
        """From what the components hold, see `plain`."""
        layers = tuple((image or {}).get("layers") or ())
        return cls(
            background=(image or {}).get("background"),
            layers=layers,
            references=tuple(references or ()),
            control=control,
        )


def plain(component: Any) -> Any:
    """A component of Gradio's that gives its handlers the files as they came: Gradio would decode them, write them anew
    and leave them there, and say in its own way what is no picture."""

    def path(payload: Any) -> Any:
        if payload is None:
            return None
        if hasattr(payload, "root"):  # of a gallery
            return [one.image.path for one in payload.root if hasattr(one, "image")]
        if hasattr(payload, "layers"):  # of an editor
            layers = [layer.path for layer in payload.layers or ()]
            background, whole = (None if one is None else one.path for one in (payload.background, payload.composite))
            return {"background": background, "layers": layers, "composite": whole}
        return payload.path

    component.preprocess = path
    return component


def steering_from(
    given: Mapping[str, Any],
    slots: Slots,
    networks: Mapping[str, tuple[str, Any]],
    near: Callable[[tuple[int, int]], tuple[int, int]],
    keep: Callable[[Image.Image | Tensor], str],
    family: Family,
) -> dict[str, Any]:
    """What the slots say, as fields of a request's JSON.

    Args:
        given: values by the names of the controls: `width`, `height`, `as_picture`, `as_reference`, `strength`,
            `grow`, `feather`, `outpaint`, `network`, `network_scale`, `network_mode`.
        near: the size nearest to that of a picture which the model can draw.
        networks: by name, the kind of condition that each is for, and its path.
        keep: takes a picture or a mask, and gives its SHA-256.
        family: that of the model, whose way to see references says what size a picture has that is as large as one.

    Raises:
        InputError: one of them is no picture, or a value is not what it may be.
    """
    found: dict[str, Any] = {}
    sides = outpaint_from(given["outpaint"])
    if slots.background is None:
        if sides is not None or _painted(slots.layers, None) is not None:
            raise InputError("there is no picture to change: put one into the editor first")
    else:
        image = _opened(slots.background)
        asked = whole("width", given["width"]), whole("height", given["height"])
        width, height = near(image.size) if given["as_picture"] else asked
        image = sized(image, (width, height))
        mask = painted = _painted(slots.layers, image.size)
        if sides is not None:
            image, mask = outpainted(image, **sides)
            if painted is not None:
                top, left = sides["top"], sides["left"]
                mask[top : top + height, left : left + width] = painted
        found = {"image": keep(image), "width": image.width, "height": image.height}
        if given["strength"] != 1:
            found["strength"] = number("strength", given["strength"])
        if mask is not None:
            mask = grown(mask, whole("grow", given["grow"]))
            found["mask"] = keep(feathered(mask, number("feather", given["feather"])))
    seen = [_opened(path) for path in slots.references]
    conditions: list[dict[str, Any]] = [
        {"kind": "Reference", "picture": keep(one), "index": i} for i, one in enumerate(seen, 1)
    ]
    if given.get("as_reference") and slots.background is None:
        if not seen:
            raise InputError("there is no reference that the picture could be as large as: put one into its slot")
        first = Reference(seen[0]).framed(family, len(seen))
        found["width"], found["height"] = first.shown_at
        if family.whole and first.inside is not None:
            conditions[0]["crop"] = True
    if slots.control is not None:
        conditions.append(_seen(given, keep(_opened(slots.control)), networks))
    elif given["network"] != ITSELF:
        raise InputError(f"{given['network']} has no picture to see: put one into the control slot")
    if conditions:
        found["conditions"] = conditions
    return found


def _seen(given: Mapping[str, Any], picture: str, networks: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """The condition that a control picture belongs to."""
    name = str(given["network"])
    if name == ITSELF:
        return {"kind": "Control", "picture": picture}
    if name not in networks:
        raise InputError(f"network {shown(name)} is not in the folder of models")
    kind = networks[name][0]
    scale = number("scale of the network", given["network_scale"])
    if kind == "Redux":
        return {"kind": kind, "pictures": [picture], "scale": [scale], "network": name}
    about: dict[str, Any] = {"kind": kind, "picture": picture, "scale": scale, "network": name}
    mode = str(given["network_mode"] or "").strip()
    if mode and kind == "ControlNet":
        if not mode.isdigit() and mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}, or a row of their table, got {shown(mode)}")
        about["mode"] = int(mode) if mode.isdigit() else mode
    return about


def _opened(path: str) -> Image.Image:
    return on_white(open_picture(path))


def sized(image: Image.Image, size: tuple[int, int], way: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """A picture brought to a size; what is too much at two sides is cut."""
    return image if image.size == size else ImageOps.fit(image, size, way)


def _painted(layers: Sequence[str], size: tuple[int, int] | None) -> Tensor | None:
    """Where something was painted, (H, W) from 0 to 1, brought to a size; None if nowhere."""
    found: np.ndarray | None = None
    for path in layers:
        alpha = open_picture(path).convert("RGBA").getchannel("A")
        if size is not None:
            alpha = sized(alpha, size, Image.Resampling.BILINEAR)  # which does not ring beyond what was painted
        values = np.asarray(alpha, np.float32) / 255
        found = values if found is None else np.maximum(found, values)
    return None if found is None or not found.any() else torch.from_numpy(found)


def outpaint_from(given: Any) -> dict[str, int] | None:
    """Pixels to add, as a field of text gives them: left, top, right, bottom."""
    text = str(given or "").strip()
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(re.fullmatch("[0-9]{1,5}", part) for part in parts):
        raise InputError(f"outpaint: expected left, top, right, bottom in pixels as 0, 0, 64, 0, got {shown(given)}")
    return dict(zip(("left", "top", "right", "bottom"), map(int, parts), strict=True))
