"""diffusers' networks with the weights of ours, for the benchmarks that compare with them."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from miniflux.checkpoints import to_layout
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.flux1 import Flux1
from miniflux.models.flux2 import Flux2
from miniflux.models.flux3 import Flux3
from miniflux.pipeline import Pipeline


def transformer(ours: Flux1 | Flux2 | Flux3) -> Any:
    """FluxTransformer2DModel, or that of FLUX.2 or FLUX.3."""
    config: Any = ours.config
    shared = {
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "axes_dims_rope": tuple(config.axes_dim),
    }
    if isinstance(ours, Flux1):
        own = {"pooled_projection_dim": config.vec_in_dim, "guidance_embeds": config.guidance_embed}
        theirs = FluxTransformer2DModel(out_channels=config.out_channels, **own, **shared)
    elif isinstance(ours, Flux2):
        own = {"mlp_ratio": config.mlp_ratio, "guidance_embeds": config.guidance_embed, "rope_theta": config.theta}
        theirs = diffusers.Flux2Transformer2DModel(**own, **shared)
    else:
        own = {"cond_in_channels": config.cond_in_channels, "flow_map": config.flow_map}
        theirs = diffusers.Flux3Transformer2DModel(**own, **shared)
    theirs.load_state_dict(to_layout(ours, ours.state_dict(), "diffusers"))
    return theirs.eval()


def autoencoder(ours: Autoencoder) -> Any:
    """AutoencoderKL."""
    config, levels = ours.config, len(ours.config.ch_mult)
    theirs = AutoencoderKL(
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
    ).eval()
    theirs.load_state_dict(to_layout(ours, ours.state_dict(), "diffusers"))
    return theirs


def pipeline(ours: Pipeline) -> Any:
    """FluxPipeline, to be given embeddings."""
    assert isinstance(ours.transformer, Flux1) and isinstance(ours.autoencoder, Autoencoder)
    shifted = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **shifted)
    encoders = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    networks = {"transformer": transformer(ours.transformer), "vae": autoencoder(ours.autoencoder)}
    theirs = FluxPipeline(scheduler=scheduler, **networks, **encoders)
    theirs.set_progress_bar_config(disable=True)
    return theirs
