"""What the tests of this room share: a small transformer, and its output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miniflux.models.flux1 import Flux1
from tests.tiny import FLUX1, flux1_inputs, randomise

INPUTS = flux1_inputs(FLUX1)


@pytest.fixture
def network() -> Flux1:
    return randomise(Flux1(FLUX1))


@torch.inference_mode()
def out(network: nn.Module, inputs: dict[str, Any] = INPUTS) -> Tensor:
    return network(**inputs)
