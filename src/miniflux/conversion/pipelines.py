"""What makes networks in folders a pipeline that diffusers opens: its index, its scheduler, its tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miniflux.conversion.tokenizer_files import Content, tokenizer_files
from miniflux.models.transformer import TransformerConfig
from miniflux.variants import VARIANTS, like, variant_of
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
# What each component of a FluxPipeline is, as (library, class).
INDEX: dict[str, Any] = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
TOKENIZERS = {"tokenizer": "clip_tokenizer", "tokenizer_2": "t5_tokenizer"}


def tokenizers_of(root: Path, config: TransformerConfig | None) -> dict[str, Path]:
    """The folders of the tokenizers that belong to a model, by their names in diffusers' layout: in its own folder,
    else where those of its variant are found; without those that are nowhere."""
    known = None if config is None else variant_of(config)
    found, _ = found_parts(known or VARIANTS["flux1-dev"], [root])
    if known is None:  # others' tokenizers need not fit
        found = {part: path for part, path in found.items() if path.parent == root}
    return {name: found[part] for name, part in TOKENIZERS.items() if part in found}


def copied(tokenizers: dict[str, Path]) -> dict[str, Content]:
    """The files of tokenizers' folders, by their places in the new folder."""
    made: dict[str, Content] = {}
    for name, folder in tokenizers.items():
        made |= {f"{name}/{file}": content for file, content in tokenizer_files(folder, TOKENIZERS[name]).items()}
    return made


def scheduler(root: Path, config: TransformerConfig) -> Content:
    """The scheduler's config of a model: that in its folder, else what is usual for its kind."""
    if (root / SCHEDULER_FILE).is_file():
        return root / SCHEDULER_FILE
    shifts = like(config)[0].shift
    return {**SCHEDULER, "num_train_timesteps": 1000, "shift": 3.0 if shifts else 1.0, "use_dynamic_shifting": shifts}
