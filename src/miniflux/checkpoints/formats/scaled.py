"""Weights of one byte each with a scale: float8, plain or scaled, and int8.

Sources: the float8 types, arXiv 2209.05433, table 1. Key names: ComfyUI (QUANTIZATION.md; `scale_weight`, `scaled_fp8`
before it) and Black Forest Labs' files (diffusers, `quantizers/bfl`). The int8 format is ComfyUI's
`int8_tensorwise` with one scale per output row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from miniflux.checkpoints.files import fresh
from miniflux.checkpoints.formats.base import FLOATS, WEIGHT, Format, Get, Kind, Stored, misshapen, need, pieces
from miniflux.errors import CheckpointError
from miniflux.strictjson import json_of

FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
MARKER = "scaled_fp8"  # the tensor that marks files of the old form; 2 elements ask for products in full precision
METADATA = "_quantization_metadata"  # the header entry of the new form
Scaling = Literal["none", "tensor", "row"]


def largest(dtype: torch.dtype) -> float:
    """The largest number of a one-byte dtype: 448, 57344 or 127."""
    return torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max


class Scaled(Format):
    """W = q * scale, with q in float8 or int8 and one scale for the tensor or for each output row, or none at all."""

    def __init__(
        self, name: str, label: str, dtype: torch.dtype, scaling: Scaling, scale: str = "weight_scale", comfy: str = ""
    ) -> None:
        """`scale`: suffix of the scale; `comfy`: what ComfyUI's metadata call the format, if they must."""
        self.name, self.label, self.dtype, self.scaling, self.scale, self.comfy = (
            name,
            label,
            dtype,
            scaling,
            scale,
            comfy,
        )
        self.shared = (scale,) if scaling == "tensor" else ()

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        weight, top = self.checked(weight), largest(self.dtype)
        q = fresh(weight.shape, self.dtype, weight.device)
        scale = self._scale(weight)
        for piece in pieces(*weight.shape):
            rows = weight[piece].float()
            if scale is not None:
                rows = rows / (scale if scale.ndim == 0 else scale[piece])
            q[piece] = (rows.clamp(-top, top) if self.dtype.is_floating_point else rows.round()).to(self.dtype)
        if scale is None:
            return {WEIGHT: q}
        if self.scaling == "row" and self.dtype.is_floating_point:
            scale = scale[:, 0]  # as Black Forest Labs' files have it
        return {WEIGHT: q, self.scale: scale}

    def _scale(self, weight: Tensor) -> Tensor | None:
        """What the largest number, of the weight or of each row, is divided by to become the largest of the dtype."""
        if self.scaling == "none":
            return None
        tops = torch.empty(len(weight), 1, device=weight.device)
        for piece in pieces(*weight.shape):  # a list of results would pin the gaps between them in the heap
            tops[piece] = weight[piece].float().abs().amax(dim=1, keepdim=True)
        amax = tops if self.scaling == "row" else tops.amax()
        return torch.where(amax > 0, amax / largest(self.dtype), torch.ones_like(amax))

    def read(self, kinds: Mapping[str, Kind], get: Get) -> Stored:
        shape = need(kinds, WEIGHT, *(FLOAT8.values() if self.dtype.is_floating_point else (self.dtype,)))
        if len(shape) != 2:
            raise misshapen(WEIGHT, shape, "[rows, columns]")
        if self.scaling == "none":
            return Stored(self, shape, {WEIGHT: kinds[WEIGHT]})
        found = need(kinds, self.scale, *FLOATS)
        if found not in ((), (1,), (1, 1), (shape[0],), (shape[0], 1)):
            raise misshapen(self.scale, found, f"[], [1] or one for each of the {shape[0]} rows")
        return Stored(self, shape, {WEIGHT: kinds[WEIGHT], self.scale: kinds[self.scale]})

    def fill(self, stored: Stored, parts: Mapping[str, Tensor], out: Tensor) -> None:
        q, rows = parts[WEIGHT], out.shape[0]
        scale = None if self.scaling == "none" else parts[self.scale].float().reshape(-1, 1)
        for piece in pieces(rows, out.shape[1]):
            numbers = widened(q[piece])
            out[piece] = numbers if scale is None else numbers * (scale if len(scale) == 1 else scale[piece])

    def header(self, layers: Iterable[str]) -> dict[str, str]:
        return comfy_header(layers, self.comfy) if self.comfy else {}

    def markers(self) -> dict[str, Tensor]:
        return {MARKER: torch.zeros(2).to(self.dtype)} if self.scale == "scale_weight" else {}


def widened(q: Tensor) -> Tensor:
    """Numbers of one byte in float32. On CPUs, whose conversion of float8 is slow, by looking them up."""
    if q.dtype not in FLOAT8.values() or q.device.type != "cpu":
        return q.float()
    values = torch.arange(256, dtype=torch.uint8).view(q.dtype).float()
    return values.index_select(0, q.view(torch.uint8).reshape(-1).int()).view(q.shape)


class Plain(Format):
    """Floats as they are: rows that stay unpacked beside packed ones of the same layer."""

    name, label = "plain", "not packed"

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return {WEIGHT: weight}

    def read(self, kinds: Mapping[str, Kind], get: Get) -> Stored:
        return Stored(self, need(kinds, WEIGHT, *FLOATS), {WEIGHT: kinds[WEIGHT]})

    def fill(self, stored: Stored, parts: Mapping[str, Tensor], out: Tensor) -> None:
        out.copy_(parts[WEIGHT])


PLAIN = Plain()


def comfy_header(layers: Iterable[str], name: str) -> dict[str, str]:
    """ComfyUI's description of packed layers, for a file's header."""
    about = {"format_version": "1.0", "layers": {layer: {"format": name} for layer in layers}}
    return {METADATA: json.dumps(about, separators=(",", ":"))}


def comfy_format(about: object) -> str:
    """The format that ComfyUI's description of one layer names.

    Raises:
        CheckpointError: it is no such description, or asks for something that would change the numbers.
    """
    if not isinstance(about, dict) or not isinstance(about.get("format"), str):
        raise CheckpointError(f"comfy_quant is no JSON object with a format: {about!r:.80}")
    if about.get("convrot"):
        raise CheckpointError(f"comfy_quant describes rotated weights (convrot), which are not read: {about!r:.80}")
    return about["format"]


def parsed_json(name: str, tensor: Tensor) -> object:
    """The JSON text in a tensor of bytes.

    Raises:
        CheckpointError: there is none.
    """
    if tensor.dtype != torch.uint8 or tensor.ndim > 1 or tensor.numel() > 1 << 16:
        raise CheckpointError(f"{name} is no text: {list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}")
    return json_of(bytes(tensor.reshape(-1).tolist()).rstrip(b"\0"), name)
