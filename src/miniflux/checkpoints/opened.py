"""What is in an opened file: which networks, under which prefixes, in which layout - found out once and kept with it.

All-in-one files name the tensors of a network as its own file does, behind a prefix: `vae.decoder.conv_in.weight`. The
prefix is not looked up but read: it is whatever stands before the key that tells a network apart. So every spelling of
the prefixes is understood, and a network without one is the case of the empty prefix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from miniflux.checkpoints.by_name import Found, found_by_name
from miniflux.checkpoints.files import Selection, TensorSource, open_tensors
from miniflux.checkpoints.folders import Model, path_of, walk
from miniflux.checkpoints.formats.reading import contents_of
from miniflux.checkpoints.layouts import detect
from miniflux.checkpoints.networks import BY_KIND, NETWORKS, PIPELINE, TRANSFORMERS
from miniflux.checkpoints.networks.causal_lm import TEKKEN_TENSOR
from miniflux.errors import CheckpointError, TokenizerError
from miniflux.strictjson import json_of

# What all-in-one files carry beside the networks, by the last part of the key, and why nothing is lost without it.
REDUNDANT_STRAYS = {
    "logit_scale": "only for comparing with images",
    "text_projection": "FLUX takes the pooled vector before CLIP's projection",
}
QUANTISATION = "_quantization_metadata"  # ComfyUI's: a JSON text whose `layers` are named with their prefix


Answer = TypeVar("Answer")


def once(source: TensorSource, question: object, answer: Callable[[], Answer]) -> Answer:
    """The answer to a question about a source, which is kept with it."""
    known: dict[object, Any] = source.__dict__.setdefault("_found_out", {})
    if question not in known:
        known[question] = answer()
    return known[question]


def network_of(source: TensorSource) -> type[nn.Module] | None:
    """Which network a source's tensors belong to, or None. Keys behind a prefix are not looked at."""

    def found() -> type[nn.Module] | None:
        return next((one.kind for one in NETWORKS if any(sign in source.entries for sign in one.signs)), None)

    return once(source, network_of, found)


def layout_in(source: TensorSource, module: nn.Module) -> str:
    """The layout in which a source names the tensors of a network."""
    return once(source, (layout_in, type(module)), lambda: detect(module, source.entries))


def known_in(source: TensorSource) -> list[Found]:
    """The networks in a source that are known by name only."""
    return once(source, known_in, lambda: found_by_name(contents_of(source).entries))


def networks_in(keys: Collection[str]) -> dict[type[nn.Module], str]:
    """The networks that keys belong to, each with its prefix.

    Raises:
        CheckpointError: a network is there twice, under two prefixes.
    """
    found: dict[type[nn.Module], str] = {}
    for network in (network for network in NETWORKS if network.behind_prefix):
        for sign in network.signs:
            prefixes = [key[: -len(sign)] for key in keys if key == sign or key.endswith("." + sign)]
            if len(prefixes) > 1:
                where = " and ".join(repr(prefix) for prefix in sorted(prefixes))
                raise CheckpointError(f"{network.kind.__name__} is there {len(prefixes)} times: under {where}")
            if prefixes:
                # Networks of several families share keys; the first that NETWORKS names has one that is its own.
                if not any(BY_KIND[k].part == network.part and at == prefixes[0] for k, at in found.items()):
                    found[network.kind] = prefixes[0]
                break
    return found


@dataclass(frozen=True)
class Division:
    """Whose tensors the keys of a file are.

    Attributes:
        prefixes: of the networks that are there.
        keys: of each network, without prefix -> as in the file.
        strays: keys of no network.
        redundant: keys of no network that are known to be of no use, with the reason.
    """

    prefixes: dict[type[nn.Module], str]
    keys: dict[type[nn.Module], dict[str, str]]
    strays: list[str]
    redundant: dict[str, str]


def divide(keys: Collection[str]) -> Division:
    """Give every key to the network with the longest prefix that fits.

    Raises:
        CheckpointError: see `networks_in`.
    """
    prefixes = networks_in(keys)
    longest = sorted(prefixes.items(), key=lambda item: -len(item[1]))
    division = Division(prefixes, {kind: {} for kind in prefixes}, [], {})
    for key in keys:
        owner = next(((kind, prefix) for kind, prefix in longest if key.startswith(prefix)), None)
        last = key.rpartition(".")[2]
        if owner is not None:
            division.keys[owner[0]][key[len(owner[1]) :]] = key
        elif why := next((why for kind in prefixes if (why := BY_KIND[kind].why_redundant(key))), None):
            division.redundant[key] = why
        elif prefixes and last in REDUNDANT_STRAYS:
            division.redundant[key] = REDUNDANT_STRAYS[last]
        else:
            division.strays.append(key)
    return division


