"""Last stage of the nano recipe: everything into the official file layouts, in bfloat16."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import miniflux
from miniflux.checkpoints import save
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.flux1 import Flux1
from miniflux.nano.recipe.text import TextEncoders
from miniflux.pipeline import Pipeline
from miniflux.text import Text


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


@dataclass(frozen=True)
class Nano:
    """A bundled model of FLUX.1, with its networks as what they are."""

    pipe: Pipeline
    transformer: Flux1
    autoencoder: Autoencoder
    text: Text

    @classmethod
    def load(cls, name: str = "nano-dev", files: dict[str, Path] | None = None) -> Nano:
        """In float32, to be trained or looked at; no parameter is trained yet."""
        return cls.of(miniflux.load(name, dtype="float32", weights=files))

    @classmethod
    def of(cls, pipe: Pipeline) -> Nano:
        transformer, autoencoder, text = pipe.transformer, pipe.autoencoder, pipe.text
        assert isinstance(transformer, Flux1) and isinstance(autoencoder, Autoencoder) and isinstance(text, Text)
        for network in (transformer, autoencoder, text.clip, text.t5):
            network.requires_grad_(False)
        return cls(pipe, transformer, autoencoder, text)


def export_network(network: nn.Module, path: Path) -> None:
    """A transformer or the autoencoder as a single file with the published keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(_halved(network), path)
