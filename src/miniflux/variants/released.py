"""Every released model, declared as its differences from a base; and nano."""

from __future__ import annotations

from dataclasses import replace

from miniflux.models.tiny_autoencoder import TinyDecoderConfig
from miniflux.text.chat import FLUX3_FORM, KLEIN_FORM, dev_form
from miniflux.variants.record import Download, Sizes, Variant
from miniflux.variants.sizes import (
    CLIP_L,
    FLUX1_AUTOENCODER,
    FLUX1_DEV,
    FLUX1_TINY,
    FLUX2_AUTOENCODER,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    FLUX3_KLEIN,
    MISTRAL_SMALL,
    NANO2,
    NANO2_AUTOENCODER,
    NANO3,
    NANO_AUTOENCODER,
    NANO_CLIP,
    NANO_DEV,
    NANO_LENGTH,
    NANO_LM,
    NANO_LM_LAYERS,
    NANO_LM_LENGTH,
    NANO_SCHNELL,
    NANO_T5,
    QWEN3_4B,
    QWEN3_8B,
    QWEN3_VL_4B,
    T5_XXL,
)
from miniflux.variants.tables import FLUX1_MAG_RATIOS, FLUX1_PREVIEW, NANO_MAG_RATIOS, NANO_PREVIEW


def _flux1_downloads(file: str, bytes: int) -> tuple[Download, ...]:
    """The parts in a repository of FLUX.1. Bytes: parameters times bytes per number; the tokenizers' are those of the
    published files."""
    shards = tuple(f"text_encoder_2/model-0000{n}-of-00002.safetensors" for n in (1, 2))
    t5 = ("text_encoder_2/config.json", "text_encoder_2/model.safetensors.index.json", *shards)
    return (
        Download("transformer", (file,), bytes),
        Download("autoencoder", ("ae.safetensors",), 335_278_732),
        Download("clip", ("text_encoder/config.json", "text_encoder/model.safetensors"), 246_120_960),
        Download("t5", t5, 9_524_621_312),
        Download("clip_tokenizer", ("tokenizer/vocab.json", "tokenizer/merges.txt"), 1_584_581),
        Download("t5_tokenizer", ("tokenizer_2/tokenizer.json",), 2_424_256),
    )


def _flux2_downloads(transformer: str, parameters: int, lm: int) -> tuple[Download, ...]:
    """The parts in a repository of FLUX.2 or FLUX.3. Bytes: parameters times bytes per number."""
    return (
        Download("transformer", (transformer,), 2 * parameters),
        Download("autoencoder", ("vae/*",), 336_185_492),
        Download("lm", ("text_encoder/*",), 2 * lm),
        Download("lm_tokenizer", ("tokenizer/*",), 16_000_000),
    )


QWEN3_4B_PARAMETERS, QWEN3_8B_PARAMETERS, MISTRAL_PARAMETERS = 4_022_468_096, 8_190_735_360, 23_572_403_200


