"""Last stage of the nano recipe: everything into the official file layouts, in bfloat16."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from miniflux.checkpoints import save
from miniflux.nano.recipe.text import TextEncoders


def _halved(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to(torch.bfloat16)


def export_encoders(encoders: TextEncoders, tokenizers: Path, folder: Path) -> None:
    """`text_encoder`, `text_encoder_2`, `tokenizer`, `tokenizer_2`, as in the FLUX.1 repositories."""
    for name, network in (("text_encoder", encoders.clip), ("text_encoder_2", encoders.t5)):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        save(_halved(network), place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(asdict(network.config), indent=2) + "\n", "utf-8")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizers / name, folder / name, dirs_exist_ok=True)


def export_network(network: nn.Module, path: Path) -> None:
    """A transformer or the autoencoder as a single file with the published keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(_halved(network), path)
