"""Folders of FLUX.2 and FLUX.3 that `convert` made, opened by diffusers: the same weights, the same picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import miniflux
from miniflux.checkpoints import convert, save
from miniflux.checkpoints.layouts import from_layout
from miniflux.checkpoints.networks import BY_KIND
from miniflux.models.causal_lm import CausalLm
from miniflux.testing import tiny
from miniflux.text.chat import ChatForm, ChatText, chat_tokenizer, load_tokenizer
from miniflux.variants import variant
from tests.parity.peers import diffusers, transformers
from tests.tekken import content, trained
from tests.tiny import randomise

PROMPT = "a cat, «naïve» 🦊"
SMALL: dict[str, Any] = {"steps": 2, "width": 64, "height": 64, "seed": 3}
PIPELINES = {
    "flux2-klein-4b": ("Flux2KleinPipeline", True),
    "flux2-klein-base-4b": ("Flux2KleinPipeline", False),
    "flux2-klein-9b-kv": ("Flux2KleinKVPipeline", True),
    "flux2-dev": ("Flux2Pipeline", None),
}


def released(name: str, folder: Path, words: Path) -> Path:
    """A tiny model as its release lies in a cache: a single file by its name, the other parts in folders."""
    pipe = tiny(name)
    folder.mkdir()
    if name == "flux2-dev":
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tekken.json").write_text(json.dumps(content(trained(140))))
    else:
        (folder / "tokenizer").symlink_to(words)
    tokenizer = load_tokenizer(folder / "tokenizer")
    lm = cast(CausalLm, pipe.text.networks["lm"])
    size = 151936 if name != "flux2-dev" else tokenizer.get_vocab_size()
    config = replace(lm.config, vocab_size=size, layers_read=None)
    network = randomise(CausalLm(config), 5).requires_grad_(False)
    pipe.text = ChatText(network, chat_tokenizer(tokenizer, cast(ChatForm, pipe.variant.chat)))
    file = variant(name).file
    save(pipe.transformer, folder / file)
    for place, part in (("vae", pipe.autoencoder), ("text_encoder", network)):
        record = BY_KIND[type(part)]
        (folder / place).mkdir()
        save(part, folder / place / f"{record.stem}.safetensors")
        (folder / place / "config.json").write_text(json.dumps(record.as_json(part.config)))
    return folder


def same_weights(ours: nn.Module, theirs: nn.Module, layout: str = "diffusers") -> None:
    state = {key: tensor.detach() for key, tensor in theirs.state_dict().items()}
    for key, tensor in from_layout(ours, state, layout).items():
        assert torch.equal(tensor, ours.state_dict()[key]), key


def same_picture(before: Any, after: Any) -> None:
    """But for where in memory the weights lie."""
    one, other = (pipe.generate(PROMPT, **SMALL).latents for pipe in (before, after))
    assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())


@pytest.mark.parametrize("name", PIPELINES)
def test_the_index(name: str, tokenizer: Callable[[str], Path], tmp_path: Path) -> None:
    """The class of the pipeline and whether it is distilled, from the name of the file; then from that index."""
    kind, distilled = PIPELINES[name]
    folder = released(name, tmp_path / "release", tokenizer("qwen3"))
    for i in range(2):
        done = convert(folder, tmp_path / f"pipeline-{i}", layout="diffusers")
        folder = tmp_path / f"pipeline-{i}"
        index = json.loads((folder / "model_index.json").read_text())
        assert (index["_class_name"], index.get("is_distilled")) == (kind, distilled) and not done.missing
        assert {"model_index.json", "scheduler", "tokenizer"} <= set(done.beside)


@pytest.fixture(params=["flux2-klein-base-4b", "flux2-dev"])
def made(request: pytest.FixtureRequest, tokenizer: Callable[[str], Path], tmp_path: Path) -> tuple[str, Path, Path]:
    folder = released(request.param, tmp_path / "release", tokenizer("qwen3"))
    done = convert(folder, tmp_path / "pipeline", layout="diffusers")
    assert not done.missing, done.missing
    return request.param, folder, tmp_path / "pipeline"


def test_diffusers_opens_it(made: tuple[str, Path, Path]) -> None:
    """As the class that draws with it; every weight is the same, and so are the ids of a prompt."""
    name, release, folder = made
    kind, distilled = PIPELINES[name]
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == kind
    theirs = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    ours = miniflux.load(folder, device="cpu")
    assert distilled is None or theirs.config.is_distilled == distilled
    same_weights(ours.transformer, theirs.transformer)
    same_weights(ours.autoencoder, theirs.vae)
    whole = CausalLm(replace(cast(CausalLm, ours.text.networks["lm"]).config, layers_read=None))
    whole.load_state_dict(theirs.text_encoder.state_dict(), strict=not whole.config.tie_word_embeddings)
    read = cast(CausalLm, ours.text.networks["lm"]).state_dict()
    assert all(torch.equal(whole.state_dict()[key], tensor) for key, tensor in read.items())
    embedded = theirs.encode_prompt(PROMPT, max_sequence_length=200)[0]
    found = ours.text.encode([PROMPT], length=200).txt
    assert float((found - embedded).abs().max()) <= 2e-5 * float(embedded.abs().max())
    before = miniflux.load(release, device="cpu")
    assert (before.variant.cfg, before.variant.steps) == (ours.variant.cfg, ours.variant.steps)
    same_picture(before, ours)


@pytest.mark.parametrize("name", ["flux3-klein", "flux3-klein-base"])
def test_parts_of_flux3(name: str, tokenizer: Callable[[str], Path], tmp_path: Path) -> None:
    """Its networks and its scheduler are opened one by one; that all of Qwen3-VL is wanted for the rest is said."""
    folder = released(name, tmp_path / "release", tokenizer("qwen3"))
    done = convert(folder, tmp_path / "made", layout="diffusers")
    assert list(done.missing) == ["the index of a pipeline"] and "its half that sees pictures" in str(done)
    made = tmp_path / "made"
    assert not list(made.glob("*index.json"))
    theirs = diffusers.Flux3Transformer2DModel.from_pretrained(made, subfolder="transformer")
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(made, subfolder="vae")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(made, subfolder="scheduler")
    assert scheduler.config.shift == 6.93 and not scheduler.config.use_dynamic_shifting
    assert transformers.AutoTokenizer.from_pretrained(made / "tokenizer").pad_token == "<|endoftext|>"
    before, after = (miniflux.load(path, device="cpu") for path in (folder, made))
    same_weights(after.transformer, theirs)
    same_weights(after.autoencoder, vae)
    same_picture(before, after)


def test_a_language_model_that_is_cut_off_makes_no_pipeline(tokenizer: Callable[[str], Path], tmp_path: Path) -> None:
    folder = released("flux2-klein-4b", tmp_path / "release", tokenizer("qwen3"))
    small = tiny("flux2-klein-4b")
    lm = cast(CausalLm, small.text.networks["lm"])
    for file in (folder / "text_encoder").iterdir():
        file.unlink()
    save(lm, folder / "text_encoder" / "model.safetensors")
    done = convert(folder, tmp_path / "made", layout="diffusers")
    assert list(done.missing) == ["the rest of the language model"]
    assert not (tmp_path / "made" / "model_index.json").exists()
