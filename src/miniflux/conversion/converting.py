"""Files of one layout and format into another: one tensor in memory at a time, resumable, read back at the end."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniflux.checkpoints.files import TensorSource, fresh
from miniflux.checkpoints.formats import Format
from miniflux.checkpoints.formats.encodings import Encoding, file_type, find_format
from miniflux.checkpoints.formats.ggml import Ggml
from miniflux.checkpoints.formats.reading import contents_of
from miniflux.checkpoints.layouts import ALL_IN_ONE, DIFFUSERS, OPENAI, ORIGINAL, hidden_size, layouts_of, to_theirs
from miniflux.checkpoints.loading import compare, fetch, is_finite
from miniflux.checkpoints.networks import BY_KIND
from miniflux.checkpoints.opened import PartSource, part_of
from miniflux.checkpoints.report import not_needed
from miniflux.checkpoints.writing import Frame, gguf_frame, safetensors_frame
from miniflux.conversion.inputs import Input, inputs
from miniflux.conversion.outputs import Output, extras, names_file, outputs
from miniflux.conversion.packed_rows import moved
from miniflux.conversion.resumable import JOURNAL, Unfinished
from miniflux.conversion.tensors import Target, Targets, targets
from miniflux.conversion.tokenizer_files import Content
from miniflux.conversion.verifying import difference, rows
from miniflux.errors import CheckpointError, InputError, OutputError

Progress = Callable[[int, int], None]
"""Called after every tensor with (tensors done, tensors in all), each counted when it is written and when it is read
back. May raise to stop; the same call then goes on from there."""

SHARD = 10_000_000_000  # bytes of a shard in diffusers' layout
# What GGUF files call the networks, and files that are mostly of one float.


@dataclass(frozen=True)
class Layer:
    """What the conversion did to one tensor.

    Attributes:
        name: in the new file.
        format: how it is stored there.
        error: relative Frobenius norm, ||new - old|| / ||old||.
    """

    name: str
    format: str
    error: float


@dataclass
class Conversion:
    """What was written. `str()` is the report.

    Attributes:
        path: the file or folder.
        networks: what was written, in words.
        bytes_before, bytes_after: of all tensors.
        formats: number of tensors by how they are stored now.
        layers: those whose numbers changed, the worst first.
        kept: weights that the format cannot hold, with what was done instead.
        left_out: tensors that no network needs, and files that are none of a pipeline's networks, with the reason.
        missing: what a pipeline would need beside the networks that were written, with the reason.
        beside: what was written beside them: tokenizers, scheduler, index.
        resumed: how many tensors an earlier, interrupted run had written.
    """

    path: Path
    networks: list[str]
    bytes_before: int
    bytes_after: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    layers: list[Layer] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    resumed: int = 0

    def report(self, worst: int | None = None) -> str:
        """Sums, then the error of every layer (or of the `worst` ones)."""
        formats = ", ".join(f"{count} x {name}" for name, count in self.formats.most_common())
        share = f"{100 * self.bytes_after / self.bytes_before:.0f} %"
        written = ", ".join(self.networks)
        sizes = f"{self.bytes_after:,} bytes, {share} of {self.bytes_before:,}"
        lines = [f"{self.path}: {written}; {formats}; {sizes}; read back"]
        if self.beside:
            lines.append(f"beside: {', '.join(self.beside)}")
        if self.resumed:
            lines.append(f"{self.resumed} tensors were there from an interrupted run")
        counts = Counter(self.kept.values())
        lines += [f"{count} weights {reason}" for reason, count in counts.items()]
        lines += [f"left out: {key} ({why})" for key, why in not_needed(self.left_out)]
        lines += [f"missing for a whole pipeline: {what} ({why})" for what, why in self.missing.items()]
        if not self.layers:
            return "\n".join([*lines, "every number is the same"])
        shown = self.layers[:worst]
        width = max((len(layer.name) for layer in shown), default=0)
        lines.append(f"relative error by layer{'' if worst is None else f', the worst {len(shown)}'}:")
        return "\n".join(lines + [f"  {layer.error:.2e}  {layer.name:<{width}}  {layer.format}" for layer in shown])

    def __str__(self) -> str:
        return self.report()


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: str | None = None,
    format: str | None = None,
    shard_bytes: int = SHARD,
    progress: Progress | None = None,
) -> Conversion:
    """Write the networks of a file or folder in another layout, another format, or both.

    The result is read back before it gets its name: what is not changed is compared bit by bit, what is packed with
    the bytes that the packer made, and its error is measured. If it is interrupted, what is done stays in a folder
    beside the target (its name and `.part`), and the same call goes on from there.

    Args:
        source: a file, an index, a folder with shards, or a model folder in diffusers' layout.
        target: ends in `.safetensors` or `.gguf`; a name without ending becomes a folder.
        layout: `original`, `diffusers`, `all-in-one` or another layout of the network; None keeps it.
        format: a name of `targets.writable`; None leaves every tensor as it is stored, packed weights included: their
            rows are taken apart or put together as the layout wants it, without a change of any number.
        shard_bytes: where a network in a folder is split into several files.

    Raises:
        InputError: an unknown name, a combination that cannot be written, a target that is the source, or no format
            and packed weights that cannot stay as they are; the message lists formats that can be written instead.
        CheckpointError: the source cannot be read, or holds tensors that no network needs, misses some, or numbers
            that are not finite or leave the range of float16.
        OutputError: the target cannot be written, or was not read back as it was written.
        MissingExtraError: GGUF without the package `gguf`.
    """
    # 1. Which networks, and what becomes of them.
    target, read = Path(target), inputs(source)
    if target.name in ("", ".."):
        raise InputError(f"{target}: give the result a name of its own")
    found = read.networks
    encoding = None if format is None else find_format(format)
    several = len(found) > 1
    networks = [_targets(part, layout, encoding, _is_gguf(target, encoding, part, several)) for part in found]
    before = sum(entry.size for part in found for entry in part.source.entries.values())
    result = Conversion(target, [part.word for part in found], before, left_out=read.left_out)
    for part, network in zip(found, networks, strict=True):
        result.left_out |= compare(network.network, part.source).redundant
        result.kept |= network.kept
    # 2. Which files, and where every tensor lies in them.
    files = outputs(target, found, networks, layout, shard_bytes)
    _check_place(target, found)
    frames = {file.name: _frame(file, encoding, found) for file in files}
    beside, result.missing = ({}, {}) if names_file(target) else extras(files, read, networks, layout)
    result.beside = list(dict.fromkeys(place.partition("/")[0] for place in beside if _is_shared(place, networks)))
    job = _fingerprint(found, frames)
    work = Unfinished.open(target.with_name(target.name + ".part"), frames, job)
    result.resumed = work.resumed
    # 3. Write, 4. read back, 5. give it its name. What was interrupted stays; what is wrong does not.
    done = _Count(2 * sum(len(network.tensors) for network in networks), progress)
    home = {(id(net), item.key): file.name for file in files for net, item in file.items}
    try:
        for file in files:
            for key, tensor in file.markers.items():
                work.write(file.name, key, {key: [tensor]})
        for network in networks:
            _write(network, work, home, done)
        for network, part in zip(networks, found, strict=True):
            names = dict.fromkeys(home[id(network), item.key] for item in network.tensors)
            written = TensorSource([work.folder / name for name in names])
            _read_back(network, part, written, work, home, result, done)
        for place, content in beside.items():
            _extra(work.folder / place, content)
        result.bytes_after = sum(frame.size - len(frame.head) for frame in frames.values())
        result.layers.sort(key=lambda layer: -layer.error)
        _finish(work, target, [file.name for file in files])
    except CheckpointError:
        work.discard()
        raise
    return result


def _is_shared(place: str, networks: list[Targets]) -> bool:
    """Whether a file beside the networks is the whole model's: not a network's config or index."""
    return (len(networks) > 1 and not place.endswith(("config.json", ".index.json"))) or place.startswith("scheduler/")


def _is_gguf(target: Path, encoding: Encoding | None, part: Input, several: bool) -> bool:
    """Which kind of file a network becomes, by the ending of the name; in folders by the format. The autoencoder, which
    is never packed, stays out of GGUF there."""
    block = isinstance(encoding, Ggml)
    if not names_file(target):
        kept = [stored.format for stored in contents_of(part.source).stored.values()]
        packed = block and not (several and not BY_KIND[type(part.network)].packed)
        return packed or (encoding is None and any(isinstance(form, Ggml) for form in kept))
    gguf = target.suffix == ".gguf"
    if gguf and isinstance(encoding, Format) and not block:
        raise InputError(f"{target}: {encoding.name} is written to .safetensors files")
    if block and not gguf:
        raise InputError(f"{target}: {encoding.name} is written to .gguf files")
    return gguf


def _targets(part: Input, layout: str | None, encoding: Encoding | None, gguf: bool) -> Targets:
    """What becomes of one network, checked against its file."""
    report = compare(part.network, part.source)
    if report.problems:
        raise CheckpointError(str(report))
    if layout is None:
        after = ALL_IN_ONE if report.layout == ALL_IN_ONE or part.together else report.layout
        after = ORIGINAL if after == OPENAI else after
    elif layout == OPENAI:
        written = ", ".join((ORIGINAL, DIFFUSERS, ALL_IN_ONE))
        raise InputError(f"the layout {OPENAI!r} is read, not written; written are {written}")
    elif layout == DIFFUSERS and DIFFUSERS not in layouts_of(part.network):
        after = ORIGINAL  # of the text encoders: diffusers' folders hold them so
    else:
        after = layout
    if after not in layouts_of(part.network):
        known = ", ".join(layouts_of(part.network))
        raise InputError(f"{type(part.network).__name__} has no layout {after!r}; known: {known}")
    return targets(part.network, part.source, (part.layout, after), encoding, gguf)


def _check_place(target: Path, found: list[Input]) -> None:
    """Refuse to write over what is read, or among what is there."""
    read = {file.path.resolve() for part in found for file in part.source.files}
    if target.resolve() in read or any(target.resolve() == path.parent for path in read):
        raise InputError(f"{target}: is what is read from; give the result another name")
    if not names_file(target) and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target}: is there already, and not empty")
    if names_file(target) and target.is_dir():
        raise OutputError(f"{target}: is a folder")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: cannot be written: there is no folder {target.parent}")


def _frame(file: Output, encoding: Encoding | None, found: list[Input]) -> Frame:
    """Head and places of a file."""
    inside = {type(network.network) for network, _ in file.items}
    kinds = {part: kind for _, item in file.items for part, kind in item.parts.items()}
    kinds |= {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in file.markers.items()}
    layers: dict[Format, list[str]] = {}
    for _, item in file.items:
        if isinstance(item.encoding, Format):
            layers.setdefault(item.encoding, []).append(item.layer)
    metadata: dict[str, str] = {}
    for part in found:
        metadata |= part.metadata if type(part.network) in inside else {}
    for form, names in layers.items():
        metadata |= form.header(names)
    if not file.name.endswith(".gguf"):
        return safetensors_frame(file.name, kinds, {"format": "pt", **metadata})
    blocks = {item.key: item.encoding.name for _, item in file.items if isinstance(item.encoding, Ggml)}
    network = file.items[0][0].network
    architecture = BY_KIND[type(network)].architecture(network.config) or "flux"
    most = Counter(item.encoding for _, item in file.items if len(item.shape) > 1).most_common(1)[0][0]
    called = encoding if isinstance(encoding, Ggml) else most
    return gguf_frame(file.name, kinds, blocks, metadata, (architecture, file_type(called)))


def _fingerprint(found: list[Input], frames: Mapping[str, Frame]) -> str:
    """Tells a job from every other: what is read, and what is written."""
    digest = hashlib.sha256()
    for path in sorted({file.path.resolve() for part in found for file in part.source.files}):
        about = path.stat()
        digest.update(f"{path} {about.st_size} {about.st_mtime_ns}\n".encode())
    for name, frame in frames.items():
        digest.update(f"{name} {frame.size}\n".encode() + frame.head)
    return digest.hexdigest()


class _Count:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, 0, progress

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


Home = Mapping[tuple[int, str], str]


def _groups(network: Targets) -> Iterator[list[Target]]:
    """What each of the network's tensors becomes."""
    for _, group in itertools.groupby(network.tensors, key=lambda item: item.ours):
        yield list(group)


