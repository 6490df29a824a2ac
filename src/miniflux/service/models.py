"""Models that come and go: what there is on this machine, loaded when asked for, kept while memory allows."""

from __future__ import annotations

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch

from miniflux import lora
from miniflux.batching import at_once
from miniflux.cache import ResultCache, result_cache
from miniflux.errors import CheckpointError, LoraError, MinifluxError
from miniflux.families import FAMILIES
from miniflux.lora import Receipt
from miniflux.lora.attaching import resolved
from miniflux.lora.fitting import fitted
from miniflux.lora.models import stand_ins
from miniflux.lora.pictures import shared
from miniflux.memory.compute import choose_device
from miniflux.memory.free import free_ram, free_vram
from miniflux.memory.modes import SPARED
from miniflux.memory.room import Room
from miniflux.pipeline import Pipeline, load
from miniflux.plan import Plan, once_for
from miniflux.result import Result
from miniflux.sampling import Moment
from miniflux.service.catalogue import Catalogue, Listed
from miniflux.service.given import Pictures, unsteered
from miniflux.service.queue import Cost, Preview, Step
from miniflux.service.together import (
    StepOf,
    Teller,
    about,
    alike,
    by_loras,
    decoder_of,
    in_one_line,
    joint,
    kin,
    shares,
)
from miniflux.service.writers import Writers
from miniflux.settings import LoraUse, Request
from miniflux.variants import ALIASES, VARIANTS
from miniflux.weights.origin import Stamp, stamps

