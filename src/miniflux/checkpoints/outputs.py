"""What a conversion reads, and the files it writes: which networks, under which names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from miniflux.checkpoints.files import TensorSource, open_tensors
from miniflux.checkpoints.formats import Format
from miniflux.checkpoints.formats.reading import contents_of
from miniflux.checkpoints.formats.scaled import METADATA
from miniflux.checkpoints.inspection import FOLDERS, axes_beside, flux1_config
from miniflux.checkpoints.layouts import ALL_IN_ONE, DIFFUSERS, PREFIXES
from miniflux.checkpoints.loading import bare, plan_for
from miniflux.checkpoints.prefixes import parts_of
from miniflux.checkpoints.sizes import config_in
from miniflux.checkpoints.targets import Target, Targets, size_of
from miniflux.errors import CheckpointError, InputError
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.models.t5 import T5Encoder
from miniflux.variants import VARIANTS, variant_of

DEFAULTS: dict[type[nn.Module], Any] = {
    Autoencoder: VARIANTS["flux1-dev"].autoencoder,
    ClipTextEncoder: VARIANTS["flux1-dev"].clip,
    T5Encoder: VARIANTS["flux1-dev"].t5,
}
# Of a diffusers folder: the sub-folder of each network, and what its files are called.
PLACES: dict[type[nn.Module], tuple[str, str]] = {
    Flux1: ("transformer", "diffusion_pytorch_model"),
    Autoencoder: ("vae", "diffusion_pytorch_model"),
    ClipTextEncoder: ("text_encoder", "model"),
    T5Encoder: ("text_encoder_2", "model"),
}
# Of a folder of single files: what they are called.
SINGLE: dict[type[nn.Module], str] = {
    Autoencoder: "ae",
    ClipTextEncoder: "clip_l",
    T5Encoder: "t5xxl_fp16",
}
# What else is in a diffusers folder.
BESIDE = ("model_index.json", "scheduler", "tokenizer", "tokenizer_2")
# Of a source's header: what is told anew, or no more true.
NOT_CARRIED = ("format", METADATA)
GGUF_OWN = ("GGUF.", "general.", "comfy.gguf.")


@dataclass(frozen=True)
class Input:
    """One network to be converted.

    Attributes:
        network: on the meta device, of the sizes in the file.
        source: its tensors.
        layout: how they are named.
        folder: of diffusers' layout that it lies in, beside its `config.json`; None for files.
        root: the whole model folder, if it is one of several networks there.
        metadata: of its file, for the header of the new one.
    """

    network: nn.Module
    source: TensorSource
    layout: str
    folder: Path | None
    root: Path | None
    metadata: dict[str, str]


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


def inputs(path: str | Path) -> list[Input]:
    """The networks of a file, a folder with shards, or a model folder in diffusers' layout.

    Raises:
        CheckpointError: nothing readable is there, or no network that is known here.
    """
    path = Path(path)
    folders = [path / name for name in FOLDERS if (path / name).is_dir()]
    found: list[Input] = []
    for place in folders or [path]:
        for kind, source in parts_of(open_tensors(place)).items():
            folder = place if place.is_dir() else None
            found.append(_input(kind, source, folder, path if folders else None))
    if not found:
        raise CheckpointError(f"{path}: no network known here")
    kinds = [type(part.network) for part in found]
    if len(set(kinds)) < len(kinds):
        raise CheckpointError(f"{path}: holds a network twice: {', '.join(kind.__name__ for kind in kinds)}")
    return found


def _input(kind: type[nn.Module], source: TensorSource, folder: Path | None, root: Path | None) -> Input:
    entries = contents_of(source).entries
    metadata = {
        key: value for key, value in source.metadata.items() if key not in NOT_CARRIED and not key.startswith(GGUF_OWN)
    }
    axes = axes_beside(folder) if folder and kind is Flux1 else None
    try:
        if kind is Flux1:
            config: Any = flux1_config(entries, source.metadata, axes, to_run=False)
            if axes:
                metadata["axes_dim"] = json.dumps(axes)
        else:
            config = config_in(entries, source.metadata, DEFAULTS[kind])
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    network = bare(kind, config)
    return Input(network, source, plan_for(network, source).layout, folder, root, metadata)


def outputs(
    target: Path, found: Sequence[Input], networks: Sequence[Targets], layout: str | None, gguf: bool, shard: int
) -> list[Output]:
    """The files that become of networks.

    Raises:
        InputError: several networks would be one file whose layout has no prefixes, or one GGUF file each.
    """
    ending, several = ".gguf" if gguf else ".safetensors", len(networks) > 1
    everything = [(network, item) for network in networks for item in network.tensors]
    if several and not all(_prefix(network) for network in networks):
        if names_file(target) or gguf:
            what = "a name without ending makes a folder" if not gguf else "or one network of them at a time"
            raise InputError(f"{target}: {len(networks)} networks in one file need the layout {ALL_IN_ONE}; {what}")
        folders = layout == DIFFUSERS or (layout is None and found[0].root is not None)
        made = [file for network in networks for file in _shards(network, several, folders, ending, shard)]
    elif names_file(target) or several:
        made = [Output(target.name if names_file(target) else "model" + ending, everything)]
    else:
        made = _shards(networks[0], several, True, ending, shard)
    for file in made:
        for network in {id(net): net for net, _ in file.items}.values():
            for form in {item.encoding for net, item in file.items if net is network}:
                if isinstance(form, Format):
                    file.markers |= {_prefix(network) + key: tensor for key, tensor in form.markers().items()}
    return made


def _prefix(network: Targets) -> str:
    """What the names of a network's tensors begin with in the new file."""
    prefix = PREFIXES[type(network.network)]
    return prefix if all(item.key.startswith(prefix) for item in network.tensors) else ""


def _shards(network: Targets, several: bool, folders: bool, ending: str, shard: int) -> list[Output]:
    """The file or the shards of one network in a folder: named as in diffusers' folders, or a single file."""
    place, stem = PLACES[type(network.network)]
    if not folders:
        return [Output(_single(network.network) + ending, [(network, item) for item in network.tensors])]
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


def _single(network: nn.Module) -> str:
    """What people call the single file of a network."""
    if not isinstance(network, Flux1):
        return SINGLE[type(network)]
    known = variant_of(network.config)
    return Path(known.file).stem if known else "flux1"


def extras(
    files: Sequence[Output], found: Sequence[Input], networks: Sequence[Targets]
) -> dict[str, Path | dict[str, Any]]:
    """What lies beside the files of a folder: indices of shards; configs and whatever else the source's folder has."""
    made: dict[str, Path | dict[str, Any]] = {}
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
    folders = {type(net.network): Path(file.name).parent for file in files for net, _ in file.items}
    for part, network in zip(found, networks, strict=True):
        folder = folders[type(part.network)]
        if folder == Path() and len(found) > 1:  # single files side by side
            continue
        if part.folder is not None and (part.folder / "config.json").is_file():
            made[str(folder / "config.json")] = part.folder / "config.json"
        elif isinstance(part.network, Flux1) and network.layout == DIFFUSERS:
            made[str(folder / "config.json")] = diffusers_config(part.network.config)
        if part.root is not None and len(found) > 1:
            made |= {name: part.root / name for name in BESIDE if (part.root / name).exists()}
    return made


def diffusers_config(config: Flux1Config) -> dict[str, Any]:
    """What diffusers' `FluxTransformer2DModel` wants to know (its `register_to_config`)."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }
