"""Looking inside: the networks at work, and noise levels and solvers, measured and drawn.

    from miniflux import study

    print(study.points(pipe))
    with study.capture(pipe, "double_blocks.*.img_out") as seen:
        pipe.generate("a red circle")

The parts are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miniflux.study.attention import attention_maps, patch_maps
    from miniflux.study.blueprints import blueprint
    from miniflux.study.capturing import Capture, capture
    from miniflux.study.comparing import diff
    from miniflux.study.concepts import concept_maps
    from miniflux.study.counting import count
    from miniflux.study.counts import Counts
    from miniflux.study.divergence import Diff
    from miniflux.study.editing import add, edit, patch, replace, scale, skip, zero
    from miniflux.study.inventory import points
    from miniflux.study.kept import Kept, opened
    from miniflux.study.maps import Maps
    from miniflux.study.point import Point
    from miniflux.study.tracing import trace
    from miniflux.study.trajectories import Trajectory, trajectory

_HOMES = {
    "blueprint": "blueprints",
    **dict.fromkeys(("attention_maps", "patch_maps"), "attention"),
    "concept_maps": "concepts",
    "Maps": "maps",
    "Counts": "counts",
    "count": "counting",
    "Diff": "divergence",
    "diff": "comparing",
    "Point": "point",
    "points": "inventory",
    **dict.fromkeys(("Kept", "opened"), "kept"),
    **dict.fromkeys(("Capture", "capture"), "capturing"),
    **dict.fromkeys(("add", "edit", "patch", "replace", "scale", "skip", "zero"), "editing"),
    "trace": "tracing",
    **dict.fromkeys(("Trajectory", "trajectory"), "trajectories"),
}

__all__ = [
    "Capture",
    "Counts",
    "Diff",
    "Kept",
    "Maps",
    "Point",
    "Trajectory",
    "add",
    "attention_maps",
    "blueprint",
    "capture",
    "concept_maps",
    "count",
    "diff",
    "edit",
    "opened",
    "patch",
    "patch_maps",
    "points",
    "replace",
    "scale",
    "skip",
    "trace",
    "trajectory",
    "zero",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"miniflux.study.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'miniflux.study' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | set(__all__))
