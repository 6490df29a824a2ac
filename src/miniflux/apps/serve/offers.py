"""Which models can be asked for, and by which names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from miniflux.checks import shown
from miniflux.conditions import fill_channels
from miniflux.errors import CheckpointError, InputError
from miniflux.families import FAMILIES
from miniflux.service import Catalogue, Listed
from miniflux.variants import ALIASES, Variant
from miniflux.weights.origin import Stamp

# Names of models that Black Forest Labs hosts (docs.bfl.ai), and the published model that answers to each here. The
# weights of [pro], [max] and [flex] are not published: their open sibling, which takes the same requests, stands in,
# and the list of models says which one it is.
HOSTED: dict[str, str] = {
    "flux-dev": "flux1-dev",
    "flux-schnell": "flux1-schnell",
    "flux-krea-dev": "flux1-krea-dev",
    "flux-kontext-dev": "flux1-kontext-dev",
    "flux-pro": "flux1-dev",
    "flux-pro-1.1": "flux1-dev",
    "flux-pro-1.1-ultra": "flux1-dev",
    "flux-kontext-pro": "flux1-kontext-dev",
    "flux-kontext-max": "flux1-kontext-dev",
    "flux-pro-1.0-fill": "flux1-fill-dev",
    "flux-pro-1.0-canny": "flux1-canny-dev",
    "flux-pro-1.0-depth": "flux1-depth-dev",
    "flux-2-dev": "flux2-dev",
    "flux-2-pro": "flux2-dev",
    "flux-2-pro-preview": "flux2-dev",
    "flux-2-flex": "flux2-dev",
    "flux-2-max": "flux2-dev",
    "flux-2-klein-4b": "flux2-klein-4b",
    "flux-2-klein-9b": "flux2-klein-9b",
    "flux-2-klein-9b-preview": "flux2-klein-9b",
    "flux-2-klein-9b-kv": "flux2-klein-9b-kv",
    "flux-3-image": "flux3-klein",
}
# FLUX.1 that was never shown a picture to look at. Kontext has the same sizes: no file tells one from the other, so
# this is said of the released models by name, and of no other file.
BLIND = ("flux1-dev", "flux1-schnell", "flux1-krea-dev", "nano-dev", "nano-schnell")
EDGES = ("flux1-canny-dev",)  # those that read edges, which can be made of a picture here


class UnknownModelError(InputError):
    """Nothing answers to this name here."""


@dataclass(frozen=True)
class Offer:
    """A model under one of its names.

    Attributes:
        name: which it was asked for by.
        listed: the model.
    """

    name: str
    listed: Listed

    @property
    def model(self) -> str:
        """What `Request.model` takes."""
        return self.listed.model

    @property
    def variant(self) -> Variant:
        return self.listed.variant

    @property
    def blind(self) -> bool:
        """Whether it makes nothing of pictures to look at."""
        return self.model in BLIND

    @property
    def edges(self) -> bool:
        return self.variant.name in EDGES

    @property
    def fills(self) -> bool:
        """Whether it was made to complete pictures."""
        v = self.variant
        return self._more == fill_channels(FAMILIES[v.family], v.transformer, v.autoencoder.downscale) > 0

    @property
    def controlled(self) -> bool:
        """Whether it reads a control picture."""
        return self._more == self.variant.transformer.out_channels

    @property
    def _more(self) -> int:
        return self.variant.transformer.in_channels - self.variant.transformer.out_channels


class Offers:
    """All of them.

    Args:
        catalogue: of the models on this machine.
        allowed: names of those that may be asked for, the first one where none is named; None for all.
        aliases: more names, and whose they are; they go before those of `HOSTED`.

    Raises:
        InputError: a name is of no model, or of one whose weights are not here.
    """

    def __init__(
        self, catalogue: Catalogue, allowed: Sequence[str] | None = None, aliases: Mapping[str, str] | None = None
    ) -> None:
        self.catalogue, self.allowed, self.aliases = catalogue, allowed, dict(aliases or {})
        self._models: dict[str, Listed] = {}
        self._names: dict[str, str] = {}
        self._paths: dict[str, list[str]] = {}
        self.refresh()
        for alias, name in self.aliases.items():
            if name not in self._models:
                raise InputError(f"alias {shown(alias)}: there is no model {shown(name)} here")
        for name in allowed or ():
            self._find(name)

    def refresh(self) -> None:
        """Look again at what there is."""
        self.catalogue.scan()
        models = {one.name: one for one in self.catalogue.listed()}
        self._models, self._names, self._paths = models, {**ALIASES, **HOSTED, **self.aliases}, {}

    @property
    def default(self) -> str:
        """Which one it is if none is named."""
        return self.allowed[0] if self.allowed else next(iter(ALIASES))

    def names(self) -> list[Offer]:
        """Every name that something answers to."""
        found = [Offer(name, one) for name, one in self._models.items()]
        found += [Offer(alias, self._models[name]) for alias, name in self._names.items() if name in self._models]
        return [offer for offer in found if not offer.listed.missing and self._may(offer)]

    def looking(self) -> list[str]:
        """Models that look at pictures, for a message."""
        seen = {offer.listed.name: offer for offer in self.names()}
        return [name for name, one in seen.items() if not (one.blind or one.fills or one.controlled)]

    def find(self, name: str) -> Offer:
        """
        Raises:
            UnknownModelError: nothing answers to this name, or its weights are not here.
        """
        offer = self._find(name)
        if not self._may(offer):
            raise self._unknown(name)
        return offer

    def _find(self, name: str) -> Offer:
        listed = self._models.get(self._names.get(name, name))
        if listed is None:
            raise self._unknown(name)
        if listed.missing:
            raise UnknownModelError(f"the weights of {listed.name}, which {shown(name)} stands for, are not here")
        return Offer(name, listed)

    def _may(self, offer: Offer) -> bool:
        if self.allowed is None:
            return True
        return offer.listed.name in {self._names.get(name, name) for name in self.allowed}

    def _unknown(self, name: str) -> UnknownModelError:
        there = sorted({offer.listed.name for offer in self.names()} or self._models)
        return UnknownModelError(f"there is no model {shown(name)} here; there are {', '.join(there)}")

    def files(self, offer: Offer) -> list[Stamp]:
        """What it is made of, as the files are now. Which files they are is looked for once until `refresh`."""
        with suppress(CheckpointError):  # one of them is gone
            if (paths := self._paths.get(offer.model)) is not None:
                return [Stamp.of(path) for path in paths]
        found = self.catalogue.files_of(offer.model)
        self._paths[offer.model] = [stamp.path for stamp in found]
        return found
