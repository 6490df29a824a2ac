"""FLUX.3's transformer: its layouts, its sizes, how it is packed and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from miniflux.checkpoints.networks.record import DIFFUSERS, TRANSFORMER, Layout, Network, Row, Shapes, count, row
from miniflux.models.flux3 import Flux3, Flux3Config

BLOCKS = {
    "content_mode_blocks.image.{i}": "mode_blocks.image.{i}",
    "content_mode_blocks.image_cond.{i}": "mode_blocks.image_cond.{i}",
    "txt_mode_blocks.{i}": "txt_mode_blocks.{i}",
    "single_blocks.{i}": "single_transformer_blocks.{i}",
}
INSIDE = {
    "q_proj.*": "attn.to_q.*",
    "k_proj.*": "attn.to_k.*",
    "v_proj.*": "attn.to_v.*",
    "attn_out.*": "attn.to_out.0.*",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
    "mlp_in.*": "ff.linear_in.*",
    "mlp_out.*": "ff.linear_out.*",
}


def _diffusers() -> Iterator[Row]:
    """diffusers' Flux3Transformer2DModel. Its last modulation has scale before shift."""
    yield row("emb_in.image.*", "x_embedders.image.*")
    yield row("emb_in.image_cond.*", "x_embedders.image_cond.*")
    yield row("txt_in.*", "context_embedder.*")
    for ours, theirs in (("time_in", "timestep_embedder"), ("ref_time_in", "target_timestep_embedder")):
        yield row(f"{ours}.in_layer.*", f"{theirs}.linear_1.*")
        yield row(f"{ours}.out_layer.*", f"{theirs}.linear_2.*")
    for kind in ("early_stream_modulations", "single_stream_modulations"):
        for stream in ("image", "image_cond", "txt"):
            yield row(f"{kind}.{stream}.lin.*", f"{kind}.{stream}.linear.*")
    for ours, theirs in BLOCKS.items():
        for a, b in INSIDE.items():
            yield row(f"{ours}.{a}", f"{theirs}.{b}")
    yield row("final_layer.image.adaLN_modulation.1.*", "norm_out.linear.*", how="swap halves")
    yield row("final_layer.image.linear.*", "proj_out.*")


FLUX3_DIFFUSERS = list(_diffusers())
HEAD = "single_blocks.0.norm.query_norm.scale"


def _sizes(shapes: Shapes, default: object) -> dict[str, Any]:
    hidden, channels = shapes["emb_in.image.weight"]
    return {
        "in_channels": channels,
        "cond_in_channels": shapes["emb_in.image_cond.weight"][1],
        "out_channels": shapes["final_layer.image.linear.weight"][0],
        "context_in_dim": shapes["txt_in.weight"][1],
        "hidden_size": hidden,
        "mlp_ratio": shapes["single_blocks.0.mlp_out.weight"][1] / hidden,
        "num_heads": max(1, hidden // shapes[HEAD][0]),
        "depth": count(shapes, r"txt_mode_blocks\.(\d+)\."),
        "depth_single_blocks": count(shapes, r"single_blocks\.(\d+)\."),
        "flow_map": any(key.startswith("ref_time_in.") for key in shapes),
    }


def _as_json(config: Flux3Config) -> dict[str, Any]:
    """The arguments of diffusers' Flux3Transformer2DModel."""
    return {
        "_class_name": "Flux3Transformer2DModel",
        "in_channels": config.in_channels,
        "cond_in_channels": config.cond_in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "mlp_ratio": config.mlp_ratio,
        "axes_dims_rope": list(config.axes_dim),
        "rope_theta": config.theta,
        "flow_map": config.flow_map,
    }


def _activations(config: Flux3Config, tokens: int, itemsize: int) -> int:
    """Bytes at the worst moment of a block: stream, modulated input, q, k and v (two of them in float32 as well),
    attention and its projection, both halves of the MLP and what becomes of them."""
    return int(tokens * config.hidden_size * (itemsize * (8 + 3 * config.mlp_ratio) + 2 * 4))


FLUX3 = Network(
    **TRANSFORMER,
    phrase="the transformer of a FLUX.3",
    kind=Flux3,
    config=Flux3Config,
    signs=("early_stream_modulations.txt.lin.weight", "early_stream_modulations.txt.linear.weight"),
    layouts={DIFFUSERS: Layout(FLUX3_DIFFUSERS, ("x_embedders.",))},
    other_half=(("repa_projectors.",), "was of use in training alone"),
    architecture=lambda config: "flux3",
    title="FLUX.3",
    telling=(
        "emb_in.image.weight",
        "emb_in.image_cond.weight",
        "txt_in.weight",
        "final_layer.image.linear.weight",
        HEAD,
        "single_blocks.0.mlp_out.weight",
    ),
    head=HEAD,
    sizes=_sizes,
    as_json=_as_json,
    lora=(
        ("diffusers", "transformer.", "flux3 diffusers", False, ""),
        ("diffusers without prefix", "", "flux3 diffusers", False, ""),
        ("PEFT", "base_model.model.", "flux3", False, ""),
        ("BFL", "", "flux3", False, ""),
        ("ComfyUI", "diffusion_model.", "flux3", False, ""),
        ("ComfyUI with diffusers names", "diffusion_model.", "flux3 diffusers", False, ""),
        ("kohya", "lora_unet_", "flux3", True, ""),
        ("LyCORIS", "lycoris_", "flux3 diffusers", True, ""),
    ),
    packed=("content_mode_blocks.", "txt_mode_blocks.", "single_blocks."),
    chains=(r"(txt_mode_blocks|content_mode_blocks\.image|content_mode_blocks\.image_cond|single_blocks)\.\d+",),
    activations=_activations,
)
