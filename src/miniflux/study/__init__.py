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
    from miniflux.study.divergence.comparing import diff
    from miniflux.study.divergence.parting import Diff
    from miniflux.study.mapping.attention import attention_maps, patch_maps
    from miniflux.study.mapping.concepts import concept_maps
    from miniflux.study.mapping.maps import Maps
    from miniflux.study.paths.trajectories import Trajectory, trajectory
    from miniflux.study.sizes.blueprints import blueprint
    from miniflux.study.sizes.counting import count
    from miniflux.study.sizes.counts import Counts
    from miniflux.study.values.capturing import Capture, capture
    from miniflux.study.values.editing import add, edit, patch, replace, scale, skip, zero
    from miniflux.study.values.inventory import points
    from miniflux.study.values.kept import Kept, opened
    from miniflux.study.values.point import Point
    from miniflux.study.values.tracing import trace

_HOMES = {
    "blueprint": "sizes.blueprints",
    **dict.fromkeys(("attention_maps", "patch_maps"), "mapping.attention"),
    "concept_maps": "mapping.concepts",
    "Maps": "mapping.maps",
    "Counts": "sizes.counts",
    "count": "sizes.counting",
    "Diff": "divergence.parting",
    "diff": "divergence.comparing",
    "Point": "values.point",
    "points": "values.inventory",
    **dict.fromkeys(("Kept", "opened"), "values.kept"),
    **dict.fromkeys(("Capture", "capture"), "values.capturing"),
    **dict.fromkeys(("add", "edit", "patch", "replace", "scale", "skip", "zero"), "values.editing"),
    "trace": "values.tracing",
    **dict.fromkeys(("Trajectory", "trajectory"), "paths.trajectories"),
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