_DEV = Variant(
    name="flux1-dev",
    repository="black-forest-labs/FLUX.1-dev",
    file="flux1-dev.safetensors",
    licence="FLUX.1 [dev] Non-Commercial License",
    transformer=FLUX1_DEV,
    autoencoder=FLUX1_AUTOENCODER,
    clip=CLIP_L,
    t5=T5_XXL,
    steps=50,
    guidance=3.5,  # the model card's; the release's own command line later went to 2.5
    # "resolutions in 0.1 and 2.0 megapixels" for all of FLUX.1 (Black Forest Labs' announcement of 1 August 2024); a
    # megapixel being 1024x1024, so that 1920x1088 is inside.
    learned=Sizes(area=(100_000, 2 * 2**20)),
    preview=FLUX1_PREVIEW,
    tiny=FLUX1_TINY,
    tiny_file="taef1_decoder.safetensors",
    mag_ratios=FLUX1_MAG_RATIOS,
    downloads=_flux1_downloads("flux1-dev.safetensors", 23_802_816_640),
)
_FLUX2_DEV = Variant(
    name="flux2-dev",
    repository="black-forest-labs/FLUX.2-dev",
    file="flux2-dev.safetensors",
    licence="FLUX.2-dev Non-Commercial License",
    transformer=FLUX2_DEV,
    autoencoder=FLUX2_AUTOENCODER,
    lm=MISTRAL_SMALL,
    lm_file="mistral_3_small_flux2_bf16.safetensors",
    chat=dev_form(),
    steps=50,
    guidance=4.0,
    learned=Sizes(area=(64 * 64, 4 * 2**20)),  # "64x64 to 4 megapixels" (the release's documentation)
    downloads=_flux2_downloads("flux2-dev.safetensors", 32_223_281_152, MISTRAL_PARAMETERS),
    family="flux2",
)
# "distilled" with 4 steps and without guidance, or "base" with 50 and classifier-free guidance (`FLUX2_MODEL_INFO` of
# `flux2/util.py`).
_KLEIN_4B = replace(
    _FLUX2_DEV,
    name="flux2-klein-4b",
    repository="black-forest-labs/FLUX.2-klein-4B",
    file="flux-2-klein-4b.safetensors",
    downloads=_flux2_downloads("flux-2-klein-4b.safetensors", 3_875_544_576, QWEN3_4B_PARAMETERS),
    licence="Apache-2.0",
    gated=False,
    transformer=FLUX2_KLEIN_4B,
    lm=QWEN3_4B,
    lm_file="qwen_3_4b.safetensors",
    chat=KLEIN_FORM,
    steps=4,
    guidance=None,
)
_KLEIN_9B = replace(
    _KLEIN_4B,
    name="flux2-klein-9b",
    repository="black-forest-labs/FLUX.2-klein-9B",
    file="flux-2-klein-9b.safetensors",
    downloads=_flux2_downloads("flux-2-klein-9b.safetensors", 9_078_581_248, QWEN3_8B_PARAMETERS),
    licence="FLUX Non-Commercial License",
    gated=True,
    transformer=FLUX2_KLEIN_9B,
    lm=QWEN3_8B,
    lm_file="qwen_3_8b.safetensors",
)
_FLUX3_KLEIN = replace(
    _KLEIN_4B,
    name="flux3-klein",
    repository="black-forest-labs/flux-3-image-klein",
    file="flux-3-image-klein.safetensors",
    downloads=_flux2_downloads("transformer/*", 5_548_681_984, QWEN3_4B_PARAMETERS),
    licence="FLUX Kommunity License",
    gated=True,
    transformer=FLUX3_KLEIN,
    lm=QWEN3_VL_4B,
    lm_file="qwen3vl_4b_bf16.safetensors",
    chat=FLUX3_FORM,
    t5_length=None,
    steps=16,
    family="flux3",
)
_NANO = Variant(
    name="nano-dev",
    repository="",
    file="flux1-nano-dev.safetensors",
    licence="Apache-2.0",
    gated=False,
    transformer=NANO_DEV,
    autoencoder=NANO_AUTOENCODER,
    clip=NANO_CLIP,
    t5=NANO_T5,
    t5_length=NANO_LENGTH,
    steps=20,
    guidance=3.0,
    size=128,
    learned=Sizes(sides=(64, 192)),  # `SIDES` in `nano/recipe/flow.py`
    bundled=True,
    preview=NANO_PREVIEW,
    # Half the autoencoder's size: at the full one it would cost a third of a step.
    tiny=TinyDecoderConfig(z_channels=16, out_ch=3, width=16, blocks=(2, 1, 0)),
    tiny_file="tiny_decoder.safetensors",
    mag_ratios=NANO_MAG_RATIOS,
)
# FLUX.2 and FLUX.3 at nano's size, as `nano/recipe/successors.py` makes them.
_NANO2 = Variant(
    name="nano2",
    repository="",
    file="flux2-nano.safetensors",
    licence="Apache-2.0",
    gated=False,
    transformer=NANO2,
    autoencoder=NANO2_AUTOENCODER,
    lm=NANO_LM,
    lm_file="nano_lm.safetensors",
    chat=replace(KLEIN_FORM, layers=NANO_LM_LAYERS),
    t5_length=NANO_LM_LENGTH,
    steps=20,
    guidance=3.0,
    size=128,
    learned=Sizes(sides=(64, 192)),
    bundled=True,
    family="flux2",
)
_NANO3 = replace(
    _NANO2,
    name="nano3",
    file="flux3-nano.safetensors",
    transformer=NANO3,
    chat=replace(FLUX3_FORM, layers=NANO_LM_LAYERS, multiple=NANO_LM_LENGTH),
    t5_length=None,
    steps=4,
    guidance=None,
    family="flux3",
)
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _DEV,
        replace(
            _DEV,
            name="flux1-schnell",
            repository="black-forest-labs/FLUX.1-schnell",
            file="flux1-schnell.safetensors",
            licence="Apache-2.0",
            gated=False,
            transformer=replace(FLUX1_DEV, guidance_embed=False),
            t5_length=256,
            shift=False,
            steps=4,
            guidance=None,
            downloads=_flux1_downloads("flux1-schnell.safetensors", 23_782_357_120),
        ),
        replace(
            _DEV,
            name="flux1-krea-dev",
            repository="black-forest-labs/FLUX.1-Krea-dev",
            file="flux1-krea-dev.safetensors",
            steps=28,
            guidance=4.5,
            downloads=_flux1_downloads("flux1-krea-dev.safetensors", 23_802_816_640),
        ),
        # Steps and guidance of the release's command lines (`cli_fill.py`, `cli_control.py`, `cli_kontext.py`).
        replace(
            _DEV,
            name="flux1-kontext-dev",
            repository="black-forest-labs/FLUX.1-Kontext-dev",
            file="flux1-kontext-dev.safetensors",
            steps=30,
            guidance=2.5,
            downloads=_flux1_downloads("flux1-kontext-dev.safetensors", 23_802_816_640),
        ),
        replace(
            _DEV,
            name="flux1-fill-dev",
            repository="black-forest-labs/FLUX.1-Fill-dev",
            file="flux1-fill-dev.safetensors",
            transformer=replace(FLUX1_DEV, in_channels=384),
            guidance=30.0,
            downloads=_flux1_downloads("flux1-fill-dev.safetensors", 23_804_782_720),
        ),
        *(
            replace(
                _DEV,
                name=f"flux1-{kind}-dev",
                repository=f"black-forest-labs/FLUX.1-{kind.capitalize()}-dev",
                file=f"flux1-{kind}-dev.safetensors",
                transformer=replace(FLUX1_DEV, in_channels=128),
                guidance=guidance,
                downloads=_flux1_downloads(f"flux1-{kind}-dev.safetensors", 23_803_209_856),
            )
            for kind, guidance in (("canny", 30.0), ("depth", 10.0))
        ),
        _FLUX2_DEV,
        _KLEIN_4B,
        replace(
            _KLEIN_4B,
            name="flux2-klein-base-4b",
            repository="black-forest-labs/FLUX.2-klein-base-4B",
            file="flux-2-klein-base-4b.safetensors",
            downloads=_flux2_downloads("flux-2-klein-base-4b.safetensors", 3_875_544_576, QWEN3_4B_PARAMETERS),
            steps=50,
            cfg=4.0,
        ),
        _KLEIN_9B,
        replace(
            _KLEIN_9B,
            name="flux2-klein-base-9b",
            repository="black-forest-labs/FLUX.2-klein-base-9B",
            file="flux-2-klein-base-9b.safetensors",
            downloads=_flux2_downloads("flux-2-klein-base-9b.safetensors", 9_078_581_248, QWEN3_8B_PARAMETERS),
            steps=50,
            cfg=4.0,
        ),
        replace(
            _KLEIN_9B,
            name="flux2-klein-9b-kv",
            repository="black-forest-labs/FLUX.2-klein-9b-kv",
            file="flux-2-klein-9b-kv.safetensors",
            downloads=_flux2_downloads("flux-2-klein-9b-kv.safetensors", 9_078_581_248, QWEN3_8B_PARAMETERS),
            once=True,
        ),
        _FLUX3_KLEIN,
        replace(
            _FLUX3_KLEIN,
            name="flux3-klein-base",
            repository="black-forest-labs/flux-3-image-klein-base",
            file="flux-3-image-klein-base.safetensors",
            downloads=_flux2_downloads("transformer/*", 5_538_458_368, QWEN3_4B_PARAMETERS),
            transformer=replace(FLUX3_KLEIN, flow_map=False),
            steps=50,
            cfg=4.0,
        ),
        _NANO,
        replace(
            _NANO,
            name="nano-schnell",
            file="flux1-nano-schnell.safetensors",
            transformer=NANO_SCHNELL,
            shift=False,
            steps=4,
            guidance=None,
        ),
        replace(
            _NANO,
            name="nano-fill",
            file="flux1-nano-fill.safetensors",
            transformer=replace(NANO_DEV, in_channels=384),
            guidance=30.0,
            mag_ratios=(),
        ),
        replace(_NANO, name="nano-kontext", file="flux1-nano-kontext.safetensors", guidance=2.5, mag_ratios=()),
        _NANO2,
        _NANO3,
    )
}
ALIASES = {"nano": "nano-dev"}


# The sizes that FLUX.1 Kontext learned (`PREFERED_KONTEXT_RESOLUTIONS` in `flux/util.py`), width and height.
_KONTEXT_SIDES = (672, 688, 720, 752, 800, 832, 880, 944, 1024, 1104, 1184, 1248, 1328, 1392, 1456, 1504, 1568)
KONTEXT_SIZES = tuple(zip(_KONTEXT_SIDES, reversed(_KONTEXT_SIDES), strict=True))


# Models of the family whose weights nobody outside has.
UNPUBLISHED = {
    "flux1-pro": "FLUX.1 [pro]",
    "flux1.1-pro": "FLUX1.1 [pro] and [ultra]",
    "flux1-kontext-pro": "FLUX.1 Kontext [pro] and [max]",
    "flux2-pro": "FLUX.2 [pro]",
    "flux2-flex": "FLUX.2 [flex]",
    "flux2-max": "FLUX.2 [max]",
    "flux3-image": "FLUX.3 as it is hosted",
}
