"""What else than words steers a picture: one small file each, and the protocol that they follow."""

from miniflux.conditions.condition import Added, Condition, Scene, joined
from miniflux.conditions.control import Control
from miniflux.conditions.img2img import Img2Img
from miniflux.conditions.inpaint import Inpaint

__all__ = ["Added", "Condition", "Control", "Img2Img", "Inpaint", "Scene", "joined"]