class PartSource(Selection):
    """The tensors of one network in a file of several, under their own names.

    Attributes:
        prefix: what stands before each name in the whole.
        strays, redundant: see `Division`; they concern everybody who reads the file.
    """

    def __init__(self, whole: TensorSource, kind: type[nn.Module], division: Division) -> None:
        self.prefix = division.prefixes[kind]
        super().__init__(whole, division.keys[kind], f"{whole} ({self.prefix}*)")
        self.strays, self.redundant = division.strays, division.redundant
        if QUANTISATION in self.metadata:
            self.metadata[QUANTISATION] = _without_prefix(self.metadata[QUANTISATION], self.prefix)


def _without_prefix(text: str, prefix: str) -> str:
    """The header's table of quantised layers, of those under `prefix` alone and by their names behind it."""
    try:
        about = json_of(text.encode(), QUANTISATION)
        layers = {k[len(prefix) :]: v for k, v in about["layers"].items() if k.startswith(prefix)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return text  # whoever reads it says what is wrong with it
    return json.dumps({**about, "layers": layers})


def part_of(source: TensorSource, kind: type[nn.Module]) -> TensorSource:
    """The tensors of one network in a source that may hold several, under their own names.

    A source with nothing but this network, without a prefix, or without this network, is returned as it is.

    Raises:
        CheckpointError: the source holds a network twice.
    """
    try:
        division = _division(source)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    if kind not in division.prefixes or (list(division.prefixes.values()) == [""]):
        return source
    return once(source, (part_of, kind), lambda: PartSource(source, kind, division))


def parts_of(source: TensorSource) -> dict[type[nn.Module], TensorSource]:
    """Every network in a source, as a source of its own; empty if none is known here.

    Raises:
        CheckpointError: the source holds a network twice.
    """
    return {kind: part_of(source, kind) for kind in _division(source).prefixes}


def _division(source: TensorSource) -> Division:
    return once(source, divide, lambda: divide(source.entries))


class Opened:
    """Files and folders that are opened once, for as long as somebody works with them: a load, a conversion."""

    def __init__(self) -> None:
        self._sources: dict[Path, TensorSource] = {}

    def source(self, path: Path) -> TensorSource:
        """The tensors of a file, an index of shards, or a folder.

        Raises:
            CheckpointError: it cannot be read.
        """
        if path not in self._sources:
            self._sources[path] = open_tensors(path)
        return self._sources[path]

    def part(self, path: Path, kind: type[nn.Module]) -> TensorSource:
        """Those of one network in there.

        Raises:
            CheckpointError: it cannot be read, or holds the network twice.
        """
        return part_of(self.source(path), kind)


def transformer_of(source: TensorSource) -> TensorSource:
    """The tensors of the transformer in a source, of whichever family; the source as it is, if there is none.

    Raises:
        CheckpointError: the source holds one twice.
    """
    kind = next((record.kind for record in TRANSFORMERS if record.kind in _division(source).prefixes), None)
    return source if kind is None else part_of(source, kind)


def open_part(path: str | Path, kind: type[nn.Module]) -> TensorSource:
    """The tensors of one network in a file, an index of shards, or a folder; see `Opened.part`."""
    return Opened().part(path_of(path), kind)


def tekken_in(path: Path) -> bytes:
    """`tekken.json`, from a language model's file that has it among its tensors.

    Raises:
        TokenizerError: there is none.
    """
    source = open_tensors(path)
    if TEKKEN_TENSOR not in source:
        raise TokenizerError(f"{path}: holds no tokenizer ({TEKKEN_TENSOR})")
    return source[TEKKEN_TENSOR].view(torch.uint8).numpy().tobytes()


FOLDERS = tuple(dict.fromkeys(network.folder for network in PIPELINE))  # of diffusers' pipelines


def models_in(path: Path) -> list[Model]:
    """The models in a folder and its sub-folders: single files first, then those of a pipeline in its order; none if it
    is no folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not path.is_dir():
        return []
    order = {name: number for number, name in enumerate(["", *FOLDERS])}

    def rank(model: Model) -> tuple[int, str]:
        above = model.path.relative_to(path).parts[:-1]
        return order.get(above[0] if above else "", len(order)), str(model.path)

    return sorted(walk(path), key=rank)
