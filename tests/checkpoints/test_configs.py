"""Sizes out of files: from their shapes in every layout, and from the header what shapes do not tell."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from miniflux.checkpoints import layouts_of, to_layout
from miniflux.checkpoints.configs import config_in, in_header, stated
from miniflux.checkpoints.layouts import ALL_IN_ONE
from miniflux.checkpoints.networks import BY_CONFIG
from miniflux.errors import CheckpointError
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.variants import FLUX1_AUTOENCODER, VARIANTS
from tests.tiny import AUTOENCODER, CLIP, FLUX1, T5

DEV = VARIANTS["flux1-dev"]
CASES: list[tuple[type[nn.Module], Any, Any]] = [
    (Autoencoder, AUTOENCODER, FLUX1_AUTOENCODER),
    (Autoencoder, FLUX1_AUTOENCODER, AUTOENCODER),
    (ClipTextEncoder, CLIP, DEV.clip),
    (ClipTextEncoder, DEV.clip, CLIP),
    (T5Encoder, T5, DEV.t5),
    (T5Encoder, DEV.t5, T5),
    (T5Encoder, VARIANTS["nano-dev"].t5, DEV.t5),
]


def shapes(module: nn.Module) -> dict[str, Any]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize(("kind", "config", "default"), CASES)
def test_from_shapes_in_every_layout(kind: type[nn.Module], config: Any, default: Any) -> None:
    """A network of the config that was read has the very tensors of the file, whatever config it started from."""
    with torch.device("meta"):
        network = kind(config)
        for layout in layouts_of(network):
            if layout == ALL_IN_ONE:
                continue
            theirs: Any = to_layout(network, network.state_dict(), layout)
            assert shapes(kind(config_in(theirs, {}, default))) == shapes(network)
            assert config_in(theirs, {}, config) == config


@pytest.mark.parametrize(("kind", "config", "default"), CASES)
def test_from_the_header(kind: type[nn.Module], config: Any, default: Any) -> None:
    with torch.device("meta"):
        header = in_header(kind(config))
    assert stated(header, default) == replace(config) and config_in({}, header, default) == config
    assert stated({}, default) is default
    with torch.device("meta"):
        assert in_header(Flux1(FLUX1)) == {"axes_dim": json.dumps(FLUX1.axes_dim)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "no JSON"),
        ("[1]", "not a T5Config"),
        ('{"d_model": "many"}', "d_model must be a whole number"),
        ('{"d_model": 0}', "d_model must be a whole number"),
        ('{"banana": 1}', "unknown field 'banana'"),
    ],
)
def test_malformed_headers(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stated({BY_CONFIG[type(T5)].header: text}, T5)


@pytest.mark.parametrize(("kind", "config", "default"), CASES[::2])
def test_shapes_of_nothing(kind: type[nn.Module], config: Any, default: Any) -> None:
    with pytest.raises(CheckpointError, match="no sizes of a"):
        config_in({}, {}, default)
