"""Structure from a picture - edges, depth - as channels beside the noisy one: FLUX.1 Canny and Depth, and their LoRAs.

The picture is encoded as any other; its tokens stand beside those of the noise at every step (`flux/sampling.py` of the
release, `prepare_control`). Edges and depth maps are made by whoever gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from miniflux.conditions.condition import Added, Picture, Scene
from miniflux.errors import InputError
from miniflux.families import Family
from miniflux.models.transformer import TransformerConfig
from miniflux.pictures import digest_of, from_image, on_white, open_picture
from miniflux.sampling import Schedule


@dataclass(frozen=True, eq=False)
class Control:
    """A control picture.

    Attributes:
        picture: a path or a Pillow picture, enlarged or reduced to the size that is drawn (Lanczos, as the release
            does); or pixels (3, H, W) in [-1, 1] of that size.
    """

    picture: Picture | str

    def __post_init__(self) -> None:
        if not isinstance(self.picture, Tensor):
            object.__setattr__(self, "picture", on_white(open_picture(self.picture)))

    def check(self, family: Family, config: TransformerConfig) -> None:
        more = config.in_channels - config.out_channels
        if more != config.out_channels:
            raise InputError(
                f"a control picture gives {config.out_channels} channels, and this network reads {more} beside the "
                "noisy picture: load a Canny or Depth model, or attach its LoRA"
            )

    def levels(self, levels: Schedule) -> Schedule:
        return levels

    def described(self) -> dict[str, Any]:
        assert not isinstance(self.picture, str)
        return {"picture": digest_of(self.picture)}

    def tokens(self, rows: int, columns: int) -> int:
        return 0

    def added(self, scene: Scene) -> Added:
        return Added(channels=scene.family.pack(scene.encode(control_pixels(self.picture, scene))))


def control_pixels(picture: Picture | str, scene: Scene) -> Tensor:
    """A control picture as pixels (3, H, W) in [-1, 1], enlarged or reduced to the size that is drawn.

    Raises:
        InputError: pixels were given, of another size.
    """
    if isinstance(picture, Image.Image):
        size = (scene.width, scene.height)
        return from_image(picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS))
    assert isinstance(picture, Tensor)
    if picture.shape != (3, scene.height, scene.width):
        given = "x".join(map(str, picture.shape))
        raise InputError(f"control pixels must be (3, {scene.height}, {scene.width}), got {given}")
    return picture
