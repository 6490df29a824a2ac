"""Where the files of a model are: given folders first, then `MINIFLUX_WEIGHTS`, then the Hugging Face cache.

Nothing is downloaded here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from miniflux.checkpoints.files import open_tensors
from miniflux.checkpoints.folders import SAFETENSORS, models, named
from miniflux.checkpoints.networks import NETWORKS, PIPELINE, networks_of
from miniflux.checkpoints.networks.causal_lm import TEKKEN_TENSOR
from miniflux.errors import CheckpointError, InputError, WeightsNotFoundError
from miniflux.variants import VARIANTS, Variant
from miniflux.weights.hubcache import hub_cache, snapshot

log = logging.getLogger(__name__)

WEIGHTS_VARIABLE = "MINIFLUX_WEIGHTS"
BUNDLED = Path(__file__).parent.parent / "nano" / "weights"
# Any of these sets will do.
TOKENIZER_FILES = (("tokenizer.json",), ("tekken.json",), ("vocab.json", "merges.txt"), ("spiece.model",))

# Of each text encoder: its tokenizer, and the folder in which releases keep that.
TOKENIZERS = {
    "clip": ("clip_tokenizer", "tokenizer"),
    "t5": ("t5_tokenizer", "tokenizer_2"),
    "lm": ("lm_tokenizer", "tokenizer"),
}
# Every part that a model may have, and those that it does without.
PARTS = tuple(dict.fromkeys([*(one.part for one in PIPELINE), *(tokenizer for tokenizer, _ in TOKENIZERS.values())]))
OPTIONAL = {network.part: network.names for network in NETWORKS if network not in PIPELINE}


def needed(variant: Variant) -> dict[str, tuple[str, ...]]:
    """The parts that a variant is made of, and the names, a file or a folder, under which releases keep each."""
    networks = networks_of(variant)
    names = {part: tuple(_filled(name, variant) for name in network.names) for part, network in networks.items()}
    return names | {TOKENIZERS[part][0]: (TOKENIZERS[part][1],) for part in networks if part in TOKENIZERS}


def _filled(name: str, variant: Variant) -> str:
    return name.format(file=variant.file, lm_file=variant.lm_file, tiny_file=variant.tiny_file)


@dataclass(frozen=True)
class Files:
    """Where each part of a model lies: a file, or a folder in the Hugging Face layout; None if it has no such part."""

    transformer: Path
    autoencoder: Path
    clip: Path | None = None
    t5: Path | None = None
    lm: Path | None = None
    clip_tokenizer: Path | None = None
    t5_tokenizer: Path | None = None
    lm_tokenizer: Path | None = None
    tiny: Path | None = None

    def of(self, part: str) -> Path:
        """Where a part lies that the model has."""
        path = getattr(self, part)
        assert path is not None, part
        return path


def weights_folder() -> Path | None:
    """The folder that `MINIFLUX_WEIGHTS` names; None if it is not set, or names none."""
    said = os.environ.get(WEIGHTS_VARIABLE)
    path = Path(os.path.expandvars(os.path.expanduser(said))) if said else None
    return path if path is not None and path.is_dir() else None


def misnamed() -> str | None:
    """What is wrong with `MINIFLUX_WEIGHTS`, in one line; None if it names a folder or is not set."""
    said = os.environ.get(WEIGHTS_VARIABLE)
    if not said or weights_folder() is not None:
        return None
    path = Path(os.path.expandvars(os.path.expanduser(said)))
    if path.is_file():
        why = f"a file; it must name the folder, {path.parent}"
    elif os.pathsep in said and any(Path(one).expanduser().is_dir() for one in said.split(os.pathsep) if one):
        why = "several folders; it must name one"
    else:
        why = "which is not there"
    return f"{WEIGHTS_VARIABLE} names {said}, {why}"


def bundled_folder(variant: Variant) -> Path:
    """Where the files of a bundled variant are: those of FLUX.1's family share one folder, others have their own."""
    own = BUNDLED / variant.name
    return own if own.is_dir() else BUNDLED


def places(variant: Variant, first: Iterable[Path] = ()) -> list[Path]:
    """Folders that may hold the files of a variant, in the order in which they are looked through."""
    found = list(first)
    if variant.bundled:
        found.append(bundled_folder(variant))
    if wrong := misnamed():
        _warned(wrong)
    if root := weights_folder():
        found += [root / variant.name, root]
    cached = snapshot(variant.repository) if variant.repository else None
    return found if cached is None else [*found, cached]


@cache
def _warned(wrong: str) -> None:
    """Say it once."""
    log.warning("%s: it is passed over", wrong)


def _held(folder: Path, name: str, part: str) -> Path | None:
    """What a folder holds of a part under a name: a file, or a folder with a tokenizer or with one whole model in it.
    Links that lead nowhere, as to blobs that are gone, are nothing."""
    path = named(folder, name)
    return path if path is not None and (path.is_file() or _holds(path, part)) else None


def _holds(path: Path, part: str) -> bool:
    if path.is_file() or not path.is_dir():
        return path.is_file()
    if part.endswith("tokenizer"):
        return any(all((path / name).is_file() for name in names) for names in TOKENIZER_FILES)
    try:
        return any(not model.missing for model in models(path))
    except CheckpointError:  # an index that cannot be read: opening it says so
        return True


