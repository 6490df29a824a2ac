"""A whole model written by diffusers: loaded from its folder, it draws the same picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor

import miniflux
from miniflux.sampling import initial_noise, pack
from miniflux.weights.finding import BUNDLED
from tests.parity.peers import autoencoder_pair, clip_pair, diffusers, flux1_pair, t5_pair, transformers
from tests.tiny import AUTOENCODER, CLIP, FLUX1, T5

CLIP_SIZES = replace(CLIP, vocab_size=2000, max_position_embeddings=77, eos_token_id=2)  # 2: the largest id in a prompt
T5_SIZES = replace(T5, vocab_size=1000)
LEVELS = replace(AUTOENCODER, ch_mult=(1, 2, 2, 2), z_channels=16)
SIZES = replace(FLUX1, in_channels=64, out_channels=64, vec_in_dim=CLIP.hidden_size, context_in_dim=T5.d_model)
PROMPT, STEPS, LENGTH, WIDTH, HEIGHT = "a red circle on a blue background", 4, 32, 80, 48
SHIFT = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}


def tokenizers() -> dict[str, Any]:
    """Those of the bundled model, in the classes that diffusers asks for."""
    pieces = SentencePieceProcessor(model_file=str(BUNDLED / "tokenizer_2" / "spiece.model"))
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    return {
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer", model_max_length=77),
        "tokenizer_2": transformers.T5Tokenizer(vocab=vocabulary, extra_ids=100),
    }


@pytest.fixture(scope="module", params=["dev", "schnell"])
def theirs(request: pytest.FixtureRequest) -> Any:
    """A pipeline of random networks: dev-like with guidance and shift, schnell-like with neither."""
    dev = request.param == "dev"
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dev else 1.0, use_dynamic_shifting=dev, **SHIFT
        ),
        vae=autoencoder_pair(LEVELS)[0],
        text_encoder=clip_pair(CLIP_SIZES)[0],
        text_encoder_2=t5_pair(T5_SIZES)[0],
        **tokenizers(),
        transformer=flux1_pair(replace(SIZES, guidance_embed=dev))[0],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: str, seed: int, guidance: float | None) -> tuple[torch.Tensor, np.ndarray]:
    """Packed latents and 8-bit pixels of diffusers from our noise."""
    steps: list[torch.Tensor] = []
    images = pipe(
        prompt,
        latents=pack(initial_noise(HEIGHT, WIDTH, seed)),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=guidance or 0.0,
        max_sequence_length=LENGTH,
        callback_on_step_end=lambda _pipe, _i, _t, kept: steps.append(kept["latents"]) or {},
    ).images
    return steps[-1], np.asarray(images[0]).astype(int)


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_the_same_picture(theirs: Any, shard: str, tmp_path: Path) -> None:
    """Files, configs, tokenizers, schedule, guidance, decoding: all from what `save_pretrained` wrote."""
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*/*.index.json"))) == (0 if shard == "1GB" else 4)
    ours = miniflux.load(tmp_path, device="cpu")
    dev = ours.transformer.config.guidance_embed
    assert ours.variant.shift == dev and ours.variant.autoencoder == LEVELS
    for prompt, seed, guidance in [
        (PROMPT, 3, 2.5),
        ("", 4, 1.0),
        ("Two GREEN squares, 7; unknown wörds " * 9, 5, 7.0),
    ]:
        strength = guidance if dev else None
        latents, pixels = draw(theirs, prompt, seed, strength)
        result = ours.generate(
            prompt, seed=seed, steps=STEPS, guidance=strength, width=WIDTH, height=HEIGHT, t5_length=LENGTH
        )
        assert float((pack(result.latents) - latents).abs().max()) <= 1e-4 * float(latents.abs().max())
        drawn = np.asarray(result.images[0]).astype(int)
        assert drawn.shape == pixels.shape and np.abs(drawn - pixels).max() <= 1
        assert pixels.std() > 5  # a flat picture would prove nothing


def test_their_configs_are_what_is_read(theirs: Any, tmp_path: Path) -> None:
    """A changed number in a config file changes the model that is built."""
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 2.0, "shift_factor": -1.0}))
    path = tmp_path / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu", "layer_norm_eps": 1e-3}))
    variant = miniflux.load(tmp_path, device="cpu").variant
    assert (variant.autoencoder.scale_factor, variant.autoencoder.shift_factor) == (2.0, -1.0)
    assert (variant.clip.hidden_act, variant.clip.layer_norm_eps) == ("gelu", 1e-3)
    assert variant.name == tmp_path.name
