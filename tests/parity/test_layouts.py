"""Files of diffusers and transformers: every weight lands in its place, and theirs load what is written here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from miniflux.checkpoints import load_into, save
from tests.parity.peers import autoencoder_pair, clip_pair, diffusers, flux1_pair, t5_pair
from tests.tiny import AUTOENCODER, CLIP, FLUX1, T5, flux1_inputs, randn

FLUX1_SIZES = {
    "dev": FLUX1,
    "schnell": replace(FLUX1, guidance_embed=False),
    "deep": replace(FLUX1, hidden_size=48, num_heads=3, axes_dim=(2, 8, 6), depth=1, depth_single_blocks=11),
}
AUTOENCODER_SIZES = {
    "three levels": AUTOENCODER,
    "four levels": replace(AUTOENCODER, ch_mult=(1, 2, 4, 4), num_res_blocks=2),
    "one level": replace(AUTOENCODER, ch_mult=(1,)),
}


def loaded(ours: nn.Module, source: Any, layout: str) -> nn.Module:
    """A network built on the meta device from their tensors; bitwise what the peers' own mapping gives."""
    with torch.device("meta"):
        module = type(ours)(ours.config)  # type: ignore[operator]
    report = load_into(module, source)
    assert report.layout == layout
    state, expected = module.state_dict(), ours.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    return module.eval()


def assert_theirs(theirs: nn.Module, ours: nn.Module, path: Path) -> None:
    """What is saved in their layout loads strictly into their class: the same keys, the same values."""
    save(ours, path, layout="diffusers")
    found, expected = load_file(path), theirs.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    other = type(theirs).from_config(theirs.config)  # type: ignore[attr-defined]
    other.load_state_dict(found, strict=True)


@pytest.mark.parametrize("name", FLUX1_SIZES)
@torch.inference_mode()
def test_flux1(name: str, tmp_path: Path) -> None:
    config = FLUX1_SIZES[name]
    theirs, ours = flux1_pair(config)
    module = loaded(ours, theirs.state_dict(), "diffusers")
    x = flux1_inputs(config)
    expected = theirs(
        hidden_states=x["img"],
        encoder_hidden_states=x["txt"],
        pooled_projections=x["y"],
        timestep=x["timesteps"],
        img_ids=x["img_ids"][0],
        txt_ids=x["txt_ids"][0],
        guidance=x["guidance"] if config.guidance_embed else None,
        return_dict=False,
    )[0]
    assert_close(module(**x), expected, rtol=0, atol=2e-5)
    assert_theirs(theirs, module, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", AUTOENCODER_SIZES)
@torch.inference_mode()
def test_autoencoder(name: str, tmp_path: Path) -> None:
    theirs, ours = autoencoder_pair(AUTOENCODER_SIZES[name])
    module = loaded(ours, theirs.state_dict(), "diffusers")
    latent = randn(1, ours.config.z_channels, 4, 3)
    expected = theirs.decode(latent / ours.config.scale_factor + ours.config.shift_factor).sample
    assert_close(module.decode(latent), expected, rtol=0, atol=2e-5)
    assert_theirs(theirs, module, tmp_path / "a.safetensors")


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clip(prefix: str, tmp_path: Path) -> None:
    """Published files have the prefix; newer versions of transformers write their module without it."""
    theirs, ours = clip_pair(CLIP)
    state = {prefix + key.removeprefix("text_model."): tensor for key, tensor in theirs.state_dict().items()}
    loaded(ours, state, "original" if prefix else "without prefix")
    theirs.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    loaded(ours, tmp_path, "original" if "text_model.final_layer_norm.bias" in written else "without prefix")


@pytest.mark.parametrize("kept", ["both", "shared.weight", "encoder.embed_tokens.weight"])
def test_t5(kept: str, tmp_path: Path) -> None:
    """The embedding has two names in memory; files hold either or both."""
    theirs, ours = t5_pair(T5)
    state = theirs.state_dict()
    names = {"shared.weight", "encoder.embed_tokens.weight"}
    assert names <= state.keys()
    file = {key: tensor.clone() for key, tensor in state.items() if key not in names or kept in ("both", key)}
    layout = "encoder embedding" if kept == "encoder.embed_tokens.weight" else "original"
    loaded(ours, file, layout)
    save_file(file, tmp_path / "model.safetensors")
    loaded(ours, tmp_path, layout)


@pytest.mark.parametrize("name", ["flux1", "autoencoder", "t5"])
def test_folders_written_by_save_pretrained(name: str, tmp_path: Path) -> None:
    """In one file and in shards with an index."""
    theirs, ours = {"flux1": lambda: flux1_pair(FLUX1), "autoencoder": lambda: autoencoder_pair(AUTOENCODER)}.get(
        name, lambda: t5_pair(T5)
    )()
    layout = "original" if name == "t5" else "diffusers"
    for size, shards in (("1GB", 1), ("10KB", 2)):
        folder = tmp_path / size
        theirs.save_pretrained(folder, max_shard_size=size)
        assert len(list(folder.glob("*.safetensors"))) >= shards
        assert len(list(folder.glob("*.index.json"))) == shards - 1
        loaded(ours, folder, layout)


@torch.inference_mode()
def test_a_single_file_written_here_loads_into_diffusers(tmp_path: Path) -> None:
    """diffusers reads original single files of the published sizes only; a folder in its layout serves any size."""
    theirs, ours = flux1_pair(FLUX1)
    theirs.save_config(tmp_path)
    save(ours, tmp_path / "diffusion_pytorch_model.safetensors", layout="diffusers")
    other = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), theirs.parameters(), strict=True))