def _shards_missing(path: Path) -> str:
    """What is not here of a folder's model, if a part of it is."""
    try:
        gone = [name for model in models(path) for name in model.missing] if path.is_dir() else []
    except CheckpointError:
        return ""
    return f"; in {path} these are missing: {', '.join(gone)}" if gone else ""


def found_parts(
    variant: Variant, first: Iterable[Path] = (), given: Mapping[str, Path] | None = None
) -> tuple[dict[str, Path], dict[str, str]]:
    """Where the parts of a variant are, and what the others are called that are nowhere.

    Parts that models share are also taken from the cached snapshots of other variants, so that they are kept once.
    """
    given = given or {}
    folders = places(variant, first)
    found: dict[str, Path] = {}
    missing: dict[str, str] = {}
    networks = networks_of(variant)
    for part, wanted in needed(variant).items():
        # ComfyUI's folders come first: its `vae` may hold many files, of which one is meant.
        folders_there = networks[part].comfyui if part in networks else ()
        inside = [f"{at}/{name}" for at in folders_there for name in wanted if name.endswith(SAFETENSORS)]
        searched = folders if part == "transformer" else [*folders, *_relatives(variant)]
        usual = [(folder, name) for folder in searched for name in (*inside, *wanted)]
        if part in given:
            chosen = given[part] if _is_given(given[part], part) else None
        else:
            chosen = next((path for folder, name in usual if (path := _held(folder, name, part))), None)
        if chosen is not None:
            found[part] = chosen
        elif part in given:
            missing[part] = str(given[part])
        else:
            gone = dict.fromkeys(_shards_missing(folder / name) for folder, name in usual)
            missing[part] = " or ".join(wanted) + "".join(gone)
    inside = found.get("lm")
    if "lm_tokenizer" in missing and "lm_tokenizer" not in given and inside is not None and _has_tokenizer(inside):
        found["lm_tokenizer"] = inside
        del missing["lm_tokenizer"]
    return found, missing


def _has_tokenizer(path: Path) -> bool:
    """Whether a language model's file has its tokenizer in it."""
    try:
        return path.is_file() and TEKKEN_TENSOR in open_tensors(path)
    except CheckpointError:  # opening it says what is wrong
        return False


def _is_given(path: Path, part: str) -> bool:
    """Whether a part is where somebody says. Of one that lacks shards, opening it says which."""
    return _holds(path, part) or bool(_shards_missing(path))


def _relatives(variant: Variant) -> list[Path]:
    """Folders of the variants with the same text encoders and autoencoder: of bundled ones for each other, and cached
    snapshots."""

    def beside(one: Variant) -> tuple[object, ...]:
        return one.autoencoder, one.clip, one.t5, one.lm

    others = [v for v in VARIANTS.values() if v.name != variant.name and beside(v) == beside(variant)]
    bundled = [bundled_folder(other) for other in others if variant.bundled and other.bundled]
    cached = [snapshot(other.repository) for other in others if other.repository]
    return [*bundled, *(folder for folder in cached if folder is not None)]


def find(variant: Variant, first: Iterable[Path] = (), given: Mapping[str, Path] | None = None) -> Files:
    """The files of a variant.

    Args:
        first: folders to look through before the usual places.
        given: parts whose file or folder is already known, by the field names of `Files`.

    Raises:
        InputError: `given` names a part that does not exist.
        WeightsNotFoundError: parts are missing; every one is named, with where it was looked for and how to get it.
    """
    first, given = list(first), dict(given or {})
    known = [*PARTS, *OPTIONAL]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"unknown part {unknown[0]!r} of a model; parts are {', '.join(known)}")
    parts = needed(variant)
    strange = next((part for part in given if part in PARTS and part not in parts), None)
    if strange is not None:
        raise InputError(f"{variant.name} has no part {strange!r}; its parts are {', '.join([*parts, *OPTIONAL])}")
    found, missing = found_parts(variant, first, {part: given[part] for part in given if part in PARTS})
    for part, names in OPTIONAL.items():
        usual = [(folder, _filled(name, variant)) for folder in places(variant, first) for name in names]
        held = (path for folder, name in usual if name and (path := _held(folder, name, part)))
        chosen = next(held, None) if part not in given else given[part] if _is_given(given[part], part) else None
        if chosen is not None:
            found[part] = chosen
        elif part in given:
            missing[part] = str(given[part])
    if missing:
        raise WeightsNotFoundError(_not_found(variant, missing, places(variant, first)))
    return Files(**found)


def _not_found(variant: Variant, missing: Mapping[str, str], folders: list[Path]) -> str:
    lines = [f"{variant.name}: not on this machine: {'; '.join(f'{part} ({name})' for part, name in missing.items())}"]
    lines.append("looked in: " + (", ".join(str(folder) for folder in folders) or "no folder at all"))
    if wrong := misnamed():
        lines.append(wrong)
    elif not os.environ.get(WEIGHTS_VARIABLE):
        lines.append(f"the variable {WEIGHTS_VARIABLE} is not set; it names the folder your weights are in")
    if variant.repository:
        if snapshot(variant.repository) is None:
            lines.append(f"the Hugging Face cache {hub_cache()} has no snapshot of {variant.repository}")
        licence = f"{variant.licence}, to be accepted there" if variant.gated else variant.licence
        lines.append(
            f"to get them: miniflux fetch {variant.name} (--dry-run lists every file), "
            f"or huggingface.co/{variant.repository} ({licence})"
        )
        lines.append('to try miniflux without any download: the bundled model "nano"')
    return "\n".join(lines)
