"""A record for each network that is loaded here, and what is known of others by name (`known`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from miniflux.checkpoints.networks.autoencoder import AUTOENCODER
from miniflux.checkpoints.networks.causal_lm import CAUSAL_LM
from miniflux.checkpoints.networks.clip import CLIP
from miniflux.checkpoints.networks.controlnet import CONTROLNET
from miniflux.checkpoints.networks.flux1 import FLUX1
from miniflux.checkpoints.networks.flux2 import FLUX2
from miniflux.checkpoints.networks.flux2_autoencoder import FLUX2_AUTOENCODER
from miniflux.checkpoints.networks.flux2_controlnet import FLUX2_CONTROLNET
from miniflux.checkpoints.networks.flux3 import FLUX3
from miniflux.checkpoints.networks.ip_adapter import INSTANTX_IP_ADAPTER, XLABS_IP_ADAPTER
from miniflux.checkpoints.networks.record import Network
from miniflux.checkpoints.networks.redux import REDUX
from miniflux.checkpoints.networks.t5 import T5
from miniflux.checkpoints.networks.tiny_decoder import TINY_DECODER
from miniflux.checkpoints.networks.vision import CLIP_VISION, SIGLIP_VISION
from miniflux.variants import Variant

__all__ = [
    "BY_CONFIG",
    "BY_KIND",
    "NETWORKS",
    "PIPELINE",
    "STEERING",
    "TRANSFORMERS",
    "Network",
    "is_transformer",
    "networks_of",
]

# Of two that may be one and the same part, and share keys, the one with keys of its own comes first.
NETWORKS = (FLUX3, FLUX2, FLUX1, FLUX2_AUTOENCODER, AUTOENCODER, CLIP, T5, CAUSAL_LM, TINY_DECODER)
PIPELINE = tuple(network for network in NETWORKS if network.folder)  # those that make a whole model, in its order
TRANSFORMERS = tuple(network for network in NETWORKS if network.part == "transformer")
# Those that steer, each in a file of its own, told by `known` and read by `steering`.
STEERING = (CONTROLNET, FLUX2_CONTROLNET, REDUX, XLABS_IP_ADAPTER, INSTANTX_IP_ADAPTER, SIGLIP_VISION, CLIP_VISION)
BY_KIND: Mapping[type[nn.Module], Network] = {network.kind: network for network in (*NETWORKS, *STEERING)}
BY_CONFIG: Mapping[type[Any], Network] = {network.config: network for network in NETWORKS}


def networks_of(variant: Variant) -> dict[str, Network]:
    """Those that a variant is made of, by part."""
    return {network.part: network for network in PIPELINE if network.of(variant) is not None}


def is_transformer(module: nn.Module) -> bool:
    """Whether a network is one that makes latents, of whatever family."""
    return type(module) in BY_KIND and BY_KIND[type(module)].part == "transformer"
