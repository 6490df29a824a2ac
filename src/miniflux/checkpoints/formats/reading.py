"""Which weights of a file are packed, in which format, and what the other tensors beside them are for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from miniflux.checkpoints.files import Entry, TensorSource, fresh
from miniflux.checkpoints.formats import FORMATS
from miniflux.checkpoints.formats.base import WEIGHT, Format, Stored
from miniflux.checkpoints.formats.fourbit import ABSMAX, MAP, NESTED, NESTED_MAP, STATE
from miniflux.checkpoints.formats.nvfp4 import BLOCK, GLOBAL, tiled
from miniflux.checkpoints.formats.scaled import FLOAT8, MARKER, METADATA, comfy_format, parsed_json
from miniflux.errors import CheckpointError
from miniflux.strictjson import json_of, shown

OLD_SCALE, NEW_SCALE, COMFY = "scale_weight", "weight_scale", "comfy_quant"
INPUT_SCALES = ("scale_input", "input_scale")
SIDES = (
    *(OLD_SCALE, NEW_SCALE, GLOBAL, COMFY, *INPUT_SCALES, ABSMAX, MAP, NESTED, NESTED_MAP),
    *(STATE + name for name in ("nf4", "fp4")),
)
WHY_INPUT = "scale of the inputs for products in eight or four bits; inputs stay as they are here"
WHY_MARKER = "says that the file holds scaled float8 weights, and how they may be multiplied"
PREFIX = "model.diffusion_model."  # of layers in the header of all-in-one files


@dataclass(frozen=True)
class Contents:
    """The packed weights of a file.

    Attributes:
        stored: by the name of the layer (its `NAME.weight` is packed): how.
        redundant: tensors beside them that are not needed, with the reason.
        broken: what is wrong, by the name of the layer (or of the header entry).
        entries: all other tensors as they are, and packed weights with the shape that they unpack to.
    """

    stored: dict[str, Stored] = field(default_factory=dict)
    redundant: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)

    def of(self, key: str) -> Stored | None:
        """How the weight of this key is packed, if it is."""
        return self.stored.get(key.removesuffix("." + WEIGHT)) if key.endswith("." + WEIGHT) else None


class GivenTensors(TensorSource):
    """Tensors in memory, as a source."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.files, self.metadata = [], {}
        self.entries = {key: Entry(t.dtype, tuple(t.shape), 0, t.nbytes) for key, t in tensors.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def read(self, key: str, out: Tensor, first: int = 0) -> None:
        out.view(-1).copy_(self.tensors[key].reshape(-1)[first : first + out.numel()])

    def __str__(self) -> str:
        return "the given tensors"


def contents_of(source: TensorSource) -> Contents:
    """What is packed in a source; found once."""
    known = source.__dict__
    if "_contents" not in known:
        known["_contents"] = _contents(source.entries, source.__getitem__, source.metadata)
    return known["_contents"]


def parts_of(source: TensorSource, layer: str, stored: Stored) -> dict[str, Tensor]:
    """The parts of a packed weight; those in files in memory of their own, which mapped pages do not add to."""
    if isinstance(source, GivenTensors):
        return {name: source[f"{layer}.{name}"] for name in stored.parts}
    parts = {name: fresh(shape, dtype) for name, (dtype, shape) in stored.parts.items()}
    for name, part in parts.items():
        source.read(f"{layer}.{name}", part)
    return parts


def formats_in(source: TensorSource) -> dict[str, int]:
    """How many tensors are stored in each format: packed weights by the format's label, others, and those that are a
    mere cast, by their dtype."""
    contents = contents_of(source)
    scaled = {layer: stored for layer, stored in contents.stored.items() if not stored.is_cast}
    parts = {f"{layer}.{name}" for layer, stored in scaled.items() for name in (*stored.parts, *stored.read)}
    counts = Counter(stored.format.label for stored in scaled.values())
    for key, entry in source.entries.items():
        if key not in parts and key not in contents.redundant:
            counts[str(entry.dtype).removeprefix("torch.")] += 1
    return dict(counts.most_common())


def format_of(source: TensorSource) -> str:
    """What a file is called after: the format that most of its bytes are in. GGUF files state a name of their own."""
    contents = contents_of(source)
    stated = source.metadata.get("general.file_type", "")
    if stated and not stated.isdigit() and any(entry.block for entry in source.entries.values()):
        return f"GGUF {stated}"
    sizes: Counter[str] = Counter()
    for key, entry in source.entries.items():
        stored = contents.of(key)
        sizes[stored.format.label if stored else str(entry.dtype).removeprefix("torch.")] += entry.size
    return max(sizes, key=lambda name: sizes[name])


def _contents(entries: Mapping[str, Entry], get: Callable[[str], Tensor], metadata: Mapping[str, str]) -> Contents:
    found = Contents()
    described = _described(metadata, found)
    if MARKER in entries:
        found.redundant[MARKER] = WHY_MARKER
    layers = [key[: -len(WEIGHT) - 1] for key in entries if key.endswith("." + WEIGHT)]
    scaled = MARKER in entries or any(
        f"{layer}.{scale}" in entries for layer in layers for scale in (OLD_SCALE, NEW_SCALE)
    )
    sides: set[str] = set()
    for layer in layers:
        entry = entries[f"{layer}.{WEIGHT}"]
        near = {name: entries[f"{layer}.{name}"] for name in SIDES if f"{layer}.{name}" in entries}
        read = lambda name, layer=layer: get(f"{layer}.{name}")  # noqa: E731
        try:
            stated = comfy_format(described[layer]) if layer in described else ""
            if COMFY in near:
                stated = comfy_format(parsed_json(COMFY, read(COMFY)))
            form = _format(entry, near, stated, scaled)
            if form is None:
                continue
            kinds = {name: (e.dtype, e.shape) for name, e in {WEIGHT: entry, **near}.items()}
            stored = form.read(kinds, read)
        except CheckpointError as error:
            found.broken[layer] = str(error)
            sides.update(f"{layer}.{name}" for name in near)
            continue
        if entry.unpacked and entry.unpacked != stored.shape:
            if math.prod(entry.unpacked) != math.prod(stored.shape):
                found.broken[layer] = f"{WEIGHT} is said to be {list(entry.unpacked)}, {list(stored.shape)} is there"
                continue
            stored = replace(stored, shape=entry.unpacked)
        if COMFY in near:
            stored = replace(stored, read=(*stored.read, COMFY))
        found.stored[layer] = stored
        found.redundant.update({f"{layer}.{name}": WHY_INPUT for name in INPUT_SCALES if name in near})
        sides.update(f"{layer}.{name}" for name in near)
    for key, entry in entries.items():
        if key not in sides and key != MARKER:
            stored = found.of(key)
            found.entries[key] = replace(entry, shape=stored.shape) if stored else entry
    return found


def _format(entry: Entry, near: Mapping[str, Entry], stated: str, scaled: bool) -> Format | None:
    """The format of a weight, or None for one that is not packed (or is of no kind known here).

    Raises:
        CheckpointError: a tensor beside it is missing, or contradicts what the file says of it.
    """
    if entry.block:
        return FORMATS[entry.block] if len(entry.shape) == 2 else None
    known = {"float8_e4m3fn": FLOAT8["float8_e4m3fn"], "float8_e5m2": FLOAT8["float8_e5m2"]}
    known |= {"nvfp4": torch.uint8, "int8_tensorwise": torch.int8}
    if stated and stated not in known:
        raise CheckpointError(f"comfy_quant names the format {stated!r}; read are {', '.join(known)}")
    if stated and entry.dtype != known[stated]:
        raise CheckpointError(f"{WEIGHT} is said to be {stated}, stored is {str(entry.dtype).removeprefix('torch.')}")
    if entry.dtype == torch.uint8:
        return _of_bytes(entry, near, stated)
    if entry.dtype == torch.int8:
        return FORMATS["int8"] if len(entry.shape) == 2 and (stated or scaled) else None
    if entry.dtype not in FLOAT8.values() or len(entry.shape) != 2:
        return None
    short = "e4m3" if entry.dtype == torch.float8_e4m3fn else "e5m2"
    if OLD_SCALE in near and NEW_SCALE in near:
        raise CheckpointError(f"has both {OLD_SCALE} and {NEW_SCALE}")
    if OLD_SCALE in near:
        return FORMATS["fp8_scaled_old"]
    if NEW_SCALE in near or stated:
        if math.prod(near[NEW_SCALE].shape if NEW_SCALE in near else ()) != 1:
            return FORMATS["fp8_rows"]
        return FORMATS["fp8_scaled" if short == "e4m3" else "fp8_scaled_e5m2"]
    if scaled:
        raise CheckpointError("weight_scale (or scale_weight) is missing, which the other float8 weights have")
    return FORMATS[f"fp8_{short}"]


def _of_bytes(entry: Entry, near: Mapping[str, Entry], stated: str) -> Format | None:
    for name in ("nf4", "fp4"):
        if STATE + name in near:
            return FORMATS[name]
    if ABSMAX in near or MAP in near:
        raise CheckpointError(f"{STATE}nf4 (or fp4) is missing")
    if not stated and GLOBAL not in near and NEW_SCALE not in near:
        return None
    plain = near[NEW_SCALE].shape if NEW_SCALE in near else ()
    if len(entry.shape) == 2 and not stated:  # a file that says nothing may still have tiles: their shape tells
        rows, blocks = entry.shape[0], entry.shape[1] * 2 // BLOCK
        stated = "nvfp4" if plain == tiled(rows, blocks) != (rows, blocks) else ""
    return FORMATS["nvfp4_comfy" if stated else "nvfp4"]


def _described(metadata: Mapping[str, str], found: Contents) -> dict[str, Any]:
    """What the header says of layers (ComfyUI's `_quantization_metadata`)."""
    if METADATA not in metadata:
        return {}
    try:
        about = json_of(metadata[METADATA].encode(), f"the header's {METADATA}")
    except CheckpointError as error:
        found.broken[METADATA] = str(error)
        return {}
    layers = about.get("layers") if isinstance(about, dict) else None
    if not isinstance(layers, dict):
        found.broken[METADATA] = f"the header's {METADATA} is no JSON object with layers: {shown(about)}"
        return {}
    return {name.removeprefix(PREFIX): layer for name, layer in layers.items()}


# Ways to pack weights that are not read, by how the name of a part ends.
FOREIGN = {
    ".weight._data": "optimum-quanto",
    ".SCB": "bitsandbytes' LLM.int8()",
    ".qweight": "SVDQuant (Nunchaku) or GPTQ",
}


def foreign_packing(keys: Iterable[str]) -> str | None:
    """What to say of weights that are packed in a way that is known by name only; None if there are none."""
    for key in keys:
        for ending, name in FOREIGN.items():
            if key.endswith(ending):
                return f"weights packed by {name}, which are not read, such as {key}"
    return None
