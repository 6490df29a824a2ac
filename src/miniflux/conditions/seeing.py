"""Pictures as vision towers want them: the preprocessing of SigLIP and CLIP, and what a tower says of them."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from miniflux.conditions.steering import placed
from miniflux.models.vision import ClipVision, SiglipVision, VisionConfig
from miniflux.pictures import from_image

# `image_mean` and `image_std` of openai/clip-vit-large-patch14's `preprocessor_config.json`; SigLIP's are all 0.5.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def siglip_pixels(picture: Image.Image, config: VisionConfig) -> Tensor:
    """An RGB picture as pixels (1, 3, side, side) in [-1, 1]: brought to the side of the tower, whatever its shape."""
    size = (config.image_size, config.image_size)
    return from_image(picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC))[None]


def clip_pixels(picture: Image.Image, config: VisionConfig) -> Tensor:
    """An RGB picture as CLIP sees it (1, 3, side, side): shorter side brought to the tower's, the middle cut out."""
    side, (width, height) = config.image_size, picture.size
    scale = side / min(width, height)
    size = (side, int(height * scale)) if width <= height else (int(width * scale), side)
    resized = picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    pixels = (from_image(resized.crop((left, top, left + side, top + side))) + 1) / 2
    mean, std = (torch.tensor(one)[:, None, None] for one in (CLIP_MEAN, CLIP_STD))
    return ((pixels - mean) / std)[None]


@torch.inference_mode()
def seen(vision: SiglipVision | ClipVision, picture: Image.Image, like: Tensor) -> tuple[Tensor, Tensor]:
    """What a tower says of a picture, on the device of `like`: every patch (1, N, hidden), and all of it (1, C)."""
    pixels = (siglip_pixels if isinstance(vision, SiglipVision) else clip_pixels)(picture, vision.config)
    return vision(pixels.to(placed(vision, like)))
