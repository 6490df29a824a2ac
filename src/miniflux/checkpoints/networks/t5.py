"""T5's encoder: its layouts and its sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from miniflux.checkpoints.networks.record import Layout, Network, Shapes, count, known_fields, row
from miniflux.errors import ConfigError
from miniflux.models.t5 import T5Config, T5Encoder

# T5 in GGUF files, as llama.cpp names it (`gguf/tensor_mapping.py`, MODEL_ARCH.T5ENCODER).
T5_LLAMA_CPP = [
    row("shared.*", "token_embd.*"),
    row("encoder.final_layer_norm.*", "enc.output_norm.*"),
    row("encoder.block.{i}.layer.0.layer_norm.*", "enc.blk.{i}.attn_norm.*"),
    *(row(f"encoder.block.{{i}}.layer.0.SelfAttention.{x}.*", f"enc.blk.{{i}}.attn_{x}.*") for x in "qkvo"),
    row("encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.*", "enc.blk.{i}.attn_rel_b.*"),
    row("encoder.block.{i}.layer.1.layer_norm.*", "enc.blk.{i}.ffn_norm.*"),
    row("encoder.block.{i}.layer.1.DenseReluDense.wi_0.*", "enc.blk.{i}.ffn_gate.*"),
    row("encoder.block.{i}.layer.1.DenseReluDense.wi_1.*", "enc.blk.{i}.ffn_up.*"),
    row("encoder.block.{i}.layer.1.DenseReluDense.wo.*", "enc.blk.{i}.ffn_down.*"),
]


def _sizes(shapes: Shapes, default: T5Config) -> dict[str, Any]:
    vocabulary, width = shapes["shared.weight"]
    buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _of_json(content: Mapping[str, Any]) -> T5Config:
    if content.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
        raise ConfigError(f"feed_forward_proj {content['feed_forward_proj']!r} is not gated-gelu")
    return known_fields(T5Config, content)


def _as_json(config: T5Config) -> dict[str, Any]:
    """The fields of transformers' T5Config."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **asdict(config),
        "num_decoder_layers": config.num_layers,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def _activations(config: T5Config, tokens: int, itemsize: int) -> int:
    """Bytes at the worst moment of a layer: three wide tensors of the MLP, the float32 stream, the bias of the scores.
    In half precision, attention makes a float32 copy of the bias."""
    bias = config.num_heads * tokens**2 * (itemsize if itemsize == 4 else itemsize + 4)
    return tokens * (3 * config.d_ff * itemsize + 3 * config.d_model * 4) + bias


T5 = Network(
    part="t5",
    word="T5 encoder",
    phrase="a text encoder (T5)",
    kind=T5Encoder,
    config=T5Config,
    signs=("encoder.final_layer_norm.weight", "enc.output_norm.weight"),
    layouts={
        "encoder embedding": Layout(
            [row("shared.*", "encoder.embed_tokens.*"), row("encoder.**", "encoder.**")], ("encoder.embed_tokens.",)
        ),
        "llama.cpp": Layout(T5_LLAMA_CPP, ("token_embd.",)),
    },
    redundant={
        "encoder.embed_tokens.weight": "a second copy of shared.weight",
        "logit_scale": "ComfyUI writes it with every text encoder; only CLIP has one",
        "output.weight": "belongs to T5's decoder",
    },
    other_half=(("decoder.", "lm_head.", "dec."), "belongs to T5's decoder"),
    prefix="text_encoders.t5xxl.transformer.",
    folder="text_encoder_2",
    stem="model",
    single="t5xxl_fp16",
    names=(
        "text_encoder_2",
        "t5xxl_fp16.safetensors",
        "t5xxl_fp8_e4m3fn_scaled.safetensors",
        "t5xxl_fp8_e4m3fn.safetensors",
    ),
    comfyui=("text_encoders", "clip"),
    architecture=lambda config: "t5encoder",
    header="t5_config",
    sizes=_sizes,
    of_json=_of_json,
    as_json=_as_json,
    named_there="a T5Config",
    lora=(
        ("diffusers", "text_encoder_2.", "t5", False, ""),
        ("ComfyUI", "text_encoders.t5xxl.transformer.", "t5", False, ""),
        ("kohya", "lora_te3_", "t5", True, ""),
        ("OneTrainer", "lora_te2_", "t5", True, ""),
    ),
    packed=("encoder.block.",),
    chains=(r"shared", r"encoder\.block\.\d+"),
    stays=re.compile(r".*\.relative_attention_bias\.weight"),  # the first block's, used before it runs
    activations=_activations,
)
