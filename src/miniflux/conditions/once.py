"""References that are looked at once: their keys and values are kept, and every step attends to them (FLUX.2 klein KV).

In the network that was trained so, references see only each other, at the time 0, whatever the picture is like by then.
So what they say to it is the same at every step: one pass through the blocks, with neither text nor picture, tells all
of it. Source: `flux2_klein_kv_cache.md` of the original release.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from miniflux.families import Family
from miniflux.models.flux1 import Attend, RunBlock, run_block
from miniflux.models.layers import attention
from miniflux.models.transformer import Transformer
from miniflux.sampling import Told, Words, Wrap

Kept = tuple[Tensor, Tensor, Tensor]
"""Keys and values of the references in one block (1, H, R, D), and the rotations of the keys."""


def look(
    family: Family, network: Transformer, tokens: Tensor, ids: Tensor, device: torch.device | None = None
) -> dict[str, Kept]:
    """What references say in each block, by its name.

    Args:
        tokens, ids: of all references together (1, R, C), (1, R, A).
        device: where it is kept; None for where it is computed.
    """
    kept: dict[str, Kept] = {}

    def run(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
        def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
            kept[name] = (k.to(device, copy=True), v.to(device, copy=True), pe.to(device))
            return attention(q, k, v, pe, mask)

        return run_block(name, block, streams, (*context[:-1], attend))

    words = Words(tokens.new_zeros(1, 0, network.config.context_in_dim), ids.new_zeros(1, 0, ids.shape[-1]))
    told = Told(tokens, ids, words, tokens.new_zeros(1), None)
    family.velocity(network, told, run=run)
    return kept


def remembering(kept: dict[str, Kept]) -> Wrap:
    """Around the blocks: their attention sees what was kept, before the text and the picture."""

    def wrap(run: RunBlock) -> RunBlock:
        def beside(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
            return run(name, block, streams, (*context[:-1], partial(_beside, context[-1], kept[name])))

        return beside

    return wrap


def _beside(
    attend: Attend, kept: Kept, q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None
) -> Tensor:
    keys, values, rotations = (x.to(q.device).expand(len(q), *x.shape[1:]) for x in kept)
    if mask is not None:
        seen = torch.ones(*mask.shape[:-1], keys.shape[2], dtype=mask.dtype, device=mask.device)
        mask = torch.cat((seen, mask), dim=-1)
    rotations = torch.cat((rotations, pe.expand(len(q), *pe.shape[1:])), dim=2)
    return attend(q, torch.cat((keys.to(k), k), dim=2), torch.cat((values.to(v), v), dim=2), rotations, mask)
