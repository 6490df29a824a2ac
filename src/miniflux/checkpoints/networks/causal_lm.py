"""The language models that read prompts for FLUX.2 and FLUX.3: their layouts and their sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from miniflux.checkpoints.networks.record import Layout, Network, Shapes, count, known_fields, row
from miniflux.errors import ConfigError
from miniflux.models.causal_lm import CausalLm, CausalLmConfig

# In GGUF files, as llama.cpp names it (`gguf/tensor_mapping.py`, MODEL_ARCH.QWEN3 and MODEL_ARCH.LLAMA). It turns
# channels 2i and 2i + 1 of Mistral's queries and keys together, where all others turn i and i + half: so their rows
# have other places there (`permute` of its `LlamaModel`).
LLAMA_CPP = [
    row("model.embed_tokens.*", "token_embd.*"),
    row("model.norm.*", "output_norm.*"),
    row("lm_head.*", "output.*"),
    *(row(f"model.layers.{{i}}.self_attn.{x}_proj.*", f"blk.{{i}}.attn_{x}.*", how="pairs") for x in "qk"),
    row("model.layers.{i}.self_attn.v_proj.*", "blk.{i}.attn_v.*"),
    row("model.layers.{i}.self_attn.o_proj.*", "blk.{i}.attn_output.*"),
    *(row(f"model.layers.{{i}}.self_attn.{x}_norm.*", f"blk.{{i}}.attn_{x}_norm.*") for x in "qk"),
    *(row(f"model.layers.{{i}}.mlp.{x}_proj.*", f"blk.{{i}}.ffn_{x}.*") for x in ("gate", "up", "down")),
    row("model.layers.{i}.input_layernorm.*", "blk.{i}.attn_norm.*"),
    row("model.layers.{i}.post_attention_layernorm.*", "blk.{i}.ffn_norm.*"),
]
KINDS = {
    # model_type in the config.json -> whether queries and keys are normalised
    "qwen3": True,
    "qwen3_vl_text": True,
    "mistral": False,
}
# Of the headers of llama.cpp's files, behind the architecture: our fields.
TOLD = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
REAL = ("rms_norm_eps", "rope_theta")  # the others are whole
LAST_NORM = "model.norm.weight"
FIRST = "layers.0.mlp.gate_proj.weight"
QWEN3_VL_THETA = 5e6  # Qwen3-VL 4B differs from Qwen3 4B in the base of its rotary frequencies, and in no shape
TEKKEN_TENSOR = "tekken_model"  # in files that ComfyUI reads: `tekken.json`, as bytes
SEES = tuple(f"{at}{name}." for at in ("model.", "") for name in ("visual", "vision_tower", "multi_modal_projector"))
BESIDE_EYES = "model.language_model."  # what transformers calls a language model that is half of one that sees
ENDS = (  # the last norm and the output layer, in each layout
    *(f"{at}norm.weight" for at in ("model.", BESIDE_EYES, "")),
    *("lm_head.weight", "output_norm.weight", "output.weight"),
)


def _beyond(config: CausalLmConfig, key: str) -> str | None:
    """What is behind the last layer that is read."""
    if key == "lm_head.weight" and config.tie_word_embeddings:
        return "a second copy of the embedding"
    layer = re.match(r"(?:model\.(?:language_model\.)?)?layers\.(\d+)\.|blk\.(\d+)\.", key)
    behind = key in ENDS
    if layer is not None:
        behind = int(layer[1] or layer[2]) >= config.depth
    return "comes behind the last layer that is read" if behind and config.layers_read else None


def _usual(config: CausalLmConfig, keys: Collection[str]) -> bool:
    """Whether the model sees, as the file does."""
    return (config.rope_theta == QWEN3_VL_THETA) == any(key.startswith((*SEES, BESIDE_EYES)) for key in keys)


def _told(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the header of a file of llama.cpp says; its float32 are the shortest numbers that they round."""
    begin = metadata.get("general.architecture", "") + "."
    said = {name: metadata[begin + key] for key, name in TOLD.items() if begin + key in metadata}
    told = {name: float(f"{float(x):.6g}") if name in REAL else int(x) for name, x in said.items()}
    return {**told, "layers_read": None} if told else {}


