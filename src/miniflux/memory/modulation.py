"""Modulation ahead of time: the shifts, scales and gates of all steps, computed before the first.

A quarter of FLUX.1's weights make them, from a vector that depends on noise level, guidance and prompt alone. So every
modulation linear is read once per run instead of once per step, and what it says is looked up: by `Ahead` where weights
come and go, by `foreseen` where they stay.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miniflux.checkpoints.networks.flux1 import MODULATION
from miniflux.memory.streaming import Chain, Streamed
from miniflux.models.flux1 import Flux1
from miniflux.models.layers import LastLayer, MLPEmbedder, Modulation
from miniflux.models.rows import ROWS, Key, by_row, key_of, known, unhooked
from miniflux.models.transformer import Transformer
from miniflux.sampling.forwards import Told, flux1_conditioning

log = logging.getLogger(__name__)

Rows = dict[Key, Tensor]


class Ahead:
    """The table of one network.

    What is kept is the output of each linear by itself, found by the bytes of its input: whoever changes the vector in
    flight gets the right answer, from weights that are then read again. Changes that hang on a linear (a LoRA) are
    computed beside it as ever.

    Attributes:
        misses: lookups of inputs that were not foreseen.
    """

    def __init__(self, streamed: Streamed) -> None:
        assert isinstance(streamed.network, Flux1)
        self.network, self.misses = streamed.network, 0
        self._chain = _modulations(streamed)[0]
        self._plain = {unit.name: unit.module.forward for unit in self._chain.units}
        self._table: dict[str, Rows] = {unit.name: {} for unit in self._chain.units}
        self._runs: list[set[Key]] = []
        self._lock = threading.Lock()
        for unit in self._chain.units:
            unit.module.forward = partial(self._look_up, unit.name)

    @property
    def size(self) -> int:
        """Bytes of the table."""
        return sum(t.numel() * t.element_size() for rows in self._table.values() for t in list(rows.values()))

    @contextmanager
    def prepared(self, calls: Sequence[Told]) -> Generator[None]:
        """In here the modulations of these calls of the network are known. Rows that no run needs are dropped at the
        next run's beginning, so that the next picture of a prompt finds its own."""
        vecs = (flux1_conditioning(self.network, call) for call in calls)
        inputs = {key_of(x): x for vec in vecs for x in F.silu(vec).split(1)}
        try:
            with self._lock:
                self._runs.append(set(inputs))
                needed = set[Key]().union(*self._runs)
                self._table = {
                    name: {key: row for key, row in rows.items() if key in needed} for name, rows in self._table.items()
                }
                if any(key not in rows for rows in self._table.values() for key in inputs):
                    self._compute(inputs)
            yield
        finally:
            with self._lock:
                self._runs.remove(set(inputs))

    def _compute(self, inputs: dict[Key, Tensor]) -> None:
        """Fill the table, one linear after the other; each vector by itself, as the network would."""
        for unit in self._chain.units:
            rows = self._table[unit.name]
            with self._chain.loaded(unit):
                plain = self._plain[unit.name]
                rows.update({key: by_row(plain, x) for key, x in inputs.items() if key not in rows})
        self._chain.free()

    def _look_up(self, name: str, x: Tensor) -> Tensor:
        """The output of a linear; a new tensor, because a LoRA adds to it in place."""
        rows = [self._table[name].get(key_of(row)) for row in x.split(1)]
        if all(row is not None for row in rows):
            return torch.cat([row for row in rows if row is not None])
        self.misses += 1
        if self._runs and self.misses == 1:
            log.warning("a conditioning vector was not foreseen: the weights of all modulations are read again for it")
        return self._plain[name](x)


@contextmanager
def foreseen(
    network: Transformer, conditioning: Callable[[Any, Told], Tensor], calls: Callable[[], list[Told]]
) -> Generator[None]:
    """Around the run of a network whose weights stay on the CPU: modulations of all calls in one product, if each call
    is of a picture or a pair. More of them are multiplied as fast step by step. Nothing is done ahead where somebody
    has hung a hook (a LoRA is one) on what would be asked: it would be called for no step.

    Args:
        conditioning: of the family: what the modulations see.
        calls: the calls of the network that the run is going to make.
    """
    asked = [module for module in network.modules() if isinstance(module, MLPEmbedder | Modulation | LastLayer)]
    parts = (one.adaLN_modulation if isinstance(one, LastLayer) else one for one in asked)
    plain = next(network.parameters()).device.type == "cpu" and all(unhooked(one) for one in parts)
    told = calls() if plain else []
    if not told or any(len(call.img) >= ROWS for call in told):
        yield
        return

    def all_of(name: str, calls: Sequence[Any]) -> Tensor | None:
        return None if getattr(calls[0], name) is None else torch.cat([getattr(call, name) for call in calls])

    one: Any = {name: all_of(name, told) for name in ("timesteps", "guidance", "target")}
    together = replace(told[0], words=replace(told[0].words, vec=all_of("vec", [call.words for call in told])), **one)

    def note() -> None:
        vec = conditioning(network, together)
        for module in asked:
            if isinstance(module, Modulation):
                module(vec)
            elif isinstance(module, LastLayer):
                module.modulation(vec)

    with known(note):
        yield


def ahead_of(streamed: Streamed) -> Ahead | None:
    """The table of a network; None where nothing would be spared, because all blocks share a few modulations, which
    stay in memory (FLUX.2, FLUX.3)."""
    return Ahead(streamed) if _modulations(streamed) else None


def _modulations(streamed: Streamed) -> list[Chain]:
    return [c for c in streamed.chains if all(re.fullmatch(MODULATION, unit.name) for unit in c.units)]
