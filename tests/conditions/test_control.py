"""Control pictures: what reaches the network, in every memory mode; sizes; bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import miniflux
from miniflux import lora
from miniflux.apps.cli import main
from miniflux.conditions import Control, Inpaint
from miniflux.errors import InputError
from miniflux.pictures import from_image
from miniflux.pipeline import Pipeline
from miniflux.sampling import denoise, image_ids, initial_noise, pack
from miniflux.weights.finding import BUNDLED
from tests.lora.test_attach import control_lora

EDGES = Image.effect_noise((64, 48), 90).convert("RGB")
SIZE = {"width": 64, "height": 48, "steps": 2, "seed": 3, "guidance": 2.0}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    pipe = miniflux.tiny()
    lora.attach(pipe, control_lora(pipe.transformer.config), name="edges")
    return pipe


def test_it_stands_beside_the_noise(pipe: Pipeline) -> None:
    """The same as `denoise` told by hand: encoded, packed, on the channels of every step."""
    result = pipe.generate("a star", conditions=[Control(EDGES)], **SIZE)
    text, latents = pipe.text.encode(["a star"], 32), pipe.autoencoder.encode(from_image(EDGES)[None])
    x = denoise(
        pipe.transformer, pack(initial_noise(48, 64, 3)), image_ids(1, 3, 4), text.txt, torch.zeros(1, 32, 3), text.vec,
        result.settings[0]["sigmas"], 2.0, img_cond=pack(latents),
    )  # fmt: skip
    assert torch.equal(pack(result.latents), x)
    (about,) = result.settings[0]["conditions"]
    assert about["kind"] == "Control" and len(about["picture"]) == 64


def test_forms_and_sizes(pipe: Pipeline, tmp_path: Path) -> None:
    """A path, a picture and pixels are one; another size is brought to that which is drawn, as the release does."""
    EDGES.save(tmp_path / "e.png")
    first = pipe.generate("a star", conditions=[Control(EDGES)], **SIZE).latents
    for given in (str(tmp_path / "e.png"), from_image(EDGES)):
        assert torch.equal(pipe.generate("a star", conditions=[Control(given)], **SIZE).latents, first)
    large = EDGES.resize((128, 96), Image.Resampling.NEAREST)
    small = large.resize((64, 48), Image.Resampling.LANCZOS)
    made = [pipe.generate("a star", conditions=[Control(picture)], **SIZE).latents for picture in (large, small)]
    assert torch.equal(*made)
    with pytest.raises(InputError, match=r"control pixels must be \(3, 48, 64\), got 3x96x128"):
        pipe.generate("a star", conditions=[Control(from_image(large))], **SIZE)
    with pytest.raises(InputError, match="no.png"):
        Control("no.png")


@pytest.mark.parametrize("memory", ["stream", "offload"])
def test_every_memory_mode_draws_the_same(memory: str) -> None:
    def drawn(mode: str) -> torch.Tensor:
        pipe = miniflux.load("nano-dev", memory=mode)
        lora.attach(pipe, control_lora(pipe.transformer.config), name="edges")
        return pipe.generate("a star", conditions=[Control(EDGES)], guide="cfg", cache="taylor", **SIZE).latents

    assert torch.equal(drawn(memory), drawn("resident"))


def test_with_a_mask(pipe: Pipeline) -> None:
    mask = torch.zeros(48, 64)
    mask[:, 32:] = 1
    options = {"steps": 2, "seed": 3}
    result = pipe.generate(
        "a star", conditions=[Inpaint(EDGES, 1.0, mask), Control(EDGES)], width=64, height=48, **options
    )
    assert np.array_equal(np.asarray(EDGES)[:, :32], np.asarray(result.images[0])[:, :32])


def test_two_controls_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="two conditions give channels"):
        pipe.generate("a star", conditions=[Control(EDGES), Control(EDGES)], **SIZE)


def test_a_model_that_reads_two_pictures(tmp_path: Path) -> None:
    """As Canny and Depth are: its input is wider. With columns of zeros it draws what it drew before."""
    state = load_file(BUNDLED / "flux1-nano-dev.safetensors")
    state["img_in.weight"] = torch.cat((state["img_in.weight"], torch.zeros_like(state["img_in.weight"])), dim=1)
    axes = list(miniflux.variants.variant("nano").transformer.axes_dim)
    save_file(state, tmp_path / "nano-canny.safetensors", {"axes_dim": json.dumps(axes)})
    pipe = miniflux.load(tmp_path / "nano-canny.safetensors", weights=BUNDLED)
    with pytest.raises(InputError, match="this model reads 64 channels of a control picture"):
        pipe.generate("a star", **SIZE)
    options = {**SIZE, "t5_length": 48}  # a file of sizes that nobody knows is treated as FLUX.1 dev, which reads 512
    plain = miniflux.load("nano-dev").generate("a star", **options)
    ours = pipe.generate("a star", conditions=[Control(EDGES)], **options)
    assert_close(ours.latents, plain.latents, atol=1e-5, rtol=0)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = miniflux.variants.variant("nano").transformer
    save_file(control_lora(config), tmp_path / "edges.safetensors")
    EDGES.save(tmp_path / "e.png")
    told = ["generate", "a star", "--control", str(tmp_path / "e.png"), "--steps", "1", "-o", str(tmp_path / "o.png")]
    assert main([*told, "--lora", str(tmp_path / "edges.safetensors")]) == 0
    assert main(told) == 2
    assert "load a Canny or Depth model, or attach its LoRA" in capsys.readouterr().err
