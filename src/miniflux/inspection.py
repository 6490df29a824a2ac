"""What a file is, told from its header alone: network, layout, format, variant, sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from miniflux.checkpoints.by_name import Found
from miniflux.checkpoints.configs import config_in, config_of_transformer, in_header, transformer_config
from miniflux.checkpoints.files import Entry, Selection, TensorSource, open_tensors
from miniflux.checkpoints.folders import path_of, unread
from miniflux.checkpoints.formats.encodings import accepted
from miniflux.checkpoints.formats.reading import contents_of, format_of, formats_in
from miniflux.checkpoints.loading import bare, compare, is_finite
from miniflux.checkpoints.networks import BY_KIND, NETWORKS, TRANSFORMERS, networks_of
from miniflux.checkpoints.opened import FOLDERS, known_in, models_in, network_of, parts_of
from miniflux.checkpoints.report import FEW, LoadReport, not_needed
from miniflux.errors import CheckpointError, ConfigError, LoraError
from miniflux.lora.files import is_lora, read, what_is
from miniflux.lora.models import fitting_models
from miniflux.models.transformer import TransformerConfig
from miniflux.variants import VARIANTS
from miniflux.weights.finding import TOKENIZERS
from miniflux.weights.which import which

Entries = Mapping[str, Entry]
LORA = "LoRA"


@dataclass(frozen=True)
class Part:
    """One network found in a file.

    Attributes:
        network: the class of a network that pipelines are made of (`Flux1`, `Flux2`, `Flux3`, `Autoencoder`,
            `Flux2Autoencoder`, `ClipTextEncoder`, `T5Encoder`, `CausalLm`) or of `TinyDecoder`; `LoRA`; what steers:
            `ControlNet`, `IP-Adapter`, `Redux`, `SigLIP`, `CLIP vision`; or `unknown`.
        variant: the released model it belongs to, a description of its sizes, or the model it is closest to.
        layout: naming of its tensors; of LoRA files, the dialect.
        format: what the file is called after: the format that most of its bytes are in.
        formats: number of tensors by format, or by dtype where they are not packed.
        tensors, parameters, bytes: how many, how large.
        problems: what does not fit the network it seems to be, is missing beside it, or is wrong with its data (if they
            were read), one line each; of many of a kind the first, and how many follow.
        redundant: tensors that published files carry and the network does not need, with the reason.
    """

    path: str
    network: str
    variant: str
    layout: str
    format: str
    formats: dict[str, int]
    tensors: int
    parameters: int
    bytes: int
    problems: list[str] = field(default_factory=list)
    redundant: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        formats = ", ".join(f"{count} x {_written(name)}" for name, count in self.formats.items())
        lines = [
            f"{self.path}",
            f"  network     {self.network}",
            f"  variant     {self.variant}",
            f"  layout      {self.layout}",
            f"  format      {_written(self.format)} ({formats})",
            f"  size        {self.tensors} tensors, {self.parameters:,} parameters, {self.bytes:,} bytes",
        ]
        lines += [f"  not needed  {key}: {why}" for key, why in not_needed(self.redundant)]
        return "\n".join(lines + [f"  problem     {problem}" for problem in self.problems])


def _written(called: str) -> str:
    """A format by the name that `convert` takes, and what it is called, where that is another one."""
    name = accepted(called)
    return called if name in (None, called) else f"{name}: {called}"


@dataclass(frozen=True)
class Inspection:
    """The networks of a file or folder. `str()` is a table, `json()` the same for programs."""

    parts: list[Part]

    def __str__(self) -> str:
        return "\n".join(str(part) for part in self.parts)

    def json(self) -> str:
        return json.dumps([asdict(part) for part in self.parts], indent=1)


def inspect(path: str | Path, *, data: bool = False) -> Inspection:
    """Say what a file, an index, a model folder or a diffusers pipeline folder holds. Reads headers only.

    Args:
        data: read every tensor once, too, and name those that are not finite or all zero.

    Raises:
        CheckpointError: nothing readable is there.
    """
    path = path_of(path)
    found = models_in(path)
    sources = [TensorSource(model.complete()) for model in found] if found else [open_tensors(path)]
    folders = [name for name in FOLDERS if (path / name).is_dir()]
    parts = [part for source in sources for part in _parts(source, data)]
    absent = _absent(parts, path if folders else None)
    if absent:
        parts[0].problems.append(f"missing beside it: {', '.join(absent)}")
    lost = unread(path) if path.is_dir() else {}
    parts[0].problems.extend(f"beside it, {file.relative_to(path)} cannot be read: {why}" for file, why in lost.items())
    return Inspection(parts)


def _parts(source: TensorSource, data: bool) -> list[Part]:
    """The networks in a source: those that cannot be loaded, those that can, and else what there is."""
    parts: list[Part] = []
    rest = dict.fromkeys(source.entries)
    for found in sorted(known_in(source), key=lambda found: -len(found.prefix)):
        keys = [key for key in rest if key.startswith(found.prefix)]
        title = f"{source} ({found.prefix}*)" if found.prefix else None
        chosen = Selection(source, {key[len(found.prefix) :]: key for key in keys}, title)
        parts.append(_part(chosen, found, data))
        for key in keys:
            del rest[key]
    if rest:
        left = Selection(source, {key: key for key in rest}) if parts else source
        try:
            known = [part for part in parts_of(left).values() if part.entries]
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from error
        parts += [_part(part, None, data) for part in known or [left]]
    return parts


def _absent(parts: list[Part], folder: Path | None) -> list[str]:
    """What a pipeline's folder, or a file of several networks, lacks of a whole model of its transformer's family."""
    networks = {part.network for part in parts}
    strange = networks - {network.kind.__name__ for network in NETWORKS}
    drawing = next((network for network in TRANSFORMERS if network.kind.__name__ in networks), None)
    if strange or drawing is None or not (folder or len(networks) > 1):
        return []
    like = next(variant for variant in VARIANTS.values() if drawing.of(variant) is not None)
    wanted = networks_of(like)
    absent = [network.word for network in wanted.values() if network.kind.__name__ not in networks]
    tokenizers = [TOKENIZERS[part][1] for part in wanted if part in TOKENIZERS]
    return absent + [name for name in tokenizers if folder and not (folder / name).is_dir()]


def _part(source: TensorSource, other: Found | None, data: bool) -> Part:
    entries = source.entries
    if other is not None:
        network, variant, layout, problems, redundant = other.what.network, other.name, other.layout, [], {}
    else:
        network, variant, layout, problems, redundant = _recognise(source)
    return Part(
        path=str(source),
        network=network,
        variant=variant,
        layout=layout,
        format=format_of(source),
        formats=formats_in(source),
        tensors=len(entries),
        parameters=sum(math.prod(entry.shape) for entry in contents_of(source).entries.values()),
        bytes=sum(entry.size for entry in entries.values()),
        problems=problems + (_bad_data(source) if data else []),
        redundant=redundant,
    )


def _bad_data(source: TensorSource) -> list[str]:
    """Tensors that are not finite, and weights that are all zero; each is read once, into the same memory."""
    room = torch.empty(max((entry.size for entry in source.entries.values()), default=0), dtype=torch.uint8)
    problems: list[str] = []
    for key, entry in source.entries.items():
        tensor = room[: entry.size].view(entry.dtype).view(entry.shape)
        source.read(key, tensor)
        if not is_finite(tensor):
            problems.append(f"not finite (NaN or infinite): {key}")
        elif tensor.numel() > 1 and not key.endswith("bias") and not room[: entry.size].any():
            problems.append(f"all zero: {key}")
    return problems


def _lora(source: TensorSource) -> tuple[str, str, str, list[str]] | None:
    """Of a LoRA file: its dialect, and which models have its widths. None if it is none."""
    if not is_lora(source):
        return None
    shapes = {key: torch.empty(e.shape, dtype=e.dtype, device="meta") for key, e in source.entries.items()}
    try:
        file = read(shapes)
    except (LoraError, CheckpointError) as error:
        return LORA, "unknown", "unknown", [str(error).removeprefix("the given tensors: ")]
    fits = fitting_models(file.groups, {}).removeprefix("; its widths are those of ")
    networks = {group.place.network for group in file.groups}
    of = {"transformer": "", "clip": " and CLIP", "t5": " and T5"}
    extra = "".join(word for network, word in of.items() if network in networks)
    said = (
        f"for {fits}{extra}" if "transformer" in networks else f"for text encoders only ({extra.removeprefix(' and ')})"
    )
    if fits.startswith("; "):
        said = fits.removeprefix("; ")
    return LORA, said, file.dialect, [f"unused: {key}" for key in file.unmatched]


def _recognise(source: TensorSource) -> tuple[str, str, str, list[str], dict[str, str]]:
    """Network, variant, layout, problems, and what is not needed."""
    kind = network_of(source)
    if kind is None:
        network, variant, layout, problems = _lora(source) or ("unknown", what_is(source) or "unknown", "unknown", [])
        return network, variant, layout, problems, {}
    names, report = _closest(kind, source)
    if len(names) > 1 and BY_KIND[kind].part == "transformer":
        names = _told(names, source)
    if report.problems and (other := _of_another_size(kind, source)):
        return kind.__name__, *other
    problems = [
        f"{what}: {key}"
        for what, keys in report.problems.items()
        for key in (keys if len(keys) <= FEW else [f"{keys[0]} and {len(keys) - 1} more"])
    ]
    if not names:
        return kind.__name__, describe(source), report.layout, problems, report.redundant
    known = " or ".join(names)
    variant = f"none known; closest is {known}" if problems else known
    return kind.__name__, variant, report.layout, problems, report.redundant


def _closest(kind: type[nn.Module], source: TensorSource) -> tuple[list[str], LoadReport]:
    """The variants that a file fits best, none if it has sizes of its own, and what does not fit."""
    record, names = BY_KIND[kind], _by_config(kind)
    candidates = list(names)
    if record.telling:
        try:
            candidates = [transformer_config(record, contents_of(source).entries, source.metadata, to_run=bool(names))]
        except CheckpointError:
            if not candidates:  # a network of no variant yet
                raise
    reports = {config: compare(bare(kind, config), source) for config in candidates}
    least = min(map(_wrong, reports.values()))
    best = [config for config, report in reports.items() if _wrong(report) == least]
    # Shapes do not tell all of a config: of several that fit, the header or the spelling of the names may.
    told = source.metadata.get(record.header)
    stated = [config for config in best if told and in_header(bare(kind, config)).get(record.header) == told]
    usual = [config for config in best if record.usual(config, source.entries)]
    best = stated or usual or best
    return [name for config in best for name in names.get(config, ())], reports[best[0]]


def _by_config(kind: type[nn.Module]) -> dict[Any, list[str]]:
    """Of each config that variants have of a network, their names."""
    names: dict[Any, list[str]] = {}
    for variant in VARIANTS.values():
        if (config := BY_KIND[kind].of(variant)) is not None:
            names.setdefault(config, []).append(variant.name)
    return names


def _told(names: list[str], source: TensorSource) -> list[str]:
    """Of variants with the same tensors the one that a transformer's header, name or pipeline tells; else all."""
    file = source.files[0].path
    folder = file.parent.parent if file.parent.name in FOLDERS else file.parent
    found = which(VARIANTS[names[0]].transformer, source.metadata, file.name, folder)
    return [found.variant.name] if found.told else names


