"""No network forms the scores of all pairs: each attention suits the kernels that never hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.sampling import guide
from tests import tiny


def flux1(masked: bool = False, nag: bool = False) -> None:
    inputs = tiny.flux1_inputs(tiny.FLUX1)
    if masked:
        inputs["txt_mask"] = torch.arange(5) < torch.tensor([[2], [4]])
    if nag:
        inputs["attend"] = guide("nag", scale=2.0).attend(0.5, 5)  # type: ignore[attr-defined]
    tiny.randomise(Flux1(tiny.FLUX1))(**inputs)


def t5(masked: bool = False) -> None:
    ids = torch.arange(14).reshape(2, 7)
    tiny.randomise(T5Encoder(tiny.T5))(ids, torch.arange(7) < torch.tensor([[3], [5]]) if masked else None)


NETWORKS: dict[str, Callable[[], object]] = {
    "flux1": flux1,
    "flux1, masked": lambda: flux1(masked=True),
    "flux1, NAG": lambda: flux1(nag=True),
    "t5": t5,
    "t5, masked": lambda: t5(masked=True),
    "clip": lambda: tiny.randomise(ClipTextEncoder(tiny.CLIP))(torch.arange(14).reshape(2, 7)),
    "autoencoder, encoding": lambda: tiny.randomise(Autoencoder(tiny.AUTOENCODER)).encode(tiny.randn(2, 3, 16, 24)),
    "autoencoder, decoding": lambda: tiny.randomise(Autoencoder(tiny.AUTOENCODER)).decode(tiny.randn(2, 4, 4, 6)),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_scores_are_never_held(name: str) -> None:
    """Only the kernel in slices is allowed; where its conditions are not met, torch refuses instead."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        NETWORKS[name]()


@torch.inference_mode()
def test_half_precision_too() -> None:
    network = tiny.randomise(Autoencoder(replace(tiny.AUTOENCODER, z_channels=6))).bfloat16()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        network.decode(tiny.randn(1, 6, 4, 4).bfloat16())
        tiny.randomise(T5Encoder(tiny.T5)).bfloat16()(torch.arange(7)[None])


def test_the_bias_of_the_scores_is_not_copied_in_every_layer() -> None:
    first = T5Encoder(tiny.T5).encoder.block[0].layer[0].SelfAttention  # type: ignore[union-attr]
    assert first.position_bias(7).is_contiguous()
