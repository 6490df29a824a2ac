"""Sizes of the networks of every release, from `flux/util.py` and `flux2/model.py` of the original releases and the
`config.json` files of text encoders and towers; and of nano. The only place where real sizes are written down."""

from __future__ import annotations

from dataclasses import replace

from miniflux.models.autoencoder import AutoencoderConfig, Flux2AutoencoderConfig
from miniflux.models.causal_lm import CausalLmConfig
from miniflux.models.clip import ClipTextConfig
from miniflux.models.flux1 import Flux1Config
from miniflux.models.flux2 import Flux2Config
from miniflux.models.flux3 import Flux3Config
from miniflux.models.t5 import T5Config
from miniflux.models.tiny_autoencoder import TinyDecoderConfig
from miniflux.models.vision import VisionConfig
from miniflux.text.chat import FLUX3_FORM, KLEIN_FORM, dev_form

FLUX1_DEV = Flux1Config(
    in_channels=64,
    out_channels=64,
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=19,
    depth_single_blocks=38,
    axes_dim=(16, 56, 56),
    theta=10_000,
    qkv_bias=True,
    guidance_embed=True,
)
FLUX1_AUTOENCODER = AutoencoderConfig(
    in_channels=3,
    ch=128,
    out_ch=3,
    ch_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    z_channels=16,
    scale_factor=0.3611,
    shift_factor=0.1159,
)
# TAEF1 (madebyollin/taef1: `taesd.py`, and the config.json beside its diffusers file).
FLUX1_TINY = TinyDecoderConfig(z_channels=16, out_ch=3, width=64, blocks=(3, 3, 3, 1))
CLIP_L = ClipTextConfig(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
T5_XXL = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)

# FLUX.2 (`flux2/model.py` of the release) and FLUX.3 (the defaults of diffusers' Flux3Transformer2DModel).
FLUX2_DEV = Flux2Config(
    in_channels=128,
    context_in_dim=15360,
    hidden_size=6144,
    num_heads=48,
    depth=8,
    depth_single_blocks=48,
    axes_dim=(32, 32, 32, 32),
    theta=2000,
    mlp_ratio=3.0,
    guidance_embed=True,
)
FLUX2_KLEIN_4B = replace(
    FLUX2_DEV,
    context_in_dim=7680,
    hidden_size=3072,
    num_heads=24,
    depth=5,
    depth_single_blocks=20,
    guidance_embed=False,
)
FLUX2_KLEIN_9B = replace(
    FLUX2_KLEIN_4B, context_in_dim=12288, hidden_size=4096, num_heads=32, depth=8, depth_single_blocks=24
)
FLUX3_KLEIN = Flux3Config(
    in_channels=128,
    out_channels=128,
    cond_in_channels=128,
    context_in_dim=20480,
    hidden_size=3072,
    num_heads=24,
    depth=5,
    depth_single_blocks=28,
    mlp_ratio=3.0,
    axes_dim=(32, 32, 32, 32),
    theta=10_000,
    flow_map=True,
)
FLUX2_AUTOENCODER = Flux2AutoencoderConfig(
    in_channels=3, ch=128, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=32
)
# The language models (`config.json` of Qwen/Qwen3-4B, Qwen/Qwen3-8B, Qwen/Qwen3-VL-4B-Instruct and
# mistralai/Mistral-Small-3.2-24B-Instruct-2506), of which as many layers are read as prompts need.
QWEN3_4B = CausalLmConfig(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=1e6,
    qk_norm=True,
    tie_word_embeddings=True,
    layers_read=max(KLEIN_FORM.layers),
)
QWEN3_8B = replace(QWEN3_4B, hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False)
QWEN3_VL_4B = replace(QWEN3_4B, rope_theta=5e6, layers_read=max(FLUX3_FORM.layers))
MISTRAL_SMALL = CausalLmConfig(
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=32768,
    num_hidden_layers=40,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e9,
    qk_norm=False,
    tie_word_embeddings=False,
    layers_read=max(dev_form().layers),
)

NANO_DEV = Flux1Config(
    in_channels=64,
    out_channels=64,
    vec_in_dim=64,
    context_in_dim=128,
    hidden_size=192,
    mlp_ratio=4.0,
    num_heads=6,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 14, 14),
    guidance_embed=True,
)

NANO_AUTOENCODER = AutoencoderConfig(
    in_channels=3,
    ch=32,
    out_ch=3,
    ch_mult=(1, 2, 2, 2),
    num_res_blocks=1,
    z_channels=16,
    scale_factor=1.1861,  # measured by the recipe: latents of unit variance
    shift_factor=-0.0041,
    num_groups=4,
)
NANO_CLIP = ClipTextConfig(
    vocab_size=767,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    eos_token_id=766,
)
NANO_T5 = T5Config(
    vocab_size=640,
    d_model=128,
    d_kv=32,
    d_ff=320,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=16,
    relative_attention_max_distance=48,
)
NANO_LENGTH = 48  # tokens of a prompt

NANO_SCHNELL = replace(NANO_DEV, guidance_embed=False)

# FLUX.2 and FLUX.3 at nano's size. Their autoencoder is nano's in the other form, with the same latents.
NANO2_AUTOENCODER = Flux2AutoencoderConfig(
    in_channels=3, ch=32, out_ch=3, ch_mult=(1, 2, 2, 2), num_res_blocks=1, z_channels=16, num_groups=4
)
NANO_LM = CausalLmConfig(
    vocab_size=640,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=1e4,
    qk_norm=True,
    tie_word_embeddings=True,
)
NANO_LM_LENGTH = 40  # tokens of a prompt in its form
NANO_LM_LAYERS = (1, 2, 3)
NANO2 = Flux2Config(
    in_channels=64,
    context_in_dim=384,
    hidden_size=192,
    num_heads=6,
    depth=2,
    depth_single_blocks=4,
    axes_dim=(8, 8, 8, 8),
    theta=2000,
    mlp_ratio=3.0,
    guidance_embed=True,
)
NANO3 = Flux3Config(
    in_channels=64,
    out_channels=64,
    cond_in_channels=64,
    context_in_dim=384,
    hidden_size=192,
    num_heads=6,
    depth=1,
    depth_single_blocks=5,
    axes_dim=(8, 8, 8, 8),
    theta=10_000,
    flow_map=True,
)

SIGLIP_SO400M = VisionConfig(  # `vision_config` of google/siglip-so400m-patch14-384
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
CLIP_VIT_L14 = VisionConfig(  # `vision_config` of openai/clip-vit-large-patch14
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    projection_dim=768,
)
SIGLIP_SIZES: dict[tuple[int, int, int], str] = {(1152, 14, 729): "SigLIP so400m patch14 384, image encoder of Redux"}
CLIP_VISION_SIZES: dict[tuple[int, int, int], str] = {(1024, 14, 257): "CLIP ViT-L/14, image encoder of IP-Adapters"}
REDUX_SIZES: dict[tuple[int, int], str] = {(1152, 4096): "flux1-redux-dev, image encoder of FLUX.1"}
