"""What a conversion reads: every network of a file, or of a folder however it is laid out, each once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from miniflux.checkpoints.configs import axes_beside, config_beside, config_in, in_header, transformer_config
from miniflux.checkpoints.files import Entry, TensorSource, open_tensors
from miniflux.checkpoints.folders import Model, path_of, unread
from miniflux.checkpoints.formats.reading import contents_of
from miniflux.checkpoints.formats.scaled import METADATA
from miniflux.checkpoints.gguf import GGUF_OWN
from miniflux.checkpoints.layouts import counterparts, own_shapes
from miniflux.checkpoints.loading import bare, fetch, filling_for
from miniflux.checkpoints.networks import BY_CONFIG, BY_KIND, NETWORKS, is_transformer
from miniflux.checkpoints.networks.causal_lm import LAST_NORM
from miniflux.checkpoints.opened import Opened, known_in, models_in, network_of, parts_of
from miniflux.errors import CheckpointError
from miniflux.lora.files import is_lora, what_is
from miniflux.models.causal_lm import CausalLmConfig
from miniflux.models.tiny_autoencoder import TinyDecoder
from miniflux.variants import VARIANTS
from miniflux.weights.which import MODEL, Which, which

# Of a source's header: what is told anew, or no more true.
NOT_CARRIED = ("format", METADATA)


@dataclass(frozen=True)
class Input:
    """One network to be converted.

    Attributes:
        network: on the meta device, of the sizes in the file.
        source: its tensors.
        layout: how they are named.
        in_folder: whether it lies in a folder of its own, as in diffusers' layout; else it is a file.
        together: whether other networks are in the same file.
        metadata: of its file, for the header of the new one.
        config: the `config.json` beside it, if there is one.
        untold: what of its config is not in the file, and was guessed; empty if nothing.
        which: which model it is, of a transformer.
    """

    network: nn.Module
    source: TensorSource
    layout: str
    in_folder: bool
    together: bool
    metadata: dict[str, str]
    config: Path | None = None
    untold: str = ""
    which: Which | None = None

    @property
    def word(self) -> str:
        """What people call the network."""
        return BY_KIND[type(self.network)].word


@dataclass(frozen=True)
class Inputs:
    """The networks of a file or a folder.

    Attributes:
        networks: each kind once.
        root: where their tokenizers and their scheduler are looked for.
        left_out: files that belong to no network of a pipeline, with the reason.
    """

    networks: list[Input]
    root: Path
    left_out: dict[str, str]


def inputs(path: str | Path) -> Inputs:
    """The networks of a file, a folder with shards, or a model folder: single files, sub-folders, or both.

    Raises:
        CheckpointError: nothing readable is there, no network that is known here, a network twice that differs, or a
            file that must hold one and cannot be read.
    """
    path = path_of(path)
    models = models_in(path)
    if path.is_dir() and (lost := unread(path)):
        named = ", ".join(f"{file.relative_to(path)} ({why})" for file, why in lost.items())
        raise CheckpointError(
            f"{path}: what is in these files would be left out: {named:.1000}; take them away, or put "
            "safetensors files in their place"
        )
    left_out: dict[str, str] = {}
    found: list[Input] = []
    for model in models:
        source = TensorSource(model.complete())
        left_out |= {str(other.relative_to(path)): f"a variant of {model.path.name}" for other in model.others}
        parts = parts_of(source)
        if len(models) > 1 and (why := _no_part(source, bool(parts))):
            left_out[str(model.path.relative_to(path))] = why
        elif not parts:
            raise CheckpointError(f"{source}: {_no_part(source, False) or what_is(source) or 'no network known here'}")
        else:
            found += [_input(kind, part, path, model, len(parts) > 1) for kind, part in parts.items()]
    if not models:  # a file, an index, or a folder without any
        whole = open_tensors(path)
        parts = parts_of(whole)
        if not parts:
            raise CheckpointError(f"{path}: {_no_part(whole, False) or what_is(whole) or 'no network known here'}")
        found = [_input(kind, part, path, None, len(parts) > 1) for kind, part in parts.items()]
    if not found:
        raise CheckpointError(f"{path}: no network known here")
    return Inputs(_each_once(path, found, left_out), path if path.is_dir() else path.parent, left_out)


def _no_part(source: TensorSource, known: bool) -> str:
    """Why a file in a model's folder is none of the pipeline's networks, if it is known what it is."""
    others = known_in(source)
    if others:
        return others[0].name
    if known:
        return ""
    if network_of(source) is TinyDecoder:
        return "the tiny decoder is for previews; a pipeline has no place for it"
    return "a LoRA is converted by itself: miniflux lora convert" if is_lora(source) else ""


def _each_once(path: Path, found: list[Input], left_out: dict[str, str]) -> list[Input]:
    """Of a network that is there twice, as in published repositories, the more precise file; if they are equal."""
    kept: dict[type[nn.Module], Input] = {}
    for part in found:
        kind = type(part.network)
        known = kept.setdefault(kind, part)
        if known is part:
            continue
        if not _equal(known, part):
            raise CheckpointError(
                f"{path}: holds the {part.word} twice, {known.source} and {part.source}, which differ; the result has "
                "one: give a folder without the other, or the file itself"
            )
        first, second = sorted((known, part), key=lambda one: -_bytes(one))
        left_out[str(second.source)] = f"the same {part.word} as {first.source}"
        told = first if first.config or not first.untold else replace(second, source=first.source)
        kept[kind] = replace(first, network=told.network, config=first.config or second.config, untold=told.untold)
    return sorted(kept.values(), key=lambda part: NETWORKS.index(BY_KIND[type(part.network)]))


def _bytes(part: Input) -> int:
    return sum(entry.size for entry in part.source.entries.values())


def _equal(a: Input, b: Input) -> bool:
    """Whether two files hold the same network, one perhaps rounded to the dtype of the other."""
    if {k: tuple(t.shape) for k, t in a.network.state_dict().items()} != {
        k: tuple(t.shape) for k, t in b.network.state_dict().items()
    }:
        return False
    tables = counterparts(a.network, a.layout), counterparts(b.network, b.layout)
    for key, tensor in a.network.state_dict().items():
        pair = [fetch(one.source, table[key], tuple(tensor.shape)) for one, table in zip((a, b), tables, strict=True)]
        narrow = min((one.dtype for one in pair), key=lambda dtype: (dtype.itemsize, str(dtype)))
        if not torch.equal(*(one.to(narrow).float() for one in pair)):
            return False
    return True


def _input(kind: type[nn.Module], source: TensorSource, path: Path, model: Model | None, together: bool) -> Input:
    entries = contents_of(source).entries
    metadata = {
        key: value for key, value in source.metadata.items() if key not in NOT_CARRIED and not key.startswith(GGUF_OWN)
    }
    place = model.path.parent if model else path
    own = model is not None and (place != path or len(source.files) > 1 or (place / "config.json").is_file())
    beside = place / "config.json" if own and not together and (place / "config.json").is_file() else None
    try:
        if BY_KIND[kind].telling:
            axes = axes_beside(place) if beside else None
            config, untold = transformer_config(BY_KIND[kind], entries, source.metadata, axes, to_run=False), ""
        else:
            config, untold = _config(kind, source, beside.parent if beside else None)
    except CheckpointError as error:
        said = str(error)
        raise CheckpointError(said if str(place) in said else f"{source}: {error}") from error
    network = bare(kind, config)
    headers = {record.header for record in NETWORKS if record.header}
    others = headers - set(own_header := in_header(network))
    metadata = {key: value for key, value in metadata.items() if key not in others}  # of networks in the same file
    if not untold:
        metadata |= own_header
    found = None
    if is_transformer(network):
        root = path if path.is_dir() else path.parent
        found = which(config, source.metadata, source.files[0].path.name, root)
        if found.told and found.others:
            metadata[MODEL] = found.variant.name
    layout, in_folder = filling_for(network, source).layout, place != path and not together
    return Input(network, source, layout, in_folder, together, metadata, beside, untold, found)


def _config(kind: type[nn.Module], source: TensorSource, folder: Path | None) -> tuple[Any, str]:
    """The config of an autoencoder or text encoder, and what of it is guessed."""
    record = BY_KIND[kind]
    known = [config for variant in VARIANTS.values() if (config := record.of(variant)) is not None]
    entries = contents_of(source).entries
    if record.header in source.metadata:
        return config_in(entries, source.metadata, known[0]), ""
    if folder is not None:
        return config_beside(folder, known[0], Opened()), ""
    if record.told(source.metadata):
        return _whole(config_in(entries, source.metadata, known[0]), entries), ""
    for config in known:
        if config_in(entries, {}, config) == config and record.usual(config, entries):
            return _whole(config, entries), ""
    return _whole(config_in(entries, {}, known[0]), entries), record.guessed


def _whole(config: Any, entries: Mapping[str, Entry]) -> Any:
    """Of a language model all that is in its file, though a variant reads a part of it. Where its last norm is missing,
    its last layers are, too."""
    if not isinstance(config, CausalLmConfig) or LAST_NORM not in own_shapes(
        BY_CONFIG[CausalLmConfig], {key: entry.shape for key, entry in entries.items()}
    ):
        return config
    return replace(config, layers_read=None)
