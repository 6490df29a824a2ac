"""Files into networks and back: strict loading, layouts as tables, saving.

`inspect` and `convert` are here for who uses them; they live in rooms above, which need this one.
"""

from importlib import import_module
from typing import Any

from miniflux.checkpoints import gguf as gguf  # enters itself among the readers of files
from miniflux.checkpoints.files import TensorSource, open_tensors
from miniflux.checkpoints.formats import FORMATS
from miniflux.checkpoints.layouts import from_layout, layouts_of, to_layout
from miniflux.checkpoints.loading import load_into
from miniflux.checkpoints.quantized import QuantizedLinear
from miniflux.checkpoints.report import LoadReport
from miniflux.checkpoints.saving import save, save_all_in_one

__all__ = [
    "FORMATS",
    "LoadReport",
    "QuantizedLinear",
    "TensorSource",
    "from_layout",
    "layouts_of",
    "load_into",
    "open_tensors",
    "save",
    "save_all_in_one",
    "to_layout",
]

_ABOVE = {
    **dict.fromkeys(("inspect", "Inspection"), "inspection"),
    **dict.fromkeys(("convert", "Conversion"), "conversion.converting"),
}


def __getattr__(name: str) -> Any:
    if name in _ABOVE:
        return getattr(import_module(f"miniflux.{_ABOVE[name]}"), name)
    raise AttributeError(f"module 'miniflux.checkpoints' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_ABOVE})
