"""Where the files of a model are: given folders first, then `MINIFLUX_WEIGHTS`, then the Hugging Face cache.

Nothing is downloaded here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from miniflux.checkpoints.files import INDEX_SUFFIX, files_in
from miniflux.errors import InputError, WeightsNotFoundError
from miniflux.variants import VARIANTS, Variant

WEIGHTS_VARIABLE = "MINIFLUX_WEIGHTS"
BUNDLED = Path(__file__).parent.parent / "nano" / "weights"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")

# For each part of a model: the names under which releases keep it, a file or a folder. `{file}` is the variant's own.
PARTS: dict[str, tuple[str, ...]] = {
    "transformer": ("{file}", "transformer"),
    "autoencoder": ("ae.safetensors", "vae"),
    "clip": ("text_encoder", "clip_l.safetensors"),
    "t5": (
        "text_encoder_2",
        "t5xxl_fp16.safetensors",
        "t5xxl_fp8_e4m3fn_scaled.safetensors",
        "t5xxl_fp8_e4m3fn.safetensors",
    ),
    "clip_tokenizer": ("tokenizer",),
    "t5_tokenizer": ("tokenizer_2",),
}
# Parts that a model does without.
OPTIONAL: dict[str, tuple[str, ...]] = {"tiny": ("{tiny_file}", "taef1")}

# In which folders of `ComfyUI/models` the same files lie.
COMFYUI: dict[str, tuple[str, ...]] = {
    "transformer": ("diffusion_models", "unet", "checkpoints"),
    "autoencoder": ("vae",),
    "clip": ("text_encoders", "clip"),
    "t5": ("text_encoders", "clip"),
}


@dataclass(frozen=True)
class Files:
    """Where each part of a model lies: a file, or a folder in the Hugging Face layout."""

    transformer: Path
    autoencoder: Path
    clip: Path
    t5: Path
    clip_tokenizer: Path
    t5_tokenizer: Path
    tiny: Path | None = None


def hub_cache() -> Path:
    """The Hugging Face cache: `HF_HUB_CACHE`, `HF_HOME`/hub, or huggingface/hub in `XDG_CACHE_HOME` or ~/.cache."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def snapshot(repository: str) -> Path | None:
    """The cached snapshot of a repository's main branch, if there is one."""
    folder = hub_cache() / ("models--" + repository.replace("/", "--"))
    try:
        revision = (folder / "refs" / "main").read_text("utf-8").strip()
    except OSError:
        return None
    found = folder / "snapshots" / revision
    return found if found.is_dir() else None


def places(variant: Variant, first: Iterable[Path] = ()) -> list[Path]:
    """Folders that may hold the files of a variant, in the order in which they are looked through."""
    found = list(first)
    if variant.bundled:
        found.append(BUNDLED)
    if os.environ.get(WEIGHTS_VARIABLE):
        root = Path(os.environ[WEIGHTS_VARIABLE]).expanduser()
        found += [root / variant.name, root]
    cached = snapshot(variant.repository) if variant.repository else None
    return found if cached is None else [*found, cached]


def _holds(path: Path, part: str) -> bool:
    if path.is_file():
        return True
    if part.endswith("tokenizer"):
        return any((path / name).is_file() for name in TOKENIZER_FILES)
    return bool(files_in(path)) or any(path.glob("*" + INDEX_SUFFIX))


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
    for part, names in PARTS.items():
        wanted = [name.format(file=variant.file) for name in names]
        # ComfyUI's folders come first: its `vae` may hold many files, of which one is meant.
        inside = [f"{at}/{name}" for at in COMFYUI.get(part, ()) for name in wanted if name.endswith(".safetensors")]
        searched = folders if part == "transformer" else [*folders, *_relatives(variant)]
        usual = [folder / name for folder in searched for name in (*inside, *wanted)]
        candidates = [given[part]] if part in given else usual
        chosen = next((path for path in candidates if _holds(path, part)), None)
        if chosen is None:
            missing[part] = str(given[part]) if part in given else " or ".join(wanted)
        else:
            found[part] = chosen
    return found, missing


def _relatives(variant: Variant) -> list[Path]:
    """Cached snapshots of the variants with the same text encoders and autoencoder."""
    same = (variant.autoencoder, variant.clip, variant.t5)
    others = [v for v in VARIANTS.values() if v.name != variant.name and (v.autoencoder, v.clip, v.t5) == same]
    cached = [snapshot(other.repository) for other in others if other.repository]
    return [folder for folder in cached if folder is not None]


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
    found, missing = found_parts(variant, first, {part: given[part] for part in given if part in PARTS})
    for part, names in OPTIONAL.items():
        usual = [
            folder / name.format(tiny_file=variant.tiny_file) for folder in places(variant, first) for name in names
        ]
        candidates = [given[part]] if part in given else usual
        chosen = next((path for path in candidates if _holds(path, part)), None)
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
    if not os.environ.get(WEIGHTS_VARIABLE):
        lines.append(f"the variable {WEIGHTS_VARIABLE} is not set; it names the folder your weights are in")
    if variant.repository:
        if snapshot(variant.repository) is None:
            lines.append(f"the Hugging Face cache {hub_cache()} has no snapshot of {variant.repository}")
        licence = f"{variant.licence}, to be accepted there" if variant.gated else variant.licence
        lines.append(
            f"to get them: miniflux fetch {variant.name}, or huggingface.co/{variant.repository} ({licence}); "
            "weights/README.md lists every file"
        )
        lines.append('to try miniflux without any download: the bundled model "nano"')
    return "\n".join(lines)
