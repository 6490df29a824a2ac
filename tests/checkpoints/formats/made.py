"""Files in every format, written by hand from the specifications or by the packages that define them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from miniflux.checkpoints import to_layout
from miniflux.models.flux1 import Flux1, Flux1Config
from tests.tiny import FLUX1, randomise

Tensors = dict[str, Tensor]
Writer = Callable[[Tensor], tuple[Tensors, Tensor]]
"""A weight -> (the tensors of a file by their suffixes, the weight that they stand for)."""

SMALL = replace(FLUX1, hidden_size=64, num_heads=4, in_channels=64, vec_in_dim=64, context_in_dim=64, depth=1)
SMALL = replace(SMALL, depth_single_blocks=1)
WIDE = replace(FLUX1, hidden_size=256, num_heads=16, in_channels=64, vec_in_dim=256, context_in_dim=256, depth=1)
WIDE = replace(WIDE, depth_single_blocks=1, mlp_ratio=1.0)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def network(config: Flux1Config) -> Flux1:
    return randomise(Flux1(config))


def empty(config: Flux1Config) -> Flux1:
    with torch.device("meta"):
        return Flux1(config)


def text(about: object) -> Tensor:
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def plain(dtype: torch.dtype) -> Writer:
    return lambda w: ({"weight": w.to(dtype)}, w.to(dtype).float())


def scaled(dtype: torch.dtype, name: str, more: Mapping[str, Tensor] | None = None, rows: bool = False) -> Writer:
    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        amax = w.abs().amax(dim=1, keepdim=True) if rows else w.abs().max()
        scale = amax / torch.finfo(dtype).max
        q = (w / scale).to(dtype)
        return {"weight": q, name: scale.flatten() if rows else scale, **(more or {})}, q.float() * scale

    return write


def int8(w: Tensor) -> tuple[Tensors, Tensor]:
    scale = w.abs().amax(dim=1, keepdim=True) / 127
    q = (w / scale).round().to(torch.int8)
    return {"weight": q, "weight_scale": scale}, q.float() * scale


# As published in arXiv 2305.14314, appendix E, and, for fp4, in the comments of bitsandbytes' kernels.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = [0.0, 0.0052083333, 0.6666666667, 1.0, 0.3333333333, 0.5, 0.1666666667, 0.25]
FP4 += [-value for value in FP4]


def nearest(x: Tensor, table: Tensor) -> Tensor:
    return (x[..., None] - table).abs().argmin(-1)


def bnb(kind: str, nested: bool) -> Writer:
    """As bitsandbytes stores it: two codes a byte, high half first; statistics of 64 numbers, themselves in 8 bits."""
    table = torch.tensor(NF4 if kind == "nf4" else FP4)

    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        blocks = w.reshape(-1, 64)
        absmax = blocks.abs().amax(dim=1)
        codes = nearest(blocks / absmax[:, None], table)
        about: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
        parts = {"weight.absmax": absmax, "weight.quant_map": table}
        if nested:
            offset, levels = float(absmax.mean()), torch.linspace(-1, 1, 256)
            groups = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
            largest = groups.abs().amax(dim=1)
            small = nearest(groups / largest[:, None], levels)
            absmax = (levels[small] * largest[:, None]).flatten()[: len(absmax)] + offset
            about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            parts |= {"weight.nested_absmax": largest, "weight.nested_quant_map": levels}
            parts["weight.absmax"] = small.flatten()[: len(absmax)].to(torch.uint8)
        pairs = codes.reshape(-1, 2)
        parts["weight"] = (pairs[:, :1] * 16 + pairs[:, 1:]).to(torch.uint8)
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = text(about)
        return parts, (table[codes] * absmax[:, None]).view_as(w)

    return write


def nvfp4(comfy: bool) -> Writer:
    """E2M1 in blocks of 16 with E4M3 scales, and one float32 for all."""
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        whole = w.abs().max() / (448 * 6)
        blocks = w.view(len(w), -1, 16)
        scale = (blocks.abs().amax(dim=2) / 6 / whole).to(E4M3)
        step = (scale.float() * whole)[..., None]
        codes = nearest(blocks.abs() / step, table)
        dense = (table[codes] * blocks.sign() * step).view_as(w)
        codes = (codes + 8 * (blocks < 0)).view(len(w), -1, 2)
        first, second = codes.unbind(2)
        if comfy:  # first number in the high half; scales in cuBLAS' tiles of 128 x 4
            first, second = second, first
            rows, columns = -(-scale.shape[0] // 128) * 128, -(-scale.shape[1] // 4) * 4
            r, c = torch.meshgrid(torch.arange(scale.shape[0]), torch.arange(scale.shape[1]), indexing="ij")
            place = ((r // 128) * (columns // 4) + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
            tiled = torch.zeros(rows * columns, dtype=torch.uint8)
            tiled[place] = scale.view(torch.uint8)
            scale = tiled.view(rows, columns).view(E4M3)
        parts = {"weight": (first + second * 16).to(torch.uint8), "weight_scale": scale, "weight_scale_2": whole}
        return parts | {"input_scale": torch.tensor(0.5)}, dense

    return write


def comfy(name: str) -> dict[str, Tensor]:
    return {"comfy_quant": text({"format": name}), "input_scale": torch.tensor(1.5)}


# name -> (writer, the label of the format)
WRITERS: dict[str, tuple[Writer, str]] = {
    "fp8 e4m3": (plain(E4M3), "fp8 e4m3"),
    "fp8 e5m2": (plain(E5M2), "fp8 e5m2"),
    "scaled fp8, old": (scaled(E4M3, "scale_weight", {"scale_input": torch.tensor(1.0)}), "fp8 scaled (old)"),
    "scaled fp8, comfy_quant": (scaled(E4M3, "weight_scale", comfy("float8_e4m3fn")), "fp8 scaled"),
    "scaled fp8 e5m2, comfy_quant": (scaled(E5M2, "weight_scale", comfy("float8_e5m2")), "fp8 scaled e5m2"),
    "scaled fp8, header": (scaled(E4M3, "weight_scale"), "fp8 scaled"),
    "fp8 by rows": (scaled(E4M3, "weight_scale", rows=True), "fp8 by rows"),
    "int8": (int8, "int8"),
    "nf4": (bnb("nf4", False), "bitsandbytes nf4"),
    "nf4, nested": (bnb("nf4", True), "bitsandbytes nf4"),
    "fp4": (bnb("fp4", False), "bitsandbytes fp4"),
    "fp4, nested": (bnb("fp4", True), "bitsandbytes fp4"),
    "nvfp4": (nvfp4(False), "nvfp4"),
    "nvfp4, header": (nvfp4(True), "nvfp4 (ComfyUI)"),
}


def write_file(path: Path, model: Flux1, name: str, layout: str, keep: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A file of the model whose matrices are packed, but those whose keys hold a word of `keep`. Returns all weights as
    they then are, in the file's names."""
    write, dense, tensors = WRITERS[name][0], {}, {}
    layers: list[str] = []
    for key, weight in to_layout(model, model.state_dict(), layout).items():
        if weight.ndim != 2 or any(word in key for word in keep):
            tensors[key] = dense[key] = weight.clone()
            continue
        layer = key.removesuffix(".weight")
        layers.append(layer)
        parts, dense[key] = write(weight)
        tensors |= {f"{layer}.{part}": tensor.clone() for part, tensor in parts.items()}
    metadata: dict[str, Any] = {"axes_dim": json.dumps(model.config.axes_dim)}
    if name == "scaled fp8, old":
        tensors["scaled_fp8"] = torch.zeros(2).to(E4M3)
    if name.endswith("header"):
        kind = "nvfp4" if name.startswith("nvfp4") else "float8_e4m3fn"
        about = {"format_version": "1.0", "layers": {layer: {"format": kind} for layer in layers}}
        metadata["_quantization_metadata"] = json.dumps(about)
    save_file(tensors, path, metadata=metadata)
    return dense


