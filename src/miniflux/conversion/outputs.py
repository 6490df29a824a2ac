"""The files that a conversion writes: which networks, under which names, and what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import Tensor

from miniflux.checkpoints.configs import json_object
from miniflux.checkpoints.formats import Format
from miniflux.checkpoints.formats.ggml import Ggml
from miniflux.checkpoints.layouts import ALL_IN_ONE, DIFFUSERS
from miniflux.checkpoints.networks import BY_KIND, is_transformer, networks_of
from miniflux.checkpoints.writing import size_of
from miniflux.conversion.inputs import Input, Inputs
from miniflux.conversion.pipelines import (
    SCHEDULER_FILE,
    WHOLE,
    copied,
    scheduler,
    tokenizers_of,
)
from miniflux.conversion.tensors import Target, Targets
from miniflux.conversion.tokenizer_files import Content
from miniflux.errors import InputError
from miniflux.models.causal_lm import CausalLm
from miniflux.models.flux1 import Flux1
from miniflux.models.flux2 import Flux2
from miniflux.models.transformer import Transformer
from miniflux.variants import VARIANTS
from miniflux.weights.which import INDEX_FILE


@dataclass
class Output:
    """One file to be written.

    Attributes:
        name: within the folder that is written; may begin with a sub-folder.
        items: its tensors, each with the network it belongs to.
        markers: tensors that say how the others are packed.
    """

    name: str
    items: list[tuple[Targets, Target]]
    markers: dict[str, Tensor] = field(default_factory=dict)


def names_file(target: Path) -> bool:
    """Whether a path names a file to be written, by its ending; else it names a folder.

    Raises:
        InputError: it ends as files of other kinds do.
    """
    if target.suffix in (".bin", ".ckpt", ".pt", ".pth", ".sft", ".json", ".onnx"):
        raise InputError(f"{target}: files are written as .safetensors or .gguf, got the ending {target.suffix!r}")
    return target.suffix in (".safetensors", ".gguf")


def outputs(
    target: Path, found: Sequence[Input], networks: Sequence[Targets], layout: str | None, shard: int
) -> list[Output]:
    """The files that become of networks.

    Raises:
        InputError: several networks would be one file whose layout has no prefixes, or one GGUF file.
    """
    several = len(networks) > 1
    everything = [(network, item) for network in networks for item in network.tensors]
    together = all(_prefix(network) for network in networks)
    gguf = any(network.gguf for network in networks)
    if several and not (together and not gguf) and (names_file(target) or together):
        words = ", ".join(part.word for part in found)
        what = "a name without ending makes a folder" if not gguf else "or one network of them at a time"
        raise InputError(
            f"{target}: {len(networks)} networks in one file need the layout {ALL_IN_ONE}; {what} ({words})"
        )
    if names_file(target) or (several and together):
        made = [Output(target.name if names_file(target) else "model.safetensors", everything)]
    elif several:
        # A text encoder in GGUF is found by its folder alone; so is a language model, whose file each variant calls
        # by another name.
        records = [BY_KIND[type(network.network)] for network in networks]
        alone = [
            not record.telling and (network.gguf or not record.single)
            for record, network in zip(records, networks, strict=True)
        ]
        folders = [
            layout == DIFFUSERS or (layout is None and part.in_folder) or by_folder
            for part, by_folder in zip(found, alone, strict=True)
        ]
        made = [
            file
            for network, part, own in zip(networks, found, folders, strict=True)
            for file in _shards(network, part, several, own, shard)
        ]
    else:
        made = _shards(networks[0], found[0], several, True, shard)
    for file in made:
        for network in {id(net): net for net, _ in file.items}.values():
            for form in {item.encoding for net, item in file.items if net is network}:
                if isinstance(form, Format):
                    file.markers |= {_prefix(network) + key: tensor for key, tensor in form.markers().items()}
    return made


def _prefix(network: Targets) -> str:
    """What the names of a network's tensors begin with in the new file."""
    prefix = BY_KIND[type(network.network)].prefix
    return prefix if all(item.key.startswith(prefix) for item in network.tensors) else ""


def _shards(network: Targets, part: Input, several: bool, folders: bool, shard: int) -> list[Output]:
    """The file or the shards of one network in a folder: named as in diffusers' folders, or a single file."""
    record = BY_KIND[type(network.network)]
    place, stem = record.folder, record.stem
    ending = ".gguf" if network.gguf else ".safetensors"
    if not folders:
        return [Output(_single(part) + ending, [(network, item) for item in network.tensors])]
    shards: list[list[Target]] = [[]]
    size = 0
    for item in network.tensors:
        more = size_of(list(item.parts.values()))
        if shards[-1] and size + more > shard and ending != ".gguf":
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += more
    stem = f"{place}/{stem}" if several else stem
    count = len(shards)
    names = [f"{stem}-{i + 1:05}-of-{count:05}" if count > 1 else stem for i in range(count)]
    return [
        Output(name + ending, [(network, item) for item in items]) for name, items in zip(names, shards, strict=True)
    ]


