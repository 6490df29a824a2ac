"""What becomes of each tensor when a file is converted: its name in the new layout, and how it is stored.

Which weights are packed is a table: those of the blocks' linears, where nearly all numbers are. What stays as it is:

- the embedders and the last layer (`img_in`, `txt_in`, `time_in`, `vector_in`, `guidance_in`, `final_layer`): 0.5 % of
  FLUX.1's weights, and everything passes through them. city96's GGUF files and ComfyUI's scaled float8 files keep them;
- norms and biases: vectors, which cost nothing;
- embeddings and T5's position biases, which are looked up, not multiplied;
- the autoencoder: its convolutions decide about every pixel, and it has 0.7 % of the size.

The modulation is packed, as in those files: it has a quarter of FLUX.1's weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from miniflux.checkpoints.files import TensorSource
from miniflux.checkpoints.formats import FORMATS, Format
from miniflux.checkpoints.formats.base import WEIGHT, Kind
from miniflux.checkpoints.formats.encodings import FLOATS, Encoding, kinds_of, writable
from miniflux.checkpoints.formats.ggml import Ggml
from miniflux.checkpoints.formats.reading import contents_of
from miniflux.checkpoints.formats.scaled import PLAIN
from miniflux.checkpoints.layouts import Counterpart, counterparts, hidden_size, to_theirs
from miniflux.checkpoints.networks import BY_KIND
from miniflux.conversion.packed_rows import Stretch, obstacle, runs_of, shared_out
from miniflux.errors import InputError

# What llama.cpp's quantiser takes for matrices whose rows are no multiple of 256 (`llama-quant.cpp`).
FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", **dict.fromkeys(("IQ4_XS", "Q3_K", "Q2_K"), "IQ4_NL")}


@dataclass(frozen=True)
class Target:
    """One tensor of the new file, packed or not.

    Attributes:
        key: its name there.
        ours: the tensor of the network that it is, or is a part of.
        shape: of its numbers.
        encoding: how they are stored.
        parts: what is written, by full name: dtype and shape of each.
        was: the dtype in the old file; None where it was packed.
        runs: rows of packed weights of the old file, which it is made of as they are.
    """

    key: str
    ours: str
    shape: tuple[int, ...]
    encoding: Encoding
    parts: dict[str, Kind]
    was: torch.dtype | None
    runs: tuple[Stretch, ...] = ()

    @property
    def layer(self) -> str:
        """The name that parts of a packed weight have in common."""
        return self.key.removesuffix("." + WEIGHT)

    @property
    def label(self) -> str:
        """What people call the encoding."""
        encoding = self.encoding
        return str(encoding).removeprefix("torch.") if isinstance(encoding, torch.dtype) else encoding.label

    @property
    def lossless(self) -> bool:
        """Whether every number of the old file can be said."""
        if self.runs:
            return True
        return self.was is not None and isinstance(self.encoding, torch.dtype) and holds(self.encoding, self.was)


@dataclass(frozen=True)
class Targets:
    """What a network becomes.

    Attributes:
        network: on the meta device.
        source: the old file.
        layout: of the new one.
        shapes: of the network's tensors.
        tensors: in the order of the network's own; some of those become several.
        before, after: which keys of the old and the new file each tensor of the network has.
        gguf: whether it is written to a GGUF file.
        kept: weights that the format was meant for and cannot hold, with what is done instead.
    """

    network: nn.Module
    source: TensorSource
    layout: str
    shapes: dict[str, tuple[int, ...]]
    tensors: list[Target]
    before: dict[str, Counterpart]
    after: dict[str, Counterpart]
    gguf: bool = False
    kept: dict[str, str] = field(default_factory=dict)


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of one floating dtype is one of the other. Whole numbers, which are counts, stay as they
    are."""
    if not narrow.is_floating_point:
        return wide == narrow
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max and a.smallest_normal <= b.smallest_normal