def _tensors(network: Targets, group: list[Target]) -> list[Tensor]:
    """What one of the network's tensors becomes, in numbers: in memory of its own, which mapped pages do not add to."""
    ours, dtypes = group[0].ours, {item.was for item in group}
    shape, was = network.shapes[ours], dtypes.pop() if len(dtypes) == 1 else None
    wide = torch.float32 if was is None else torch.bfloat16 if was.itemsize == 1 else was  # float8 is exact in it
    weight = fetch(network.source, network.before[ours], shape, out=fresh(shape, wide))
    after = network.after[ours]
    return to_theirs(weight, after, hidden_size(network.network))


def _write(network: Targets, work: Unfinished, home: Home, done: _Count) -> None:
    for group in _groups(network):
        missing = [(home[id(network), item.key], item.key) not in work.done for item in group]
        if any(missing):
            _write_group(network, group, missing, work, home)
        done.add(len(group))


def _write_group(network: Targets, group: list[Target], missing: list[bool], work: Unfinished, home: Home) -> None:
    """A function of its own, so that a tensor is let go of before the next is read."""
    for item, numbers, wanted in zip(group, _tensors(network, group), missing, strict=True):
        if not is_finite(numbers):
            raise CheckpointError(f"{network.source}: {item.ours} is not finite (NaN or infinite)")
        if wanted:
            work.write(home[id(network), item.key], item.key, _encoded(network.source, item, numbers))