def _of_another_size(kind: type[nn.Module], source: TensorSource) -> tuple[str, str, list[str], dict[str, str]] | None:
    """Of a network whose file tells its sizes, and fits them, though no variant has them: in how many it differs from
    the closest, its layout, no problems, and what is not needed. None if it does not fit."""
    record = BY_KIND[kind]
    if record.telling or record.sizes is None:
        return None
    found: list[tuple[list[str], list[str], Any]] = []
    for config, names in _by_config(kind).items():
        try:
            own = config_in(contents_of(source).entries, source.metadata, config)
        except (CheckpointError, ConfigError):
            continue
        values = [(one.name, getattr(own, one.name), getattr(config, one.name)) for one in fields(own)]
        found.append(([f"{name} {a} instead of {b}" for name, a, b in values if a != b], names, own))
    if not found:
        return None
    other, names, own = min(found, key=lambda one: len(one[0]))
    report = compare(bare(kind, own), source)
    if report.problems or not other:
        return None
    more = f" and {len(other) - FEW} more" if len(other) > FEW else ""
    said = f"of another size than {' or '.join(names)}: {', '.join(other[:FEW])}{more}"
    return said, report.layout, [], report.redundant


def _wrong(report: LoadReport) -> int:
    return sum(len(keys) for keys in report.problems.values())


def fits(source: TensorSource, config: TransformerConfig) -> bool:
    """Whether the sizes in a transformer's file are those of `config`, though tensors may be missing."""
    try:
        return config_of_transformer(contents_of(source).entries, source.metadata, tuple(config.axes_dim)) == config
    except CheckpointError:
        return False


def describe(source: TensorSource) -> str:
    """A few words on what a file holds: a variant, a FLUX.1 of other sizes, another network."""
    others = known_in(source)
    if others:
        return others[0].name
    kind = network_of(source)
    record = BY_KIND[kind] if kind else None
    if record is None or not record.telling:
        return f"the tensors of {kind.__name__}" if kind else what_is(source) or "no network known here"
    try:
        config = transformer_config(record, contents_of(source).entries, source.metadata)
    except CheckpointError as error:
        return str(error)
    names = [variant.name for variant in VARIANTS.values() if record.of(variant) == config]
    guidance = "with" if config.guidance_embed else "without"
    sizes = (
        f"in_channels {config.in_channels}, hidden size {config.hidden_size}, {config.depth} + "
        f"{config.depth_single_blocks} blocks, {guidance} guidance input"
    )
    return " or ".join(names) if names else f"a {record.title} of another size ({sizes})"
