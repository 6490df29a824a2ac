"""A folder that `convert` made, opened by diffusers: it is a whole pipeline, and draws the same picture as ours."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import miniflux
from miniflux.checkpoints import convert, save, save_all_in_one
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.text import load_clip_tokenizer, load_t5_tokenizer
from miniflux.weights.finding import BUNDLED
from tests.parity.peers import diffusers, transformers
from tests.parity.test_pipeline import CLIP_SIZES, LENGTH, LEVELS, PROMPT, SIZES, STEPS, T5_SIZES, draw
from tests.tiny import randomise

PROMPTS = [
    *(PROMPT, "", "Two GREEN squares, 7; unknown wörds", "tabs\tand\nlines  and   spaces", "ﬁne ½ Ⅷ ｆｕｌｌ x²"),
    *(
        "日本語のテキスト",
        "emoji 🎨🖌️ here",
        "a</s>b <pad> <extra_id_3>",
        "don't; it's we'll",
        "é e\u0301 \u200b\u00ad\u00a0.",
    ),
]


def nano(folder: Path, name: str) -> Path:
    """A bundled model as weights/README.md recommends: single files beside sub-folders."""
    folder.mkdir()
    for file in (f"flux1-{name}.safetensors", "ae.safetensors"):
        shutil.copy(BUNDLED / file, folder / file)
    for place in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(BUNDLED / place, folder / place)
    return folder


def tiny(folder: Path, dev: bool) -> Path:
    """A random model in single files, whose sizes are told by their headers."""
    folder.mkdir()
    networks: list[tuple[str, Any]] = [
        ("flux1-mine", randomise(Flux1(replace(SIZES, guidance_embed=dev)))),
        ("ae", randomise(Autoencoder(LEVELS))),
        ("clip_l", randomise(ClipTextEncoder(CLIP_SIZES))),
        ("t5xxl_fp16", randomise(T5Encoder(T5_SIZES))),
    ]
    for name, network in networks:
        save(network, folder / f"{name}.safetensors")
    for place in ("tokenizer", "tokenizer_2"):
        shutil.copytree(BUNDLED / place, folder / place)
    return folder


def opened(folder: Path) -> Any:
    pipe = diffusers.FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_pictures(theirs: Any, ours: Any, guidance: float | None, tolerance: float) -> None:
    for seed, prompt in enumerate(PROMPTS[:3]):
        latents, pixels = draw(theirs, prompt, seed, guidance)
        result = ours.generate(prompt, seed=seed, steps=STEPS, guidance=guidance, width=80, height=48, t5_length=LENGTH)
        from miniflux.sampling import pack

        assert float((pack(result.latents) - latents).abs().max()) <= tolerance * float(latents.abs().max())
        drawn = np.asarray(result.images[0]).astype(int)
        assert np.abs(drawn - pixels).max() <= 1 and pixels.std() > 5


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("name", ["nano-dev", "nano-schnell"])
def test_nano(name: str, tmp_path: Path) -> None:
    source = nano(tmp_path / "source", name)
    made = convert(source, tmp_path / "made", layout="diffusers")
    assert not made.missing and not made.left_out
    dev = name == "nano-dev"
    theirs = opened(tmp_path / "made")
    assert theirs.scheduler.config.use_dynamic_shifting == dev and theirs.scheduler.config.shift == (3 if dev else 1)
    assert theirs.tokenizer.model_max_length == 77
    same_pictures(theirs, miniflux.load(source), 3.0 if dev else None, 1e-4)


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("dev", [True, False])
@pytest.mark.parametrize("shape", ["single files", "all-in-one", "there and back"])
def test_a_random_model(dev: bool, shape: str, tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", dev)
    ours = miniflux.load(source)
    if shape == "all-in-one":
        convert(source, tmp_path / "one.safetensors", layout="all-in-one")
        for place in ("tokenizer", "tokenizer_2"):  # which the file cannot hold
            shutil.copytree(BUNDLED / place, tmp_path / place)
        source = tmp_path / "one.safetensors"
    if shape == "there and back":
        convert(source, tmp_path / "there", layout="diffusers")
        convert(tmp_path / "there", tmp_path / "back", layout="original")
        source = tmp_path / "back"
    made = convert(source, tmp_path / "made", layout="diffusers")
    assert not made.missing, made
    same_pictures(opened(tmp_path / "made"), ours, 2.5 if dev else None, 1e-4)


def test_tokenizers(tmp_path: Path) -> None:
    """Made of `vocab.json`, `merges.txt` and `spiece.model` alone: transformers and we read the same ids from them."""
    made = tmp_path / "made"
    convert(nano(tmp_path / "source", "nano-dev"), made, layout="diffusers")
    clip = transformers.CLIPTokenizer.from_pretrained(made / "tokenizer")
    t5 = transformers.T5TokenizerFast.from_pretrained(made / "tokenizer_2")
    before = load_clip_tokenizer(BUNDLED / "tokenizer"), load_t5_tokenizer(BUNDLED / "tokenizer_2")
    after = load_clip_tokenizer(made / "tokenizer"), load_t5_tokenizer(made / "tokenizer_2")
    for prompt in PROMPTS:
        for theirs, ours, again in zip((clip, t5), before, after, strict=True):
            assert theirs(prompt, padding="max_length", max_length=40, truncation=True).input_ids == (
                ours(prompt, 40)[0].tolist()
            ), prompt
            assert again(prompt, 40).equal(ours(prompt, 40)), prompt


def test_tokenizers_of_one_file_each(tmp_path: Path) -> None:
    """CLIP's from `tokenizer.json` alone: the tables that older programs want are taken out of it."""
    source = nano(tmp_path / "source", "nano-dev")
    transformers.CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer").save_pretrained(tmp_path / "saved")
    shutil.rmtree(source / "tokenizer")
    (source / "tokenizer").mkdir()
    shutil.copy(tmp_path / "saved" / "tokenizer.json", source / "tokenizer")
    convert(source, tmp_path / "made", layout="diffusers")
    vocabulary = json.loads((tmp_path / "made" / "tokenizer" / "vocab.json").read_text("utf-8"))
    assert vocabulary == json.loads((BUNDLED / "tokenizer" / "vocab.json").read_text("utf-8"))
    lines = (tmp_path / "made" / "tokenizer" / "merges.txt").read_text("utf-8").splitlines()
    assert lines[1:] == (BUNDLED / "tokenizer" / "merges.txt").read_text("utf-8").splitlines()[1:]


def test_all_in_one_files_keep_the_dtype(tmp_path: Path) -> None:
    """The networks were widened to compute; the file is as large as those they came from."""
    pipe = miniflux.load("nano")
    assert pipe.dtype == torch.float32
    save_all_in_one(pipe, tmp_path / "a.safetensors")
    convert(nano(tmp_path / "source", "nano-dev"), tmp_path / "b.safetensors", layout="all-in-one")
    from safetensors.torch import load_file

    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    with torch.no_grad():  # trained or merged since: what bfloat16 cannot say is not rounded
        pipe.transformer.img_in.bias += 1e-4
    save_all_in_one(pipe, tmp_path / "a.safetensors")
    changed = load_file(tmp_path / "a.safetensors")
    key = "model.diffusion_model.img_in.bias"
    assert torch.equal(changed[key], pipe.transformer.img_in.bias) and changed[key].dtype == torch.float32