def _sizes(shapes: Shapes, default: CausalLmConfig) -> dict[str, Any]:
    vocabulary, width = shapes["model.embed_tokens.weight"]
    at = "model.layers.0.self_attn"
    rows = shapes[f"{at}.k_proj.weight"][0]
    head = shapes[f"{at}.q_norm.weight"][0] if f"{at}.q_norm.weight" in shapes else math.gcd(rows, default.head_dim)
    layers = there = count(shapes, r"model\.layers\.(\d+)\.")
    read = default.layers_read if (default.layers_read or 0) < layers else None
    if LAST_NORM not in shapes:  # nobody needs it where the last layers are cut off
        there, read = max(default.num_hidden_layers, layers + 1), layers
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": there,
        "num_attention_heads": shapes[f"{at}.q_proj.weight"][0] // head,
        "num_key_value_heads": rows // head,
        "head_dim": head,
        "qk_norm": f"{at}.q_norm.weight" in shapes,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "layers_read": read,
    }


def _of_json(content: Mapping[str, Any]) -> CausalLmConfig:
    kind = content.get("model_type")
    if kind not in KINDS:
        raise ConfigError(f"model_type {kind!r} is none of {', '.join(KINDS)}")
    rope = content.get("rope_parameters") or {}
    scaling = content.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "mrope"):
        raise ConfigError(f"rope_scaling {scaling!r}; expected none")
    if content.get("attention_bias"):
        raise ConfigError("attention_bias True; expected False")
    heads = content["num_attention_heads"]
    return known_fields(
        CausalLmConfig,
        {
            "head_dim": content["hidden_size"] // heads,
            "tie_word_embeddings": False,
            **content,
            "rope_theta": float(content.get("rope_theta") or rope["rope_theta"]),
            "qk_norm": KINDS[kind],
        },
    )


def _as_json(config: CausalLmConfig) -> dict[str, Any]:
    """The fields of transformers' Qwen3Config or MistralConfig."""
    kind = "qwen3" if config.qk_norm else "mistral"
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "MistralForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _activations(config: CausalLmConfig, tokens: int, itemsize: int) -> int:
    """Bytes at the worst moment of a layer: the MLP's three wide tensors and the stream; or queries, keys and values,
    their rotated copies, and the mask. Hidden states that are kept come on top."""
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    mlp = tokens * itemsize * (3 * config.intermediate_size + 3 * config.hidden_size)
    attention = tokens * itemsize * (2 * heads + 3 * config.hidden_size) + tokens**2 * (1 + itemsize)
    return max(mlp, attention) + 3 * tokens * itemsize * config.hidden_size


CAUSAL_LM = Network(
    part="lm",
    word="language model",
    phrase="a language model (text encoder of FLUX.2 or FLUX.3)",
    kind=CausalLm,
    config=CausalLmConfig,
    signs=(f"model.{FIRST}", f"{BESIDE_EYES}{FIRST}", FIRST, "blk.0.attn_output.weight"),
    layouts={
        "language model": Layout(
            [row("model.**", f"{BESIDE_EYES}**"), row("lm_head.**", "lm_head.**")], (BESIDE_EYES,)
        ),
        "bare": Layout([row("lm_head.**", "lm_head.**"), row("model.**", "**")], ("layers.", "embed_tokens.")),
        "llama.cpp": Layout(LLAMA_CPP, ("blk.", "token_embd.")),
    },
    redundant={
        TEKKEN_TENSOR: "its tokenizer, which is read where there is no other",
        "tokenizer_json": "its tokenizer",
    },
    other_half=(SEES, "sees pictures, and prompts are text"),
    beyond=_beyond,
    usual=_usual,
    folder="text_encoder",
    stem="model",
    names=("text_encoder", "{lm_file}"),
    comfyui=("text_encoders", "clip"),
    paired=lambda config: 0 if config.qk_norm else config.head_dim,
    architecture=lambda config: "qwen3" if config.qk_norm else "llama",  # llama.cpp's name for Mistral, too
    header="lm_config",
    sizes=_sizes,
    told=_told,
    of_json=_of_json,
    as_json=_as_json,
    named_there="a Qwen3Config, MistralConfig or text_config of such a model",
    guessed="the base of its rotary frequencies",
    packed=("model.layers.",),
    chains=(r"model\.embed_tokens", r"model\.layers\.\d+"),
    stays=re.compile(r".*norm\.weight"),
    activations=_activations,
)
