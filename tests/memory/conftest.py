"""A tiny model on disk, whose weights can be anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miniflux.checkpoints import save
from miniflux.weights.finding import BUNDLED
from tests.test_assembly import CONFIGS, PARTS

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Write the model: layout of the transformer, dtype of transformer and text encoders."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def write(layout: str = "original", dtype: torch.dtype = torch.float32) -> Path:
        if (layout, dtype) in made:
            return made[layout, dtype]
        root = made[layout, dtype] = tmp_path_factory.mktemp("model")
        for name, (module, usual) in PARTS.items():
            (root / name).mkdir()
            kept = module if name == "vae" else type(module)(module.config).to(dtype)  # type: ignore[operator]
            kept.load_state_dict(module.state_dict())
            save(kept, root / name / "model.safetensors", layout=layout if name == "transformer" else usual)
            (root / name / "config.json").write_text(json.dumps(CONFIGS[name]), "utf-8")
        for name in ("tokenizer", "tokenizer_2"):
            (root / name).symlink_to(BUNDLED / name)
        return root

    return write
