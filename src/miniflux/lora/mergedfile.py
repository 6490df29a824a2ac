"""A checkpoint with LoRAs in it: what each of its tensors becomes, made one after the other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniflux.checkpoints.files import Entry, TensorSource
from miniflux.checkpoints.formats import FORMATS
from miniflux.checkpoints.formats.base import WEIGHT, Kind, Stored
from miniflux.checkpoints.formats.encodings import Encoding, file_type
from miniflux.checkpoints.formats.ggml import BLOCKS
from miniflux.checkpoints.formats.reading import COMFY, PREFIX, SIDES, contents_of
from miniflux.checkpoints.formats.scaled import METADATA
from miniflux.checkpoints.gguf import GGUF_OWN
from miniflux.checkpoints.layouts import counterparts, hidden_size, to_theirs
from miniflux.checkpoints.loading import fetch
from miniflux.checkpoints.opened import PartSource
from miniflux.checkpoints.quantized import QuantizedLinear
from miniflux.checkpoints.writing import Frame, gguf_frame, safetensors_frame
from miniflux.errors import LoraError
from miniflux.lora.layer import Change
from miniflux.lora.merging import merged_bias, merged_weight, touched
from miniflux.lora.packing import Rounding, again, check_range, kinds_again, rounding, why_not
from miniflux.lora.restoring import stack_of
from miniflux.models.transformer import Transformer

WIDE = torch.float16  # of packed weights that change


class Weights:
    """The numbers of a base checkpoint, by the names of the network, and what is to become of them."""

    def __init__(self, network: Transformer, source: TensorSource, layout: str) -> None:
        self.network, self.source = network, source
        self.shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        self.plan = counterparts(network, layout)
        self.changes: dict[str, list[tuple[Change, float]]] = {}
        self.replaced: dict[str, Tensor] = {}

    def ours(self, key: str) -> Tensor:
        """One of the network's tensors, as the base has it; what is packed or float8, in float32."""
        tensor = fetch(self.source, self.plan[key], self.shapes[key])
        return tensor.float() if tensor.dtype.itemsize == 1 else tensor

    def fill(self, key: str) -> None:
        """Give the network one of its tensors, if it has one of this name: packed ones as they are packed."""
        if key not in self.plan:
            return
        module, _, parameter = key.rpartition(".")
        owner = self.network.get_submodule(module)
        if isinstance(owner, QuantizedLinear) and parameter == WEIGHT:
            pairs = zip(owner.layers, owner.stored, strict=True)
            owner.hold([stack_of(self.source, layer, stored) for layer, stored in pairs])
        else:
            owner.register_parameter(parameter, nn.Parameter(self.ours(key), requires_grad=False))


