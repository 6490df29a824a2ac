"""Formats of packed weights: pure functions from a weight to its parts and back, in torch alone."""

import torch

from miniflux.checkpoints.formats.base import Format, Stored
from miniflux.checkpoints.formats.fourbit import FourBit
from miniflux.checkpoints.formats.ggml import BLOCKS, Ggml
from miniflux.checkpoints.formats.nvfp4 import Nvfp4
from miniflux.checkpoints.formats.scaled import FLOAT8, Scaled

_E4M3, _E5M2 = FLOAT8.values()

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Scaled("fp8_e4m3", "fp8 e4m3", _E4M3, "none"),
        Scaled("fp8_e5m2", "fp8 e5m2", _E5M2, "none"),
        Scaled("fp8_scaled_old", "fp8 scaled (old)", _E4M3, "tensor", scale="scale_weight"),
        Scaled("fp8_scaled", "fp8 scaled", _E4M3, "tensor", comfy="float8_e4m3fn"),
        Scaled("fp8_scaled_e5m2", "fp8 scaled e5m2", _E5M2, "tensor", comfy="float8_e5m2"),
        Scaled("fp8_rows", "fp8 by rows", _E4M3, "row"),
        Scaled("int8", "int8", torch.int8, "row", comfy="int8_tensorwise"),
        FourBit("nf4"),
        FourBit("fp4"),
        Nvfp4("nvfp4", "nvfp4", comfy=False),
        Nvfp4("nvfp4_comfy", "nvfp4 (ComfyUI)", comfy=True),
        *(Ggml(name) for name in BLOCKS),
    )
}

__all__ = ["FORMATS", "Format", "Stored"]
