"""Every family through the same pipeline: variants of random weights, in every memory mode, with what steers them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

import miniflux
from miniflux.apps.cli import main
from miniflux.checkpoints import save
from miniflux.checkpoints.networks import BY_KIND
from miniflux.conditions import ControlNet, Reference
from miniflux.errors import ConfigError, InputError
from miniflux.families import FAMILIES
from miniflux.families.flux2 import FLUX2
from miniflux.families.flux3 import FLUX3
from miniflux.models.causal_lm import CausalLm
from miniflux.models.flux3 import Flux3
from miniflux.pipeline import Pipeline
from miniflux.sampling import initial_noise
from miniflux.testing import tiny
from miniflux.text import ChatForm, ChatText, load_chat_tokenizer
from miniflux.variants import UNPUBLISHED, VARIANTS, variant
from tests.tiny import randomise

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8), "RGB")
NEW = [name for name, one in VARIANTS.items() if one.family != "flux1"]
SMALL: dict[str, Any] = {"steps": 2, "width": 64, "height": 48}


@pytest.mark.parametrize("name", NEW)
def test_every_variant_draws(name: str) -> None:
    """With its own steps, guidance and schedule; a picture does not depend on its neighbours."""
    pipe = tiny(name)
    result = pipe.generate(["a cat", "a much longer prompt about two dogs"], width=64, height=64, steps=3, images=2)
    assert len(result.images) == 4 and all(image.size == (64, 64) for image in result.images)
    assert (
        result.latents.shape == (4, pipe.variant.transformer.in_channels, 4, 4) and torch.isfinite(result.latents).all()
    )
    alone = pipe.generate("a much longer prompt about two dogs", width=64, height=64, steps=3, seed=3)
    assert torch.equal(alone.latents[0], result.latents[3])
    said = result.settings[0]
    scale = VARIANTS[name].cfg
    usual = {"method": "cfg", "scale": scale, "window": [0.0, 1.0], "rescale": 0.0}
    assert said["guide"] == (None if scale is None else usual)
    assert said["guidance"] == VARIANTS[name].guidance


def test_guidance_of_base_models() -> None:
    """`guidance` is the scale of the usual guide; 1 is no guidance at all."""
    pipe = tiny("flux2-klein-base-4b")
    plain = pipe.generate("a cat", guidance=1, **SMALL)
    neutral = pipe.generate("a cat", guide=miniflux.sampling.guide("cfg", scale=1), **SMALL)
    assert torch.equal(plain.latents, neutral.latents)
    usual = pipe.generate("a cat", **SMALL)
    assert torch.equal(usual.latents, pipe.generate("a cat", guidance=4.0, **SMALL).latents)
    assert not torch.equal(usual.latents, plain.latents)
    assert not torch.equal(usual.latents, pipe.generate("a cat", negative="a dog", **SMALL).latents)
    with pytest.raises(InputError, match=r"guidance 3 is the scale of the usual guide of tiny-flux2-klein-base-4b"):
        pipe.generate("a cat", guidance=3, guide="apg", **SMALL)
    with pytest.raises(InputError, match="tiny-flux2-klein-4b has no guidance input"):
        tiny("flux2-klein-4b").generate("a cat", guidance=3, **SMALL)


def test_noise_of_the_release() -> None:
    """(128, h / 16, w / 16), drawn in this order from one generator."""
    expected = torch.randn(1, 128, 3, 5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(initial_noise(48, 80, 7, 128, 1), expected)


def test_positions() -> None:
    """As the releases count them; those of FLUX.3 in half steps, whose references are before the text."""
    assert FLUX2.image_ids(1, 2, 3)[0].tolist() == [[0, y, x, 0] for y in range(2) for x in range(3)]
    assert FLUX2.reference_ids(2, 1, 2)[0].tolist() == [[20, 0, 0, 0], [20, 0, 1, 0]]
    assert FLUX2.text_ids(1, 3)[0].tolist() == FLUX3.text_ids(1, 3)[0].tolist() == [[0, 0, 0, i] for i in range(3)]
    assert FLUX3.image_ids(1, 2, 2)[0].tolist() == [[0, y / 2, x / 2, 0] for y in range(2) for x in range(2)]
    assert FLUX3.reference_ids(2, 1, 2)[0].tolist() == [[0, 0, 0, -2], [0, 0, 0.5, -2]]


@pytest.mark.parametrize(
    ("family", "count", "size", "resized", "canvas"),
    [
        ("flux1", 1, (50, 37), (48, 32), (48, 32)),
        ("flux2", 1, (100, 70), (100, 70), (96, 64)),
        ("flux2", 1, (3000, 2000), (2478, 1652), (2464, 1648)),
        ("flux2", 2, (3000, 2000), (1254, 836), (1248, 832)),
        ("flux3", 1, (100, 70), (100, 70), (112, 80)),
        ("flux3", 1, (20, 30), (20, 30), (64, 64)),
        ("flux3", 1, (5000, 5000), (2048, 2048), (2048, 2048)),
        ("flux3", 2, (100, 70), (100, 70), (96, 64)),
    ],
)
def test_frames(family: str, count: int, size: tuple[int, int], resized: Any, canvas: Any) -> None:
    frame = FAMILIES[family].reference_frame(*size, count)
    assert (frame.resized, frame.canvas) == (resized, canvas)
    seen = Reference(Image.new("RGB", size)).framed(FAMILIES[family], count)
    assert seen.shown_at == canvas


def test_mirrored_around_itself() -> None:
    """A picture that FLUX.3 sees whole: in the middle it is itself, and beyond its edges as in a mirror."""
    seen = Reference(PHOTO.crop((0, 0, 90, 60))).framed(FLUX3, 1).picture
    pixels, given = np.asarray(seen), np.asarray(PHOTO)[:60, :90]
    assert pixels.shape == (64, 96, 3) and np.array_equal(pixels[2:62, 3:93], given)
    assert np.array_equal(pixels[1, 3:93], given[1]) and np.array_equal(pixels[2:62, 93], given[:, 88])


def test_references_that_are_refused() -> None:
    pipe = tiny("flux2-klein-4b")
    with pytest.raises(InputError, match="a reference of 40x100: FLUX.2 sees pictures with sides of at least 64"):
        pipe.generate("a cat", conditions=[Reference(Image.new("RGB", (40, 100)))], **SMALL)
    with pytest.raises(InputError, match="at most 8 times the other"):
        pipe.generate("a cat", conditions=[Reference(Image.new("RGB", (64, 600)))], **SMALL)
    for name in ("flux1-kontext-dev", "flux2-dev", "flux3-klein"):
        with pytest.raises(InputError, match="looks at references at every step: once=True is for FLUX.2 klein"):
            tiny(name).generate("a cat", conditions=[Reference(PHOTO, once=True)], **SMALL)
    with pytest.raises(InputError, match="references see each other"):
        pipe.generate("a", conditions=[Reference(PHOTO, once=True), Reference(PHOTO, index=2, once=False)], **SMALL)
    with pytest.raises(InputError, match="once must be True, False or None, got 'x'"):
        Reference(PHOTO, once="x")  # pyright: ignore


def test_what_a_family_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    pipe = tiny("flux3-klein")
    for options, said in (
        ({"cache": "taylor"}, "step caches watch text and picture go through all blocks together"),
        ({"guide": "nag"}, "NAG guides attention of text and picture together"),
        ({"padding": "masked"}, "padding must be one of released, got 'masked'"),
        ({"solver": "heun"}, "tiny-flux3-klein is a flow map"),
    ):
        with pytest.raises(InputError, match=said):
            pipe.generate("a cat", **options, **SMALL)
    with pytest.raises(InputError, match="padding must be one of released, masked, got 'trimmed'"):
        tiny("flux2-dev").generate("a cat", padding="trimmed", **SMALL)
    tokens, ids = torch.zeros(1, 1, 128), torch.zeros(1, 1, 4)
    with pytest.raises(ConfigError, match="target must be a tensor"):
        cast(Flux3, pipe.transformer)(tokens, ids, tokens, ids, torch.ones(1))


def test_a_controlnet_of_flux1_is_refused() -> None:
    from tests.test_steering import controlnet

    with pytest.raises(InputError, match=r"was made for FLUX\.1, and this network is a Flux2"):
        tiny("flux2-klein-4b").generate("a cat", conditions=[ControlNet(controlnet(), PHOTO)], **SMALL)


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_models_that_nobody_can_load(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: the weights of .* are not published"):
        miniflux.load(name)
    with pytest.raises(InputError, match="are not published"):
        variant(name)


def saved(pipe: Pipeline, folder: Path, tokenizer: Path) -> Path:
    """A tiny model in the layout of its release: a single file of the transformer, the other parts in folders."""
    save(pipe.transformer, folder / "transformer.safetensors")
    for name, network in (("vae", pipe.autoencoder), ("text_encoder", pipe.text.networks["lm"])):
        record = BY_KIND[type(network)]
        (folder / name).mkdir()
        save(network, folder / name / f"{record.stem}.safetensors")
        (folder / name / "config.json").write_text(json.dumps(record.as_json(network.config)))
    (folder / "tokenizer").symlink_to(tokenizer)
    return folder


@pytest.fixture(scope="module", params=["flux2-klein-base-4b", "flux3-klein"])
def files(
    request: pytest.FixtureRequest, tokenizer: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    small = tiny(request.param)
    lm = cast(CausalLm, small.text.networks["lm"])
    config = replace(lm.config, vocab_size=151936, num_hidden_layers=lm.config.depth + 2, layers_read=None)
    network = randomise(CausalLm(replace(config, tie_word_embeddings=True)), 5).requires_grad_(False)
    small.text = ChatText(network, load_chat_tokenizer(tokenizer("qwen3"), cast(ChatForm, small.variant.chat)))
    return saved(small, tmp_path_factory.mktemp(request.param), tokenizer("qwen3"))


@pytest.mark.parametrize("memory", ["text-freed", "offload", "stream"])
def test_every_memory_mode(files: Path, memory: str) -> None:
    """With references, two texts, and layers of the language model that nobody reads: the same latents."""
    options: dict[str, Any] = {"conditions": [Reference(PHOTO), Reference(PHOTO, index=2)], **SMALL}
    plain = miniflux.load(files, device="cpu").generate("a cat", **options)
    other = miniflux.load(files, device="cpu", memory=memory)
    assert torch.equal(other.generate("a cat", **options).latents, plain.latents)
    if other.variant.family == "flux2":
        once = {**options, "conditions": [replace(one, once=True) for one in options["conditions"]]}
        expected = miniflux.load(files, device="cpu").generate("a cat", **once).latents
        assert torch.equal(other.generate("a cat", **once).latents, expected)
    assert other.memory is not None and other.memory.mode == memory


def test_layers_behind_the_last_one_are_never_read(files: Path) -> None:
    """They are said to be of no use, and what is in them does not matter."""
    pipe = miniflux.load(files, device="cpu")
    lm = cast(CausalLm, pipe.text.networks["lm"])
    assert pipe.variant.chat is not None and len(lm.model.layers) == max(pipe.variant.chat.layers)
    assert not any(key.startswith(("model.norm", "lm_head")) for key in lm.state_dict())


def test_another_language_model_is_said(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its numbers differ from those of the encoder that the model was trained with: pictures would be worse."""
    with caplog.at_level(logging.WARNING):
        miniflux.load(files, device="cpu")
    assert "is another language model than the one this model was trained with: " in caplog.text


@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_is_what_the_autoencoder_makes(name: str) -> None:
    """Family and autoencoder are of one mind about it, and the network reads as many channels."""
    one = VARIANTS[name]
    family, latent = FAMILIES[one.family], one.autoencoder
    assert family.patch == latent.patch and latent.unit == 16
    assert one.transformer.out_channels == latent.latent_channels * family.patch**2


def test_prompts_of_a_command_line_may_have_lengths_of_their_own(files: Path, tmp_path: Path) -> None:
    """FLUX.3 gives each prompt a window of its own; texts that are read ahead are read one by one."""
    prompts = ["a cat", "a dog", "a very long prompt about two dogs and a cat " * 12]
    options = ["--steps", "1", "--size", "64x64", "-o", str(tmp_path / "a.png")]
    assert main(["generate", *prompts, "--model", str(files), *options]) == 0
    assert len(list(tmp_path.glob("a-*.png"))) == 3
