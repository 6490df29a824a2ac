"""Requests of several people in one batch: which are alike, all their LoRAs in one line, whose picture is whose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from miniflux.checks import shown
from miniflux.errors import InputError, MinifluxError
from miniflux.pipeline import Pipeline
from miniflux.plan import Plan
from miniflux.result import Result
from miniflux.sampling import Moment
from miniflux.service.queue import Preview
from miniflux.settings import Request
from miniflux.variants import ALIASES
from miniflux.weights.origin import belongs

Previews = Mapping[int, tuple[int, "Preview"]]
"""Of pictures of a request, by their numbers in it: (steps that are done of the picture, what makes its preview)."""
StepOf = Callable[[int, int, Previews], None]
"""Told after every step of every request: (number of the request, steps done of it, previews of those of its pictures
that have gone a step since it was told before)."""

T = TypeVar("T")
OWN = ("prompt", "seed", "images", "loras")
"""In what requests differ that are drawn together: what each picture of a call has for itself."""


def kin(request: Request) -> str:
    """What requests that may be drawn in one batch have in common, in 64 hexadecimal digits: the same for all of them,
    in every process.

    Beside words, seed, number and LoRAs, all is the same for the pictures of a call: steps, size, guide, the image that
    is changed and what steers (by the digests of their pixels, so that equal ones are one). A variation counts up from
    the first picture of its call, so that a request with one is drawn with nobody: only the very same one is its kin.
    With a step cache, which decides for a whole batch, kin are drawn one after the other (`Models.most_at_once` is 1).

    Raises:
        SettingsError: a strength is a function, which has no form as JSON.
    """
    about = request.as_json()
    if request.variation is None:
        about = {name: value for name, value in about.items() if name not in OWN}
    about["model"] = ALIASES.get(request.model, request.model)
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def alike(requests: Sequence[Request]) -> list[dict[int, Request]]:
    """Requests that may be drawn together, by their numbers; in the order in which the first of each is asked for.

    Raises:
        InputError: something else than a request is among them.
    """
    found: dict[Any, dict[int, Request]] = {}
    for which, request in enumerate(requests):
        with about(which):
            if not isinstance(request, Request):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError(f"requests[{which}] must be a Request, got {shown(request)}")
            key = kin(request) if request.variation is None else which
        found.setdefault(key, {})[which] = request
    return list(found.values())


def by_loras(requests: Mapping[int, Request]) -> list[dict[int, Request]]:
    """Those with the same LoRAs at the same strengths together."""
    found: dict[Any, dict[int, Request]] = {}
    for which, request in requests.items():
        found.setdefault(request.loras, {})[which] = request
    return list(found.values())


@contextmanager
def about(which: int) -> Generator[None]:
    """What is refused in here is about the request of this number."""
    try:
        yield
    except MinifluxError as error:
        error.which = which
        raise


def in_one_line(sequences: Sequence[Sequence[T]]) -> tuple[list[T], list[list[int]]]:
    """A line in which all sequences are, each in its own order, and the places of each. Numbers add up in that order:
    in another one a picture would not be bit for bit the one that is drawn alone."""
    line: list[T] = []
    for items in sequences:
        after = 0
        for item in items:
            if item not in line[after:]:
                line.insert(after, item)
            after = line.index(item, after) + 1
    places: list[list[int]] = []
    for items in sequences:
        own: list[int] = []
        for item in items:
            own.append(line.index(item, own[-1] + 1 if own else 0))
        places.append(own)
    return line, places


class Teller:
    """Tells of each request how many of its steps are done.

    Args:
        requests: by their numbers; their pictures follow each other in the call.
        plan: of the call.
    """

    def __init__(self, requests: Mapping[int, Request], pipe: Pipeline, plan: Plan, step: StepOf) -> None:
        self.owners = [(which, i) for which, request in requests.items() for i in range(request.images)]
        self.pipe, self.plan, self.step = pipe, plan, step
        self.decoder = decoder_of(pipe)
        self.done = [0] * len(self.owners)  # steps of each picture
        self.told = dict.fromkeys(requests, 0)
        self.previews: dict[int, dict[int, tuple[int, Preview]]] = {which: {} for which in requests}
        self.total = -1

    def waiting(self) -> None:
        """Nothing is new, and whoever is told may raise to stop."""
        for which, done in self.told.items():
            self.step(which, done, {})

    def watch(self, picture: int, moment: Moment) -> None:
        """A step of a picture is done; told by `progress`, when it is done for all that are drawn with it."""
        self.done[picture] = moment.step
        if self.decoder is not None:
            which, number = self.owners[picture]
            preview = partial(self.pipe.preview, moment, self.plan.width, self.plan.height, self.decoder)
            self.previews[which][number] = (moment.step, preview)

    def progress(self, total: int, _: int) -> None:
        """Steps of all pictures together: where they grow no more, the call waits for another one."""
        if total == self.total:
            self.waiting()
        self.total = total
        self._tell()

    def over(self) -> None:
        """All is drawn, or was drawn before."""
        self.done = [self.plan.steps] * len(self.owners)
        self._tell()

    def _tell(self) -> None:
        for which, before in self.told.items():
            done = sum(steps for steps, (owner, _) in zip(self.done, self.owners, strict=True) if owner == which)
            if done != before:
                new, self.previews[which] = self.previews[which], {}
                self.told[which] = done
                self.step(which, done, new)


def decoder_of(pipe: Pipeline) -> str | None:
    """What makes previews: the table takes 1.4 % of a step of nano at 128x128, the tiny decoder 14 %."""
    return "table" if pipe.variant.preview else "tiny" if pipe.tiny is not None else None


def shares(result: Result, requests: Mapping[int, Request]) -> dict[int, Result]:
    """What each request would have got alone, of a call for all of them: LoRAs are called as they are then."""
    found: dict[int, Result] = {}
    first = 0
    for which, request in requests.items():
        part = slice(first, first + request.images)
        first += request.images
        mine = result.settings[part]
        names = {one["name"]: f"{i + 1} {_stem(one['name'])}" for i, one in enumerate(mine[0]["loras"])}
        files = tuple((_renamed(name, names), stamp) for name, stamp in result.files if belongs(name, mine[0]))
        settings = [{**said, "loras": [{**one, "name": names[one["name"]]} for one in said["loras"]]} for said in mine]
        latents = torch.clone(result.latents[part])  # of its own: the others' are not kept for it
        found[which] = Result(result.images[part], latents, settings, None, files, result.keys[part])
    return found


def _stem(name: str) -> str:
    return name.partition(" ")[2]


def _renamed(part: str, names: Mapping[str, str]) -> str:
    return f"lora {names[part.removeprefix('lora ')]}" if part.startswith("lora ") else part


def joint(plan: Plan, requests: Mapping[int, Request]) -> Plan:
    """The call that draws all of them, of the plan of one."""
    prompts = [request.prompt for request in requests.values() for _ in range(request.images)]
    seeds = tuple(request.seed + i for request in requests.values() for i in range(request.images))
    return replace(plan, prompts=prompts, images=1, seeds=seeds)
