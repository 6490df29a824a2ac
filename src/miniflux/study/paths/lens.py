"""A lens for flow models: the picture that the network points to after each of its blocks.

The last layer reads a velocity from the picture's tokens of the last block. Blocks add to one residual stream, so it
can read those of any block before it: with its modulation, as at the end. That is the logit lens of language models
(nostalgebraist, "interpreting GPT: the logit lens", 2020) with a velocity in place of logits. Nothing is trained for
it, so what early blocks say is to be taken with care: they may write what only later blocks can read.
Letters in shapes: B batch, L image tokens, T text tokens, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miniflux.errors import InputError
from miniflux.models.flux1 import RunBlock
from miniflux.models.transformer import Transformer, TransformerConfig
from miniflux.sampling import Told
from miniflux.sampling.observing import Call

JOINED = "single_blocks."  # of every family: text, picture and references as one sequence
WITH_PICTURE = ("double_blocks.", "content_mode_blocks.image.", JOINED)  # the picture's tokens are their first stream


def picture_blocks(config: TransformerConfig) -> list[str]:
    """Names of the blocks that hold the picture's tokens, in the order in which they run."""
    return [name for name in config.blocks if name.startswith(WITH_PICTURE)]


def lens(network: Transformer, told: Told, vec: Tensor, name: str, streams: Sequence[Tensor]) -> Tensor:
    """The velocity that the last layer reads from what a block made; of the last block the network's own, bit for bit.

    Args:
        network, told: the network and what it was told in this call.
        vec: what the modulations of the picture see (B, hidden), `Family.conditioning`.
        name: of the block, one of `picture_blocks`.
        streams: what came out of it.

    Returns:
        (B, L, C) of the picture alone, in the dtype of the network.

    Raises:
        InputError: a block that does not hold the picture's tokens.
    """
    if not name.startswith(WITH_PICTURE):
        known = picture_blocks(network.config)
        raise InputError(f"{name!r} holds no tokens of the picture; known: {known[0]} to {known[-1]}")
    drawn = told.img.shape[1] if told.drawn is None else told.drawn
    x = streams[0]
    if name.startswith(JOINED):
        text = told.words.txt.shape[1]
        x = x[:, text : text + (told.img.shape[1] if network.config.joined else drawn)]
    last: Any = network.final_layer
    last = last["image"] if isinstance(last, nn.ModuleDict) else last
    return last(x, vec)[:, :drawn]


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen at the beginning of a step.

    Attributes:
        sigma: the noise level.
        x: the latents (1, L, C), as the network was told them, float32.
        velocities: by the name of the block (1, L, C), float32; for the prompt, without what other texts add.
    """

    sigma: float
    x: Tensor
    velocities: dict[str, Tensor]


class Lens:
    """An observer that holds the lens to the first call of every step, and changes nothing; for one picture.

    Args:
        network: that is going to be called.
        conditioning: of its family.
        blocks: names of those to look at.

    Attributes:
        looks: one for each step so far, on the CPU.
    """

    alters: str | None = None

    def __init__(
        self, network: Transformer, conditioning: Callable[[Any, Told], Tensor], blocks: Sequence[str]
    ) -> None:
        self.network, self.conditioning, self.blocks = network, conditioning, frozenset(blocks)
        self.looks: list[Look] = []
        self._now: tuple[Told, Tensor, slice] | None = None

    def began(self, pictures: Sequence[int]) -> None:
        if len(pictures) > 1 or self.looks:
            raise InputError(f"one picture is followed, got picture {pictures[-1]} as well")

    def calling(self, call: Call) -> None:
        """Other calls of a step are of solvers at levels between, or of guides for other texts."""
        self._now = None
        if call.number:
            return
        told, place = call.told, call.told.texts.index("positive")
        row = slice(place, place + 1)
        self._now = told, self.conditioning(self.network, told), row
        x = told.img[row, : told.drawn, : self.network.config.out_channels]
        self.looks.append(Look(call.sigma, _kept(x), {}))

    def wrap(self, run: RunBlock) -> RunBlock:
        def looked(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
            out = run(name, block, streams, context)
            if self._now is not None and name in self.blocks:
                told, vec, row = self._now
                # All rows are read, though one is kept: of another number of them each is rounded in another way.
                self.looks[-1].velocities[name] = _kept(lens(self.network, told, vec, name, out)[row])
            return out

        return looked


def _kept(x: Tensor) -> Tensor:
    """A copy in float32 on the CPU: what blocks make is written over by those behind them."""
    return x.to("cpu", torch.float32, copy=True)
