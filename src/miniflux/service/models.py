"""Models that come and go: what there is on this machine, loaded when asked for, kept while memory allows."""

from __future__ import annotations

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch

from miniflux import lora
from miniflux.cache import ResultCache, result_cache
from miniflux.errors import CheckpointError, LoraError
from miniflux.lora import Receipt
from miniflux.lora.attaching import resolved
from miniflux.lora.fitting import fitted
from miniflux.lora.models import stand_ins
from miniflux.memory.room import Room
from miniflux.pipeline import Pipeline, load
from miniflux.plan import Plan
from miniflux.result import Result
from miniflux.sampling import Moment
from miniflux.service.catalogue import Catalogue, Listed
from miniflux.service.given import Given, unsteered
from miniflux.service.queue import Cost, Preview, Step
from miniflux.service.writers import Writers
from miniflux.settings import LoraUse, Request
from miniflux.variants import ALIASES, VARIANTS
from miniflux.weights.origin import Stamp, stamps

log = logging.getLogger(__name__)

REMEMBERED = 256  # requests whose answers are looked up without the model
LONGER = ("Reference",)  # conditions that make steps longer, by tokens that can be counted without a network
LONG = 10_000  # characters of a prompt that is not remembered so


class _Loaded:
    """A pipeline, and who uses it with which LoRAs: calls with the same ones may run at once, others wait."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe, self.users = pipe, 0
        self.uses: tuple[LoraUse, ...] = ()
        self.attached: list[tuple[str, list[Stamp]]] = []  # names, and the files they came from
        self.change = threading.Condition()
        networks = (pipe.transformer, pipe.autoencoder, *pipe.text.networks.values())
        tensors = chain.from_iterable(chain(network.parameters(), network.buffers()) for network in networks)
        self.bytes = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)  # those of streamed blocks are


class Models:
    """The models of a service.

    Args:
        weights, device, dtype: as of `miniflux.load`.
        max_bytes: of loaded weights; the least recently used models that nobody uses are let go first. None for no
            bound.
        cache: pictures that were drawn before, see `miniflux.load`; shared by all models.
        folder: models in it are listed as well, see `Catalogue.scan`.
        given: where pictures are that requests name; None to refuse such requests.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_bytes: int | None = None,
        cache: ResultCache | str | Path | None = None,
        folder: str | Path | None = None,
        given: Given | None = None,
    ) -> None:
        self.given = given
        self.weights, self.device, self.dtype, self.max_bytes = weights, device, dtype, max_bytes
        self.catalogue = Catalogue(weights, folder)
        self.writers = Writers(self.catalogue, device, dtype)
        self.results = result_cache(cache)
        self._loaded: OrderedDict[tuple[str, str | None], _Loaded] = OrderedDict()
        self._room = Room()
        self._loading, self._lock = threading.Lock(), threading.Lock()
        self._answers: OrderedDict[Request, Result] = OrderedDict()  # without pictures, which the cache holds

    # What there is

    def listed(self) -> list[Listed]:
        """See `Catalogue.listed`."""
        return self.catalogue.listed()

    def lora(self, file: str | Path, model: str | None = None) -> Receipt:
        """The receipt of a LoRA file, without loading a model.

        Args:
            model: compare with this model; None for the first that fits.

        Raises:
            LoraError, CheckpointError: it cannot be used, and the message says why.
        """
        sizes = None if model is None else self.catalogue.variant_of(model)
        if sizes is None or VARIANTS.get(sizes.name) == sizes:  # not one of other sizes whose file is called so
            return lora.inspect(file, None if sizes is None else sizes.name)
        networks = stand_ins(sizes)
        return fitted(networks, lora.read(resolved(file)), strict=True).receipt(str(file), networks)

    # Models at work

    @contextmanager
    def use(self, request: Request) -> Generator[Pipeline]:
        """A pipeline with exactly the LoRAs of a request, which nobody changes while it is used.

        Raises:
            WeightsNotFoundError, LoraError, CheckpointError: what is missing or does not fit; the pipeline has no LoRAs
                then.
        """
        loaded = self._load(request)
        files = [_file(use) for use in request.loras]
        with loaded.change:
            while loaded.users and loaded.uses != request.loras:
                loaded.change.wait()
            if not loaded.users:
                _attach(loaded, request.loras, files)
            loaded.users += 1
        try:
            yield loaded.pipe
        finally:
            with loaded.change:
                loaded.users -= 1
                loaded.change.notify_all()

    def _key(self, request: Request) -> tuple[str, str | None]:
        return ALIASES.get(request.model, request.model), request.dtype or self.dtype

    def _load(self, request: Request) -> _Loaded:
        key = self._key(request)
        with self._loading:
            with self._lock:
                if key in self._loaded:
                    self._loaded.move_to_end(key)
                    return self._loaded[key]
            self._make_room(key[0])
            weights = self.catalogue.weights_of(key[0])
            pipe = load(key[0], weights=weights, device=self.device, dtype=key[1], cache=self.results)
            with self._lock:
                self._loaded[key] = loaded = _Loaded(pipe)
            self._let_go(0, key)  # in a wider precision than that of its files it is larger than they are
            return loaded

    def _make_room(self, name: str) -> None:
        """Let models go until there is room for the files of another one."""
        if self.max_bytes is not None:
            self._let_go(self.catalogue.bytes_of(name))

    def _let_go(self, wanted: int, kept: tuple[str, str | None] | None = None) -> None:
        """Let go of what nobody uses, the least recently used first, until so many more bytes are within the bound."""
        gone = False
        with self._lock:
            for key in [key for key, loaded in self._loaded.items() if not loaded.users and key != kept]:
                total = wanted + sum(loaded.bytes for loaded in self._loaded.values())
                if self.max_bytes is None or total <= self.max_bytes:
                    break
                log.info("letting go of %s: %d bytes of weights are too many", key[0], total)
                del self._loaded[key]
                gone = True
        if gone:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # Work for the queue

    def draw(self, request: Request, step: Step) -> Result:
        """Draw, telling `step` about every step: what `Queue` wants to be given.

        Raises:
            InputError, MinifluxError: as `Pipeline.generate`; or a picture that it names is not here.
        """
        steering = self._steering(request)
        with self.use(request) as pipe:
            plan = request.plan(pipe.as_it_is(), steering.get("conditions", ()))
            preview: list[Preview | None] = [None]
            # The table takes 1.4 % of a step of nano at 128x128, the tiny decoder 14 %.
            decoder = "table" if pipe.variant.preview else "tiny" if pipe.tiny is not None else None

            def watch(_: int, moment: Moment) -> None:
                if decoder is not None:
                    preview[0] = partial(pipe.preview, moment, plan.width, plan.height, decoder)

            def progress(done: int, _: int) -> None:
                step(done, preview[0])

            with self._beside_others(pipe, plan, lambda: step(0, None)):
                result = pipe.generate(**request.arguments(), **steering, watch=watch, progress=progress)
        if result.keys and len(request.prompt) < LONG:
            with self._lock:
                self._answers[request] = replace(result, images=[], latents=torch.empty(0), moment=None)
                if len(self._answers) > REMEMBERED:
                    self._answers.popitem(last=False)
        return result

    def _steering(self, request: Request) -> dict[str, Any]:
        return unsteered(request) if self.given is None else self.given.steering(request)

    def _beside_others(self, pipe: Pipeline, plan: Plan, waiting: Callable[[], None]) -> AbstractContextManager[None]:
        """Begins when there is memory for the run beside those at work."""
        if pipe.memory is None:
            return nullcontext()
        return self._room.taken(pipe.memory.ledger(plan.needs(pipe.memory.device)).working, pipe.memory.device, waiting)

    def answer(self, request: Request) -> Result | None:
        """What was drawn for the same request before, if the cache still holds it: for `Queue(answer=...)`."""
        with self._lock:
            known, loaded = self._answers.get(request), self._loaded.get(self._key(request))
        if loaded is not None and loaded.pipe.changed():
            return None
        if known is None or self.results is None or not all(_unchanged(stamp) for _, stamp in known.files):
            return None
        pictures = [self.results.get(key) for key in known.keys]
        drawn = [picture for picture in pictures if picture is not None]
        if len(drawn) != len(pictures):
            return None
        settings = [{**about, "cached": True} for about in known.settings]
        images, latents = [picture.image for picture in drawn], torch.cat([picture.latents for picture in drawn])
        return replace(known, images=images, latents=latents, settings=settings)

    def cost(self, request: Request) -> Cost:
        """What a request will cost.

        Raises:
            InputError, WeightsNotFoundError: a model or a picture that is not here.
        """
        key = self._key(request)
        with self._lock:
            loaded = self._loaded.get(key)
        if loaded is None:
            self.catalogue.bytes_of(key[0])  # refuses what is not here
        chosen = self.catalogue.variant_of(key[0]) if loaded is None else loaded.pipe.variant
        if self.given is None:
            unsteered(request)
        plan = request.plan(chosen, () if self.given is None else self.given.conditions(request, LONGER))
        method = None if request.guide is None else type(request.guide).__name__
        kind = (key, request.solver, method)
        # Of one picture, all that its guide and its solver ask for.
        tokens = plan.calls * (
            plan.rows * plan.columns + sum(c.tokens(plan.rows, plan.columns) for c in plan.conditions)
        )
        return Cost(kind=kind, size=tokens / plan.steps, steps=plan.total * plan.steps)