def _single(part: Input) -> str:
    """What people call the single file of a network."""
    record = BY_KIND[type(part.network)]
    if part.which is not None and part.which.variant.transformer == cast(Transformer, part.network).config:
        return Path(part.which.variant.file).stem
    return record.single or record.title.lower().replace(".", "")


def extras(
    files: Sequence[Output], found: Inputs, networks: Sequence[Targets], layout: str | None
) -> tuple[dict[str, Content], dict[str, str]]:
    """What lies beside the files of a folder: indices of shards, configs, and of a model of several networks its
    tokenizers, its scheduler and its index.

    Returns:
        The files by their places; and what a pipeline needs and is not there, with the reason.
    """
    made: dict[str, Content] = {}
    missing: dict[str, str] = {}
    shards: dict[str, list[Output]] = {}
    for file in files:
        if (stem := re.sub(r"-\d{5}-of-\d{5}\.safetensors$", "", file.name)) != file.name:
            shards.setdefault(stem, []).append(file)
    for stem, group in shards.items():
        homes = {part: Path(file.name).name for file in group for _, item in file.items for part in item.parts}
        homes |= {key: Path(file.name).name for file in group for key in file.markers}
        total = sum(size_of(list(item.parts.values())) for file in group for _, item in file.items)
        made[stem + ".safetensors.index.json"] = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(homes.items())),
        }
    several = len(networks) > 1
    folders = {type(net.network): Path(file.name).parent for file in files for net, _ in file.items}
    for part, network in zip(found.networks, networks, strict=True):
        folder = folders[type(part.network)]
        if folder == Path() and several:  # single files side by side: their headers tell
            continue
        place = str(folder / "config.json")
        diffusers = layout == DIFFUSERS or network.layout == DIFFUSERS
        if part.untold and diffusers and not part.config:
            missing[place] = f"{part.untold} is not in {part.source}, and no config.json is beside it"
        elif part.config or diffusers:
            made[place] = _config(part, diffusers)
    if several and not all(_prefix(network) for network in networks):
        extra, absent = _pipeline(found, layout)
        missing |= absent
        made |= extra
        packed = {item.label for net in networks for item in net.tensors if _is_packed(item)}
        if layout == DIFFUSERS and packed:
            missing["weights that are not packed"] = f"miniflux opens {', '.join(sorted(packed))}, diffusers does not"
        if missing:
            made.pop(INDEX_FILE, None)
    return made, missing


def _is_packed(item: Target) -> bool:
    """Whether a tensor is stored as more than its numbers in a dtype."""
    return isinstance(item.encoding, Format) and (isinstance(item.encoding, Ggml) or list(item.parts) != [item.key])


def _config(part: Input, diffusers: bool) -> Content:
    """The config of a network: its own, and what diffusers wants to know of what is read here."""
    if not diffusers:
        assert part.config is not None
        return part.config
    own = json_object(part.config) if part.config else {}
    own = {} if "text_config" in own else own  # of a whole CLIP
    return {key: value for key, value in own.items() if key != "quantization_config"} | BY_KIND[
        type(part.network)
    ].as_json(part.network.config)


def _pipeline(found: Inputs, layout: str | None) -> tuple[dict[str, Content], dict[str, str]]:
    """Tokenizers, scheduler and index of a model, and what it lacks to be a whole one."""
    kinds = {type(part.network): part for part in found.networks}
    drawing = next((part for part in found.networks if is_transformer(part.network)), None)
    other = Flux2 if CausalLm in kinds else Flux1
    whole = WHOLE[other if drawing is None else type(drawing.network)]
    config = None if drawing is None else cast(Transformer, drawing.network).config
    chosen = VARIANTS[whole.like]
    if drawing is not None and drawing.which is not None:
        drawing.which.warn(found.root)
        chosen = drawing.which.variant
    tokenizers = tokenizers_of(found.root, config, whole)
    made = copied(tokenizers, whole, chosen.chat)
    missing = {one.word: "not in what was converted" for one in networks_of(chosen).values() if one.kind not in kinds}
    missing |= {
        name: f"not in {found.root}, nor where weights are looked for"
        for name in whole.tokenizers
        if name not in tokenizers
    }
    lm = kinds.get(CausalLm)
    if lm is not None and cast(CausalLm, lm.network).config.layers_read:
        missing["the rest of the language model"] = (
            f"its last layers are not in {lm.source}, and transformers wants them"
        )
    if layout == DIFFUSERS:
        missing |= whole.never
    if config is not None and (layout == DIFFUSERS or (found.root / SCHEDULER_FILE).is_file()):
        made[SCHEDULER_FILE] = scheduler(found.root, config, whole)
    if layout == DIFFUSERS and not missing:
        made[INDEX_FILE] = whole.index(chosen)
    return made, missing
