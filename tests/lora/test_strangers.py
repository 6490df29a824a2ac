"""Files that are no LoRAs are named in one line; the model of one that is is found, with its weights."""

from __future__ import annotations

import io
import json
import logging
import math
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import miniflux
from miniflux.apps.cli import main
from miniflux.conversion.converting import convert as convert_file
from miniflux.errors import CheckpointError, InputError, LoraError, MinifluxError
from miniflux.inspection import inspect as inspect_file
from miniflux.lora import attach, convert, extract, inspect, merge_files, read
from miniflux.lora.attaching import BUNDLED_LORAS
from miniflux.lora.models import stand_ins
from miniflux.variants import names
from miniflux.weights.finding import BUNDLED
from tests.tiny import randn

HIDDEN = 192  # of nano


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, kind)
    return stream.getvalue()


def zipped() -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, stream)
    assert zipfile.is_zipfile(stream)
    return stream.getvalue()


BYTES: dict[str, tuple[bytes, str]] = {
    "a.png": (picture("PNG"), "a picture (PNG)"),
    "a.jpg": (picture("JPEG"), "a picture (JPEG)"),
    "a.safetensors": (picture("WEBP"), "a picture (WebP)"),
    "b.safetensors": (picture("BMP"), "a picture (BMP)"),
    "c.safetensors": (picture("GIF"), "a picture (GIF)"),
    "d.safetensors": (picture("TIFF"), "a picture (TIFF)"),
    "e.ckpt": (zipped(), "a zip archive as torch.save writes it: with a pickle"),
    "f.pt": (pickle.dumps({"state_dict": list(range(99))}), "a pickle, which can run code and is never loaded"),
    "g.gguf": (b"GGUF\x03\0\0\0" + bytes(99), "a GGUF file"),
    "h.safetensors": (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
    "i.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer"),
    "j.json": (json.dumps({"nodes": [1, 2]}).encode(), "a JSON file"),
    "l.safetensors": (picture("TGA"), "a picture (TGA)"),
    "m.safetensors": (picture("PPM"), "a picture (PPM)"),
    "n.onnx": (b"\x08\x07\x12\x07pytorch\x1a\x051.2.0" + bytes(99), "a model in ONNX"),
    "o.npy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "an array of numpy"),
    "p.tar": (b"weights".ljust(257, b"\0") + b"ustar" + bytes(300), "an archive (tar)"),
    "q.safetensors": (picture("JPEG2000"), "a picture (JPEG2000)"),
    "r.safetensors": (picture("DDS"), "a picture (DDS)"),
    "s.pkl": (pickle.dumps({"state_dict": list(range(99))}, 0), "a pickle, which can run code and is never loaded"),
    "t.pkl": (pickle.dumps({"state_dict": list(range(99))}, 1), "a pickle, which can run code and is never loaded"),
    "u.onnx": (b"\x08\x03\x12\x0cmytoolchains:\x10" + bytes(99), "a model in ONNX"),
    "v.zip": (b"PK\x05\x06" + bytes(18), "a zip archive without files"),
    "w.mp3": (b"ID3\x04" + bytes(99), "a recording of sound"),
    "x.tflite": (b"\x1c\0\0\0TFL3" + bytes(99), "a model in TensorFlow Lite"),
    "y.safetensors": (bytes(4096), "nothing but zeros"),
    "z.safetensors": (picture("TGA") + bytes(200_000), "a picture (TGA)"),  # begins with the length of what follows
    "k.safetensors": (b"Entry not found, sorry\n", "a text file"),
}


