"""FLUX.1's transformer: its layouts, its sizes, how it is packed and streamed."""

from __future__ import annotations

import re
from typing import Any

from miniflux.checkpoints.networks.record import DIFFUSERS, TRANSFORMER, Layout, Network, Shapes, count, row
from miniflux.models.flux1 import Flux1, Flux1Config

# What diffusers' classes of FLUX.1 and FLUX.2 call alike. Fused tensors of double blocks are split, and the last
# modulation has scale before shift.
COMMON_DIFFUSERS = [
    row("img_in.*", "x_embedder.*"),
    row("txt_in.*", "context_embedder.*"),
    row("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", how="swap halves"),
    row("final_layer.linear.*", "proj_out.*"),
    row(
        "double_blocks.{i}.img_attn.qkv.*",
        "transformer_blocks.{i}.attn.to_q.*",
        "transformer_blocks.{i}.attn.to_k.*",
        "transformer_blocks.{i}.attn.to_v.*",
    ),
    row(
        "double_blocks.{i}.txt_attn.qkv.*",
        "transformer_blocks.{i}.attn.add_q_proj.*",
        "transformer_blocks.{i}.attn.add_k_proj.*",
        "transformer_blocks.{i}.attn.add_v_proj.*",
    ),
    row("double_blocks.{i}.img_attn.norm.query_norm.scale", "transformer_blocks.{i}.attn.norm_q.weight"),
    row("double_blocks.{i}.img_attn.norm.key_norm.scale", "transformer_blocks.{i}.attn.norm_k.weight"),
    row("double_blocks.{i}.txt_attn.norm.query_norm.scale", "transformer_blocks.{i}.attn.norm_added_q.weight"),
    row("double_blocks.{i}.txt_attn.norm.key_norm.scale", "transformer_blocks.{i}.attn.norm_added_k.weight"),
    row("double_blocks.{i}.img_attn.proj.*", "transformer_blocks.{i}.attn.to_out.0.*"),
    row("double_blocks.{i}.txt_attn.proj.*", "transformer_blocks.{i}.attn.to_add_out.*"),
    row("single_blocks.{i}.norm.query_norm.scale", "single_transformer_blocks.{i}.attn.norm_q.weight"),
    row("single_blocks.{i}.norm.key_norm.scale", "single_transformer_blocks.{i}.attn.norm_k.weight"),
]
# diffusers' FluxTransformer2DModel.
FLUX1_DIFFUSERS = [
    *COMMON_DIFFUSERS,
    row("time_in.in_layer.*", "time_text_embed.timestep_embedder.linear_1.*"),
    row("time_in.out_layer.*", "time_text_embed.timestep_embedder.linear_2.*"),
    row("guidance_in.in_layer.*", "time_text_embed.guidance_embedder.linear_1.*"),
    row("guidance_in.out_layer.*", "time_text_embed.guidance_embedder.linear_2.*"),
    row("vector_in.in_layer.*", "time_text_embed.text_embedder.linear_1.*"),
    row("vector_in.out_layer.*", "time_text_embed.text_embedder.linear_2.*"),
    row("double_blocks.{i}.img_mod.lin.*", "transformer_blocks.{i}.norm1.linear.*"),
    row("double_blocks.{i}.txt_mod.lin.*", "transformer_blocks.{i}.norm1_context.linear.*"),
    row("double_blocks.{i}.img_mlp.0.*", "transformer_blocks.{i}.ff.net.0.proj.*"),
    row("double_blocks.{i}.img_mlp.2.*", "transformer_blocks.{i}.ff.net.2.*"),
    row("double_blocks.{i}.txt_mlp.0.*", "transformer_blocks.{i}.ff_context.net.0.proj.*"),
    row("double_blocks.{i}.txt_mlp.2.*", "transformer_blocks.{i}.ff_context.net.2.*"),
    row("single_blocks.{i}.modulation.lin.*", "single_transformer_blocks.{i}.norm.linear.*"),
    row(
        "single_blocks.{i}.linear1.*",
        "single_transformer_blocks.{i}.attn.to_q.*",
        "single_transformer_blocks.{i}.attn.to_k.*",
        "single_transformer_blocks.{i}.attn.to_v.*",
        "single_transformer_blocks.{i}.proj_mlp.*",
    ),
    row("single_blocks.{i}.linear2.*", "single_transformer_blocks.{i}.proj_out.*"),
]

