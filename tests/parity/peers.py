"""Pairs of networks with the same random weights: one of diffusers or transformers, and ours.

The mappings between their names are written for the tests alone, so that they can catch a wrong row in our own tables.
"""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from miniflux.models.autoencoder import Autoencoder, AutoencoderConfig
from miniflux.models.clip import ClipTextConfig, ClipTextEncoder
from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.models.t5 import T5Config, T5Encoder
from tests.tiny import randomise

WHY = "parity tests compare with diffusers and transformers: pip install miniflux[test]"
diffusers = pytest.importorskip("diffusers", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)


def flux1_from_diffusers(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a FluxTransformer2DModel in the original names: q, k and v are joined there."""
    ours: dict[str, Tensor] = {}
    rest = dict(theirs)

    def move(new: str, *old: str) -> None:
        """Join the rows of the old linears (or take the one), weight and bias."""
        for part in ("weight", "bias"):
            if f"{old[0]}.{part}" in rest:
                ours[f"{new}.{part}"] = torch.cat([rest.pop(f"{name}.{part}") for name in old])

    def scale(new: str, old: str) -> None:
        ours[f"{new}.scale"] = rest.pop(f"{old}.weight")

    def count(prefix: str) -> int:
        return len({key.split(".")[1] for key in theirs if key.startswith(prefix + ".")})

    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    for new, old in [("time_in", "timestep"), ("guidance_in", "guidance"), ("vector_in", "text")]:
        move(f"{new}.in_layer", f"time_text_embed.{old}_embedder.linear_1")
        move(f"{new}.out_layer", f"time_text_embed.{old}_embedder.linear_2")

    for i in range(count("transformer_blocks")):
        b, d = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for s, context, out, ff, q, k, v, norm in [
            ("img", "norm1", "to_out.0", "ff", "to_q", "to_k", "to_v", ""),
            ("txt", "norm1_context", "to_add_out", "ff_context", "add_q_proj", "add_k_proj", "add_v_proj", "added_"),
        ]:
            move(f"{d}.{s}_mod.lin", f"{b}.{context}.linear")
            move(f"{d}.{s}_attn.qkv", *(f"{b}.attn.{name}" for name in (q, k, v)))
            move(f"{d}.{s}_attn.proj", f"{b}.attn.{out}")
            move(f"{d}.{s}_mlp.0", f"{b}.{ff}.net.0.proj")
            move(f"{d}.{s}_mlp.2", f"{b}.{ff}.net.2")
            scale(f"{d}.{s}_attn.norm.query_norm", f"{b}.attn.norm_{norm}q")
            scale(f"{d}.{s}_attn.norm.key_norm", f"{b}.attn.norm_{norm}k")

    for i in range(count("single_transformer_blocks")):
        b, s = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        move(f"{s}.modulation.lin", f"{b}.norm.linear")
        move(f"{s}.linear1", f"{b}.attn.to_q", f"{b}.attn.to_k", f"{b}.attn.to_v", f"{b}.proj_mlp")
        move(f"{s}.linear2", f"{b}.proj_out")
        scale(f"{s}.norm.query_norm", f"{b}.attn.norm_q")
        scale(f"{s}.norm.key_norm", f"{b}.attn.norm_k")

    move("final_layer.linear", "proj_out")
    for part in ("weight", "bias"):  # diffusers: scale, then shift
        scale_rows, shift_rows = rest.pop(f"norm_out.linear.{part}").chunk(2)
        ours[f"final_layer.adaLN_modulation.1.{part}"] = torch.cat([shift_rows, scale_rows])
    assert not rest, f"not mapped: {sorted(rest)}"
    return ours


AUTOENCODER_NAMES = [
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets", r"up.\1.block"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
]


def autoencoder_from_diffusers(theirs: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The state dict of an AutoencoderKL in the original names: decoder levels count from the other end there."""
    ours: dict[str, Tensor] = {}
    for key, tensor in theirs.items():
        for pattern, name in AUTOENCODER_NAMES:
            key = re.sub(pattern, name, key)
        key = re.sub(r"decoder\.up\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", key)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key):
            tensor = tensor[..., None, None]  # linears there, 1x1 convolutions here
        ours[key] = tensor
    return ours


def flux1_pair(config: Flux1Config) -> tuple[nn.Module, Flux1]:
    """FluxTransformer2DModel and Flux1."""
    theirs = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        num_single_layers=config.depth_single_blocks,
        attention_head_dim=config.hidden_size // config.num_heads,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_in_dim,
        pooled_projection_dim=config.vec_in_dim,
        guidance_embeds=config.guidance_embed,
        axes_dims_rope=config.axes_dim,
    )
    ours = Flux1(config)
    ours.load_state_dict(flux1_from_diffusers(randomise(theirs).state_dict()))
    return theirs, ours


def autoencoder_pair(config: AutoencoderConfig) -> tuple[nn.Module, Autoencoder]:
    """AutoencoderKL and Autoencoder."""
    levels = len(config.ch_mult)
    theirs = diffusers.AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.out_ch,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.ch * mult for mult in config.ch_mult),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=config.num_groups,
        scaling_factor=config.scale_factor,
        shift_factor=config.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    ours = Autoencoder(config)
    ours.load_state_dict(autoencoder_from_diffusers(randomise(theirs).state_dict(), levels))
    return theirs, ours


def clip_pair(config: ClipTextConfig) -> tuple[nn.Module, ClipTextEncoder]:
    """CLIPTextModel, whose newer versions leave out the prefix of the published files, and ClipTextEncoder."""
    theirs = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**asdict(config))))
    state = {f"text_model.{key.removeprefix('text_model.')}": x for key, x in theirs.state_dict().items()}
    state.pop("text_model.embeddings.position_ids", None)  # a buffer in older versions
    ours = ClipTextEncoder(config)
    ours.load_state_dict(state)
    return theirs, ours


def t5_pair(config: T5Config) -> tuple[nn.Module, T5Encoder]:
    """T5EncoderModel, which lists its embedding twice, and T5Encoder."""
    settings = transformers.T5Config(**asdict(config), feed_forward_proj="gated-gelu", dropout_rate=0.0)
    theirs = randomise(transformers.T5EncoderModel(settings))
    ours = T5Encoder(config)
    ours.load_state_dict({k: x for k, x in theirs.state_dict().items() if k != "encoder.embed_tokens.weight"})
    return theirs, ours
