"""What else than words steers a picture: one small file each, and the protocol that they follow."""

from miniflux.conditions.condition import Added, Condition, Scene, joined
from miniflux.conditions.control import Control
from miniflux.conditions.fill import Fill, fill_channels
from miniflux.conditions.img2img import Img2Img
from miniflux.conditions.inpaint import Inpaint
from miniflux.conditions.reference import Reference, kontext_size

__all__ = [
    "Added",
    "Condition",
    "Control",
    "Fill",
    "Img2Img",
    "Inpaint",
    "Reference",
    "Scene",
    "fill_channels",
    "joined",
    "kontext_size",
]
