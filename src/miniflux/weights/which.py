"""Which model a transformer's file is, where several have the same tensors and other defaults: klein and klein base."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniflux.checkpoints.configs import json_object
from miniflux.models.transformer import TransformerConfig
from miniflux.variants import VARIANTS, Variant, like

log = logging.getLogger(__name__)

INDEX_FILE = "model_index.json"
MODEL = "miniflux_model"
"""In the header of files that are converted: the name of the variant, where tensors do not tell it."""


@dataclass(frozen=True)
class Which:
    """A variant, and how it was found.

    Attributes:
        told: whether the header, the file's name or the index beside it says so; else it is the first that fits.
        others: names of variants with the same tensors that are drawn with in another way: without classifier-free
            guidance or with it, references looked at once or not.
    """

    variant: Variant
    told: bool
    others: tuple[str, ...]

    def warn(self, place: Path) -> None:
        """Say that it was guessed, if it was, and others may be meant."""
        if self.told or not self.others:
            return
        log.warning(
            "%s: taken for %s; %s %s the same tensors, and other defaults. The beginning of its file's name, or "
            "%s beside it, tells",
            place,
            self.variant.name,
            " and ".join(self.others),
            "has" if len(self.others) == 1 else "have",
            INDEX_FILE,
        )


def which(config: TransformerConfig, metadata: Mapping[str, str], file: str, folder: Path) -> Which:
    """The variant of a transformer, or of other sizes the one that it is treated as: told by its header, else by how
    its file's name begins (`flux-2-klein-base-4b-fp8.safetensors`), else by `model_index.json`.

    Args:
        config: its sizes.
        metadata: of its header.
        file: its name.
        folder: of the pipeline that it belongs to.
    """
    alike = like(config)
    told = next((one for one in alike if one.name == metadata.get(MODEL)), None)
    told = told or _named(alike, file) or _indexed(alike, json_object(folder / INDEX_FILE))
    chosen = told or alike[0]
    same = [one for one in VARIANTS.values() if one.transformer == chosen.transformer]
    others = tuple(one.name for one in same if (one.cfg is None, one.once) != (chosen.cfg is None, chosen.once))
    return Which(chosen, told is not None, others)


def _named(alike: Sequence[Variant], file: str) -> Variant | None:
    """The variant with whose name, or whose file's, the name of a file begins; of several the longest."""
    found: dict[str, Variant] = {}
    for one in alike:
        for name in (one.name, Path(one.file).stem):
            if re.match(rf"{re.escape(name)}(?![a-z0-9])", file.lower()):
                found[name] = one
    return found[max(found, key=len)] if found else None


def _indexed(alike: Sequence[Variant], index: Mapping[str, Any]) -> Variant | None:
    """The variant that the index of diffusers' pipeline means, if it says so."""
    if not index:
        return None
    once = index.get("_class_name") == "Flux2KleinKVPipeline"
    fitting = [one for one in alike if one.once == once] or list(alike)
    if "is_distilled" in index:
        fitting = [one for one in fitting if (one.cfg is None) == bool(index["is_distilled"])]
    return fitting[0] if fitting else None
