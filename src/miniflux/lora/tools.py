"""Files from files: a base with LoRAs merged in, a LoRA in other names, a LoRA taken out of a tuned model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from miniflux.checkpoints.configs import config_of_transformer
from miniflux.checkpoints.files import TensorSource, open_tensors
from miniflux.checkpoints.folders import path_of
from miniflux.checkpoints.formats.reading import contents_of
from miniflux.checkpoints.loading import bare, compare, take_packed_layers
from miniflux.checkpoints.networks import BY_CONFIG, BY_KIND
from miniflux.checkpoints.opened import known_in, layout_in, network_of, transformer_of
from miniflux.checkpoints.saving import checkpoint_path
from miniflux.checkpoints.writing import write_frame
from miniflux.disk import write_beside
from miniflux.errors import CheckpointError, InputError, LoraError, OutputError
from miniflux.lora.adapters import Scale, checked_scale, scale_of
from miniflux.lora.attaching import resolved
from miniflux.lora.bases import bases_of
from miniflux.lora.dialects import NORM_PARAMETER
from miniflux.lora.encoding import WRITABLE, Contents, encode, write
from miniflux.lora.files import LoraFile, read, what_is
from miniflux.lora.fitting import WIDENED, fitted
from miniflux.lora.layer import Dense, LowRank
from miniflux.lora.mergedfile import MergedFile, Weights
from miniflux.lora.models import stand_ins
from miniflux.lora.packing import report
from miniflux.lora.receipt import Receipt
from miniflux.models.transformer import Transformer
from miniflux.variants import VARIANTS, variant

log = logging.getLogger(__name__)


def network_of_file(source: TensorSource) -> tuple[Transformer, str]:
    """The transformer that a checkpoint is of, on the meta device, and the layout of its names.

    Raises:
        CheckpointError: the file holds no transformer, or not all of one.
    """
    try:
        config = config_of_transformer(contents_of(source).entries, source.metadata, to_run=False)
    except CheckpointError as error:
        found = network_of(source)
        is_one = found is not None and BY_KIND[found].part == "transformer"
        other = None if known_in(source) or is_one else what_is(source)
        why = f"expected a transformer of FLUX, found {other}" if other else error
        raise CheckpointError(f"{source}: {why}") from error
    network = cast(Transformer, bare(BY_CONFIG[type(config)].kind, config))
    report = compare(network, source)
    if report.problems:
        raise CheckpointError(str(report))
    return network, layout_in(source, network)


def merge_files(
    base: str | Path,
    loras: Sequence[tuple[str | Path | Mapping[str, Tensor], Scale]],
    path: str | Path,
    *,
    pack: bool = False,
) -> list[Receipt]:
    """Write a checkpoint with LoRAs merged in, in the base's own layout and dtypes, one tensor in memory at a time.

    Packed weights that change become float16, whose rounding is eight times as fine as that of bfloat16; those that do
    not keep their bytes.

    Args:
        base: a transformer: a file, an index or folder of shards; other networks in them are copied.
        loras: what `attach` takes, each with its scale.
        path: ends in `.safetensors`; in `.gguf` if the base does and holds packed blocks.
        pack: pack such weights again, in the format that they were in: what is smaller than its rounding is lost, see
            `merge`. Better is to merge into the wide file that the base was made of, and to `convert` the result.

    Raises:
        CheckpointError: the base cannot be read or is no transformer.
        LoraError: a LoRA does not fit; or it changes text encoders, which the base does not hold; or a weight is to be
            packed again in a format that cannot hold it; or the sum is beyond the range of its dtype.
        OutputError: the path cannot be written.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        checkpoint_path(path)
    source = transformer_of(open_tensors(path_of(base)))
    blocks = any(entry.block for entry in source.entries.values())
    if blocks != (path.suffix == ".gguf"):
        ending = ".gguf" if blocks else ".safetensors"
        raise OutputError(f"{path}: what is merged into {source} is written to a file that ends in {ending}")
    network, layout = network_of_file(source)
    weights = Weights(network, source, layout)
    take_packed_layers(network, source)  # on the meta device, until they are filled
    files = [read(resolved(lora), type(network)) for lora, _ in loras]
    for group in (group for file in files for group in file.groups):
        if "magnitude" in group.tensors:  # DoRA looks at the weight that it changes
            weights.fill(f"{group.place.target}.weight")
        elif group.form == "diff":  # the difference of a norm is added to it at once
            weights.fill(f"{group.place.target}.{NORM_PARAMETER}")
    plans = [fitted({"transformer": network}, file, strict=True) for file in files]
    for plan, (_, scale) in zip(plans, loras, strict=True):
        changes = plan.changes.get("transformer", [])
        scale = checked_scale(scale, [layer for layer, _ in changes], plan.file.source)
        scales = [scale_of(scale, layer) for layer, _ in changes]
        for (layer, change), value in zip(changes, scales, strict=True):
            weights.changes.setdefault(layer, []).append((change, value))
        on = any(scales) or (not scales and scale != 0)
        for (module, parameter), tensor in plan.replaced.get("transformer", {}).items():
            if not on and module != WIDENED:
                continue
            if f"{module}.{parameter}" in weights.replaced:
                raise LoraError(f"{plan.file.source}: {module} is replaced by another of the LoRAs already")
            weights.replaced[f"{module}.{parameter}"] = tensor
    merged = MergedFile(weights, pack)
    frame = merged.frame(path.name, gguf=blocks)
    write_beside(path, lambda beside: write_frame(beside, frame, merged.tensors()))
    report(merged.roundings)
    return [plan.receipt(file.source, {"transformer": network}) for plan, file in zip(plans, files, strict=True)]


