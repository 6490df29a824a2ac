"""Control LoRAs on FLUX.2: those that widen the input as BFL's of FLUX.1 do, and those that look at references."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from PIL import Image
from torch import Tensor

import miniflux
from miniflux.conditions import Control, Reference
from miniflux.errors import InputError
from miniflux.families.flux2 import image_ids, text_ids
from miniflux.lora import attach, detach
from miniflux.models.flux2 import Flux2
from miniflux.pictures import from_image
from miniflux.sampling import denoise, initial_noise, pack
from miniflux.sampling.forwards import Words, flux2_velocity
from tests.lora.test_attach import control_lora
from tests.tiny import randn, randomise

PHOTO, EDGES = (Image.effect_noise((64, 64), level).convert("RGB") for level in (60, 90))
SIZE = {"width": 64, "height": 48, "steps": 3, "seed": 3}
SPELLINGS = ["img_in", "diffusion_model.img_in", "transformer.x_embedder"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("model", ["flux2-dev", "flux2-klein-4b"])
def test_a_wider_input(model: str, spelling: str) -> None:
    """What it draws is drawn by a network with the wider weight written out, with the tokens of the picture beside the
    noise at every step. Without the picture, or with references, it is refused; and it goes without a trace."""
    pipe = miniflux.tiny(model)
    plain, config = pipe.generate("a star", **SIZE).latents, cast(Flux2, pipe.transformer).config
    tensors = control_lora(config)
    receipt = attach(pipe, {key.replace("img_in", spelling): tensor for key, tensor in tensors.items()}, 0.5, "edges")
    assert receipt.applied == receipt.expected == 1
    found = pipe.generate("a star", conditions=[Control(EDGES)], **SIZE)

    wide = randomise(Flux2(replace(config, in_channels=2 * config.in_channels)))
    down, up = (tensors[f"img_in.lora_{which}.weight"] for which in "AB")
    state = {key: tensor for key, tensor in pipe.transformer.state_dict().items() if key in wide.state_dict()}
    wide.load_state_dict(state | {"img_in.weight": state["img_in.weight"] + 0.5 * up @ down})
    text = pipe.text.encode(["a star"], pipe.text.length, "released")
    edges = from_image(EDGES.resize((64, 48), Image.Resampling.LANCZOS))
    sigmas, guidance = (found.settings[0][name] for name in ("sigmas", "guidance"))
    x = denoise(
        wide,
        pack(initial_noise(48, 64, 3, 128, 1), 1),
        image_ids(1, 3, 4),
        Words(text.txt, text_ids(1, text.txt.shape[1]), None, text.mask),
        timesteps=sigmas,
        guidance=guidance,
        img_cond=pack(pipe.autoencoder.encode(edges[None]), 1),
        velocity=flux2_velocity,
    )
    torch.testing.assert_close(pack(found.latents, 1), x, rtol=0, atol=1e-5)

    with pytest.raises(InputError, match="LoRA 'edges' is a control LoRA: with it the network reads 128 channels"):
        pipe.generate("a star", **SIZE)
    with pytest.raises(InputError, match="tokens of references have none"):
        pipe.generate("a star", conditions=[Control(EDGES), Reference(PHOTO)], **SIZE)
    detach(pipe, "edges")
    assert torch.equal(pipe.generate("a star", **SIZE).latents, plain)


def test_another_number_of_channels_is_refused() -> None:
    """Of a picture that is encoded here there are 128; for a file that wants 64 nobody could give any."""
    pipe = miniflux.tiny("flux2-dev")
    config = cast(Flux2, pipe.transformer).config
    wide: dict[str, Tensor] = {"img_in.lora_A.weight": randn(2, 192), "img_in.lora_B.weight": randn(64, 2, seed=1)}
    assert config.hidden_size == 64
    attach(pipe, wide, name="edges")
    with pytest.raises(InputError, match="a control picture gives 128 channels, and this network reads 64 beside"):
        pipe.generate("a star", conditions=[Control(EDGES)], **SIZE)


def test_control_by_references() -> None:
    """As thedeoxen's `refcontrol` LoRAs for klein have it: no wider input, the control picture is the first reference,
    what is to be seen in it the second. Both the LoRA and that order count."""
    pipe = miniflux.tiny("flux2-klein-4b")
    given = [Reference(EDGES), Reference(PHOTO, index=2)]
    plain = pipe.generate("a star", conditions=given, **SIZE).latents
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    attach(pipe, {f"{name}.lora_A.weight": randn(2, 64) / 8, f"{name}.lora_B.weight": randn(192, 2, seed=1) / 8})
    drawn = pipe.generate("a star", conditions=given, **SIZE).latents
    turned = pipe.generate("a star", conditions=[Reference(PHOTO), Reference(EDGES, index=2)], **SIZE).latents
    assert not torch.equal(drawn, plain) and not torch.equal(drawn, turned)
