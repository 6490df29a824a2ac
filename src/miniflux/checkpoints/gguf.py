"""GGUF files as sources of tensors, beside safetensors: the same lazy mapping, their blocks of bytes as they are.

The container is read by the package `gguf` (extra `gguf`), what is in the blocks by `formats/ggml.py`. Sources: ggml's
`docs/gguf.md`; the arrays `comfy.gguf.orig_shape.*` are those of city96's ComfyUI-GGUF, which stores tensors whose rows
fit no block as rows of 256. Files of stable-diffusion.cpp have no `general.architecture`; nothing here needs one.
"""

from __future__ import annotations

import math
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miniflux.checkpoints.beginnings import HEAD, kind_of_file
from miniflux.checkpoints.files import READERS, Entry, TensorFile
from miniflux.checkpoints.formats.ggml import BLOCKS
from miniflux.errors import CheckpointError, MissingExtraError
from miniflux.strictjson import open_regular

PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
# What headers may hold. Everything in them becomes several Python objects, so a few megabytes would become gigabytes.
MAX_ITEMS = 5_000  # tensors, and fields of metadata; all four networks in one file have 1,500
MAX_TEXT = 16_000_000  # bytes of texts, with their lengths; the vocabularies of language models have 8 MB at most
MAX_ARRAY = 64  # values of an array that is looked at, such as a shape; longer ones, such as vocabularies, are left out
GGUF_OWN = ("GGUF.", "general.", "comfy.gguf.")  # of a header


