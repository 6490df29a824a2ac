"""What the page stands on: models, queue, history, and what each browser session has on its shelf."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniflux.apps.ui.recording import Recording
from miniflux.apps.ui.uploads import Uploads
from miniflux.cache import ResultCache
from miniflux.checks import shown
from miniflux.disk import digest_of, folder_to_fill
from miniflux.errors import InputError, MinifluxError
from miniflux.lora import Receipt
from miniflux.lora.attaching import BUNDLED_LORAS
from miniflux.memory.compute import choose_device, choose_dtype
from miniflux.models.transformer import TransformerConfig
from miniflux.result import Result
from miniflux.service import Given, Grid, History, Job, Listed, Models, Queue
from miniflux.service.queue import Deliver, Draw
from miniflux.settings import Request
from miniflux.variants import ALIASES

log = logging.getLogger(__name__)

MAX_SHELVES = 1000  # browser sessions remembered at once, beside their history, which is on the disk
MAX_NAMED = 3  # models that a line about a LoRA names
MAX_LORAS = 32  # files that one session may drop
MAX_GIVEN = 64  # pictures of one session that its requests may name; the latest ones
MAX_UNTOLD = 8  # jobs of a session that are over, kept to say so
CACHE_BYTES = 2**30  # of pictures kept to answer repeated requests
RECORDED_BYTES = 2**29  # of all sessions' recordings of the insides of models
BUNDLED = {"realism": "Realism", "canny": "Canny edges"}  # LoRAs, and what the list calls them
MODEL_FILES = {".safetensors", ".sft", ".gguf"}


@dataclass(frozen=True)
class Lora:
    """A LoRA of a session's list.

    Attributes:
        id: what the page calls it.
        label: what people read.
        file: what `LoraUse` takes.
        sha256: of the file.
        reasons: by model, why it cannot be used there; empty where it can.
        about: a line.
        receipt: a table of what it changes.
    """

    id: str
    label: str
    file: str
    sha256: str
    reasons: dict[str, str]
    about: str
    receipt: str


@dataclass
class Shelf:
    """What a browser session has, beside its history: LoRAs, the SHA-256 of pictures that it gave, the latest last,
    jobs whose end it has not been told, and what was seen inside of the model when it last looked."""

    loras: dict[str, Lora] = field(default_factory=dict[str, Lora])
    given: dict[str, None] = field(default_factory=dict[str, None])
    jobs: list[Job] = field(default_factory=list[Job])
    recording: Recording | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)


class Site:
    """Everything behind the page.

    Args:
        models: what there is to draw with.
        queue: who draws next; its pictures go to `history`.
        history: what was drawn.
        uploads: files that were dropped.
        first: the model chosen at first.
        only: names of the models that may be drawn with; None for all.

    Raises:
        InputError: the first model is unknown, or its weights are not on this machine.
    """

    def __init__(
        self,
        models: Models,
        queue: Queue,
        history: History,
        uploads: Uploads,
        first: str = "nano-dev",
        only: Collection[str] | None = None,
    ) -> None:
        self.models, self.queue, self.history, self.uploads = models, queue, history, uploads
        self.folder, self.only = uploads.place, only
        uploads.busy = self._waits_for
        self.listed = self._listed()
        named = next((model.name for model in self.listed.values() if first in (model.name, model.path)), None)
        if named is None:
            raise InputError(f"--model {first}: not on this machine; there are {', '.join(self.listed)}")
        self.first = named
        self.bundled = {
            id: self._lora(id, label, id, BUNDLED_LORAS / f"{id}.safetensors") for id, label in BUNDLED.items()
        }
        self._shelves: OrderedDict[str, Shelf] = OrderedDict()
        self._lock, self._scanning = threading.Lock(), threading.Lock()

    def _listed(self) -> dict[str, Listed]:
        found = {model.name: model for model in self.models.listed() if not model.missing}
        return found if self.only is None else {name: found[name] for name in found if name in self.only}

    def refresh(self) -> None:
        """Look again at what is in the folder of models; LoRAs are compared with what is new."""
        with self._scanning:
            if not self.models.catalogue.scan():
                return
            listed = self._listed()
            new = [name for name, model in listed.items() if self.listed.get(name) != model]
            with self._lock:
                shelves = [*self._shelves.values(), Shelf(self.bundled)]
            for lora in {id(lora): lora for shelf in shelves for lora in list(shelf.loras.values())}.values():
                lora.reasons.update(self._reasons(lora.file, {name: listed[name] for name in new})[0])
            self.listed = listed

    def shelf(self, session: str) -> Shelf:
        """What this session has; a new one has the bundled LoRAs."""
        with self._lock:
            if session not in self._shelves:
                self._shelves[session] = Shelf(dict(self.bundled))
            self._shelves.move_to_end(session)
            while len(self._shelves) > MAX_SHELVES:
                self._clear(*self._shelves.popitem(last=False))
            return self._shelves[session]

    def _clear(self, session: str, shelf: Shelf) -> None:
        with shelf.lock:
            for lora in shelf.loras.values():
                if lora.id not in BUNDLED:
                    self.uploads.let_go(session, Path(lora.file))
            shelf.loras = dict(self.bundled)

    def sweep(self) -> None:
        """Let go of what belonged to sessions that have left, and of files nobody uses; asked for every minute."""
        for session in self.uploads.sweep():
            with self._lock:
                shelf = self._shelves.pop(session, None)
            if shelf is not None:
                self._clear(session, shelf)

    def prepare(self) -> None:
        """Load the first model, if it is a bundled one: it is small, and will be wanted soon."""
        if self.listed[self.first].bundled:
            with self.models.use(Request(prompt="", model=self.first)):
                log.info("%s is loaded", self.first)

    # LoRAs

    def _lora(self, id: str, label: str, file: str, path: Path) -> Lora:
        """Read a file, against every model there is; raises if it fits none."""
        reasons, receipt = self._reasons(file, self.listed)
        if isinstance(receipt, MinifluxError):
            raise receipt
        fits = [name for name in self.listed if not reasons[name]]
        more = f" and {len(fits) - MAX_NAMED} more" if len(fits) > MAX_NAMED else ""
        named = ", ".join(fits[:MAX_NAMED]) + more
        about = f"{receipt.dialect}, {receipt.applied} of {receipt.expected} modules applied; for {named}"
        text = str(receipt).replace(receipt.source, path.name)
        return Lora(id, label, file, digest_of(path), reasons, about, text)

    def _reasons(self, file: str, listed: Mapping[str, Listed]) -> tuple[dict[str, str], Receipt | MinifluxError]:
        """Why a LoRA cannot be used with each model, empty where it can; and its receipt, or why it fits none."""
        asked: dict[tuple[str, TransformerConfig], Receipt | MinifluxError] = {}  # models of the same sizes only once
        reasons: dict[str, str] = {}
        for name, model in listed.items():
            sizes = model.variant.name, model.variant.transformer
            if sizes not in asked:
                try:
                    asked[sizes] = self.models.lora(file, model.model)
                except MinifluxError as error:
                    asked[sizes] = error
            fits = not isinstance(asked[sizes], MinifluxError)
            reasons[name] = "" if fits else f"made for another model than {name}"
        receipts = [answer for answer in asked.values() if not isinstance(answer, MinifluxError)]
        return reasons, next(iter([*receipts, *asked.values()]), InputError("no model is listed"))

    def keep_lora(self, session: str, path: Path) -> Lora:
        """Check a file that was dropped, move it where it stays, and put it on the shelf.

        Raises:
            MinifluxError: it cannot be used; the message says why, and nothing has changed.
        """
        shelf = self.shelf(session)
        if len(shelf.loras) >= MAX_LORAS + len(self.bundled):
            raise InputError(f"{path.name}: this session has dropped {MAX_LORAS} LoRAs already")
        self._lora("", path.stem, str(path), path)  # refuses before anything is kept
        digest = digest_of(path)
        place = self.uploads.place / digest / path.name
        self.uploads.keep(session, path, place)
        lora = self._lora(digest[:16], path.stem, str(place), place)
        with shelf.lock:
            before = shelf.loras.get(lora.id)
            shelf.loras[lora.id] = lora
        if before is not None and before.file != lora.file:  # the same under another name
            self.uploads.let_go(session, Path(before.file))
        return lora

    def remove_lora(self, session: str, id: str) -> None:
        """Take a LoRA that was dropped off the shelf; its file goes when no job and no other session needs it.

        Raises:
            InputError: the session has none of this id, or it is the bundled one.
        """
        shelf = self.shelf(session)
        with shelf.lock:
            if id not in shelf.loras or id in self.bundled:
                raise InputError(f"no LoRA {id!r} was dropped by this session")
            lora = shelf.loras.pop(id)
        self.uploads.let_go(session, Path(lora.file))

    def _waits_for(self, session: str, place: Path) -> bool:
        """Whether a job of a session needs a file."""
        jobs = self.queue.jobs(session)
        return any(Path(use.file) == place for job in jobs for request in job.requests for use in request.loras)

    # Pictures

    def give(self, session: str, picture: Image.Image | Tensor) -> str:
        """Keep a picture or a mask that requests of a session may name; errors as of `Given.add`."""
        assert self.models.given is not None
        digest, shelf = self.models.given.add(picture), self.shelf(session)
        with shelf.lock:
            shelf.given.pop(digest, None)
            shelf.given[digest] = None
            for old in list(shelf.given)[:-MAX_GIVEN]:
                del shelf.given[old]
        return digest

    def has(self, session: str, digests: Iterable[str]) -> bool:
        """Whether a session has given all of these pictures, and they are still here."""
        given, shelf = self.models.given, self.shelf(session)
        return all(digest in shelf.given and given is not None and digest in given for digest in digests)

    def _check(self, session: str, requests: Sequence[Request]) -> None:
        """Nobody draws from pictures of somebody else, nor with a model that is not for everybody."""
        if self.only is not None:  # an older picture may say another one
            allowed = {model.model for model in self.listed.values()}
            for request in requests:
                if ALIASES.get(request.model, request.model) not in allowed:
                    raise InputError(
                        f"the model {shown(request.model)} is not here; there are {', '.join(self.listed)}"
                    )
        if not self.has(session, (digest for request in requests for digest in request.pictures)):
            raise InputError("a picture that it was made from is not here any more: put it into its slot again")

    # Jobs

    def submit(
        self,
        session: str,
        requests: Sequence[Request],
        title: str = "",
        *,
        deliver: Deliver | None = None,
        draw: Draw | None = None,
    ) -> Job:
        """Put a job in line for a session; `deliver`, `draw` and errors as of `Queue.submit`, or a picture is not
        here."""
        self._check(session, requests)
        job = self.queue.submit(session, *requests, title=title, deliver=deliver, draw=draw)
        return self._on_shelf(session, job)

    def keep_recording(self, session: str, recording: Recording) -> None:
        """In place of the session's last one; those of other sessions go, the longest unused first, where all together
        would be too large."""
        shelf = self.shelf(session)
        with self._lock:
            others = [one for one in self._shelves.values() if one is not shelf and one.recording is not None]
            total = recording.bytes + sum(one.recording.bytes for one in others if one.recording is not None)
            for one in others:
                if total <= RECORDED_BYTES:
                    break
                total -= 0 if one.recording is None else one.recording.bytes
                one.recording = None
            shelf.recording = recording

    def submit_grid(self, session: str, grid: Grid) -> Job:
        """Put a grid in line; what comes into the history is one labelled sheet."""
        results: list[Result] = []
        requests = grid.requests()
        self._check(session, requests)
        title = "grid: " + " by ".join(axis.setting for axis in (grid.x, grid.y) if axis is not None)

        def deliver(job: Job, which: int, result: Result) -> None:
            results.append(result)
            if len(results) == len(requests):
                self.history.add_sheet(session, grid, results, title)

        return self._on_shelf(session, self.queue.submit(session, *requests, title=title, deliver=deliver))

    def _on_shelf(self, session: str, job: Job) -> Job:
        shelf = self.shelf(session)
        with shelf.lock:
            for old in [job for job in shelf.jobs if job.over][:-MAX_UNTOLD]:  # nobody asks: the page was closed
                shelf.jobs.remove(old)
            shelf.jobs.append(job)
        return job

    def job(self, session: str, id: str) -> Job | None:
        """A job of this session that is not over, by its id."""
        return next((job for job in self.queue.jobs(session) if job.id == id), None)

    def ended(self, session: str) -> list[Job]:
        """Jobs of this session that are over and of which nobody was told; told once."""
        shelf = self.shelf(session)
        with shelf.lock:
            over = [job for job in shelf.jobs if job.over]
            shelf.jobs = [job for job in shelf.jobs if not job.over]
        return over


@contextmanager
def opened(
    folder: Path,
    *,
    first: str = "nano-dev",
    weights: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    waiting: int = 64,
    workers: int = 1,
    cache: str | None = None,
    shelf: str | None = None,
    only: Collection[str] | None = None,
) -> Generator[Site]:
    """Everything behind a page, while the context lasts.

    Args:
        folder: for the history and the LoRAs that are dropped.
        first: the model chosen at first; a name, an alias, or the path of a file or a folder.
        waiting: jobs that may wait.
        workers: jobs at once, at most; a run begins only when there is memory for it.
        cache: a folder for drawn pictures; None for memory.
        shelf: a folder whose models are listed as well.
        only: as of `Site`.

    Raises:
        InputError, OutputError: something of this cannot be used here.
    """
    checked(weights, device, dtype)
    if shelf is not None and not Path(shelf).is_dir():
        raise InputError(f"--models {shelf}: no such folder")
    results = ResultCache(cache, CACHE_BYTES)
    if cache is not None:
        folder_to_fill(Path(cache), "a cache")
    given = Given(folder / "given")
    models = Models(weights=weights, device=device, dtype=dtype, cache=results, folder=shelf, given=given)
    models.catalogue.scan()
    first = ALIASES.get(first, first)
    if first not in [model.name for model in models.listed()] and os.path.exists(first):
        first = str(models.catalogue.add(first))
    history = History(folder)
    uploads = Uploads(Path(os.environ.get("GRADIO_TEMP_DIR") or folder / "uploads"), folder / "loras")
    try:
        with Queue(
            models.draw, models.cost, workers=workers, waiting=waiting, deliver=history.deliver, answer=models.answer
        ) as queue:
            yield Site(models, queue, history, uploads, first, only)
    finally:
        uploads.close()
        history.close()
        given.close()


def checked(weights: str | None, device: str | None, dtype: str | None) -> None:
    """What would otherwise only be found when the first picture is drawn.

    Raises:
        InputError: a folder that is not there, a device or a precision that this machine has not.
    """
    if weights is not None:
        folder = Path(weights)
        if not folder.is_dir():
            raise InputError(f"--weights {weights}: no such folder")
        if not any(path.suffix in MODEL_FILES for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth)):
            raise InputError(f"--weights {weights}: no model is in this folder")
    choose_dtype(dtype, choose_device(device), torch.float32, 0)
