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

SMALL = replace(FLUX1, hidden_size=64, num_heads=4, in_channels=64, vec_in_dim=64, context_in_dim=64)
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


def bnb(kind: str, nested: bool) -> Writer:
    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        from bitsandbytes import functional

        q, state = functional.quantize_4bit(w, quant_type=kind, blocksize=64, compress_statistics=nested)
        parts = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"weight": q, **parts}, functional.dequantize_4bit(q, state)

    return write


def nvfp4(comfy: bool) -> Writer:
    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        from diffusers.quantizers.bfl.utils import dequantize_nvfp4, quantize_nvfp4

        q, scale, whole = quantize_nvfp4(w)
        dense = dequantize_nvfp4(q, scale, whole)
        if comfy:  # first number in the high half; scales in cuBLAS' tiles of 128 x 4
            q = q << 4 | q >> 4
            rows, columns = -(-scale.shape[0] // 128) * 128, -(-scale.shape[1] // 4) * 4
            tiled = torch.zeros(rows * columns, dtype=torch.uint8)
            for (r, c), value in np.ndenumerate(scale.view(torch.uint8).numpy()):
                tile = (r // 128) * (columns // 4) + c // 4
                tiled[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = int(value)
            scale = tiled.view(rows, columns).view(E4M3)
        parts = {"weight": q, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(0.5)}
        return parts, dense

    return write


def comfy(name: str) -> dict[str, Tensor]:
    return {"comfy_quant": text({"format": name}), "input_scale": torch.tensor(1.5)}


# name -> (writer, its label, metadata of a whole file from the layers, markers)
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
    writer = gguf.GGUFWriter(path, architecture or "")
    if architecture is None:  # stable-diffusion.cpp states none
        writer.kv_data[0].pop("general.architecture")
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
