"""Control pictures made here: edges by OpenCV (extra `edges`), depth by an estimator of the user's (extra `depth`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from miniflux.checks import check_number
from miniflux.errors import InputError, MissingExtraError
from miniflux.pictures import on_white, open_picture

log = logging.getLogger(__name__)

LOW, HIGH = 50, 200  # thresholds of the release (`flux/modules/image_embedders.py`, CannyImageEncoder)


def canny(
    picture: Image.Image | str, size: tuple[int, int] | None = None, low: float = LOW, high: float = HIGH
) -> Image.Image:
    """White edges on black, as FLUX.1 Canny was trained with: of the picture at the size that will be drawn.

    Args:
        size: (width, height); None for the picture's own.
        low, high: thresholds of the gradient, from 0.

    Raises:
        InputError: a threshold is below 0.
        MissingExtraError: OpenCV is not installed (`pip install miniflux[edges]`).
    """
    for name, value in (("low", low), ("high", high)):
        check_number(name, value, 0)
    try:
        import cv2
    except ImportError as error:
        raise MissingExtraError("edges are found by OpenCV: pip install 'miniflux[edges]'") from error
    pixels = np.asarray(_sized(picture, size))
    edges: Any = cv2.Canny(pixels, low, high)
    return Image.fromarray(np.repeat(np.asarray(edges, np.uint8)[..., None], 3, axis=2))


def depth(picture: Image.Image | str, estimator: str | Path, size: tuple[int, int] | None = None) -> Image.Image:
    """A depth map, near is white, as FLUX.1 Depth was trained with.

    Args:
        estimator: the folder of a model for depth in transformers' layout, such as LiheYoung/depth-anything-large-hf,
            which the release uses. Nothing is downloaded.
        size: (width, height); None for the picture's own.

    Raises:
        InputError: there is no such folder, or no such model in it.
        MissingExtraError: transformers is not installed (`pip install miniflux[depth]`).
    """
    folder = Path(estimator)
    if not folder.is_dir():
        raise InputError(f"{folder}: no folder of a depth estimator; get one and name its folder")
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("depth is estimated by transformers: pip install 'miniflux[depth]'") from error
    seen = _sized(picture, size)
    try:
        processor: Any = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model: Any = transformers.AutoModelForDepthEstimation.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no depth estimator: {str(error).splitlines()[0]}") from error
    with torch.inference_mode():
        found = model(processor(seen, return_tensors="pt")["pixel_values"]).predicted_depth[:, None]
    found = F.interpolate(found, (seen.height, seen.width), mode="bicubic", antialias=True)
    if (most := float(found.max())) > 255:
        log.warning("%s: depths up to %.0f; those above 255 are all white", folder, most)
    grey = rearrange(found.clamp(0, 255), "1 1 h w -> h w 1").round().byte().expand(-1, -1, 3)
    return Image.fromarray(grey.numpy())


def _sized(picture: Image.Image | str, size: tuple[int, int] | None) -> Image.Image:
    seen = on_white(open_picture(picture))
    return seen if size is None or seen.size == size else seen.resize(size, Image.Resampling.LANCZOS)