def inspect(path_or_tensors: str | Path | Mapping[str, Tensor], model: str | None = None) -> Receipt:
    """The receipt of a LoRA file, without loading a model.

    The changes are compared with the weights of the model where its files are on this machine: read one by one, when
    the receipt is asked for them.

    Args:
        model: the variant to compare it with; None for the first that it fits and whose weights are here, else the
            first that it fits. The receipt names all that it fits.

    Raises:
        CheckpointError: the file cannot be read.
        LoraError: it is damaged, no LoRA, or fits no model; the message says which it was made for.
        InputError: an unknown model.
    """
    file = read(resolved(path_or_tensors))
    fitting = _fitting(file) if model is None else [variant(model).name]
    bases = {name: bases_of(name, stand_ins(name)) for name in fitting}
    changed = {group.place.network for group in file.groups}
    chosen = next((name for name in fitting if changed <= bases[name].keys()), fitting[0])
    networks = stand_ins(chosen)
    for group in file.groups:  # DoRA looks at the weight that it changes
        layer, base = group.place.target, bases[chosen].get(group.place.network)
        weight = base(layer) if base is not None and "magnitude" in group.tensors else None
        if weight is not None:
            owner = networks[group.place.network].get_submodule(layer)
            owner.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    receipt = fitted(networks, file, strict=True).receipt(f"{file.source} for {chosen}", networks)
    modules = [
        replace(module, base=partial(base, group.place.target))
        if (base := bases[chosen].get(group.place.network)) is not None
        else module
        for module, group in zip(receipt.modules, file.groups, strict=True)
    ]
    others = tuple(name for name in fitting if name != chosen)
    return replace(receipt, modules=modules, fits=(chosen, *others))


def _fitting(file: LoraFile) -> list[str]:
    """The variants whose layers and widths a file fits, in order.

    Raises:
        LoraError: none; the message is that of the variant that comes nearest.
    """
    fitting: list[str] = []
    errors: list[LoraError] = []
    known: dict[tuple[object, ...], LoraError | None] = {}  # many variants have the same sizes
    for name, about in VARIANTS.items():
        sizes = (about.transformer, about.clip, about.t5)
        if sizes not in known:
            try:
                fitted(stand_ins(name), file, strict=True)
                known[sizes] = None
            except LoraError as error:
                known[sizes] = error
                errors.append(error)
        if known[sizes] is None:
            fitting.append(name)
    if not fitting:
        raise min(errors, key=lambda error: str(error).count("\n"))
    return fitting


def fits(path_or_tensors: str | Path | Mapping[str, Tensor]) -> tuple[str, ...]:
    """The variants whose layers and widths a LoRA file fits, in order: at least one.

    Raises:
        CheckpointError: the file cannot be read.
        LoraError: it is damaged, no LoRA, or fits no model; the message says which it was made for.
    """
    return tuple(_fitting(read(resolved(path_or_tensors))))


