"""Files into networks and back: strict loading, layouts as tables, inspection, saving."""

from miniflux.checkpoints import gguf as gguf  # enters itself among the readers of files
from miniflux.checkpoints.converting import Conversion, convert
from miniflux.checkpoints.files import TensorSource, open_tensors
from miniflux.checkpoints.formats import FORMATS
from miniflux.checkpoints.inspection import Inspection, inspect
from miniflux.checkpoints.layouts import from_layout, layouts_of, to_layout
from miniflux.checkpoints.loading import load_into
from miniflux.checkpoints.quantized import QuantizedLinear
from miniflux.checkpoints.report import LoadReport
from miniflux.checkpoints.saving import save, save_all_in_one

__all__ = [
    "FORMATS",
    "Conversion",
    "Inspection",
    "LoadReport",
    "QuantizedLinear",
    "TensorSource",
    "convert",
    "from_layout",
    "inspect",
    "layouts_of",
    "load_into",
    "open_tensors",
    "save",
    "save_all_in_one",
    "to_layout",
]