class MergedFile:
    """The tensors of the new file. Only those that change are made; all others are the bytes of the base.

    Raises:
        LoraError: a weight is to be packed again in a format that cannot hold it.
    """

    def __init__(self, weights: Weights, pack: bool) -> None:
        self.weights, self.source, self.pack = weights, weights.source, pack
        self.contents, self.roundings = contents_of(weights.source), list[Rounding]()
        part = self.source if isinstance(self.source, PartSource) else None  # of a file that holds more
        self.whole, self.prefix = (part.whole, part.prefix) if part else (self.source, "")
        self.kinds: dict[str, Kind] = {key: (entry.dtype, entry.shape) for key, entry in self.source.entries.items()}
        self.blocks = {key: entry.block for key, entry in self.source.entries.items() if entry.block}
        self.wide: set[str] = set()  # layers of the file that are packed no more
        for ours in weights.plan:
            for key, rows in self._changing(ours):
                self._announce(key, (rows.stop - rows.start, *self._shape(ours)[1:]))

    def _shape(self, ours: str) -> tuple[int, ...]:
        """Of one of the network's tensors in the end: a control LoRA widens the input."""
        replaced = self.weights.replaced.get(ours)
        return self.weights.shapes[ours] if replaced is None else tuple(replaced.shape)

    def _changing(self, ours: str) -> Iterator[tuple[str, slice]]:
        """The tensors of the file that change with one of the network's: each with its rows there."""
        origin, (layer, _, parameter) = self.weights.plan[ours], ours.rpartition(".")
        changes, replaced = self.weights.changes.get(layer, []), ours in self.weights.replaced
        if not changes and not replaced:
            return
        heights = [self.contents.entries[key].shape[0] for key in origin.keys]
        for key, (start, end) in zip(origin.keys, pairwise([0, *accumulate(heights)]), strict=True):
            bias = any(scale != 0 and change.bias is not None for change, scale in changes)
            if replaced or (touched(changes, start, end) if parameter == WEIGHT else parameter == "bias" and bias):
                yield key, slice(start, end)

    def _announce(self, key: str, shape: tuple[int, ...]) -> None:
        """Enter what a changing tensor becomes."""
        layer, stored = key.removesuffix("." + WEIGHT), self.contents.of(key)
        dtype = self.kinds[key][0]
        if stored is None:  # float8 is as coarse in a bias as in a packed weight
            self.kinds[key] = (WIDE if dtype.itemsize == 1 and not self.pack else dtype, shape)
            return
        if self.pack and (why := why_not(stored, shape[1])):
            raise LoraError(
                f"{self.source}: {layer} cannot be packed again: {why}; attach the LoRA instead, merge without packing "
                "again, or convert the base to another format"
            )
        for side in SIDES if not self.pack else (*stored.parts, *stored.read):
            if not self.pack or side != COMFY:
                self.kinds.pop(f"{layer}.{side}", None)
        if self.pack:
            self.kinds |= {f"{layer}.{part}": kind for part, kind in kinds_again(stored, shape).items()}
        else:
            self.kinds[key] = (WIDE, shape)
            self.wide.add(layer)
            self.blocks.pop(key, None)

    def frame(self, name: str, gguf: bool) -> Frame:
        """Head and places of the new file."""
        metadata = dict(self.whole.metadata)
        kinds = {self.prefix + key: kind for key, kind in self.kinds.items()}
        kinds |= {key: (entry.dtype, entry.shape) for key, entry in self._others().items()}
        if not gguf:
            if METADATA in metadata:  # which says how each layer is packed
                about, wide = json.loads(metadata[METADATA]), {p + k for k in self.wide for p in (self.prefix, PREFIX)}
                about["layers"] = {key: value for key, value in about["layers"].items() if key not in wide}
                metadata[METADATA] = json.dumps(about, separators=(",", ":"))
            return safetensors_frame(name, kinds, metadata)
        if self.whole is not self.source:
            raise LoraError(f"{self.whole}: a GGUF file of one network is expected")
        odd = [key for key in self.blocks if _reshaped(self.source.entries[key])]
        if odd:
            raise LoraError(f"{self.source}: {odd[0]} is stored in another shape than it has: convert the file first")
        sizes: Counter[Encoding] = Counter()
        for key, (dtype, shape) in self.kinds.items():
            encoding = FORMATS[self.blocks[key]] if key in self.blocks else dtype
            sizes[encoding] += torch.Size(shape).numel() * dtype.itemsize
        kind, stated = file_type(sizes.most_common(1)[0][0]), f"MOSTLY_{metadata.get('general.file_type')}"
        if kind.endswith("_K_S") and stated == kind[:-1] + "M":  # some of its tensors are of a larger type
            kind = stated
        kept = {key: value for key, value in metadata.items() if not key.startswith(GGUF_OWN)}
        about = (metadata.get("general.architecture", "flux"), kind)
        return gguf_frame(name, self.kinds, self.blocks, kept, about)

    def _others(self) -> dict[str, Entry]:
        """What belongs to other networks, or to none."""
        ours = {self.prefix + key for key in self.source.entries}
        return {key: entry for key, entry in self.whole.entries.items() if key not in ours}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the new file, with its name."""
        made: set[str] = set()
        for ours in self.weights.plan:
            for key, tensor in self._made(ours):
                made.add(key)
                yield self.prefix + key, tensor
        yield from ((self.prefix + key, self.source[key]) for key in self.kinds if key not in made)
        yield from ((key, self.whole[key]) for key in self._others())

    def _made(self, ours: str) -> Iterator[tuple[str, Tensor]]:
        changing = dict(self._changing(ours))
        if not changing:
            return
        layer, _, parameter = ours.rpartition(".")
        before, shape = self.weights.ours(ours), self._shape(ours)
        if parameter not in (WEIGHT, "bias"):
            after = self.weights.replaced[ours]
        else:
            if shape != tuple(before.shape):
                before = F.pad(before, (0, shape[1] - before.shape[1]))
            combine = merged_weight if parameter == WEIGHT else merged_bias
            after = combine(before, self.weights.changes.get(layer, []))
        origin, hidden = self.weights.plan[ours], hidden_size(self.weights.network)
        theirs = (to_theirs(tensor, origin, hidden) for tensor in (before, after))
        for key, old, new in zip(origin.keys, *theirs, strict=True):
            stored = self.contents.of(key)
            if key not in changing:
                continue
            if stored is None:
                new = new.to(self.kinds[key][0])
                check_range(key, new)
                yield key, new
            else:
                yield from self._packed(key, stored, old, new)

    def _packed(self, key: str, stored: Stored, old: Tensor, new: Tensor) -> Iterator[tuple[str, Tensor]]:
        name = key.removesuffix("." + WEIGHT)
        stack = again(name, stored, new, None if self.pack else WIDE)
        if self.pack:
            self.roundings.append(rounding(name, old, new, stack))
        yield from ((f"{name}.{part}", tensor) for part, tensor in stack[1].items())


def _reshaped(entry: Entry) -> bool:
    """Whether a GGUF file holds a weight in rows of another length, which its header would have to say."""
    block = BLOCKS[entry.block]
    return entry.unpacked != (entry.shape[0], entry.shape[1] // block.bytes * block.numbers)
