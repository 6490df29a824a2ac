"""CLIP's text tower: its layouts and its sizes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from miniflux.checkpoints.networks.record import OPENAI, THIRDS, Layout, Network, Shapes, count, known_fields, row
from miniflux.models.clip import ClipTextConfig, ClipTextEncoder

# CLIP as OpenAI published it, and as open_clip still names it (`clip/model.py` of openai/CLIP): q, k and v are one.
CLIP_OPENAI = [
    row("text_model.embeddings.token_embedding.*", "token_embedding.*"),
    row("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    row("text_model.final_layer_norm.*", "ln_final.*"),
    *(
        row(f"text_model.encoder.layers.{{i}}.self_attn.{x}_proj.*", "transformer.resblocks.{i}.attn.in_proj_*", how=n)
        for x, n in zip("qkv", THIRDS, strict=True)
    ),
    row("text_model.encoder.layers.{i}.self_attn.out_proj.*", "transformer.resblocks.{i}.attn.out_proj.*"),
    row("text_model.encoder.layers.{i}.layer_norm1.*", "transformer.resblocks.{i}.ln_1.*"),
    row("text_model.encoder.layers.{i}.layer_norm2.*", "transformer.resblocks.{i}.ln_2.*"),
    row("text_model.encoder.layers.{i}.mlp.fc1.*", "transformer.resblocks.{i}.mlp.c_fc.*"),
    row("text_model.encoder.layers.{i}.mlp.fc2.*", "transformer.resblocks.{i}.mlp.c_proj.*"),
]


def _sizes(shapes: Shapes, default: ClipTextConfig) -> dict[str, Any]:
    vocabulary, hidden = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": default.num_attention_heads if hidden == default.hidden_size else 1,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "eos_token_id": default.eos_token_id if vocabulary == default.vocab_size else vocabulary - 1,
    }


def _as_json(config: ClipTextConfig) -> dict[str, Any]:
    """The fields of transformers' CLIPTextConfig."""
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **asdict(config)}


CLIP = Network(
    part="clip",
    word="CLIP text encoder",
    phrase="a text encoder (CLIP)",
    kind=ClipTextEncoder,
    config=ClipTextConfig,
    signs=("text_model.final_layer_norm.weight", "embeddings.token_embedding.weight", "ln_final.weight"),
    layouts={
        # As newer transformers name it in memory.
        "without prefix": Layout([row("text_model.**", "**")], ("embeddings.token_embedding.",)),
        OPENAI: Layout(CLIP_OPENAI, ("ln_final.",)),
    },
    redundant={
        "text_model.embeddings.position_ids": "the numbers 0, 1, 2 ...",
        "text_projection.weight": "FLUX takes the pooled vector before CLIP's projection",
        "logit_scale": "only for comparing with images",
        "visual_projection.weight": "belongs to CLIP's image encoder",
        "embeddings.position_ids": "the numbers 0, 1, 2 ...",
        "text_projection": "FLUX takes the pooled vector before CLIP's projection",
        "attn_mask": "no token looks at later ones",
        **dict.fromkeys(("input_resolution", "context_length", "vocab_size"), "a size, which the shapes tell"),
    },
    other_half=(("vision_model.", "visual."), "belongs to CLIP's image encoder"),
    prefix="text_encoders.clip_l.transformer.",
    folder="text_encoder",
    stem="model",
    single="clip_l",
    names=("text_encoder", "clip_l.safetensors"),
    comfyui=("text_encoders", "clip"),
    architecture=lambda config: "clip",
    header="clip_config",
    sizes=_sizes,
    of_json=lambda content: known_fields(ClipTextConfig, content),
    as_json=_as_json,
    named_there="a ClipTextConfig",
    guessed="the number of its heads",
    lora=(
        ("diffusers", "text_encoder.", "clip", False, ""),
        ("ComfyUI", "text_encoders.clip_l.transformer.", "clip", False, ""),
        ("kohya", "lora_te1_", "clip", True, ""),
        ("kohya", "lora_te_", "clip", True, ""),
    ),
    packed=("text_model.encoder.layers.",),
    chains=(r"text_model\.embeddings\.token_embedding", r"text_model\.encoder\.layers\.\d+"),
)
