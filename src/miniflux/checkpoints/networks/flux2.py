"""FLUX.2's transformer: its layouts, its sizes, how it is packed and streamed."""

from __future__ import annotations

from typing import Any

from miniflux.checkpoints.networks.flux1 import COMMON_DIFFUSERS
from miniflux.checkpoints.networks.record import DIFFUSERS, TRANSFORMER, Layout, Network, Shapes, count, row
from miniflux.models.flux2 import Flux2, Flux2Config

# diffusers' Flux2Transformer2DModel. Of single blocks nothing is split there.
FLUX2_DIFFUSERS = [
    *COMMON_DIFFUSERS,
    row("time_in.in_layer.*", "time_guidance_embed.timestep_embedder.linear_1.*"),
    row("time_in.out_layer.*", "time_guidance_embed.timestep_embedder.linear_2.*"),
    row("guidance_in.in_layer.*", "time_guidance_embed.guidance_embedder.linear_1.*"),
    row("guidance_in.out_layer.*", "time_guidance_embed.guidance_embedder.linear_2.*"),
    row("double_stream_modulation_img.lin.*", "double_stream_modulation_img.linear.*"),
    row("double_stream_modulation_txt.lin.*", "double_stream_modulation_txt.linear.*"),
    row("single_stream_modulation.lin.*", "single_stream_modulation.linear.*"),
    row("double_blocks.{i}.img_mlp.0.*", "transformer_blocks.{i}.ff.linear_in.*"),
    row("double_blocks.{i}.img_mlp.2.*", "transformer_blocks.{i}.ff.linear_out.*"),
    row("double_blocks.{i}.txt_mlp.0.*", "transformer_blocks.{i}.ff_context.linear_in.*"),
    row("double_blocks.{i}.txt_mlp.2.*", "transformer_blocks.{i}.ff_context.linear_out.*"),
    row("single_blocks.{i}.linear1.*", "single_transformer_blocks.{i}.attn.to_qkv_mlp_proj.*"),
    row("single_blocks.{i}.linear2.*", "single_transformer_blocks.{i}.attn.to_out.*"),
]
HEAD = "single_blocks.0.norm.query_norm.scale"


def _sizes(shapes: Shapes, default: object) -> dict[str, Any]:
    hidden, channels = shapes["img_in.weight"]
    return {
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "context_in_dim": shapes["txt_in.weight"][1],
        "hidden_size": hidden,
        "mlp_ratio": shapes["double_blocks.0.img_mlp.2.weight"][1] / hidden,
        "num_heads": max(1, hidden // shapes[HEAD][0]),
        "depth": count(shapes, r"double_blocks\.(\d+)\."),
        "depth_single_blocks": count(shapes, r"single_blocks\.(\d+)\."),
        "guidance_embed": any(key.startswith("guidance_in.") for key in shapes),
    }


def _as_json(config: Flux2Config) -> dict[str, Any]:
    """The arguments of diffusers' Flux2Transformer2DModel."""
    return {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "mlp_ratio": config.mlp_ratio,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
        "rope_theta": config.theta,
    }


def _activations(config: Flux2Config, tokens: int, itemsize: int) -> int:
    """Bytes at the worst moment of a single block: stream, linear1's output, q, k and v, attention, MLP, their join."""
    return int(tokens * itemsize * config.hidden_size * (9 + 5 * config.mlp_ratio))


FLUX2 = Network(
    **TRANSFORMER,
    phrase="the transformer of a FLUX.2",
    kind=Flux2,
    config=Flux2Config,
    signs=("double_stream_modulation_img.lin.weight", "double_stream_modulation_img.linear.weight"),
    layouts={DIFFUSERS: Layout(FLUX2_DIFFUSERS, ("x_embedder.",))},
    stacked=lambda config: config.hidden_size,
    architecture=lambda config: "flux2",
    title="FLUX.2",
    telling=(
        "img_in.weight",
        "txt_in.weight",
        "final_layer.linear.weight",
        HEAD,
        "double_blocks.0.img_mlp.2.weight",
    ),
    head=HEAD,
    sizes=_sizes,
    as_json=_as_json,
    packed=("double_blocks.", "single_blocks."),
    chains=(r"(double|single)_blocks\.\d+",),
    activations=_activations,
)
