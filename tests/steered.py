"""Small pictures and networks to steer the bundled model with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from PIL import Image

import miniflux
from miniflux.checkpoints import save
from miniflux.models.controlnet import ControlNet, ControlNetConfig
from tests.tiny import randomise


def photo(path: Path, level: int = 80) -> str:
    Image.effect_noise((64, 64), level).convert("RGB").save(path)
    return str(path)


def network(path: Path, **more: int) -> str:
    """A small ControlNet for the bundled model."""
    config = miniflux.load("nano").transformer.config
    sizes = {**asdict(config), "depth": 1, "depth_single_blocks": 0, "control_channels": config.out_channels, **more}
    net = randomise(ControlNet(ControlNetConfig(**sizes)))
    for parameter in net.controlnet_blocks.parameters():
        parameter.data *= 0.05
    save(net, path)
    return str(path)
