"""LoRA: every dialect, a receipt for each file, exact merging.

import miniflux

pipe = miniflux.load("nano")
print(miniflux.lora.attach(pipe, "realism", scale=0.8))
"""

from miniflux.lora.adapters import attached
from miniflux.lora.attaching import attach, detach, set_scale, set_schedule
from miniflux.lora.files import LoraFile, read
from miniflux.lora.receipt import ModuleReceipt, Receipt

__all__ = [
    "LoraFile",
    "ModuleReceipt",
    "Receipt",
    "attach",
    "attached",
    "detach",
    "read",
    "set_scale",
    "set_schedule",
]
