"""What exists: every released model, by name.

What a model is said to be is in `record.py`, the models in `released.py`, sizes in `sizes.py`, measured tables in
`tables.py`.
"""

from __future__ import annotations

from miniflux.errors import InputError
from miniflux.models.transformer import TransformerConfig
from miniflux.variants.record import Download, Sizes, Variant
from miniflux.variants.released import ALIASES, KONTEXT_SIZES, UNPUBLISHED, VARIANTS
from miniflux.variants.sizes import (
    CLIP_L,
    CLIP_VISION_SIZES,
    CLIP_VIT_L14,
    FLUX1_AUTOENCODER,
    FLUX1_DEV,
    FLUX1_TINY,
    FLUX2_AUTOENCODER,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    FLUX3_KLEIN,
    MISTRAL_SMALL,
    NANO_AUTOENCODER,
    NANO_CLIP,
    NANO_DEV,
    NANO_LENGTH,
    NANO_LM,
    NANO_SCHNELL,
    NANO_T5,
    QWEN3_4B,
    QWEN3_8B,
    QWEN3_VL_4B,
    REDUX_SIZES,
    SIGLIP_SIZES,
    SIGLIP_SO400M,
    T5_XXL,
)
from miniflux.variants.tables import FLUX1_MAG_RATIOS, FLUX1_PREVIEW, NANO_MAG_RATIOS, NANO_PREVIEW

__all__ = [
    "ALIASES",
    "CLIP_L",
    "CLIP_VISION_SIZES",
    "CLIP_VIT_L14",
    "FLUX1_AUTOENCODER",
    "FLUX1_DEV",
    "FLUX1_MAG_RATIOS",
    "FLUX1_PREVIEW",
    "FLUX1_TINY",
    "FLUX2_AUTOENCODER",
    "FLUX2_DEV",
    "FLUX2_KLEIN_4B",
    "FLUX2_KLEIN_9B",
    "FLUX3_KLEIN",
    "KONTEXT_SIZES",
    "MISTRAL_SMALL",
    "NANO_AUTOENCODER",
    "NANO_CLIP",
    "NANO_DEV",
    "NANO_LENGTH",
    "NANO_LM",
    "NANO_MAG_RATIOS",
    "NANO_PREVIEW",
    "NANO_SCHNELL",
    "NANO_T5",
    "QWEN3_4B",
    "QWEN3_8B",
    "QWEN3_VL_4B",
    "REDUX_SIZES",
    "SIGLIP_SIZES",
    "SIGLIP_SO400M",
    "T5_XXL",
    "UNPUBLISHED",
    "VARIANTS",
    "Download",
    "Sizes",
    "Variant",
    "like",
    "names",
    "variant",
    "variant_of",
]


def names() -> list[str]:
    """Names of all models that `miniflux.load` knows."""
    return list(VARIANTS)


def variant(name: str) -> Variant:
    """The variant of this name (or alias, or repository).

    Raises:
        InputError: there is none; the message lists those there are.
    """
    for candidate in VARIANTS.values():
        if (name and name in (candidate.name, candidate.repository)) or ALIASES.get(name) == candidate.name:
            return candidate
    if name in UNPUBLISHED:
        raise InputError(f"{name}: the weights of {UNPUBLISHED[name]} are not published")
    raise InputError(f"unknown model {name!r}; known: {', '.join([*VARIANTS, *ALIASES])}")


def like(config: TransformerConfig) -> list[Variant]:
    """The variants whose transformer has exactly this config; if there is none, those as which a transformer of other
    sizes is treated: of its family, and with a guidance input or a time aimed at, or without, as it is."""
    same = [one for one in VARIANTS.values() if one.transformer == config]
    family = [one for one in VARIANTS.values() if type(one.transformer) is type(config)]

    def alike(one: Variant) -> bool:
        names = ("guidance_embed", "flow_map")
        return all(getattr(one.transformer, name, None) == getattr(config, name, None) for name in names)

    return same or [one for one in family if alike(one)] or family


def variant_of(config: TransformerConfig, file: str = "") -> Variant | None:
    """The variant whose transformer has exactly this config, if any: of several, that whose file is so called, else the
    first."""
    same = [one for one in like(config) if one.transformer == config]
    return next((one for one in same if one.file == file), same[0] if same else None)
