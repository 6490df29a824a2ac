"""Files into modules: strict, without a copy where the layout is the network's own."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from miniflux.checkpoints.files import TensorSource, open_tensors
from miniflux.checkpoints.layouts import REDUNDANT, Origin, detect, hidden_size, origins, their_shape_fits, to_ours
from miniflux.errors import CheckpointError

log = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """What became of every tensor of a file and of a network.

    Attributes:
        source: the file or files.
        layout: the naming that was recognised.
        dtypes: how many tensors the file stores in each dtype.
        used: keys of the file that went into the network.
        redundant: keys of the file that the network does not need, with the reason.
        missing: keys of the network that the file lacks.
        unused: keys of the file that nothing asked for.
        misshapen: "key: the file's shape, the expected shape".
        not_floating: "key: dtype" of weights stored as whole numbers, such as those of quantised files.
        bad: keys of the network whose values are not finite.
    """

    source: str
    layout: str
    dtypes: dict[str, int] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    redundant: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    not_floating: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    @property
    def problems(self) -> dict[str, list[str]]:
        found = {
            "missing": self.missing,
            "unused": self.unused,
            "misshapen": self.misshapen,
            "not floating-point": self.not_floating,
            "not finite (NaN or infinite)": self.bad,
        }
        return {name: keys for name, keys in found.items() if keys}

    def __str__(self) -> str:
        """A first line that sums up, then every key that is not as it should be."""
        counts = [f"{len(keys)} {name}, such as {keys[0]}" for name, keys in self.problems.items()]
        lines = [f"{self.source}: {'; '.join(counts) or f'{len(self.used)} tensors, all used'} (layout: {self.layout})"]
        lines += [f"  {name}: {key}" for name, keys in self.problems.items() for key in keys]
        lines += [f"  not needed: {key} ({why})" for key, why in self.redundant.items()]
        return "\n".join(lines)


def compare(module: nn.Module, source: Mapping[str, Tensor], layout: str | None = None) -> LoadReport:
    """Compare the tensors of a file with those a network needs, by name and shape; no data is read."""
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    entries = source.entries if isinstance(source, TensorSource) else source
    layout = layout or detect(module, entries)
    report = LoadReport(str(source) if isinstance(source, TensorSource) else "the given tensors", layout)
    report.dtypes = dict(Counter(str(entry.dtype).removeprefix("torch.") for entry in entries.values()))
    for key, origin in origins(module, layout).items():
        absent = [name for name in origin.keys if name not in entries]
        report.missing += [key if layout == "original" else f"{key} (here: {name})" for name in absent]
        if absent:
            continue
        report.used += origin.keys
        theirs = [tuple(entries[name].shape) for name in origin.keys]
        if not their_shape_fits(theirs, origin.how, shapes[key], hidden_size(module)):
            given = " + ".join(str(list(shape)) for shape in theirs)
            report.misshapen.append(f"{key}: {given} in the file, {list(shapes[key])} expected")
        kinds = {entries[name].dtype for name in origin.keys if not entries[name].dtype.is_floating_point}
        report.not_floating += [f"{key}: {str(kind).removeprefix('torch.')}" for kind in kinds]
    used, redundant = set(report.used), REDUNDANT.get(type(module), {})
    for key in entries:
        if key not in used:
            if key in redundant:
                report.redundant[key] = redundant[key]
            else:
                report.unused.append(key)
    return report


def load_into(
    module: nn.Module,
    path_or_tensors: str | Path | Mapping[str, Tensor],
    *,
    layout: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LoadReport:
    """Fill a network, usually built on the meta device, from a file, a folder with shards, or a dict of tensors.

    Tensors are assigned, not copied: on the CPU in the file's own layout and dtype they stay views of the mapped file.
    Peak memory is the size of the result plus one tensor.

    Args:
        layout: name of the key layout; None to recognise it.
        device, dtype: where the tensors go and what they become; None leaves them on the CPU, in the file's dtype.

    Returns:
        The report; every tensor was used.

    Raises:
        CheckpointError: a file cannot be read, or any tensor is missing, unused, misshapen or not finite. The error's
            text is the report: a summary line, then every key. The module is left as it was.
    """
    source = path_or_tensors if isinstance(path_or_tensors, Mapping) else open_tensors(path_or_tensors)
    report = compare(module, source, layout)
    if report.problems:
        raise CheckpointError(str(report))
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    for key, origin in origins(module, report.layout).items():
        tensor = _fetch(source, origin, shapes[key], dtype).to(dtype=dtype)
        if not is_finite(tensor):  # checked in its new dtype, because float16 may overflow
            report.bad.append(key)
        loaded[key] = tensor.to(device)
    if report.bad:
        raise CheckpointError(str(report))
    module.load_state_dict(loaded, assign=True)
    for why in report.redundant.items():
        log.info("%s: %s is not needed: %s", report.source, *why)
    return report


def _fetch(source: Mapping[str, Tensor], origin: Origin, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """One of our tensors. Views of the mapped file where possible; where bytes must move anyway, they are read into
    fresh memory, so that the pages of the file do not count twice."""
    if not isinstance(source, TensorSource):
        return to_ours([source[key] for key in origin.keys], origin.how, shape)
    entries = [source.entries[key] for key in origin.keys]
    if origin.how == "rows":
        kinds = {entry.dtype for entry in entries}
        stacked = torch.empty(shape, dtype=kinds.pop() if len(kinds) == 1 else torch.float32)
        parts = stacked.split([entry.shape[0] for entry in entries])
        for key, entry, part in zip(origin.keys, entries, parts, strict=True):
            if entry.dtype == part.dtype:
                source.read(key, part)
            else:
                part.copy_(source[key])
        return stacked
    (key,), (entry,) = origin.keys, entries
    if origin.how != "swap halves" and dtype in (None, entry.dtype):
        return to_ours([source[key]], origin.how, shape)
    moved = torch.empty(entry.shape, dtype=entry.dtype)
    source.read(key, moved)
    return to_ours([moved], origin.how, shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: one pass at memory speed, because minimum and maximum carry NaN along."""
    if tensor.is_meta or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no minimum
        tensor = tensor.float()
    return all(bool(torch.isfinite(bound)) for bound in tensor.aminmax())
