"""A language model that rewrites prompts, out of its folder: `load_upsampler`."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from miniflux.checkpoints.configs import config_beside, json_object
from miniflux.checkpoints.files import TensorSource
from miniflux.checkpoints.folders import models, path_of
from miniflux.checkpoints.formats.reading import contents_of
from miniflux.checkpoints.layouts import counterparts
from miniflux.checkpoints.loading import bare, compare, load_into
from miniflux.checkpoints.opened import Opened, layout_in
from miniflux.errors import CheckpointError, WeightsNotFoundError
from miniflux.memory.compute import choose_device, choose_dtype
from miniflux.models.causal_lm import CausalLm, CausalLmConfig
from miniflux.text.chat import WANTED, has_tokenizer, load_tokenizer
from miniflux.upsampling.rewriting import QWEN_VL, Turns, Upsampler
from miniflux.variants import VARIANTS

log = logging.getLogger(__name__)


def load_upsampler(
    folder: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> Upsampler:
    """A whole language model, all of it in memory, that rewrites prompts.

    Args:
        folder: as transformers writes it: `config.json`, safetensors, and `tokenizer.json` (or Mistral's `tekken.json`,
            or Qwen's `vocab.json`, `merges.txt` and `tokenizer_config.json`). The tokenizer may also lie in a folder
            `tokenizer` beside it, as in FLUX.2's pipelines, whose `text_encoder` this may be.
        dtype: float32, bfloat16 or float16; None for what suits the device, see `choose_dtype`.
        device: None for the best there is.

    Raises:
        WeightsNotFoundError: no such folder, or files that must be in it are not; all of them are named.
        CheckpointError: the model is of no kind that can be run here, or its files do not hold all of it.
        TokenizerError, InputError: see `load_tokenizer`, `Upsampler`, `choose_device`, `choose_dtype`.
    """
    folder, place, started = path_of(folder), choose_device(device), time.monotonic()
    network, source, words, turns = _described(folder)
    entries = contents_of(source).entries
    parameters = sum(math.prod(entry.shape) for entry in entries.values())
    largest = max(source.entries.values(), key=lambda entry: entry.size)
    compute = choose_dtype(dtype, place, largest.dtype, parameters)
    load_into(network, source, device=place, dtype=compute)
    network.eval().requires_grad_(False)
    log.info(
        "%s: %.1f million parameters in %s on %s, loaded in %.1f s",
        folder,
        parameters / 1e6,
        str(compute).removeprefix("torch."),
        place,
        time.monotonic() - started,
    )
    return Upsampler(network, load_tokenizer(words), turns)


def check_upsampler(folder: str | Path) -> None:
    """Whether a folder holds a language model that can write; reads headers only, but where a model has its embedding
    and an output layer beside it.

    Raises:
        WeightsNotFoundError, CheckpointError: see `load_upsampler`.
    """
    network, source, _, _ = _described(path_of(folder))
    report = compare(network, source)
    if report.problems:
        raise CheckpointError(str(report).partition("\n")[0])


def _described(folder: Path) -> tuple[CausalLm, TensorSource, Path, Turns | None]:
    """A language model without weights, where they are, the folder of its tokenizer, and how it is asked, if its
    vocabulary does not tell; errors as of `load_upsampler`."""
    opened, words = Opened(), _complete(folder)
    about = json_object(folder / "config.json")
    about = {**about, **(about.get("text_config") or {})}
    kind = str(about.get("model_type"))
    if kind.startswith("qwen3_5"):
        raise CheckpointError(
            f"{folder}: model_type {kind!r}, as FLUX.3's prompt upsampler has it (flux-3-image-klein-pup), cannot be "
            "run here: three of four layers of Qwen3.5 are gated delta nets, and there is none in this library; "
            "language models that can are Qwen3, Qwen3-VL and Mistral"
        )
    default = next(variant.lm for variant in VARIANTS.values() if variant.lm is not None)
    source = opened.part(folder, CausalLm)
    config = replace(config_beside(folder, default, opened), layers_read=None)
    network = bare(CausalLm, _with_output_layer(config, about, source))
    return network, source, words, QWEN_VL if kind.startswith("qwen3_vl") else None


def _complete(folder: Path) -> Path:
    """The folder of the tokenizer, if all that is needed is there.

    Raises:
        WeightsNotFoundError: it is not.
    """
    if not folder.is_dir():
        raise WeightsNotFoundError(
            f"{folder}: no such folder; expected one of a language model: config.json, safetensors, tokenizer.json"
        )
    words = [place for place in (folder, folder.parent / "tokenizer") if has_tokenizer(place)]
    found = {
        "config.json": (folder / "config.json").is_file(),
        "weights (*.safetensors)": bool(models(folder)),
        f"a tokenizer ({WANTED}; here or in ../tokenizer)": bool(words),
    }
    missing = [name for name, there in found.items() if not there]
    if missing:
        raise WeightsNotFoundError(f"{folder}: no language model to write with; missing: {'; '.join(missing)}")
    return words[0]


def _with_output_layer(config: CausalLmConfig, about: dict[str, Any], source: TensorSource) -> CausalLmConfig:
    """The config with an output layer of its own where the file has one that is not the embedding, as transformers
    does; configs of models that see pictures say of their whole, often wrongly, what the language model does not say.
    """
    tied = bool(about.get("tie_word_embeddings", config.tie_word_embeddings))
    apart = bare(CausalLm, replace(config, tie_word_embeddings=False))
    names = counterparts(apart, layout_in(source, apart))
    (output,), (embedding,) = names["lm_head.weight"].keys, names["model.embed_tokens.weight"].keys
    if tied and output in source.entries and embedding in source.entries:
        tied = torch.equal(source[output], source[embedding])
        if not tied:
            log.info("%s: its output layer is not its embedding, whatever its config says", source)
    return replace(config, tie_word_embeddings=tied)