def targets(
    network: nn.Module, source: TensorSource, layouts: tuple[str, str], encoding: Encoding | None, gguf: bool
) -> Targets:
    """What becomes of each tensor of a network.

    Args:
        network: on the meta device, of the sizes in the file.
        layouts: that of the source, and that of the result.
        encoding: for numbers of all tensors, or for the weights that are packed; None leaves all as it is stored.
        gguf: whether it is written to a GGUF file.

    Raises:
        InputError: there is no encoding, and a packed weight cannot stay as it is.
    """
    before, after = (counterparts(network, layout) for layout in layouts)
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    made = Targets(network, source, layouts[1], shapes, [], before, after, gguf)
    linears = {f"{name}.{WEIGHT}" for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    for ours, tensor in network.state_dict().items():
        origin, was = after[ours], _dtype_of(source, before[ours])
        parts = to_theirs(tensor, origin, hidden_size(network))
        packed = ours in linears and ours.startswith(BY_KIND[type(network)].packed)
        runs = runs_of(source, before[ours]) if encoding is None else None
        if runs is not None:
            for key, some in zip(origin.keys, shared_out(runs, origin, [len(part) for part in parts]), strict=True):
                made.tensors.append(_kept(source, key, ours, some, gguf))
            continue
        for key, part in zip(origin.keys, parts, strict=True):
            shape = tuple(part.shape)
            chosen = _chosen(encoding, packed, shape, was, gguf)
            if isinstance(encoding, Format) and packed and chosen is not encoding:
                needs = f"rows of a multiple of {encoding.multiple}" if encoding.multiple > 1 else "other shapes"
                instead = f"as {chosen.label}" if isinstance(chosen, Format) else "not packed"
                made.kept[key] = f"{instead}: {encoding.label} needs {needs}"
            made.tensors.append(Target(key, ours, shape, chosen, _parts(key, shape, chosen), was))
    return made


def _kept(source: TensorSource, key: str, ours: str, runs: list[Stretch], gguf: bool) -> Target:
    """A tensor of a weight of which at least some rows are packed: it stays as it is."""
    form, shape = runs[0].stored.format, (sum(run.rows for run in runs), runs[0].stored.shape[1])
    if all(run.stored.format is PLAIN for run in runs):
        dtypes = {run.stored.parts[WEIGHT][0] for run in runs}
        was = dtypes.pop() if len(dtypes) == 1 else torch.float32
        chosen = _chosen(None, False, shape, was, gguf)
        return Target(key, ours, shape, chosen, _parts(key, shape, chosen), was)
    if isinstance(form, Ggml) != gguf:
        raise _not_kept(source, key, f"{form.label} is not in {'.gguf' if gguf else '.safetensors'} files", gguf)
    if reason := obstacle(source, runs):
        raise _not_kept(source, key, f"{reason} ({form.label})", gguf)
    return Target(key, ours, shape, form, _parts(key, shape, form), None, tuple(runs))


def _not_kept(source: TensorSource, key: str, reason: str, gguf: bool) -> InputError:
    fitting = [name for name in writable() if name in FLOATS or isinstance(FORMATS[name], Ggml) == gguf]
    return InputError(
        f"{source}: the new {key} cannot stay packed as it is: {reason}; say which format it is to be in: "
        f"{', '.join(fitting)}"
    )


def _dtype_of(source: TensorSource, origin: Counterpart) -> torch.dtype | None:
    contents = contents_of(source)
    scaled = [how for key in origin.keys if (how := contents.of(key)) is not None and not how.is_cast]
    dtypes = {source.entries[key].dtype for key in origin.keys}
    return None if scaled else dtypes.pop() if len(dtypes) == 1 else torch.float32


def fitting(form: Format, shape: tuple[int, ...]) -> Format | None:
    """What a weight of this shape is packed in: that format, or the one in its place; None if neither can hold it."""
    candidates = [form, *([FORMATS[FALLBACK[form.name]]] if form.name in FALLBACK else [])]
    return next((one for one in candidates if one.holds(shape)), None)


def _chosen(
    encoding: Encoding | None, packed: bool, shape: tuple[int, ...], was: torch.dtype | None, gguf: bool
) -> Encoding:
    if isinstance(encoding, Format) and packed and (form := fitting(encoding, shape)) is not None:
        return form
    if was is not None and not was.is_floating_point:
        return was  # a count, as in the batch norm of FLUX.2's autoencoder
    dtype = encoding if isinstance(encoding, torch.dtype) else was or torch.float32
    if gguf and len(shape) == 1:
        return torch.float32  # ggml computes with vectors of float32 alone
    if gguf and dtype.itemsize == 1:
        return torch.float16  # GGUF has no float8, all of whose numbers are float16's too
    return dtype


def _parts(key: str, shape: tuple[int, ...], encoding: Encoding) -> dict[str, Kind]:
    if isinstance(encoding, torch.dtype):
        return {key: (encoding, shape)}
    layer = key.removesuffix("." + WEIGHT)
    return {f"{layer}.{part}": kind for part, kind in kinds_of(encoding, shape).items()}