class GgufFile(TensorFile):
    """One GGUF file. Packed tensors are bytes, (rows, bytes of a row); their entries say the type of block and the
    shape of the weight.

    Raises:
        CheckpointError: the file is cut off, its header contradicts itself, or it holds types that are not read here.
        MissingExtraError: the package `gguf` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                self._check_begin(file.read(HEAD))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        reader, fields = _open(path)
        self.size = int(reader.data.nbytes)
        self.metadata = {name: str(value) for name, value in fields.items() if not isinstance(value, list)}
        shapes = {
            name.removeprefix(ORIGINAL_SHAPE): tuple(value)
            for name, value in fields.items()
            if name.startswith(ORIGINAL_SHAPE) and isinstance(value, list)
        }
        self.entries = {tensor.name: self._entry_of(tensor, shapes.get(tensor.name)) for tensor in reader.tensors}
        if not self.entries:
            raise CheckpointError(f"{path}: holds no tensors")
        self._check_overlap()
        self._bytes = None
        kind = self.metadata.get("general.file_type", "")
        if kind.isdigit():
            import gguf

            names = {
                int(member): name.removeprefix("MOSTLY_") for name, member in gguf.LlamaFileType.__members__.items()
            }
            self.metadata["general.file_type"] = names.get(int(kind), kind)

    def _check_begin(self, begin: bytes) -> None:
        """Refuse what the package would read at length, or wrongly."""
        if len(begin) < 24 or not begin.startswith(b"GGUF"):
            kind = None if begin.startswith(b"GGUF") else kind_of_file(begin)
            why = f": it looks like {kind}" if kind else f", or cut off: it begins with {begin[:4]!r}"
            raise CheckpointError(f"{self.path}: not a GGUF file{why}")
        version, tensors, fields = struct.unpack("<IQQ", begin[4:24])
        if version & 0xFFFF == 0:
            raise CheckpointError(f"{self.path}: its numbers are big-endian, which are not read")
        for count, what in ((tensors, "tensors"), (fields, "fields")):
            if count > MAX_ITEMS:
                raise CheckpointError(
                    f"{self.path}: its header claims {count:,} {what}; more than {MAX_ITEMS:,} are not read"
                )

    def _entry_of(self, tensor: Any, original: tuple[int, ...] | None) -> Entry:
        name, kind = tensor.name, tensor.tensor_type.name
        shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))  # ggml counts axes from the innermost
        start, size = int(tensor.data_offset), int(tensor.n_bytes)
        if original is not None and (
            any(type(n) is not int for n in original) or math.prod(original) != math.prod(shape)
        ):
            raise CheckpointError(f"{self.path}: {ORIGINAL_SHAPE}{name} is {list(original)}, stored is {list(shape)}")
        if kind in PLAIN:
            expected = math.prod(shape) * PLAIN[kind].itemsize
            entry = Entry(PLAIN[kind], original or shape, start, expected)
        elif kind in BLOCKS:
            block = BLOCKS[kind]
            if not shape or shape[-1] % block.numbers:
                raise CheckpointError(f"{self.path}: {name!r} of shape {list(shape)} is not made of {kind} blocks")
            packed = (*shape[:-1], shape[-1] // block.numbers * block.bytes)
            expected = math.prod(packed)
            entry = Entry(torch.uint8, packed, start, expected, kind, original or shape)
        else:
            known = ", ".join([*PLAIN, *BLOCKS])
            raise CheckpointError(f"{self.path}: {name!r} is of type {kind}, which is not read; read are {known}")
        if size != expected or start + size > self.size:
            raise CheckpointError(f"{self.path}: cut off, or its header is wrong: {name!r} needs {expected} bytes")
        return entry

    def _check_overlap(self) -> None:
        end, last = 0, ""
        for key, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].size)):
            if entry.start < end:
                raise CheckpointError(f"{self.path}: {key!r} overlaps {last!r}")
            end, last = entry.start + entry.size, key


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """The package's reader, made to stop where a file is cut off or would take too much memory; and its metadata."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(f"{path}: GGUF files are read with the extra: pip install 'miniflux[gguf]'") from error

    class Reader(gguf.GGUFReader):
        text = 0  # bytes so far

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            there = max(0, len(self.data) - int(offset)) // np.dtype(dtype).itemsize
            if int(count) > there:
                raise ValueError(f"{int(count)} values are announced at byte {offset}, {there} are there")
            return super()._get(offset, dtype, count, override_order)

        def _get_str(self, offset: int) -> Any:
            self._add_text(8 + int(self._get(offset, "uint64")[0]))
            return super()._get_str(offset)

        def _add_text(self, size: int) -> None:
            self.text += size
            if self.text > MAX_TEXT:
                raise ValueError(f"{self.text} bytes of texts in the header; more than {MAX_TEXT:,} are not read")

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = gguf.GGUFValueType(int(self._get(orig_offs, "uint32")[0]))
            length = int(self._get(orig_offs + 4, "uint64")[0])
            if kind == gguf.GGUFValueType.ARRAY:
                raise ValueError("an array of ARRAY in the header")
            if length <= MAX_ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            found = [gguf.GGUFValueType.ARRAY, kind]
            if kind == gguf.GGUFValueType.STRING:
                return 12 + self._size_of_texts(orig_offs + 12, length), [], [], found
            size = length * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
            self._get(orig_offs + 12, "uint8", size)  # is it there?
            return 12 + size, [], [], found

        def _size_of_texts(self, start: int, length: int) -> int:
            self._add_text(8 * length)
            data: Any = self.data  # a buffer, but not to type checkers before 3.12
            content, end, unpack = memoryview(data), start, struct.Struct("<Q").unpack_from
            for _ in range(length):
                if end + 8 > len(content):
                    raise ValueError(f"an array of {length} texts in the header, which are not there")
                end += 8 + unpack(content, end)[0]
            self._add_text(end - start - 8 * length)
            return end - start

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of overflow in absurd shapes; the sizes are checked below
            reader = Reader(path)
            return reader, {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: not a GGUF file, or cut off: its header asks for too much memory") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, ArithmeticError, AttributeError) as error:
        reason = "".join(c if c.isprintable() else "?" for c in f"{type(error).__name__}: {error}"[:200])
        raise CheckpointError(f"{path}: not a GGUF file, or cut off: {reason}") from error


READERS[".gguf"] = GgufFile
