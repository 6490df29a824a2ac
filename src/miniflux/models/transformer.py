"""The transformers that draw, as one type: what samplers and pipelines work with, whichever family it is."""

from __future__ import annotations

from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.models.flux2 import Flux2, Flux2Config
from miniflux.models.flux3 import Flux3, Flux3Config

Transformer = Flux1 | Flux2 | Flux3
TransformerConfig = Flux1Config | Flux2Config | Flux3Config
