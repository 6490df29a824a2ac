"""What is in a folder that somebody gives: the one place that says which names count.

Systems and programs leave files beside those of their users: macOS a `._name` with what a foreign disk cannot hold,
browsers half of a download, notebooks their checkpoints. Every reader of folders asks here, so that all pass over the
same. A file that is named as such is opened whatever its name is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from miniflux.errors import CheckpointError
from miniflux.strictjson import json_file, shown

SAFETENSORS = (".safetensors", ".sft")  # the second is how Black Forest Labs first called them
GGUF = (".gguf",)
# Besides whatever begins with a dot or `~$`: names, in lower case, and endings that are nobody's model or picture.
LITTER = (
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "__pycache__", "@eadir", "#recycle"),
    *("$recycle.bin", "system volume information", "lost+found"),
)
HALVES = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".opdownload", ".aria2", ".!ut")
LITTER_ENDINGS = (*HALVES, ".tmp", ".temp", "~", ":zone.identifier", ".lock")
# Weights as others keep them: pickled, which can run programs when they are read, or of other libraries.
UNREAD = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx")
TRAINERS = ("optimizer", "scheduler", "random_states", "rng_state", "training_args", "scaler", "sampler", "dl_state")
"""What the names of files begin with that hold where a training run stopped, and no network."""
MAX_FOLDERS = 10_000  # in a folder, at any depth
INDEX = re.compile(r"(.+?)\.(?:safetensors|sft)\.index(?:\.([\w-]+))?\.json", re.IGNORECASE)
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.[\w-]+)?")  # a variant is named before the number or behind it
MAX_SHARDS = 1000  # of one model; published ones have a few dozen


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is what systems and programs leave behind."""
    lower = name.lower()
    return lower.startswith((".", "~$")) or lower in LITTER or lower.endswith(LITTER_ENDINGS)


