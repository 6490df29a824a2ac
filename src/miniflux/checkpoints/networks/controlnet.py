"""ControlNets of FLUX.1: XLabs' names are our own; InstantX and Shakker Labs publish in diffusers'."""

from __future__ import annotations

from typing import Any

from miniflux.checkpoints.networks.flux1 import FLUX1_DIFFUSERS, trunk_sizes
from miniflux.checkpoints.networks.record import DIFFUSERS, Layout, Network, Shapes, row
from miniflux.models.controlnet import PATCH, ControlNet, ControlNetConfig

HEAD = "double_blocks.0.img_attn.norm.query_norm.scale"
ROWS = [
    *(one for one in FLUX1_DIFFUSERS if not one.ours.startswith("final_layer.")),
    row("pos_embed_input.*", "controlnet_x_embedder.*"),
    *(row(f"{name}.**", f"{name}.**") for name in ("controlnet_blocks", "controlnet_single_blocks")),
    row("controlnet_mode_embedder.*", "controlnet_mode_embedder.*"),
    # Of the convolutions over the picture, as diffusers names them: the first, three pairs, the last.
    row("input_hint_block.0.*", "input_hint_block.conv_in.*"),
    *(row(f"input_hint_block.{2 * i + 2}.*", f"input_hint_block.blocks.{i}.*") for i in range(6)),
    row("input_hint_block.14.*", "input_hint_block.conv_out.*"),
]


def _sizes(shapes: Shapes, default: object) -> dict[str, Any]:
    hint, told = shapes.get("input_hint_block.0.weight", (0,))[0], trunk_sizes(shapes, HEAD)
    return {
        **told,
        "out_channels": told["in_channels"],
        "control_channels": hint * PATCH**2 or shapes["pos_embed_input.weight"][1],
        "modes": shapes.get("controlnet_mode_embedder.weight", (0,))[0],
        "hint_channels": hint,
    }


CONTROLNET = Network(
    part="controlnet",
    word="ControlNet",
    phrase="a ControlNet",
    kind=ControlNet,
    config=ControlNetConfig,
    signs=("controlnet_blocks.0.weight",),
    layouts={DIFFUSERS: Layout(ROWS, ("controlnet_x_embedder.",))},
    stacked=lambda config: config.hidden_size,
    header="axes_dim",
    title="FLUX.1",
    head=HEAD,
    sizes=_sizes,
)
