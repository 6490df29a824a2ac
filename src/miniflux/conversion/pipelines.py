"""What makes networks in folders a pipeline that diffusers opens: its index, its scheduler, its tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from miniflux.conversion.tokenizer_files import Content, chat_tokenizer_files, tokenizer_files
from miniflux.models.flux1 import Flux1
from miniflux.models.flux2 import Flux2
from miniflux.models.flux3 import Flux3
from miniflux.models.transformer import TransformerConfig
from miniflux.sampling.schedules import FLUX3_SHIFT
from miniflux.text.chat import ChatForm
from miniflux.variants import VARIANTS, Variant, like, variant_of
from miniflux.weights.finding import found_parts

# Settings of diffusers' scheduler that `flux1_schedule` has built in: where they differ, pictures would.
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
SCHEDULER_FILE = "scheduler/scheduler_config.json"
EULER = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
# What each component of a FluxPipeline is, as (library, class).
FLUX1_INDEX: dict[str, Any] = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": EULER,
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# Of both kinds of Flux2Pipeline. Mistral is the half of its release that reads.
FLUX2_INDEX: dict[str, Any] = {
    "_diffusers_version": "0.42.1",
    "scheduler": EULER,
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


@dataclass(frozen=True)
class Whole:
    """What makes a whole pipeline of a kind of transformer.

    Attributes:
        like: a variant that has its parts.
        tokenizers: the folders of its tokenizers -> our names of them.
        index: `model_index.json` of a variant.
        scheduler: settings of its scheduler, from whether its schedule is shifted by the size of pictures.
        never: what diffusers wants and is never written, with the reason.
    """

    like: str
    tokenizers: dict[str, str]
    index: Callable[[Variant], dict[str, Any]]
    scheduler: Callable[[bool], dict[str, Any]]
    never: dict[str, str] = field(default_factory=dict[str, str])


def _by_size(shifts: bool) -> dict[str, Any]:
    return {"shift": 3.0 if shifts else 1.0, "use_dynamic_shifting": shifts}


def _flux2_index(variant: Variant) -> dict[str, Any]:
    assert variant.lm is not None
    if not variant.lm.qk_norm:
        encoder, words = ["transformers", "MistralForCausalLM"], ["transformers", "PreTrainedTokenizerFast"]
        return {"_class_name": "Flux2Pipeline", **FLUX2_INDEX, "text_encoder": encoder, "tokenizer": words}
    kind = "Flux2KleinKVPipeline" if variant.once else "Flux2KleinPipeline"
    encoder, words = ["transformers", "Qwen3ForCausalLM"], ["transformers", "Qwen2TokenizerFast"]
    return {
        "_class_name": kind,
        "is_distilled": variant.cfg is None,
        **FLUX2_INDEX,
        "text_encoder": encoder,
        "tokenizer": words,
    }


LM_TOKENIZER = {"tokenizer": "lm_tokenizer"}
WHOLE: dict[type[nn.Module], Whole] = {
    Flux1: Whole(
        "flux1-dev",
        {"tokenizer": "clip_tokenizer", "tokenizer_2": "t5_tokenizer"},
        lambda variant: FLUX1_INDEX,
        _by_size,
    ),
    Flux2: Whole("flux2-klein-4b", LM_TOKENIZER, _flux2_index, _by_size),
    Flux3: Whole(
        "flux3-klein",
        LM_TOKENIZER,
        lambda variant: {},
        lambda shifts: {"shift": FLUX3_SHIFT, "use_dynamic_shifting": False},
        {
            "the index of a pipeline": "diffusers reads prompts with all of Qwen3-VL, its half that sees pictures and "
            "its processor included: copy text_encoder, tokenizer and modular_model_index.json from the release"
        },
    ),
}


def tokenizers_of(root: Path, config: TransformerConfig | None, whole: Whole) -> dict[str, Path]:
    """Where the tokenizers are that belong to a model, by the names of their folders in diffusers' layout: in its own
    folder, else where those of its variant are found; without those that are nowhere."""
    known = None if config is None else variant_of(config)
    found, _ = found_parts(known or VARIANTS[whole.like], [root])
    if known is None:  # others' tokenizers need not fit
        found = {part: path for part, path in found.items() if path.parent == root}
    return {name: found[part] for name, part in whole.tokenizers.items() if part in found}


def copied(tokenizers: dict[str, Path], whole: Whole, form: ChatForm | None) -> dict[str, Content]:
    """The files of tokenizers' folders, by their places in the new folder."""
    made: dict[str, Content] = {}
    for name, path in tokenizers.items():
        part = whole.tokenizers[name]
        files = tokenizer_files(path, part) if form is None else chat_tokenizer_files(path, form)
        made |= {f"{name}/{file}": content for file, content in files.items()}
    return made


def scheduler(root: Path, config: TransformerConfig, whole: Whole) -> Content:
    """The scheduler's config of a model: that in its folder, else what is usual for its kind."""
    if (root / SCHEDULER_FILE).is_file():
        return root / SCHEDULER_FILE
    return {**SCHEDULER, "num_train_timesteps": 1000, **whole.scheduler(like(config)[0].shift)}
