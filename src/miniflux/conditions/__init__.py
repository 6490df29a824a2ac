"""What else than words steers a picture: one small file each, and the protocol that they follow.

`load` reads the networks that some of them need; it lives in a room above (`miniflux.steering`).
"""

from importlib import import_module
from typing import Any

from miniflux.conditions.condition import Added, Condition, Scene, joined
from miniflux.conditions.control import Control
from miniflux.conditions.controlnet import ControlNet
from miniflux.conditions.fill import Fill, fill_channels
from miniflux.conditions.img2img import Img2Img
from miniflux.conditions.inpaint import Inpaint
from miniflux.conditions.ip_adapter import IPAdapter
from miniflux.conditions.redux import Redux
from miniflux.conditions.reference import Reference, kontext_size
from miniflux.conditions.steering import Steering

__all__ = [
    "Added",
    "Condition",
    "Control",
    "ControlNet",
    "Fill",
    "IPAdapter",
    "Img2Img",
    "Inpaint",
    "Redux",
    "Reference",
    "Scene",
    "Steering",
    "fill_channels",
    "joined",
    "kontext_size",
]


def __getattr__(name: str) -> Any:
    if name == "load":  # for who uses it
        return import_module("miniflux.steering").load
    raise AttributeError(f"module 'miniflux.conditions' has no attribute {name!r}")
