"""Settings of A1111, Forge and ComfyUI: what maps is taken, everything else is listed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from miniflux.sampling import solver
from miniflux.sampling.schedules import SPACINGS, dynamic_shift, flux1_mu, static_shift
from miniflux.settings import LoraUse, Reading, foreign, read_picture

FORGE = """a lighthouse in fog <lora:realism:0.8>, film photograph, 35mm, (grain:1.2)
second line
Negative prompt: cartoon, people"""
FORGE += (
    "\nSteps: 12, Sampler: DPM++ 2M, Schedule type: Simple, CFG scale: 2.5, Distilled CFG Scale: 3.2, "
    "Seed: 2874518412, "
    "Size: 896x1152, Model hash: 4610115bb0, Model: flux1-dev, "
    'Lora hashes: "realism: 8c1b, other: 11", Denoising strength: 0.6, Version: f2.0.1'
)


def written(tmp_path: Path, **texts: str) -> Reading:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png", pnginfo=info)
    return read_picture(tmp_path / "x.png")


def test_forge(tmp_path: Path) -> None:
    reading = written(tmp_path, parameters=FORGE)
    (request,) = reading.requests
    assert reading.origin == "A1111"
    assert request.prompt == "a lighthouse in fog , film photograph, 35mm, (grain:1.2)\nsecond line"
    assert request.negative == "cartoon, people" and request.guide is not None and request.guide.scale == 2.5
    assert (request.model, request.steps, request.guidance, request.seed) == ("flux1-dev", 12, 3.2, 2874518412)
    assert (request.width, request.height, request.solver, request.schedule) == (896, 1152, "dpmpp-2m", "simple")
    assert request.loras == (LoraUse("realism", 0.8),)
    told = "\n".join(reading.not_understood)
    for part in (
        "Model hash: 4610115bb0",
        "Lora hashes: realism: 8c1b, other: 11",
        "Denoising strength: 0.6",
        "Version: f2.0.1",
        "noise is drawn otherwise",
        "(word:1.2)",
    ):
        assert part in told
    assert "Steps" not in told and "Size" not in told


def test_what_cannot_be_taken_is_listed(tmp_path: Path) -> None:
    """Each value that we have no place for, or could not have, with the reason; the rest is taken."""
    text = "a star\nNegative prompt: x\nSteps: 99999, Sampler: Euler a Karras, CFG scale: 1, "
    text += "Seed: -1, Size: 99999x64, Model: else"
    reading = written(tmp_path, parameters=text)
    (request,) = reading.requests
    assert (request.prompt, request.steps, request.seed, request.width) == ("a star", None, 0, None)
    assert (request.solver, request.schedule, request.negative, request.guide) == (
        "euler-ancestral",
        "karras",
        None,
        None,
    )
    told = "\n".join(reading.not_understood)
    for part in (
        "steps '99999'",
        "seed '-1'",
        "Size: 99999x64",
        "model 'else'",
        "Negative prompt: has no effect",
        "karras",
    ):
        assert part in told


def test_a1111_in_a_jpeg(tmp_path: Path) -> None:
    """As its web UI writes them: the EXIF user comment, UTF-16 behind `UNICODE`."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + FORGE.replace("fog", "fög").encode("utf-16-be")
    Image.new("RGB", (16, 16)).save(tmp_path / "x.jpg", exif=exif)
    reading = read_picture(tmp_path / "x.jpg")
    assert reading.origin == "A1111" and reading.requests[0].steps == 12 and "fög" in reading.requests[0].prompt


def graph(**changes: Any) -> dict[str, Any]:
    """The graph of ComfyUI's own FLUX.1 dev example, with a LoRA."""
    nodes: dict[str, Any] = {
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 1024, "height": 768, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["11", 0]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["13", 0], "vae": ["10", 0]}},
        "9": {
            "class_type": "SaveImage",
            "inputs": {"images": ["8", 0], "filename_prefix": "x"},
            "is_changed": [float("nan")],
        },
        "10": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
        "11": {"class_type": "DualCLIPLoader", "inputs": {"clip_name1": "t5xxl_fp16.safetensors", "type": "flux"}},
        "12": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}},
        "13": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["25", 0],
                "guider": ["22", 0],
                "sampler": ["16", 0],
                "sigmas": ["17", 0],
                "latent_image": ["5", 0],
            },
        },
        "16": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "17": {
            "class_type": "BasicScheduler",
            "inputs": {"scheduler": "simple", "steps": 20, "denoise": 1.0, "model": ["30", 0]},
        },
        "22": {"class_type": "BasicGuider", "inputs": {"model": ["30", 0], "conditioning": ["26", 0]}},
        "25": {"class_type": "RandomNoise", "inputs": {"noise_seed": 219670278747233}},
        "26": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
        "30": {
            "class_type": "ModelSamplingFlux",
            "inputs": {"max_shift": 1.15, "base_shift": 0.5, "width": 1024, "height": 768, "model": ["31", 0]},
        },
        "31": {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"lora_name": "sub/style.safetensors", "strength_model": 0.7, "model": ["12", 0]},
        },
    }
    return {**nodes, **changes}