def entries(folder: Path) -> list[Path]:
    """What is in a folder, by name, without litter.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not is_litter(path.name))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from error


def files_in(folder: Path, endings: Iterable[str]) -> list[Path]:
    """The files in a folder whose names end so, in upper or lower case; links that lead nowhere are none."""
    wanted = tuple(ending.lower() for ending in endings)
    return [path for path in entries(folder) if path.name.lower().endswith(wanted) and path.is_file()]


def named(folder: Path, name: str) -> Path | None:
    """The file or folder of this name; for `a.safetensors` also `a.sft`, and either in other case. None if there is
    none, or a link that leads nowhere."""
    path = folder / name
    if path.exists():
        return path
    if path.suffix.lower() not in SAFETENSORS or not path.parent.is_dir():
        return None
    found = [file for file in files_in(path.parent, SAFETENSORS) if file.stem.lower() == path.stem.lower()]
    return min(found, key=lambda file: SAFETENSORS.index(file.suffix.lower()), default=None)


@dataclass(frozen=True)
class Model:
    """The files that hold one set of tensors: a single file, or shards with or without an index.

    Attributes:
        stem: what their names begin with, the variant included: `model.fp16`.
        paths: the files that are here.
        index: the index of shards, if there is one.
        missing: names of shards that are not here.
        others: variants of it that were passed over.
    """

    stem: str
    paths: tuple[Path, ...]
    index: Path | None = None
    missing: tuple[str, ...] = ()
    others: tuple[Path, ...] = ()

    @property
    def path(self) -> Path:
        """What to name it by."""
        return self.index or self.paths[0]

    @property
    def is_gguf(self) -> bool:
        return bool(self.paths) and self.paths[0].suffix.lower() in GGUF

    def complete(self) -> list[Path]:
        """Its files.

        Raises:
            CheckpointError: shards are missing; all are named.
        """
        if self.missing:
            named = f"{self.index} names" if self.index else f"{self.paths[0]} is one of"
            count = len(self.paths) + len(self.missing)
            names = ", ".join(self.missing)
            raise CheckpointError(f"{named} {count} files, of which these are missing: {names:.1000}")
        return list(self.paths)


def models(folder: Path) -> list[Model]:
    """The models in a folder. Of several variants (`a.safetensors`, `a.fp16.safetensors`) the plain one; all of them
    where there is no plain one.

    Raises:
        CheckpointError: the folder, or an index in it, cannot be read.
    """
    found: dict[tuple[str, bool], Model] = {}
    owned: set[Path] = set()
    for path in files_in(folder, (".json",)):
        if match := INDEX.fullmatch(path.name):
            model = indexed(path)
            owned.update(model.paths)
            found[model.stem, False] = model
    shards: dict[tuple[str, int], dict[int, Path]] = {}
    for path in files_in(folder, (*SAFETENSORS, *GGUF)):
        match = SHARD.fullmatch(path.stem)
        if path in owned:
            continue
        if match and path.suffix.lower() not in GGUF:
            shards.setdefault((match[1] + (match[4] or ""), int(match[3])), {})[int(match[2])] = path
        elif (key := (path.stem, path.suffix.lower() in GGUF)) not in found or found[key].missing:
            found[key] = Model(path.stem, (path,))
    for (stem, count), here in shards.items():
        missing = tuple(f"number {i} of {count}" for i in range(1, min(count, MAX_SHARDS) + 1) if i not in here)
        if (stem, False) not in found or found[stem, False].missing:
            found[stem, False] = Model(stem, tuple(here[i] for i in sorted(here)), None, missing)
    return _plain(found)


def _plain(found: dict[tuple[str, bool], Model]) -> list[Model]:
    """The models without the variants of others among them. An index without any of its shards, beside a variant, was
    fetched with all small files: it is passed over."""
    fetched = {key for (stem, gguf) in found if (key := (stem.rpartition(".")[0], gguf)) in found}
    found = {key: model for key, model in found.items() if model.paths or key not in fetched}
    passed: dict[tuple[str, bool], list[Path]] = {}
    for (stem, gguf), model in found.items():
        plain = stem.rpartition(".")[0]
        if (plain, gguf) in found:
            passed.setdefault((plain, gguf), []).append(model.path)
    variants = {path for paths in passed.values() for path in paths}
    kept = {key: model for key, model in found.items() if model.path not in variants}
    return [replace(model, others=tuple(passed.get(key, ()))) for key, model in kept.items()]


def indexed(path: Path) -> Model:
    """What an index (`*.safetensors.index.json`) names, which lies beside it.

    Raises:
        CheckpointError: the index is malformed, or names files of other folders.
    """
    content = json_file(path)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or any(not isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{path}: not a safetensors index: expected a weight_map from tensors to file names")
    names = sorted(set(shards.values()))
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{path}: names {len(names):,} files; more than {MAX_SHARDS:,} are not looked for")
    for name in names:
        if name in ("", ".", "..") or "\0" in name or {PurePosixPath(name).name, PureWindowsPath(name).name} != {name}:
            raise CheckpointError(f"{path}: names {shown(name)}; shards are files in the folder of their index")
    here = {name: os.path.isfile(path.parent / name) for name in names}
    match = INDEX.fullmatch(path.name)
    stem = path.name if match is None else match[1] + (f".{match[2]}" if match[2] else "")
    paths = tuple(path.parent / name for name in names if here[name])
    return Model(stem, paths, path, tuple(name for name in names if not here[name]))


def shard_paths(index: Path) -> list[Path]:
    """The files that an index names.

    Raises:
        CheckpointError: as of `indexed`; or shards are missing.
    """
    return indexed(index).complete()


def path_of(given: str | Path) -> Path:
    """The path that somebody gives; an empty text would be the folder we are in, which nobody means by it.

    Raises:
        CheckpointError: it is empty, or no path.
    """
    if not isinstance(given, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CheckpointError(f"expected the path of a file or folder, got {type(given).__name__}")
    if not str(given):
        raise CheckpointError("the name of a file or folder is empty")
    return Path(given)


def tensor_paths(path: str | Path) -> list[Path]:
    """The files of tensors behind a file, an index, or a folder with one model in it.

    Raises:
        CheckpointError: there are none, or a folder holds several models.
    """
    path = path_of(path)
    if INDEX.fullmatch(path.name):
        return shard_paths(path)
    if not os.path.isdir(path):
        if not os.path.exists(path):  # not path.exists(), which raises where the name is too long
            link = "a symbolic link that leads nowhere or in a circle" if os.path.islink(path) else "no such file"
            raise CheckpointError(f"{path}: {link}")
        return [path]
    found = models(path)
    found = [model for model in found if not model.is_gguf] or found
    found = [model for model in found if model.index] if sum(model.index is not None for model in found) == 1 else found
    if len(found) == 1:
        return found[0].complete()
    names = ", ".join(model.path.name for model in found) or "none"
    gone = [entry.name for entry in entries(path) if entry.is_symlink() and not os.path.exists(entry)]
    why = f"; {', '.join(gone)} leads nowhere" if gone and not found else ""
    raise CheckpointError(f"{path}: expected one safetensors file, or one index of shards; found {names}{why}")


def walk(folder: Path) -> list[Model]:
    """The models in a folder and in the folders in it.

    Raises:
        CheckpointError: one of them cannot be read, or there are too many.
    """
    return [model for place in _places(folder) for model in models(place)]


def unread(folder: Path) -> dict[Path, str]:
    """Files in a folder and in the folders in it that must hold a network, by their names, and cannot be read, with the
    reason: pickled ones, halves of downloads, links that lead nowhere. Those whose network lies beside them in a file
    that can be read are none.

    Raises:
        CheckpointError: as of `walk`.
    """
    found: dict[Path, str] = {}
    for place in _places(folder):
        here = {model.stem.lower() for model in models(place)}
        for path in sorted(place.iterdir()):
            stem, why = _unread(path)
            plain = stem.rpartition(".")[0]
            if why and not (here & {stem, plain} or any(other.startswith(f"{stem}.") for other in here)):
                found[path] = why
    return found


def _unread(path: Path) -> tuple[str, str]:
    """The stem of the network that a file must hold, and why it cannot be read; empty where it is no such file."""
    name = path.name.lower()
    whole = next((name.removesuffix(half) for half in HALVES if name.endswith(half)), name)
    ending = next((ending for ending in (*SAFETENSORS, *GGUF, *UNREAD) if whole.endswith(ending)), None)
    if ending is None and not path.suffix and not path.exists():
        ending = ""  # a link to a folder
    if ending is None or name.startswith((".", "~$", *TRAINERS)) or path.is_dir():
        return "", ""
    stem = re.sub("^(pytorch|tf|flax)_", "", whole.removesuffix(ending))
    if match := SHARD.fullmatch(stem):
        stem = match[1] + (match[4] or "")
    if whole != name:
        return stem, "half of a download"
    if not path.exists():
        return stem, "a link that leads nowhere"
    return stem, "neither safetensors nor GGUF" if ending in UNREAD else ""


def _places(folder: Path) -> list[Path]:
    """A folder and the folders in it, each once, whatever links there are."""
    found = {folder.resolve(): folder}
    waiting = [folder]
    while waiting:
        for entry in entries(waiting.pop(0)):
            if entry.is_dir() and (real := entry.resolve()) not in found:
                found[real] = entry
                waiting.append(entry)
        if len(found) > MAX_FOLDERS:
            raise CheckpointError(f"{folder}: holds more than {MAX_FOLDERS:,} folders; give the one of the model")
    return list(found.values())
