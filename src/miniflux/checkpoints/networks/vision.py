"""Vision towers: SigLIP's and CLIP's, alone in a file or beside their text towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miniflux.checkpoints.networks.record import Layout, Network, Row, Shapes, count, known_fields, row
from miniflux.models.vision import ClipVision, SiglipVision, VisionConfig

PATCHES, PLACES = "vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.position_embedding.weight"


def _sizes(shapes: Shapes, default: VisionConfig) -> dict[str, Any]:
    """All but the number of heads."""
    hidden, _, patch, _ = shapes[PATCHES]
    whole = "vision_model.embeddings.class_embedding" in shapes  # which has a position, too
    places = shapes[PLACES][0] - whole
    return {
        "hidden_size": hidden,
        "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count(shapes, r"vision_model\.encoder\.layers\.(\d+)\."),
        # Pixels beyond the last whole patch are not seen, and no shape tells of them.
        "image_size": default.image_size if default.patches == places else patch * round(places**0.5),
        "patch_size": patch,
        "projection_dim": shapes["visual_projection.weight"][0] if whole else 0,
    }


def _of_json(content: Mapping[str, Any]) -> VisionConfig:
    """transformers leaves out what is as usual, and keeps CLIP's projection beside the vision half."""
    own = content.get("vision_config") or content
    clip = "clip" in str(own.get("model_type", content.get("model_type", ""))) and "siglip" not in str(
        own.get("model_type", "")
    )
    usual = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5} if clip else {
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }  # fmt: skip
    projection = {"projection_dim": content.get("projection_dim", own.get("projection_dim", 512))} if clip else {}
    return known_fields(VisionConfig, {**usual, **own, **projection} if clip else {**usual, **own, "projection_dim": 0})


def _record(part: str, kind: type[Any], sign: str, *beside: Row) -> Network:
    return Network(
        part=part,
        word="vision tower",
        phrase="a vision tower",
        kind=kind,
        config=VisionConfig,
        signs=(sign, sign.removeprefix("vision_model.")),
        # As newer transformers writes a tower that stands alone.
        layouts={"without prefix": Layout([*beside, row("vision_model.**", "**")], ("embeddings.patch_embedding.",))},
        redundant={
            "vision_model.embeddings.position_ids": "the numbers 0, 1, 2 ...",
            "logit_scale": "only for comparing with texts",
            "logit_bias": "only for comparing with texts",
            "text_projection.weight": "belongs to the text encoder",
        },
        other_half=(("text_model.",), "belongs to the text encoder"),
        sizes=_sizes,
        of_json=_of_json,
        named_there="a vision tower",
    )


SIGLIP_VISION = _record("siglip", SiglipVision, "vision_model.head.probe")
CLIP_VISION = _record(
    "clip-vision",
    ClipVision,
    "vision_model.pre_layrnorm.weight",
    row("visual_projection.*", "visual_projection.*"),
)