__all__ = ["Models", "kin"]

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
        max_bytes: of loaded weights, None for what is free: the least recently used models that nobody uses are let go
            before another one is loaded for which there is no room.
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
        given: Pictures | None = None,
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

    def loaded(self) -> dict[str, int]:
        """Names of the models in memory, and bytes of their weights."""
        with self._lock:
            found = [(name, loaded.bytes) for (name, _), loaded in self._loaded.items()]
        return {name: sum(size for one, size in found if one == name) for name, _ in found}

    # Models at work

    @contextmanager
    def use(self, request: Request) -> Generator[Pipeline]:
        """A pipeline with exactly the LoRAs of a request, which nobody changes while it is used.

        Raises:
            WeightsNotFoundError, LoraError, CheckpointError: what is missing or does not fit; the pipeline has no LoRAs
                then.
        """
        with self._with(self._load(request), request.loras, [_file(use) for use in request.loras]) as pipe:
            yield pipe

    @contextmanager
    def _with(self, loaded: _Loaded, uses: tuple[LoraUse, ...], files: list[Path]) -> Generator[Pipeline]:
        with loaded.change:
            while loaded.users and loaded.uses != uses:
                loaded.change.wait()
            if not loaded.users:
                _attach(loaded, uses, files)
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
        if self._loaded:
            self._let_go(self.catalogue.bytes_of(name))

    def _let_go(self, wanted: int, kept: tuple[str, str | None] | None = None) -> None:
        """Let go of what nobody uses, the least recently used first, until there is room for so many more bytes."""
        with self._lock:
            for key in [key for key, loaded in self._loaded.items() if not loaded.users and key != kept]:
                if (full := self._full(wanted)) is None:
                    break
                log.info("letting go of %s: %s", key[0], full)
                del self._loaded[key]
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _full(self, wanted: int) -> str | None:
        """Why there is no room for so many bytes; None if there is."""
        total = wanted + sum(loaded.bytes for loaded in self._loaded.values())
        if self.max_bytes is not None and total > self.max_bytes:
            return f"{total} bytes of weights are too many"
        device = choose_device(self.device)
        free = free_ram() if device.type == "cpu" else free_vram(device)
        if self.max_bytes is None and free is not None and wanted > SPARED * free:
            return f"{wanted} bytes are wanted for another model, {free} are free"
        return None

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
            decoder = decoder_of(pipe)

            def watch(_: int, moment: Moment) -> None:
                if decoder is not None:
                    preview[0] = partial(pipe.preview, moment, plan.width, plan.height, decoder)

            def progress(done: int, _: int) -> None:
                step(done, preview[0])

            with self._beside_others(pipe, plan, lambda: step(0, None)):
                result = pipe.generate(**request.arguments(), **steering, watch=watch, progress=progress)
        self._remember(request, result)
        return result

    def draw_together(self, requests: Sequence[Request], step: StepOf) -> list[Result]:
        """Draw requests of several people, those that are alike (`together.kin`) in one batch as far as that pays and
        fits. Each gets what `draw` gives, bit for bit where `batching` says so; its settings may say `batch`, and it
        has no moment to go on from.

        Args:
            step: called after every step with (number of the request, steps done of it, previews of those of its
                pictures that have gone a step); it may raise to stop all.

        Raises:
            InputError, MinifluxError: as `draw`. What is about one of them has its number as `which`, and is raised
                before any request of its batch is drawn: the others can be asked for again.
        """
        made: dict[int, Result] = {}
        for group in alike(requests):
            made |= self._draw_alike(group, step)
        return [made[which] for which in range(len(requests))]

    def most_at_once(self, request: Request) -> int:
        """How many pictures of requests like this one it pays to draw together, and fit into what is free now, if the
        model is loaded. 1 where they are drawn one after the other: large ones, with a step cache, with a variation.

        Raises:
            InputError, WeightsNotFoundError: as `cost`.
        """
        loaded, plan = self._planned(request)
        if request.variation is not None:
            return 1
        if loaded is not None:
            return loaded.pipe.at_once(plan)
        return at_once(plan, False, self.catalogue.variant_of(request.model).transformer.hidden_size, plan.needs())

    def _draw_alike(self, group: Mapping[int, Request], step: StepOf) -> dict[int, Result]:
        """Draw requests that are alike but for their LoRAs, if need be one set of them after the other."""
        with ExitStack() as stack:
            pipe, apart = self._use_all(stack, group)
            if not apart:
                return self._draw_one_batch(pipe, group, step)
        others = {which: request for which, request in group.items() if which not in apart}
        sets = [others] if others else []
        made: dict[int, Result] = {}
        for one in [*sets, *by_loras({which: group[which] for which in apart})]:
            made |= self._draw_alike(one, step)
        return made

    def _use_all(self, stack: ExitStack, group: Mapping[int, Request]) -> tuple[Pipeline, list[int]]:
        """A pipeline on which each picture of these requests has its own LoRAs, until the stack is closed; and the
        requests with one that can only be the same for all pictures."""
        (first, request), *_ = group.items()
        if len(by_loras(group)) == 1:
            with about(first):
                return stack.enter_context(self.use(request)), []
        with about(first):
            loaded = self._load(request)
            variant, conditions = loaded.pipe.variant, self._steering(request).get("conditions", ())
            once = once_for(variant, FAMILIES[variant.family], conditions)
        if once:  # they see one set of LoRAs
            return loaded.pipe, list(group)
        files: list[list[Path]] = []
        for which, request in group.items():
            with about(which):
                files.append([_file(use) for use in request.loras])
        line, places = in_one_line(files)
        try:
            off = tuple(LoraUse(str(file), 0.0) for file in line)  # for whoever sees nothing of `per_picture`
            pipe = stack.enter_context(self._with(loaded, off, line))
            names = [name for name, _ in loaded.attached]
            fixed = {i for i, name in enumerate(names) if shared(pipe, name) is not None}
            apart = [which for which, own in zip(group, places, strict=True) if fixed & set(own)]
            if not apart:
                uses = [
                    {names[i]: use.strength for i, use in zip(own, request.loras, strict=True)}
                    for request, own in zip(group.values(), places, strict=True)
                    for _ in range(request.images)
                ]
                stack.enter_context(lora.per_picture(pipe, uses))
            return pipe, apart
        except MinifluxError:
            stack.close()
            for which, request in group.items():  # whose LoRA is it?
                with about(which), self.use(request):
                    pass
            return loaded.pipe, list(group)  # nobody's: some cannot be beside each other

    def _draw_one_batch(self, pipe: Pipeline, group: Mapping[int, Request], step: StepOf) -> dict[int, Result]:
        (first, request), *_ = group.items()
        with about(first):
            steering = self._steering(request)
            plan = joint(request.plan(pipe.as_it_is(), steering.get("conditions", ())), group)
        teller = Teller(group, pipe, plan, step)
        own = {"prompt": plan.prompts, "seed": plan.seeds, "images": 1}
        call: dict[str, Any] = {**request.arguments(), **steering, **own, "batch": "auto"}
        with self._beside_others(pipe, plan, teller.waiting, min(plan.total, pipe.at_once(plan))):
            result = pipe.generate(**call, watch=teller.watch, progress=teller.progress)
        teller.over()
        made = shares(result, group)
        for which, mine in made.items():
            self._remember(group[which], mine)
        return made

    def _remember(self, request: Request, result: Result) -> None:
        """For `answer`."""
        if result.keys and len(request.prompt) < LONG:
            with self._lock:
                self._answers[request] = replace(result, images=[], latents=torch.empty(0), moment=None)
                if len(self._answers) > REMEMBERED:
                    self._answers.popitem(last=False)

    def _steering(self, request: Request) -> dict[str, Any]:
        return unsteered(request) if self.given is None else self.given.steering(request)

    def _beside_others(
        self, pipe: Pipeline, plan: Plan, waiting: Callable[[], None], pictures: int = 1
    ) -> AbstractContextManager[None]:
        """Begins when there is memory for the run, of so many pictures at once, beside those at work."""
        if pipe.memory is None:
            return nullcontext()
        needs, device = plan.needs(pipe.memory.device), pipe.memory.device
        run = replace(needs, batch=pictures * needs.batch)
        return self._room.taken(pipe.memory.ledger(run).working, device, waiting)

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
        key, (_, plan) = self._key(request), self._planned(request)
        method = None if request.guide is None else type(request.guide).__name__
        kind = (key, request.solver, method)
        # Of one picture, all that its guide and its solver ask for.
        tokens = plan.calls * (
            plan.rows * plan.columns + sum(c.tokens(plan.rows, plan.columns) for c in plan.conditions)
        )
        return Cost(kind=kind, size=tokens / plan.steps, steps=plan.total * plan.steps)

    def _planned(self, request: Request) -> tuple[_Loaded | None, Plan]:
        """The model, if it is loaded, and what a request will do on it."""
        key = self._key(request)
        with self._lock:
            loaded = self._loaded.get(key)
        if loaded is None:
            self.catalogue.bytes_of(key[0])  # refuses what is not here
        chosen = self.catalogue.variant_of(key[0]) if loaded is None else loaded.pipe.variant
        if self.given is None:
            unsteered(request)
        return loaded, request.plan(chosen, () if self.given is None else self.given.conditions(request, LONGER))


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