# What a quarter of the weights make, from noise level, guidance and prompt alone: known before a run (`Ahead`).
MODULATION = r"(double|single)_blocks\.\d+\.(img_mod|txt_mod|modulation)\.lin|final_layer\.adaLN_modulation\.1"
HEAD = "single_blocks.0.norm.query_norm.scale"


def trunk_sizes(shapes: Shapes, head: str) -> dict[str, Any]:
    """What the transformer and its ControlNets tell alike: all but the output, and the rotary axes, which none tells.

    Args:
        head: a tensor as long as a head of attention.
    """
    hidden, channels = shapes["img_in.weight"]
    return {
        "in_channels": channels,
        "vec_in_dim": shapes["vector_in.in_layer.weight"][1],
        "context_in_dim": shapes["txt_in.weight"][1],
        "hidden_size": hidden,
        "mlp_ratio": shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
        "num_heads": max(1, hidden // shapes[head][0]),
        "depth": count(shapes, r"double_blocks\.(\d+)\."),
        "depth_single_blocks": count(shapes, r"single_blocks\.(\d+)\."),
        "qkv_bias": "double_blocks.0.img_attn.qkv.bias" in shapes,
        "guidance_embed": any(key.startswith("guidance_in.") for key in shapes),
    }


def _sizes(shapes: Shapes, default: object) -> dict[str, Any]:
    return {**trunk_sizes(shapes, HEAD), "out_channels": shapes["final_layer.linear.weight"][0]}


def _as_json(config: Flux1Config) -> dict[str, Any]:
    """The arguments of diffusers' FluxTransformer2DModel."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }


def _modulation(config: Flux1Config) -> int:
    """Numbers that all modulations of one call make."""
    return config.hidden_size * (config.depth * 12 + config.depth_single_blocks * 3 + 2)


def _activations(config: Flux1Config, tokens: int, itemsize: int) -> int:
    """Bytes at the worst moment of a single block: stream, linear1's output, q, k and v, attention, MLP, their join."""
    hidden = config.hidden_size
    return int(tokens * itemsize * hidden * (9 + 3 * config.mlp_ratio))


FLUX1 = Network(
    **TRANSFORMER,
    phrase="the transformer of a FLUX.1",
    kind=Flux1,
    config=Flux1Config,
    signs=("img_in.weight", "x_embedder.weight"),
    layouts={DIFFUSERS: Layout(FLUX1_DIFFUSERS, ("x_embedder.",))},
    stacked=lambda config: config.hidden_size,
    architecture=lambda config: "flux",
    title="FLUX.1",
    telling=(
        "img_in.weight",
        "txt_in.weight",
        "vector_in.in_layer.weight",
        "final_layer.linear.weight",
        HEAD,
        "double_blocks.0.img_mlp.0.weight",
    ),
    head=HEAD,
    sizes=_sizes,
    as_json=_as_json,
    lora=(
        ("diffusers", "transformer.", "diffusers", False, ""),
        ("diffusers without prefix", "", "diffusers", False, ""),
        ("SimpleTuner", "transformer.base_model.model.", "diffusers", False, ""),
        ("PEFT", "base_model.model.", "original", False, ""),  # fal, BFL's own trainer
        ("PEFT with diffusers names", "base_model.model.", "diffusers", False, ""),
        ("BFL", "", "original", False, ""),
        ("ComfyUI", "diffusion_model.", "original", False, ""),
        ("ComfyUI with diffusers names", "diffusion_model.", "diffusers", False, ""),
        ("OneTrainer with original names", "transformer.", "original", False, ""),
        ("XLabs", "", "xlabs", False, ""),
        ("XLabs in ComfyUI", "diffusion_model.", "xlabs", False, ""),
        ("kohya", "lora_unet_", "original", True, ""),
        ("kohya with diffusers names", "lora_unet_", "diffusers", True, "_"),
        ("kohya with diffusers names", "lora_unet_", "diffusers", True, ""),
        ("OneTrainer", "lora_transformer_", "diffusers", True, ""),
        ("LyCORIS", "lycoris_", "diffusers", True, ""),
        ("LyCORIS with original names", "lycoris_", "original", True, ""),
    ),
    packed=("double_blocks.", "single_blocks."),
    chains=(r"(double|single)_blocks\.\d+", MODULATION),
    # DoRA takes the bias of a modulation away again after it has run.
    stays=re.compile(rf"({MODULATION})\.bias"),
    modulation=_modulation,
    activations=_activations,
)
