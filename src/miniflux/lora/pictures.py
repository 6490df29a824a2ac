"""LoRAs of each picture: several hang on one network, and in a batch each picture is drawn with its own."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from miniflux.checkpoints.networks import is_transformer
from miniflux.errors import InputError, LoraError
from miniflux.lora.adapters import Attachable, Parts, Scale, checked_scale, named, networks, scale_of, told_scale
from miniflux.lora.layer import Change, of_pictures
from miniflux.models.compiling import is_compiled

Uses = Sequence[Mapping[str, Scale]]


@dataclass(frozen=True)
class PerPicture:
    """Which LoRAs of a transformer each picture of a call is drawn with.

    Attributes:
        uses: of each picture, names of LoRAs and their strengths.
        layers: what each of these LoRAs changes.
        strengths: of each of their changes, for each picture.
    """

    uses: Uses
    layers: dict[str, list[str]]
    strengths: dict[Change, list[float]]

    def check(self, pictures: int, once: bool) -> None:
        """Whether a call can be drawn so.

        Args:
            pictures: of the call.
            once: whether references are looked at once, for all pictures.

        Raises:
            InputError: it cannot.
        """
        if len(self.uses) != pictures:
            raise InputError(f"LoRAs were given for {len(self.uses)} pictures, and {pictures} are to be drawn")
        if once and self.layers:
            raise InputError(
                "references that are looked at once are seen with one set of LoRAs for all pictures: attach that, or "
                "look at references at every step (once=False)"
            )

    def described(self, i: int, attached: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the settings of picture i say of all that is attached: its own, and what counts for every picture."""
        own = {name: {"scale": told_scale(scale, self.layers[name])} for name, scale in self.uses[i].items()}
        counting = [about for about in attached if about["name"] in own or about["name"] not in self.layers]
        return [{**about, **own.get(about["name"], {})} for about in counting]

    def drawing(self, pictures: Sequence[int]) -> AbstractContextManager[None]:
        """In here the transformer is called with a batch of these pictures."""
        return of_pictures({change: [of[i] for i in pictures] for change, of in self.strengths.items()})


_given: ContextVar[Mapping[nn.Module, PerPicture] | None] = ContextVar("given", default=None)


@contextmanager
def per_picture(pipe: Parts, uses: Uses) -> Generator[None]:
    """In here a call of `generate` draws each of its pictures with LoRAs of its own, in one batch if that pays. Other
    threads see nothing of it: for them every LoRA has the scale that it was attached with.

    Args:
        uses: for each picture, names of attached LoRAs and their strengths, see `Scale`. A LoRA that some pictures name
            does not count for the others; one that none names counts for all, at its own scale. What a layer is
            given adds up in the order of attaching.

    Raises:
        LoraError: a name is not attached, or that LoRA can only be the same for all pictures: the message says why.
        InputError: a strength is not a finite number, or begins the name of no module of the LoRA.
    """
    names = list(dict.fromkeys(name for own in uses for name in own))
    for name in names:
        reason = shared(pipe, name)
        if reason is not None:
            raise LoraError(f"LoRA {name!r} cannot differ from picture to picture: {reason}")
    adapters = {name: adapter for name in names for _, adapter in named(pipe, name)}
    checked = [{name: checked_scale(scale, adapters[name].layers, name) for name, scale in own.items()} for own in uses]
    strengths = {
        change: [scale_of(own[name], layer) if name in own else 0.0 for own in checked]
        for name, adapter in adapters.items()
        for layer, change in adapter.changes
    }
    own = PerPicture(checked, {name: adapter.layers for name, adapter in adapters.items()}, strengths)
    token = _given.set({**(_given.get() or {}), pipe.transformer: own})
    try:
        yield
    finally:
        _given.reset(token)


def shared(target: Attachable, name: str) -> str | None:
    """Why the strength of a LoRA cannot differ from picture to picture; None if it can.

    Raises:
        LoraError: nothing of this name is attached.
    """
    parts = {id(network): part for part, network in networks(target).items()}
    for network, adapter in named(target, name):
        if not is_transformer(network):
            return f"it changes the {parts[id(network)]} network, which reads prompts before pictures are drawn"
        if adapter.merged:
            return "it is merged into the weights"
        if adapter.schedule is not None:
            return "its strength follows the noise level"
        if adapter.saved:
            module, parameter = next(iter(adapter.saved))
            return f"it replaces parameters ({module}.{parameter}), of which there is one for all pictures"
        if is_compiled(network):
            return "the blocks of this transformer are compiled"
    return None


def given(pipe: Parts) -> PerPicture | None:
    """What this thread has given to the pictures of a pipeline; None if all LoRAs count for all of them."""
    return (_given.get() or {}).get(pipe.transformer)