def test_comfyui_custom_sampler(tmp_path: Path) -> None:
    nodes = graph(**{"40": {"class_type": "ImageUpscaleWithModel", "inputs": {"image": ["8", 0]}}})
    reading = written(tmp_path, prompt=json.dumps(nodes), workflow="{}")
    (request,) = reading.requests
    assert reading.origin == "ComfyUI"
    assert (request.prompt, request.model, request.steps, request.guidance) == ("a cat", "flux1-dev", 20, 3.5)
    assert (request.width, request.height, request.seed) == (1024, 768, 219670278747233)
    assert (request.solver, request.schedule) == ("euler", "simple")
    assert request.loras == (LoraUse("sub/style.safetensors", 0.7),)
    # The node's line through 256 and 4096 tokens is the one of the release, at the same size.
    assert request.shift is not None
    for t in (0.1, 0.5, 0.9):
        assert static_shift(request.shift)(t) == pytest.approx(dynamic_shift(flux1_mu(64 * 48))(t), abs=1e-12)
    assert [line for line in reading.not_understood if line.startswith("node")] == ["node 40: ImageUpscaleWithModel"]


def ksampler() -> dict[str, Any]:
    return {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 5,
                "steps": 4,
                "cfg": 3.0,
                "sampler_name": "dpmpp_2m_sde",
                "scheduler": "beta",
                "denoise": 0.5,
                "model": ["4", 0],
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "flux1-schnell.safetensors"}},
        "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 2}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["20", 0], "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
        "20": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a dog"}},
    }


def test_comfyui_ksampler(tmp_path: Path) -> None:
    reading = written(tmp_path, prompt=json.dumps(ksampler()))
    (request,) = reading.requests
    assert (request.prompt, request.negative, request.model) == ("a dog", "blurry", "flux1-schnell")
    assert request.guide is not None and request.guide.scale == 3.0
    assert (request.steps, request.seed, request.images, request.width) == (4, 5, 2, 512)
    assert (request.solver, request.schedule, request.shift) == ("dpmpp-2m-sde", "beta-comfyui", None)
    assert any("denoise 0.5" in line for line in reading.not_understood)


def test_comfyui_without_a_shift_node_has_its_fixed_shift(tmp_path: Path) -> None:
    nodes = {**ksampler(), "4": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors"}}}
    assert written(tmp_path, prompt=json.dumps(nodes)).requests[0].shift == pytest.approx(math.exp(1.15))


def test_comfyui_editor_graph(tmp_path: Path) -> None:
    """Values in the order of the widgets, links by number."""
    workflow = {
        "nodes": [
            {
                "id": 3,
                "type": "KSampler",
                "widgets_values": [7, "randomize", 12, 1, "uni_pc", "sgm_uniform", 1],
                "inputs": [
                    {"name": "positive", "link": 1},
                    {"name": "latent_image", "link": 2},
                    {"name": "model", "link": None},
                ],
            },
            {"id": 6, "type": "CLIPTextEncode", "widgets_values": ["a fox"], "inputs": []},
            {"id": 5, "type": "EmptyLatentImage", "widgets_values": [640, 480, 1]},
            {"id": 9, "type": "Note", "widgets_values": ["hello"]},
        ],
        "links": [[1, 6, 0, 3, 1, "CONDITIONING"], [2, 5, 0, 3, 3, "LATENT"]],
    }
    (request,) = written(tmp_path, workflow=json.dumps(workflow)).requests
    assert (request.prompt, request.seed, request.steps, request.width, request.height) == ("a fox", 7, 12, 640, 480)
    assert (request.solver, request.schedule) == ("unipc", "sgm-uniform")


@pytest.mark.parametrize(
    "nodes",
    [
        graph(**{"30": {"class_type": "ModelSamplingFlux", "inputs": {"model": ["30", 0]}}}),  # a circle
        graph(**{"6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["6", 0]}}}),
        graph(**{"13": {"class_type": "Unknown", "inputs": {}}}),
        graph(**{"5": {"class_type": "EmptyLatentImage", "inputs": {"width": "wide", "height": None}}}),
        graph(**{"17": {"class_type": "BasicScheduler", "inputs": {"scheduler": ["x"], "steps": {}, "denoise": "a"}}}),
        graph(**{"25": {"class_type": "RandomNoise", "inputs": {"noise_seed": -5}}}),
        {},
    ],
)
def test_comfyui_graphs_that_make_no_sense(tmp_path: Path, nodes: dict[str, Any]) -> None:
    """Circles, missing and ill-typed nodes: something is listed, nothing hangs and nothing else is raised."""
    reading = written(tmp_path, prompt=json.dumps(nodes))
    assert len(reading.requests) == 1 and reading.not_understood


def test_names_map_to_solvers_and_schedules_there_are() -> None:
    assert {solver(name).name for name in foreign.SOLVERS.values()} == set(foreign.SOLVERS.values())
    assert set(foreign.SCHEDULES.values()) <= set(SPACINGS)