def _attach(loaded: _Loaded, uses: tuple[LoraUse, ...], files: list[Path]) -> None:
    """Exchange the LoRAs of a pipeline that nobody uses; where only strengths differ, nothing is loaded."""
    wanted = [stamps(file) for file in files]
    pipe = loaded.pipe
    if wanted == [stamp for _, stamp in loaded.attached]:
        for (name, _), old, new in zip(loaded.attached, loaded.uses, uses, strict=True):
            if old.scale != new.scale:
                lora.set_scale(pipe, name, new.strength)
        loaded.uses = uses
        return
    _detach(loaded)
    try:
        for i, (use, file, stamp) in enumerate(zip(uses, files, wanted, strict=True)):
            name = f"{i + 1} {file.stem}"
            lora.attach(pipe, file, use.strength, name)
            loaded.attached.append((name, stamp))
    except BaseException:
        _detach(loaded)
        raise
    loaded.uses = uses


def _detach(loaded: _Loaded) -> None:
    for name, _ in reversed(loaded.attached):
        lora.detach(loaded.pipe, name)
    loaded.attached, loaded.uses = [], ()


def _file(use: LoraUse) -> Path:
    """The file of a LoRA, or the bundled one of this name."""
    path = Path(cast(Path, resolved(use.file)))
    if use.sha256 is not None and stamps(path)[0].sha256() != use.sha256:
        raise LoraError(f"LoRA {path}: not the file that is asked for: its SHA-256 differs")
    return path


def _unchanged(stamp: Stamp) -> bool:
    try:
        return Stamp.of(stamp.path) == stamp
    except CheckpointError:
        return False
