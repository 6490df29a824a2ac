"""Small models of FLUX.2 and FLUX.3 in the layout of their releases, with a tokenizer of single bytes: as files, since
the command line and the page know nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from miniflux.checkpoints import save
from miniflux.checkpoints.networks import BY_KIND
from miniflux.models.causal_lm import CausalLm
from miniflux.testing import tiny
from tests.tiny import randn, randomise

QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
MISTRAL_MARKS = ("<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]")
VOCABULARY = 272


def tokenizer_of(marks: tuple[str, ...]) -> Tokenizer:
    """A tokenizer of single bytes, and these marks."""
    made = Tokenizer(BPE({mark: i for i, mark in enumerate([*marks, *sorted(ByteLevel.alphabet())])}, []))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore
    made.decoder = Bytes()  # type: ignore
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return made


def model(folder: Path, name: str, *, writes: bool = True) -> Path:
    """A tiny model of a variant, told from its relatives by the name of its file.

    Args:
        writes: whether its language model is whole; else it has only the layers that a prompt needs.
    """
    pipe = tiny(name)
    read = cast(CausalLm, pipe.text.networks["lm"]).config
    lm = replace(read, vocab_size=VOCABULARY, num_hidden_layers=read.depth + 1, layers_read=None)
    lm = lm if writes else replace(lm, layers_read=read.depth)
    network = randomise(CausalLm(lm), 5).requires_grad_(False)
    if writes and lm.tie_word_embeddings:
        network.model.embed_tokens.weight *= 0.25  # or it says its last word again and again
    folder.mkdir(parents=True)
    save(pipe.transformer, folder / pipe.variant.file)
    for part, one in (("vae", pipe.autoencoder), ("text_encoder", network)):
        record = BY_KIND[type(one)]
        (folder / part).mkdir()
        save(one, folder / part / f"{record.stem}.safetensors")
        (folder / part / "config.json").write_text(json.dumps(record.as_json(one.config)))
    (folder / "tokenizer").mkdir()
    marks = MISTRAL_MARKS if name == "flux2-dev" else QWEN_MARKS
    tokenizer_of(marks).save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


def shelf(folder: Path, names: tuple[str, ...]) -> Path:
    """A folder of such models, each in a folder of its name; only the language model of FLUX.2 dev can write."""
    for name in names:
        model(folder / name, name, writes=name == "flux2-dev")
    return folder


def lora(path: Path, name: str) -> Path:
    """A LoRA for one layer of the transformer of such a model."""
    layer = "single_blocks.0.linear2" if name.startswith("flux2") else "single_blocks.0.attn_out"
    rows, columns = tiny(name).transformer.get_submodule(layer).get_parameter("weight").shape
    tensors = {"lora_A": randn(2, columns, seed=1), "lora_B": randn(rows, 2, seed=2)}
    save_file({f"diffusion_model.{layer}.{half}.weight": tensor for half, tensor in tensors.items()}, path)
    return path