def convert(
    path_or_tensors: str | Path | Mapping[str, Tensor], path: str | Path, dialect: str, model: str | None = None
) -> int:
    """Write a LoRA file in the names of another dialect; every change stays what it is to float32 rounding.

    Args:
        dialect: diffusers, kohya, comfyui or xlabs.
        model: the variant that it is for, whose widths say where fused layers divide; None for the first that it fits.
            Where it fits several, they have the same widths there, and the file is the same for all.

    Returns:
        The number of tensors written.

    Raises:
        LoraError: the file does not fit the model, or holds something that this dialect cannot say exactly.
        InputError: an unknown dialect or model.
        OutputError: the path cannot be written.
    """
    path, file = checkpoint_path(path), read(resolved(path_or_tensors))
    if dialect not in WRITABLE:
        raise InputError(f"unknown dialect {dialect!r} to write; known: {', '.join(WRITABLE)}")
    fitting = _fitting(file) if model is None else [model]
    networks = stand_ins(fitting[0])
    plan = fitted(networks, file, strict=True)
    log.info("%s: for %s", file.source, " or ".join(fitting))
    shifted = [group.module for group, change in plan.groups if change is None and group.form == "diff"]
    if shifted:
        raise LoraError(f"{plan.file.source}: {shifted[0]} is the difference of a norm, which {dialect} cannot say")
    return write(encode(Contents.of_plan(plan), dialect, networks), path)


@dataclass(frozen=True)
class Extracted:
    """What `extract` found in one module.

    Attributes:
        target: the module.
        norm: Frobenius norm of the whole difference.
        captured: share of its square that the chosen rank holds, 0 to 1.
    """

    target: str
    norm: float
    captured: float


def extract(
    base: str | Path, tuned: str | Path, path: str | Path, rank: int = 32, dialect: str = "kohya"
) -> list[Extracted]:
    """The difference of two checkpoints as a LoRA: the best approximation of each matrix at this rank (SVD).

    Differences of biases and norms are stored whole. Modules that do not differ are left out.

    Raises:
        CheckpointError: a file cannot be read, or they are transformers of different sizes.
        InputError: rank is not a positive number, or the files do not differ; or an unknown dialect.
        LoraError: the dialect cannot say a difference (a norm in xlabs).
        OutputError: the path cannot be written.
    """
    path = checkpoint_path(path)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"rank must be a whole number of at least 1, got {rank!r}")
    sources = [transformer_of(open_tensors(path_of(file))) for file in (base, tuned)]
    (before, layout), (after, other) = (network_of_file(source) for source in sources)
    old, new = Weights(before, sources[0], layout), Weights(after, sources[1], other)
    differing = sorted(
        key
        for key in {*old.shapes, *new.shapes}
        if old.shapes.get(key) != new.shapes.get(key)
        and not (key == f"{WIDENED}.weight" and old.shapes[key] < new.shapes[key])
    )
    if differing:
        raise CheckpointError(f"{tuned} and {base} are transformers of different sizes: {differing[0]} differs")
    contents = Contents()
    found: list[Extracted] = []
    for key in old.shapes:
        module, _, parameter = key.rpartition(".")
        a, b = old.ours(key).float(), new.ours(key).float()
        if parameter == "weight" and a.shape != b.shape:
            a = torch.cat([a, a.new_zeros(len(a), b.shape[1] - a.shape[1])], dim=1)
        difference = b - a
        norm = float(torch.linalg.vector_norm(difference.double()))
        if norm == 0:
            continue
        rows = (0, len(difference))
        if parameter == NORM_PARAMETER:
            contents.replaced["transformer", module] = new.ours(key)
            found.append(Extracted(module, norm, 1.0))
        elif parameter == "bias":
            contents.add("transformer", module, Dense(None, rows, difference))
        else:
            up, down, captured = _best_pair(difference, rank)
            contents.add("transformer", module, LowRank(down, up, rows))
            found.append(Extracted(module, norm, captured))
    if not contents.changes and not contents.replaced:
        raise InputError(f"{tuned} and {base} hold the same numbers: there is nothing to extract")
    write(encode(contents, dialect, {"transformer": after}), path)
    return found


EXACT_SVD = 1024  # matrices whose smaller side is below this are decomposed whole; others by random projection


def _best_pair(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(up, down, share of the squared norm) of the best approximation of a rank."""
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= EXACT_SVD:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=6)
        vh = v.T
    root = s[:rank].sqrt()
    captured = float(s[:rank].double().square().sum() / matrix.double().square().sum())
    return (u[:, :rank] * root).contiguous(), (root[:, None] * vh[:rank]).contiguous(), min(1.0, captured)
