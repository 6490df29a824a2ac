"""Models that come and go: what there is on this machine, loaded when asked for, kept while memory allows."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from miniflux import lora
from miniflux.checkpoints.finding import find
from miniflux.errors import InputError, WeightsNotFoundError
from miniflux.lora import Receipt
from miniflux.pipeline import Pipeline, load
from miniflux.result import Result
from miniflux.sampling import Moment
from miniflux.service.queue import Cost, Step
from miniflux.settings import LoraUse, Request
from miniflux.variants import ALIASES, VARIANTS, Variant, variant


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One model for a list to choose from.

    Attributes:
        name: what `Request.model` takes.
        missing: why it cannot be loaded: the files that are not here; empty if it can.
        bundled: whether its weights are inside the package.
        guided: whether it reads `guidance`; the others refuse it.
        steps, guidance, size: its defaults.
        previews: whether previews can be made.
    """

    name: str
    missing: str
    bundled: bool
    licence: str
    guided: bool
    steps: int
    guidance: float | None
    size: int
    previews: bool


class _Loaded:
    """A pipeline, and who uses it with which LoRAs: calls with the same ones may run at once, others wait."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe, self.users = pipe, 0
        self.loras: tuple[LoraUse, ...] = ()
        self.names: list[str] = []
        self.change = threading.Condition()


class Models:
    """The models of a service.

    Args:
        weights, device, dtype: as of `miniflux.load`.
        max_bytes: of loaded weights; the least recently used models that nobody uses are let go first. None for no
            bound.
    """

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.weights, self.device, self.dtype, self.max_bytes = weights, device, dtype, max_bytes
        self._loaded: OrderedDict[tuple[str, str | None], _Loaded] = OrderedDict()
        self._lock = threading.RLock()

    def listed(self) -> list[Listed]:
        """Every variant, those whose weights are here first."""
        return sorted(
            (self._listed(v) for v in VARIANTS.values()), key=lambda model: (bool(model.missing), not model.bundled)
        )

    def _listed(self, v: Variant) -> Listed:
        missing = ""
        try:
            find(v, [] if self.weights is None else [Path(self.weights)])
        except WeightsNotFoundError as error:
            missing = str(error).partition("\n")[0]
        return Listed(
            name=v.name,
            missing=missing,
            bundled=v.bundled,
            licence=v.licence,
            guided=v.transformer.guidance_embed,
            steps=v.steps,
            guidance=v.guidance,
            size=v.size,
            previews=bool(v.preview),
        )

    def lora(self, file: str | Path, model: str | None = None) -> Receipt:
        """The receipt of a LoRA file that was dropped, without loading a model.

        Raises:
            LoraError, CheckpointError: it cannot be used; the message says why.
        """
        return lora.inspect(file, model)

    @contextmanager
    def use(self, request: Request) -> Generator[Pipeline]:
        """A pipeline with exactly the LoRAs of a request, which nobody changes while it is used.

        Raises:
            WeightsNotFoundError, LoraError, CheckpointError: what is missing or does not fit; nothing has changed then.
        """
        loaded = self._load(request)
        with loaded.change:
            while loaded.users and loaded.loras != request.loras:
                loaded.change.wait()
            if loaded.loras != request.loras:
                _attach(loaded, request.loras)
            loaded.users += 1
        try:
            yield loaded.pipe
        finally:
            with loaded.change:
                loaded.users -= 1
                loaded.change.notify_all()

    def _load(self, request: Request) -> _Loaded:
        key = (ALIASES.get(request.model, request.model), request.dtype or self.dtype)
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = _Loaded(load(key[0], weights=self.weights, device=self.device, dtype=key[1]))
            self._loaded.move_to_end(key)
            return self._loaded[key]

    def draw(self, request: Request, step: Step) -> Result:
        """Draw, telling `step` about every step: what `Queue` wants to be given."""
        if request.image is not None:
            raise InputError("a picture to change cannot be queued yet")
        with self.use(request) as pipe:
            width, height = request.size(pipe.variant)
            shows = bool(pipe.variant.preview)

            def callback(i: int, moment: Moment) -> None:
                preview = (lambda: pipe.preview(moment, width, height)) if shows else None
                step(i * moment.steps + moment.step, preview)

            return pipe.generate(**request.arguments(), callback=callback)

    def cost(self, request: Request) -> Cost:
        """What a request will cost."""
        with self._lock:
            loaded = self._loaded.get((ALIASES.get(request.model, request.model), request.dtype or self.dtype))
        chosen = loaded.pipe.variant if loaded else variant(request.model)
        return Cost(
            kind=(request.model, request.size(chosen), request.guide is not None), steps=request.steps_in_all(chosen)
        )


def _attach(loaded: _Loaded, uses: tuple[LoraUse, ...]) -> None:
    """Exchange the LoRAs of a pipeline; where only strengths differ, nothing is loaded."""
    pipe = loaded.pipe
    if [use.file for use in uses] == [use.file for use in loaded.loras]:
        for name, use in zip(loaded.names, uses, strict=True):
            lora.set_scale(pipe, name, use.strength)
    else:
        for name in loaded.names:
            lora.detach(pipe, name)
        loaded.names, loaded.loras = [], ()
        for i, use in enumerate(uses):
            name = f"{i + 1}: {Path(use.file).stem}"
            lora.attach(pipe, use.file, use.strength, name)
            loaded.names.append(name)
    loaded.loras = uses
