"""Weights of the model that a LoRA is for, read one by one from its files where they are on this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from miniflux.checkpoints.layouts import counterparts
from miniflux.checkpoints.loading import compare, fetch
from miniflux.checkpoints.opened import layout_in, open_part
from miniflux.errors import MinifluxError
from miniflux.lora.dialects import PartName
from miniflux.variants import variant
from miniflux.weights.finding import found_parts

log = logging.getLogger(__name__)

Weight = Callable[[str], Tensor | None]
"""From the name of a layer to its weight in numbers; None if it has none."""


def bases_of(model: str, networks: Mapping[PartName, nn.Module]) -> dict[PartName, Weight]:
    """How to read the weights of a variant's networks (given on the meta device), for those whose files are found.

    Files that do not fit are left out, and that is logged.
    """
    found, _ = found_parts(variant(model))
    bases: dict[PartName, Weight] = {}
    for kind, network in networks.items():
        if kind in found:
            try:
                bases[kind] = _reader(network, found[kind])
            except MinifluxError as error:
                log.info("%s: its numbers are not compared with: %s", found[kind], str(error).partition("\n")[0])
    return bases


def _reader(network: nn.Module, path: Path) -> Weight:
    source = open_part(path, type(network))
    report = compare(network, source)
    if report.problems:
        raise MinifluxError(str(report))
    table = counterparts(network, layout_in(source, network))
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}

    def weight(layer: str) -> Tensor | None:
        key = f"{layer}.weight"
        return fetch(source, table[key], shapes[key]).to(torch.float32) if key in table else None

    return weight