def write_gguf(
    path: Path, model: Flux1, kind: str, layout: str, architecture: str | None = "flux"
) -> dict[str, Tensor]:
    """The same as a GGUF file, by its package: random blocks for types that the package does not write."""
    writer = gguf.GGUFWriter(path, architecture or "")  # which writes no empty strings
    writer.add_string("axes_dim", json.dumps(model.config.axes_dim))
    dense: dict[str, Tensor] = {}
    wanted = gguf.GGMLQuantizationType[kind]
    for i, (key, weight) in enumerate(to_layout(model, model.state_dict(), layout).items()):
        array = weight.numpy().copy()
        if weight.ndim != 2 or weight.shape[1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            writer.add_tensor(key, array)
            dense[key] = weight
            continue
        try:
            raw = gguf.quants.quantize(array, wanted)
        except NotImplementedError:
            raw = random_blocks(kind, *weight.shape, seed=i)
        dense[key] = torch.from_numpy(gguf.quants.dequantize(raw, wanted).astype(np.float32))
        writer.add_tensor(key, raw, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes as blocks, whose float16 scales are small numbers."""
    from miniflux.checkpoints.formats.ggml import BLOCKS

    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // numbers, size), dtype=np.uint8)
    for start in BLOCKS[kind].halves:
        scales = (rng.standard_normal((len(blocks), 1)) * 1e-3).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)
