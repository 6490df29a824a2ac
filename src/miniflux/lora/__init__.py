"""LoRA: every dialect, a receipt for each file, exact merging.

import miniflux

pipe = miniflux.load("nano")
print(miniflux.lora.attach(pipe, "realism", scale=0.8))
"""

from miniflux.lora.adapters import attached
from miniflux.lora.attaching import attach, detach, set_scale, set_schedule
from miniflux.lora.encoding import save
from miniflux.lora.files import LoraFile, read
from miniflux.lora.merging import merge, unmerge
from miniflux.lora.pictures import per_picture
from miniflux.lora.receipt import ModuleReceipt, Receipt
from miniflux.lora.tools import Extracted, convert, extract, fits, inspect, merge_files

__all__ = [
    "Extracted",
    "LoraFile",
    "ModuleReceipt",
    "Receipt",
    "attach",
    "attached",
    "convert",
    "detach",
    "extract",
    "fits",
    "inspect",
    "merge",
    "merge_files",
    "per_picture",
    "read",
    "save",
    "set_scale",
    "set_schedule",
    "unmerge",
]
