"""FLUX.1 Redux's two linears; the release and diffusers name them alike."""

from __future__ import annotations

from typing import Any

from miniflux.checkpoints.networks.record import Network, Shapes
from miniflux.models.redux import Redux, ReduxConfig


def _sizes(shapes: Shapes, default: object) -> dict[str, Any]:
    inner, seen = shapes["redux_up.weight"]
    return {"redux_dim": seen, "txt_in_features": shapes["redux_down.weight"][0], "inner": inner}


REDUX = Network(
    part="redux",
    word="Redux",
    phrase="Redux",
    kind=Redux,
    config=ReduxConfig,
    signs=("redux_up.weight",),
    layouts={},
    sizes=_sizes,
)