def _encoded(source: TensorSource, item: Target, numbers: Tensor) -> dict[str, Any]:
    """The parts of a tensor of the new file, each in pieces."""
    if isinstance(item.encoding, Format):
        parts = moved(source, item.runs) if item.runs else item.encoding.pack(numbers)
        return {f"{item.layer}.{name}": [part] for name, part in parts.items()}
    return {item.key: _cast(item, item.encoding, numbers)}


def _cast(item: Target, dtype: torch.dtype, numbers: Tensor) -> Iterator[Tensor]:
    for some in rows(numbers.shape):
        piece = numbers[some].to(dtype) if numbers.ndim else numbers.to(dtype)
        if not is_finite(piece):
            raise CheckpointError(f"{item.key}: has numbers beyond the range of {str(dtype).removeprefix('torch.')}")
        yield piece


def _read_back(
    network: Targets,
    part: Input,
    written: TensorSource,
    work: Unfinished,
    home: Home,
    result: Conversion,
    done: _Count,
) -> None:
    """Compare what is in the files with what was read, and with what was written."""
    view = part_of(written, type(network.network))
    prefix = view.prefix if isinstance(view, PartSource) else ""
    report = compare(part.network, view)
    if report.problems:
        work.discard()
        raise OutputError(f"{result.path}: was not read back as it was written: {report}")
    for group in _groups(network):
        for item, error in _errors(network, group, view, prefix, work, home):
            if error is None or (item.lossless and error):
                work.discard()
                raise OutputError(f"{result.path}: {item.key} was not read back as it was written")
            result.formats[item.label] += 1
            if error:
                result.layers.append(Layer(item.key, item.label, error))
        done.add(len(group))


def _errors(
    network: Targets, group: list[Target], view: TensorSource, prefix: str, work: Unfinished, home: Home
) -> list[tuple[Target, float | None]]:
    """How far each part of a tensor is from what it was; None if its bytes are not those that were written."""
    found: list[tuple[Target, float | None]] = []
    for item, numbers in zip(group, _tensors(network, group), strict=True):
        name = home[id(network), item.key]
        same = all(work.checksum(name, key) == value for key, value in work.done[name, item.key].items())
        found.append((item, difference(view, item.key.removeprefix(prefix), item, numbers) if same else None))
    return found


def _extra(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, "utf-8")


def _finish(work: Unfinished, target: Path, names: list[str]) -> None:
    """Give the result its name."""
    try:
        if names_file(target):
            (work.folder / names[0]).replace(target)
            work.discard()
        else:
            (work.folder / JOURNAL).unlink()
            if target.is_dir():
                target.rmdir()
            work.folder.replace(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
