"""Those who look into a run, or change what happens in it, without being an argument of it: `observed`.

    with observed(mine):
        pipe.generate(prompt)

This is what `miniflux.study` is built on. Nothing is asked of the network: the loop tells when it is called, blocks are
run through `wrap`, and everything inside of a block is a module of PyTorch.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from miniflux.models.flux1 import RunBlock
from miniflux.sampling.forwards import Told


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the network.

    Attributes:
        step, steps: the step that it is made for, from 0, and how many there are in all; of a run that begins at a
            lower noise level (img2img) those that it leaves out are counted.
        number: of the calls of this step, from 0: solvers of a higher order and guides make several.
        sigma: the noise level.
        told: all that the network is told. The rows of its batch are the pictures, once for each of `told.texts`.
    """

    step: int
    steps: int
    number: int
    sigma: float
    told: Told


class Observer(Protocol):
    """Whoever is told of a run.

    Attributes:
        alters: what it changes in pictures, in a few words for their settings; None if it only looks on.
    """

    @property
    def alters(self) -> str | None: ...

    def began(self, pictures: Sequence[int]) -> None:
        """Pictures of these numbers of a call of `generate` are being drawn from now on, together. Called again for
        the next ones."""
        ...

    def calling(self, call: Call) -> None:
        """The network is called next. In this call blocks are run through `wrap`; a step cache may leave some out."""
        ...

    def wrap(self, run: RunBlock) -> RunBlock:
        """What runs a block, made into what does so in its place; see `sampling.Wrap`. Of what a block is told beside
        its streams, the last is always what computes attention: another one may be put there."""
        ...


_observers: ContextVar[tuple[tuple[Observer, object], ...]] = ContextVar("observers", default=())


def observers(network: object = None) -> tuple[Observer, ...]:
    """Those of this thread, the outermost first; of those of one network alone, this one's."""
    return tuple(one for one, its in _observers.get() if its is None or network is None or its is network)


@contextmanager
def observed(observer: Observer, network: object = None) -> Generator[None]:
    """In here `observer` is told of all runs that `Pipeline.generate` makes in this thread; with `network`, of those
    of a pipeline with this transformer alone."""
    token = _observers.set((*_observers.get(), (observer, network)))
    try:
        yield
    finally:
        _observers.reset(token)