@pytest.mark.parametrize("name", BYTES)
def test_files_of_other_kinds(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Item 13: one line that says what it is; from Python, and of every command that takes a LoRA."""
    data, kind = BYTES[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(LoraError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: this is {kind}") and str(caught.value).endswith(", not a LoRA")
    assert main(["lora", "inspect", str(path)]) == 2
    assert main(["lora", "convert", str(path), "--to", "kohya", "-o", str(tmp_path / "out.safetensors")]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and all(kind in line for line in shown)
    assert not path.name.endswith(".gguf") or "must end in .gguf" not in shown[0]


@pytest.mark.parametrize("name", [name for name in BYTES if name != "g.gguf"])
def test_files_of_other_kinds_given_as_a_model(name: str, tmp_path: Path) -> None:
    """By every way that a model is named, and whatever the name of the file ends in."""
    data, kind = BYTES[name]
    for ending in ("safetensors", "gguf"):
        path = tmp_path / f"a.{ending}"
        path.write_bytes(data)
        for call in (
            miniflux.load,
            miniflux.checkpoints.inspect,
            lambda path: merge_files(path, [], tmp_path / "b.safetensors"),
        ):
            with pytest.raises(MinifluxError) as caught:
                call(path)
            assert str(caught.value).startswith(f"{path}: not a ") and f"it looks like {kind}" in str(caught.value)


def nothing(*keys: str) -> dict[str, Tensor]:
    return {key: torch.ones(4, 4) for key in keys}


TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "embedding of CLIP and T5": (nothing("clip_l", "t5xxl"), "an embedding of words"),
    "embedding of A1111": (nothing("emb_params"), "an embedding of words"),
    "ControlNet": (
        nothing("controlnet_x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"),
        "a FLUX.1 ControlNet, 1 + 0 blocks",
    ),
    "IP-Adapter": (nothing("ip_adapter_proj_model.proj.weight", "double_blocks.0.processor.ip.weight"), "IP-Adapter"),
    "SigLIP": (nothing("vision_model.head.probe"), "SigLIP"),
    "U-Net": (nothing("down_blocks.0.resnets.0.conv1.weight"), "a U-Net of Stable Diffusion"),
    "checkpoint of SD": (nothing("model.diffusion_model.input_blocks.0.0.weight"), "a checkpoint of Stable Diffusion"),
    "LoRA of SD": (
        nothing("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
        "a LoRA for Stable Diffusion (its U-Net has down_blocks), not a LoRA for FLUX",
    ),
    "LoRA of the end of SDXL": (
        nothing("lora_unet_output_blocks_1_0_emb_layers_1.lora_up.weight", "lora_te2_text_model_x.alpha"),
        "a LoRA for Stable Diffusion XL (its U-Net has output_blocks), not a LoRA for FLUX",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_other_kinds(name: str, tmp_path: Path) -> None:
    tensors, kind = TENSORS[name]
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(LoraError, match="not a LoRA") as caught:
        read(path)
    assert kind in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["embedding of A1111", "U-Net", "checkpoint of SD", "LoRA of SD", "LoRA"])
def test_tensors_of_other_kinds_given_as_a_model(name: str, tmp_path: Path) -> None:
    """In the same words, by everything that takes a model."""
    tensors, kind = (nano_lora(), "a LoRA, which changes a model") if name == "LoRA" else TENSORS[name]
    path, kind, new = tmp_path / "a.safetensors", kind.partition(", not")[0], tmp_path / "b.safetensors"
    save_file(tensors, path)
    for call in (miniflux.load, lambda path: merge_files(path, [], new), lambda path: extract(path, path, new, 4)):
        with pytest.raises(CheckpointError) as caught:
            call(path)
        assert str(caught.value).startswith(f"{path}: expected a transformer of FLUX, found {kind}")
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: {kind}" if "LoRA" not in name else "a LoRA is conv")):
        convert_file(path, new)
    assert "LoRA" in name or inspect_file(path).parts[0].variant.startswith(kind)


NETWORKS = {
    "flux1-nano-dev.safetensors": "the transformer of a FLUX.1",
    "ae.safetensors": r"an autoencoder \(VAE\)",
    "tiny_decoder.safetensors": "a tiny decoder",
    "text_encoder": r"a text encoder \(CLIP\)",
    "text_encoder_2": r"a text encoder \(T5\)",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    with pytest.raises(LoraError, match=rf"{name}.*: this is {NETWORKS[name]}.*, not a LoRA"):
        attach(miniflux.load("nano"), BUNDLED / name)


def test_whole_models(tmp_path: Path) -> None:
    """All in one file, and the folder of a pipeline."""
    parts = {
        "model.diffusion_model.": BUNDLED / "flux1-nano-dev.safetensors",
        "vae.": BUNDLED / "ae.safetensors",
    }
    whole = {prefix + key: tensor for prefix, file in parts.items() for key, tensor in load_file(file).items()}
    save_file(whole, tmp_path / "all.safetensors")
    with pytest.raises(LoraError, match=r"a whole checkpoint \(the transformer of a FLUX.1, an autoencoder"):
        read(tmp_path / "all.safetensors")
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    with pytest.raises(LoraError, match="the folder of a whole model, not a LoRA"):
        read(tmp_path / "pipeline")


@pytest.mark.parametrize("start", [b"BM", b"\x80\x02", b"\x80\x04", b"\x1f\x8b", b"II*\x00"])
def test_a_header_whose_length_looks_like_another_file(start: bytes, tmp_path: Path) -> None:
    """A safetensors file begins with the length of its header, which may be any number."""
    size = int.from_bytes(start, "little")
    tensors = nano_lora()
    save_file(tensors, tmp_path / "plain.safetensors")
    data = (tmp_path / "plain.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].rstrip()
    size += (1 << 16) * (size < len(header))
    assert size >= len(header)
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(struct.pack("<Q", size) + header.ljust(size) + data[8 + length :])
    assert odd.read_bytes().startswith(start)
    assert len(read(odd).groups) == 1


# The model that a LoRA is for


def nano_lora(network: str = "transformer") -> dict[str, Tensor]:
    if network == "clip":
        sizes = miniflux.variants.variant("nano").clip
        prefix, rows, columns = (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            sizes.intermediate_size,
            sizes.hidden_size,
        )
    else:
        prefix, rows, columns = "lora_unet_double_blocks_0_img_attn_qkv", 3 * HIDDEN, HIDDEN
    return {f"{prefix}.lora_down.weight": randn(4, columns), f"{prefix}.lora_up.weight": randn(rows, 4, seed=1)}


@pytest.mark.parametrize("network", ["transformer", "clip"])
def test_norms_beside_those_of_the_base(network: str, tmp_path: Path) -> None:
    """Item 12: |dW| / |W| of a file for nano, without a word of which model; the same as attached."""
    save_file(nano_lora(network), tmp_path / "a.safetensors")
    receipt = inspect(tmp_path / "a.safetensors")
    others = ("nano-schnell", "nano-fill", "nano-kontext", *(["nano2"] if network == "transformer" else []))
    assert receipt.fits == ("nano-dev", *others)
    attached = attach(miniflux.load("nano-dev"), tmp_path / "a.safetensors")
    assert receipt.modules[0].relative == pytest.approx(attached.modules[0].relative, rel=1e-6)
    assert math.isfinite(receipt.modules[0].relative)
    assert f"1 of 1 modules applied; for nano-dev (it fits {', '.join(others)} as well)" in str(receipt)


@pytest.mark.parametrize("kind", ["DoRA", "packed q, k and v"])
def test_norms_of_other_forms(kind: str, tmp_path: Path) -> None:
    tensors = nano_lora()
    if kind == "DoRA":
        tensors["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"] = randn(3 * HIDDEN, 1).abs() + 0.5
    else:
        down, up = tensors.values()
        name = "transformer.transformer_blocks.0.attn.to_k"
        tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up[:HIDDEN].contiguous()}
    save_file(tensors, tmp_path / "a.safetensors")
    receipt, attached = inspect(tmp_path / "a.safetensors"), attach(miniflux.load("nano"), tmp_path / "a.safetensors")
    for found, wanted in zip(receipt.modules, attached.modules, strict=True):
        assert (found.norm, found.relative) == pytest.approx((wanted.norm, wanted.relative), rel=1e-5)


def test_without_the_weights_there_is_no_norm_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file for FLUX.1 dev where that is not here: its numbers are left out, not guessed."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("MINIFLUX_WEIGHTS", raising=False)
    width = stand_ins("flux1-dev")["transformer"].img_in.out_features  # pyright: ignore
    prefix = "lora_unet_double_blocks_18_img_attn_proj"
    tensors = {f"{prefix}.lora_down.weight": randn(2, width), f"{prefix}.lora_up.weight": randn(width, 2, seed=1)}
    save_file(tensors, tmp_path / "a.safetensors")
    receipt = inspect(tmp_path / "a.safetensors")
    assert receipt.fits == tuple(name for name in names() if name.startswith("flux1"))
    assert math.isnan(receipt.modules[0].relative) and receipt.modules[0].norm > 0


@pytest.mark.parametrize("dialect", ["diffusers", "comfyui", "kohya"])
def test_convert_finds_the_model(dialect: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Item 12: the bundled LoRA, which flux1-dev was taken for; what it fits is said; the changes stay the same."""
    out = tmp_path / "out.safetensors"
    assert main(["lora", "convert", "realism", "--to", dialect, "-o", str(out)]) == 0  # sets the level of the log
    with caplog.at_level(logging.INFO):
        convert("realism", out, dialect)
    assert "for nano-dev or nano-schnell" in caplog.text
    ours, theirs = inspect("realism"), inspect(out)
    assert sum(m.norm**2 for m in ours.modules) == pytest.approx(sum(m.norm**2 for m in theirs.modules), rel=1e-5)


def test_convert_for_no_model_and_for_another(tmp_path: Path) -> None:
    prefix = "lora_unet_double_blocks_0_img_attn_qkv"
    odd = {f"{prefix}.lora_down.weight": torch.ones(2, 33), f"{prefix}.lora_up.weight": torch.ones(99, 2)}
    with pytest.raises(LoraError, match=r"its widths \(33\) are those of no model known here"):
        convert(odd, tmp_path / "out.safetensors", "kohya")
    with pytest.raises(LoraError, match="its widths are those of nano-dev"):
        convert("realism", tmp_path / "out.safetensors", "kohya", model="flux1-dev")
    with pytest.raises(InputError, match="unknown dialect 'civitai'"):
        convert("realism", tmp_path / "out.safetensors", "civitai")


def test_the_nearest_model_says_what_is_wrong(tmp_path: Path) -> None:
    """One bad tensor of a file for nano is not told as all of them not fitting FLUX.1 dev."""
    tensors = load_file(BUNDLED_LORAS / "realism.safetensors")
    key = next(key for key in tensors if key.endswith("up.weight"))
    tensors[key] = torch.from_numpy(np.ones((7, tensors[key].shape[1]), np.float32))
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match=r"2 of its \d+ tensors find no use"):
        inspect(tmp_path / "a.safetensors")
