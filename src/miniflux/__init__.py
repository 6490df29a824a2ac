"""miniflux: the FLUX family of image models, from scratch in PyTorch, to read, to study and to trust.

    import miniflux

    pipe = miniflux.load("nano")
    pipe.generate("a red circle on a blue background", seed=1).save("out.png")

Importing this package does no work; the parts are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from miniflux.version import __version__

if TYPE_CHECKING:
    from miniflux import checkpoints, errors, lora, models, sampling, text, variants
    from miniflux.pipeline import Pipeline, Result, load
    from miniflux.testing import tiny

_HOMES = {"Pipeline": "pipeline", "Result": "pipeline", "load": "pipeline", "tiny": "testing"}
_ROOMS = ("checkpoints", "errors", "lora", "models", "sampling", "text", "variants")

__all__ = [
    "Pipeline",
    "Result",
    "__version__",
    "checkpoints",
    "errors",
    "load",
    "lora",
    "models",
    "sampling",
    "text",
    "tiny",
    "variants",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"miniflux.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"miniflux.{name}")
    raise AttributeError(f"module 'miniflux' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | set(__all__))
