"""The result cache: a picture that was drawn before, of exactly the same things, is not drawn again.

    pipe = miniflux.load("nano", cache="pictures.cache")    # a folder; or a ResultCache, also one in memory

The key of a picture is the SHA-256 of everything that makes it: of weights and LoRAs the hashes of their files. What
cannot be told that way (`not_keyed`) is drawn anew, and the settings say why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import secrets
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miniflux.checkpoints.folders import files_in, is_litter
from miniflux.checks import whole
from miniflux.errors import CheckpointError, OutputError
from miniflux.plan import Plan
from miniflux.sampling import Moment
from miniflux.sampling.caches import Measure
from miniflux.weights.origin import Stamp, belongs

log = logging.getLogger(__name__)

MAGIC = b"miniflux picture 1\n"
ENDING = ".picture"
STALE = 3600.0  # seconds after which a half-written file is nobody's any more
NOT_IN_KEY = ("threads", "model_path", "dtype_asked", "steps_asked", "loras")
"""Settings that say how a picture came about and not what it is; LoRAs count by the hashes of their files."""


@dataclass(frozen=True)
class Drawn:
    """One picture.

    Attributes:
        image: RGB.
        latents: (1, C, h, w), float32, on the CPU.
        about: what only drawing it could tell, for its settings: the bill of a step cache.
        moment: the state after the last step; None of a picture that was kept.
    """

    image: Image.Image
    latents: Tensor
    about: dict[str, Any]
    moment: Moment | None = None


def picture_key(settings: Mapping[str, Any], files: Sequence[tuple[str, Stamp]]) -> str:
    """The key of a picture: 64 hexadecimal digits.

    Args:
        settings: all that made it, as plain JSON.
        files: what its call is made from, LoRAs in the order in which they are attached.

    Raises:
        CheckpointError: a file has changed since it was loaded.
    """
    facts = {name: value for name, value in settings.items() if name not in NOT_IN_KEY}
    names = {about["name"]: i for i, about in enumerate(settings["loras"])}  # a LoRA counts by what it is
    files = [(part, stamp) for part, stamp in files if belongs(part, settings)]
    parts = [names.get(part.removeprefix("lora "), part) if part.startswith("lora ") else part for part, _ in files]
    hashes = [stamp.sha256() for _, stamp in files]
    scales = [about["scale"] for about in settings["loras"]]
    text = json.dumps([facts, parts, hashes, scales], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def not_keyed(
    plan: Plan, settings: Mapping[str, Any], files: Sequence[tuple[str, Stamp]], callback: bool
) -> str | None:
    """Why no key can tell what makes the pictures of a call; None if one can."""
    if not files:
        return "the pipeline was not loaded from files"
    if "changed" in settings:
        return f"changed in memory since it was loaded: {'; '.join(settings['changed'])}"
    if plan.wrapped:
        return f"functions of the caller's take part: {', '.join(plan.wrapped)}"
    if plan.observers:
        return "somebody looks on, who would see nothing of pictures that are kept"
    if callback:
        return "a callback may replace the latents (watch only looks on)"
    if plan.resume is not None:
        return "it goes on from a moment"
    if plan.stop is not None:
        return "it stops early, and its moment is wanted"
    if plan.check_cache:
        return "the step cache is to be compared with the run without it"
    if isinstance(plan.cache, Measure):
        return "the step cache measures"
    if not plan.method.step.__module__.startswith("miniflux."):
        return f"the solver {plan.method.name} is one of your own"
    functions = callable(plan.guidance) or callable(getattr(plan.guide, "scale", None))
    if functions and plan.method.calls > 1 and plan.method.name != "heun":
        return f"guidance is a function, and {plan.method.name} asks it between the noise levels"
    for condition in plan.conditions:
        if getattr(condition, "network", None) is not None and not getattr(condition, "files", ()):
            return f"the network of a {type(condition).__name__} was not loaded from files"
        if callable(getattr(condition, "scale", None)):
            return f"the scale of a {type(condition).__name__} is a function of the noise level"
    for about in settings["loras"]:
        if about["scheduled"]:
            return f"the strength of LoRA {about['name']} is a function of the noise level"
        if about.get("merged"):
            return f"LoRA {about['name']} is merged into the weights"
        if not any(part == f"lora {about['name']}" for part, _ in files):
            return f"LoRA {about['name']} did not come from a file"
    try:
        for _, stamp in files:
            stamp.sha256()
    except CheckpointError as error:
        return str(error)
    return None


class ResultCache:
    """Pictures by their keys, bounded by bytes; what was not asked for longest goes first. Safe between threads.

    In a folder it survives the process and may be shared by several: files are written beside and renamed, and one that
    is damaged counts as not there.

    Args:
        folder: None to keep pictures in memory.
        max_bytes: of all pictures: 3 bytes per pixel and 4 per number of the latents.

    Attributes:
        hits, misses: how often a picture was there, or not.

    Raises:
        InputError: max_bytes is not a whole number of at least 1.
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int = 1_000_000_000) -> None:
        self.folder = None if folder is None else Path(folder)
        self.max_bytes = whole("max_bytes", max_bytes, 1)
        self.hits = self.misses = 0
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._making: set[str] = set()
        self._change = threading.Condition()
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{folder}: no folder for a cache: {error.strerror}") from error

    def once(
        self, key: str, draw: Callable[[], Drawn], waiting: Callable[[], None] | None = None
    ) -> tuple[Drawn, bool]:
        """The picture of a key, and whether it was there already.

        If another thread draws it at this moment, wait for that one; if it fails or is cancelled, draw.

        Args:
            draw: makes the picture.
            waiting: called several times a second while another thread draws; may raise to give up.
        """
        while True:
            kept = self.get(key)
            if kept is not None:
                self.hits += 1
                return kept, True
            with self._change:
                if key not in self._making:
                    self._making.add(key)
                    break
                self._change.wait(0.1)
            if waiting is not None:
                waiting()
        try:
            kept = self.get(key)  # another thread may have finished between the two looks
            if kept is not None:
                self.hits += 1
                return kept, True
            self.misses += 1
            drawn = draw()
            self.put(key, drawn)
            return drawn, False
        finally:
            with self._change:
                self._making.discard(key)
                self._change.notify_all()

    def __contains__(self, key: str) -> bool:
        """Whether there is a picture of this key; it may still turn out to be damaged."""
        if self.folder is not None:
            return (self.folder / (key + ENDING)).is_file()
        with self._change:
            return key in self._memory

    def get(self, key: str) -> Drawn | None:
        """The picture of a key; None if it is not there, or damaged."""
        if self.folder is None:
            with self._change:
                data = self._memory.get(key)
                if data is not None:
                    self._memory.move_to_end(key)
        else:
            path = self.folder / (key + ENDING)
            try:
                data = path.read_bytes()
            except OSError:
                data = None
            else:
                with suppress(OSError):  # a cache that only others may write to answers as well
                    os.utime(path)
        if data is None:
            return None
        drawn = _unpacked(data)
        if drawn is None:
            log.warning("the cached picture %s is damaged and is drawn anew", key)
            self._forget(key)
        return drawn

    def put(self, key: str, drawn: Drawn) -> None:
        """Keep a picture, if it is not larger than the whole cache. A disk that is full is no error, and said."""
        data = _packed(drawn)
        if len(data) > self.max_bytes:
            return
        if self.folder is None:
            with self._change:
                self._memory[key] = data
                self._memory.move_to_end(key)
                while sum(map(len, self._memory.values())) > self.max_bytes:
                    self._memory.popitem(last=False)
            return
        beside = self.folder / f"{key}.{secrets.token_hex(4)}.part"
        try:
            try:
                beside.write_bytes(data)
                beside.replace(self.folder / (key + ENDING))
            finally:
                beside.unlink(missing_ok=True)
            self._shrink(self.folder)
        except OSError as error:
            log.warning("a picture could not be kept in the cache %s: %s", self.folder, error)

    def _shrink(self, folder: Path) -> None:
        kept: list[tuple[float, int, str]] = []
        for entry in os.scandir(folder):
            try:
                about = entry.stat()
                if entry.name.endswith(ENDING) and not is_litter(entry.name):
                    kept.append((about.st_mtime, about.st_size, entry.path))
                elif entry.name.endswith(".part") and time.time() - about.st_mtime > STALE:
                    os.unlink(entry.path)
            except FileNotFoundError:  # another process was faster
                continue
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= self.max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size

    def _forget(self, key: str) -> None:
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / (key + ENDING)).unlink()
        with self._change:
            self._memory.pop(key, None)

    def keys(self) -> list[str]:
        """The keys of all pictures, those asked for longest ago first."""
        if self.folder is None:
            with self._change:
                return list(self._memory)
        found = sorted(files_in(self.folder, (ENDING,)), key=lambda path: path.stat().st_mtime)
        return [path.stem for path in found]

    def clear(self) -> None:
        """Forget all pictures."""
        for key in self.keys():
            self._forget(key)


