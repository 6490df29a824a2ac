"""A record for each network that is loaded here, and what is known of others by name (`known`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from miniflux.checkpoints.networks.autoencoder import AUTOENCODER
from miniflux.checkpoints.networks.clip import CLIP
from miniflux.checkpoints.networks.controlnet import CONTROLNET
from miniflux.checkpoints.networks.flux1 import FLUX1
from miniflux.checkpoints.networks.ip_adapter import INSTANTX_IP_ADAPTER, XLABS_IP_ADAPTER
from miniflux.checkpoints.networks.record import Network
from miniflux.checkpoints.networks.redux import REDUX
from miniflux.checkpoints.networks.t5 import T5
from miniflux.checkpoints.networks.tiny_decoder import TINY_DECODER
from miniflux.checkpoints.networks.vision import CLIP_VISION, SIGLIP_VISION

__all__ = ["BY_CONFIG", "BY_KIND", "BY_PART", "NETWORKS", "PIPELINE", "STEERING", "Network", "is_transformer"]

NETWORKS = (FLUX1, AUTOENCODER, CLIP, T5, TINY_DECODER)
PIPELINE = tuple(network for network in NETWORKS if network.folder)  # those that make a whole model, in its order
# Those that steer, each in a file of its own, told by `known` and read by `steering`.
STEERING = (CONTROLNET, REDUX, XLABS_IP_ADAPTER, INSTANTX_IP_ADAPTER, SIGLIP_VISION, CLIP_VISION)
BY_KIND: Mapping[type[nn.Module], Network] = {network.kind: network for network in (*NETWORKS, *STEERING)}
BY_PART: Mapping[str, Network] = {network.part: network for network in NETWORKS}
BY_CONFIG: Mapping[type[Any], Network] = {network.config: network for network in NETWORKS}


def is_transformer(module: nn.Module) -> bool:
    """Whether a network is one that makes latents, of whatever family."""
    return type(module) in BY_KIND and BY_KIND[type(module)].part == "transformer"
