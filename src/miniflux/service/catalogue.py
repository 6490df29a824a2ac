"""What there is to draw with: the variants, and the files and folders that somebody names, each told by its header."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from miniflux.assembly import locate
from miniflux.checkpoints.files import TensorSource
from miniflux.checkpoints.folders import MAX_FOLDERS, entries, models
from miniflux.checkpoints.formats.reading import format_of
from miniflux.checkpoints.loading import bare, compare
from miniflux.checkpoints.networks import BY_KIND, networks_of
from miniflux.checkpoints.opened import known_in, open_part, parts_of
from miniflux.conditions.again import NETWORKS
from miniflux.errors import CheckpointError, InputError, MinifluxError, WeightsNotFoundError
from miniflux.models.causal_lm import CausalLm
from miniflux.steering import BUNDLED_CONTROLNETS
from miniflux.variants import ALIASES, VARIANTS, Variant, variant
from miniflux.weights.finding import find
from miniflux.weights.origin import Stamp, stamped

log = logging.getLogger(__name__)

MODEL, WRITER = "model", "language model"
BUNDLED = {f"{name} (bundled)": ("ControlNet", path) for name, path in BUNDLED_CONTROLNETS.items()}
SHOWN = 3  # tensors that a refusal names


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One model for a list to choose from.

    Attributes:
        name: what people choose it by; of the variants also what `Request.model` takes.
        variant: which model it is.
        path: of a file or folder that was given, what `Request.model` takes; empty of the variants.
        format: of such a file: bfloat16, Q4_K ...
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
    variant: Variant
    path: str = ""
    format: str = ""

    @property
    def model(self) -> str:
        """What `Request.model` takes."""
        return self.path or self.name


@dataclass(frozen=True)
class Found:
    """A model in a file or a folder.

    Attributes:
        path: what `miniflux.load` takes.
        variant: which model it is, by its keys and shapes.
        format: in which its weights are: bfloat16, Q4_K ...
        parts: where each of its parts is, as `miniflux.load` takes them.
        files: all that it is made of, as they were.
    """

    path: Path
    variant: Variant
    format: str
    parts: dict[str, Path]
    files: tuple[Stamp, ...]

    @property
    def unchanged(self) -> bool:
        try:
            return all(Stamp.of(stamp.path) == stamp for stamp in self.files)
        except CheckpointError:
            return False


def checked(path: Path, first: Sequence[Path] = ()) -> Found:
    """What a file or folder holds, with all that is needed to draw with it. Reads headers only.

    Args:
        first: folders to look for its other parts in, before the usual places.

    Raises:
        InputError, WeightsNotFoundError, CheckpointError: it is no model that draws, incomplete, or parts are missing.
    """
    variant, files = locate(path, list(first), {})
    record = networks_of(variant)["transformer"]
    source = open_part(files.transformer, record.kind)
    report = compare(bare(record.kind, variant.transformer), source)
    wrong = [f"{what}: {key}" for what, keys in report.problems.items() for key in keys]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise CheckpointError(f"{path}: not a whole {record.title} transformer: {'; '.join(wrong[:SHOWN])}{more}")
    parts = {part.name: at for part in fields(files) if (at := getattr(files, part.name)) is not None}
    return Found(path, variant, format_of(source), parts, tuple(stamp for _, stamp in stamped(files)))


def candidates(folder: Path) -> Iterator[tuple[Path, MinifluxError | str]]:
    """What may be used of a folder and of the folders in it: paths, and what is there - "model", "language model",
    the kind of condition whose network it is, or why it cannot be read.

    Folders of whole pipelines count as one; files of other networks, as LoRAs and encoders, are passed over.
    """
    seen: set[Path] = set()
    level = [folder]
    while level and len(seen) < MAX_FOLDERS:
        deeper: list[Path] = []
        for place in level:
            if place.resolve() in seen:
                continue
            seen.add(place.resolve())
            try:
                inside = [entry for entry in entries(place) if entry.is_dir()]
                if place.joinpath("transformer").is_dir():
                    yield place, MODEL
                    continue
                deeper += inside
                found = models(place)
            except CheckpointError as error:
                yield place, error
                continue
            for model in found:
                try:
                    source = TensorSource(model.complete())
                    if kinds := [kind for found in known_in(source) if (kind := _steers(found.what.kind))]:
                        yield model.path, kinds[0]
                    elif any(BY_KIND[kind].part == "transformer" for kind in parts_of(source)):
                        yield model.path, MODEL
                    elif CausalLm in parts_of(source):
                        yield model.path, WRITER
                except CheckpointError as error:
                    yield model.path, error
        level = deeper


def _steers(network: type[Any] | None) -> str | None:
    """The kind of condition that a kind of network is for, if it is for one."""
    return next((kind for kind, networks in NETWORKS.items() if network in networks), None)


class Catalogue:
    """All models to choose from.

    Args:
        weights: a folder in which the files of models are looked for first.
        folder: models in it are listed as well, see `scan`.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, weights: str | Path | None = None, folder: str | Path | None = None) -> None:
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"models {str(folder)!r}: no such folder")
        self.first = [] if weights is None else [Path(weights)]
        self.folder = None if folder is None else Path(os.path.abspath(folder))
        self.refused: dict[str, str] = {}
        """What in the folder cannot be used, by its name there, and why."""
        self.networks: dict[str, tuple[str, Path]] = dict(BUNDLED)
        """What steers, bundled or in the folder: the kind of condition it is for and its path, by its name there."""
        self._writers: list[Path] = []  # folders of language models in the folder
        self._files: dict[Path, Found] = {}  # by the paths that were given, and those in the folder

    def listed(self) -> list[Listed]:
        """Every variant, those whose weights are here first, and the files that were given or found in the folder."""
        found = [_about(v, v.name, self._missing(v)) for v in VARIANTS.values()]
        names = {v.name for v in VARIANTS.values()} | set(ALIASES)
        for path, file in self._files.items():
            name = _name_of(path, self.folder, names)
            names.add(name)
            found.append(replace(_about(file.variant, name), bundled=False, path=str(path), format=file.format))
        return sorted(found, key=lambda model: (bool(model.missing), not model.bundled, bool(model.path)))

    def _missing(self, v: Variant) -> str:
        try:
            find(v, self.first)
        except WeightsNotFoundError as error:
            return str(error).partition("\n")[0]
        return ""

    def add(self, path: str | Path) -> Path:
        """List a file or a folder with a model.

        Returns:
            Its path as `Request.model` takes it.

        Raises:
            InputError, WeightsNotFoundError, CheckpointError: it cannot be used, told from its header.
        """
        place = Path(os.path.abspath(Path(path).expanduser()))
        self._files[place] = checked(place, self.first)
        return place

    def scan(self) -> bool:
        """Look again at what is in the folder: only new and changed files are opened. What cannot be used is told in
        `refused`.

        Returns:
            Whether something has changed.
        """
        folder = self.folder
        if folder is None:
            return False
        before, refused, networks = dict(self._files), dict[str, str](), dict[str, tuple[str, Path]](BUNDLED)
        writers: list[Path] = []
        files = {path: found for path, found in before.items() if not path.is_relative_to(folder) and found.unchanged}
        for path, what in candidates(folder):
            known = before.get(path)
            try:
                if isinstance(what, MinifluxError):
                    raise what
                if what == WRITER:
                    writers.append(path.parent)
                    continue
                if what != MODEL:
                    networks[str(path.relative_to(folder))] = what, path
                    continue
                unchanged = known is not None and known.unchanged
                files[path] = known if known is not None and unchanged else checked(path, [*self.first, folder])
            except MinifluxError as error:
                name = str(path.relative_to(folder))
                refused[name] = str(error).partition("\n")[0].replace(str(path), name).replace(f"{folder}{os.sep}", "")
        for name in refused.keys() - self.refused.keys():
            log.warning("not in the list of models: %s", refused[name])
        now, then = (files, refused, networks, writers), (before, self.refused, self.networks, self._writers)
        self._files, self.refused, self.networks, self._writers = now
        return now != then

    def language_models(self) -> dict[str, Path]:
        """Folders of language models, by name: those that models here read prompts with, and others in the folder."""
        read: dict[Path, str] = {}
        for path, file in self._files.items():
            if "lm" in file.parts:
                read.setdefault(file.parts["lm"], _name_of(path, self.folder, set(read.values())))
        for one in VARIANTS.values():
            if (
                one.lm is not None
                and not one.bundled  # those read prompts, and cannot write any
                and not self._missing(one)
                and (place := find(one, self.first).lm) is not None
            ):
                read.setdefault(place, one.name)
        found = {f"text encoder of {name}": place for place, name in read.items()}
        for place in self._writers:
            if place not in read:
                found[_name_of(place, self.folder, set(found))] = place
        return found

    def variant_of(self, model: str) -> Variant:
        """Which variant a name, or a path that is listed, means.

        Raises:
            InputError: there is none.
        """
        found = self._files.get(Path(model))
        return variant(model) if found is None else found.variant

    def lists(self, model: str) -> bool:
        """Whether a name is that of a variant, or a path is listed."""
        return model in VARIANTS or model in ALIASES or Path(model) in self._files

    def weights_of(self, model: str) -> dict[str, Path] | Path | None:
        """Where `miniflux.load` is to look for the parts of a model."""
        found = self._files.get(Path(model))
        return (self.first[0] if self.first else None) if found is None else found.parts

    def files_of(self, model: str) -> list[Stamp]:
        """The files of a model as they are now; none of one that is not listed.

        Raises:
            WeightsNotFoundError: files of a variant are missing.
            CheckpointError: one cannot be read any more.
        """
        found = self._files.get(Path(model))
        if found is not None:
            return [Stamp.of(stamp.path) for stamp in found.files]
        return [stamp for _, stamp in stamped(find(variant(model), self.first))] if model in VARIANTS else []

    def bytes_of(self, model: str) -> int:
        """How large the files of a model are; 0 of one that is not listed.

        Raises:
            WeightsNotFoundError: files of a variant are missing.
        """
        found = self._files.get(Path(model))
        if found is not None:
            return sum(stamp.size for stamp in found.files)
        return sum(stamp.size for _, stamp in stamped(find(variant(model), self.first))) if model in VARIANTS else 0


def _about(v: Variant, name: str, missing: str = "") -> Listed:
    return Listed(
        name=name,
        variant=v,
        missing=missing,
        bundled=v.bundled,
        licence=v.licence,
        guided=v.transformer.guidance_embed,
        steps=v.steps,
        guidance=v.guidance,
        size=v.size,
        previews=bool(v.preview),
    )


def _name_of(path: Path, folder: Path | None, taken: set[str]) -> str:
    """A name for a file or folder that no other has: as short as may be."""
    inside = folder is not None and path.is_relative_to(folder)
    longer = str(path.relative_to(folder)) if folder is not None and inside else f"{path.parent.name}/{path.name}"
    names = [path.name if path.is_dir() else path.name.removesuffix(".index.json"), longer]
    return next(name for name in chain(names, (f"{longer} ({i})" for i in count(2))) if name not in taken)