def _packed(drawn: Drawn) -> bytes:
    """magic, SHA-256 of the rest, length of the header, header, pixels, latents."""
    size, shape = drawn.image.size, list(drawn.latents.shape)
    header = json.dumps({"size": size, "shape": shape, "about": drawn.about}).encode()
    body = struct.pack("<I", len(header)) + header + drawn.image.tobytes() + drawn.latents.numpy().tobytes()
    return MAGIC + hashlib.sha256(body).digest() + body


def _unpacked(data: bytes) -> Drawn | None:
    """None if anything is not as it was written."""
    start = len(MAGIC) + 32
    body = memoryview(data)[start:]
    if data[: len(MAGIC)] != MAGIC or hashlib.sha256(body).digest() != data[len(MAGIC) : start]:
        return None
    (length,) = struct.unpack("<I", body[:4])
    about = json.loads(bytes(body[4 : 4 + length]))
    (width, height), shape = about["size"], about["shape"]
    pixels = body[4 + length :]
    image = Image.frombytes("RGB", (width, height), bytes(pixels[: 3 * width * height]))
    numbers = np.frombuffer(pixels[3 * width * height :], np.float32, math.prod(shape)).reshape(shape)
    return Drawn(image, torch.from_numpy(numbers.copy()), about["about"])


def result_cache(cache: ResultCache | str | Path | None) -> ResultCache | None:
    """A cache; a folder's name stands for the cache in it."""
    return cache if cache is None or isinstance(cache, ResultCache) else ResultCache(cache)
