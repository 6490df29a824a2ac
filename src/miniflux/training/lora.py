"""New adapters: what a trainer optimises, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from miniflux.checkpoints.quantized import QuantizedLinear, device_of
from miniflux.errors import InputError, LoraError
from miniflux.lora.adapters import Adapter, adapters_of, checked_name
from miniflux.lora.encoding import Contents, encode
from miniflux.lora.layer import Change, LowRank, add_changes
from miniflux.models.transformer import Transformer


class TrainableLora(nn.Module):
    """A fresh LoRA on a transformer: its matrices are parameters, the transformer's own are left alone.

    The up matrices start at zero, so the transformer starts as it was (arXiv 2106.09685, section 4.1).

    Args:
        network: the transformer it is attached to, under `name`; `miniflux.lora.detach` takes it off.
        layers: names of the linears to change.
        rank: of every change.

    Raises:
        InputError: no layers, a rank below 1, or a layer that is no linear.
        LoraError: the name is taken.
    """

    def __init__(self, network: Transformer, layers: Sequence[str], rank: int, name: str = "trained") -> None:
        super().__init__()
        if rank < 1 or not layers:
            raise InputError(f"a LoRA needs at least one layer and rank 1, got {len(layers)} layers and rank {rank}")
        if checked_name(name) in adapters_of(network):
            raise LoraError(f"a LoRA named {name!r} is attached already")
        self.names = list(layers)
        changes: list[LowRank] = []
        for layer in layers:
            module = dict(network.named_modules()).get(layer)
            if not isinstance(module, nn.Linear | QuantizedLinear):
                raise InputError(f"{layer!r} is no linear of this network")
            down = torch.empty(rank, module.in_features)
            nn.init.kaiming_uniform_(down, a=5**0.5)
            change = LowRank(down, torch.zeros(module.out_features, rank), (0, module.out_features))
            change.down, change.up = nn.Parameter(change.down), nn.Parameter(change.up)
            changes.append(change.to(device_of(module)))
        self.changes = nn.ModuleList(changes)
        for layer, change in zip(layers, changes, strict=True):
            add_changes(network.get_submodule(layer), name, [change])
        pairs = list(zip(layers, changes, strict=True))
        adapters_of(network)[name] = Adapter(name, "training", changes=cast("list[tuple[str, Change]]", pairs))

    def set_scale(self, scale: float) -> None:
        """What the change is multiplied by from now on."""
        for change in cast("list[LowRank]", list(self.changes)):
            change.scale.fill_(scale)

    def tensors(self, network: Transformer, dialect: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a LoRA file; `network`: what it is for, on any device.

        Raises:
            LoraError: the dialect has no name for one of the layers.
            InputError: an unknown dialect.
        """
        contents = Contents()
        for layer, change in zip(self.names, cast("list[LowRank]", list(self.changes)), strict=True):
            down, up = change.down.detach().to(dtype), change.up.detach().to(dtype)
            contents.add("transformer", layer, LowRank(down, up, change.rows))
        return encode(contents, dialect, {"transformer": network})
