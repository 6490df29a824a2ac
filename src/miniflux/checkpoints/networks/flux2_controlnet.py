"""The ControlNet of FLUX.2 dev, which alibaba-pai publishes under diffusers' names."""

from __future__ import annotations

from typing import Any

from miniflux.checkpoints.networks.flux2 import FLUX2_DIFFUSERS
from miniflux.checkpoints.networks.record import DIFFUSERS, Layout, Network, Row, Shapes, count, row
from miniflux.models.flux2_controlnet import Flux2ControlNet, Flux2ControlNetConfig

BLOCKS = "control_transformer_blocks."


def _of_control(one: Row) -> Row:
    """A row of the transformer's double blocks, for those of a ControlNet."""
    theirs = tuple(key.replace("transformer_blocks.", BLOCKS, 1) for key in one.theirs)
    return Row(one.ours.replace("double_blocks.", BLOCKS, 1), theirs, one.how)


ROWS = [
    *(row(name, name) for name in ("control_img_in.*", f"{BLOCKS}0.before_proj.*", f"{BLOCKS}{{i}}.after_proj.*")),
    *(_of_control(one) for one in FLUX2_DIFFUSERS if one.ours.startswith("double_blocks.")),
]


def _sizes(shapes: Shapes, default: object) -> dict[str, Any]:
    hidden, channels = shapes["control_img_in.weight"]
    (head,) = shapes[f"{BLOCKS}0.img_attn.norm.query_norm.scale"]
    return {
        "control_channels": channels,
        "hidden_size": hidden,
        "num_heads": max(1, hidden // head),
        "depth": count(shapes, r"control_transformer_blocks\.(\d+)\."),
        "mlp_ratio": shapes[f"{BLOCKS}0.img_mlp.2.weight"][1] / hidden,
    }


FLUX2_CONTROLNET = Network(
    part="controlnet",
    word="ControlNet",
    phrase="a ControlNet of a FLUX.2",
    kind=Flux2ControlNet,
    config=Flux2ControlNetConfig,
    signs=("control_img_in.weight",),
    layouts={DIFFUSERS: Layout(ROWS, (f"{BLOCKS}0.attn.",))},
    stacked=lambda config: config.hidden_size,
    title="FLUX.2",
    sizes=_sizes,
)
