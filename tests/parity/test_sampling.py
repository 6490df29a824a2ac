"""Schedules and whole runs against diffusers: FlowMatchEulerDiscreteScheduler and FluxPipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from miniflux.models.flux1 import Flux1
from miniflux.sampling import denoise, flux1_schedule, image_ids, initial_noise, pack, text_ids, unpack
from miniflux.text import load_clip_tokenizer, load_t5_tokenizer
from tests.parity.peers import autoencoder_pair, clip_pair, diffusers, flux1_pair, t5_pair, transformers
from tests.tiny import AUTOENCODER, CLIP, FLUX1, T5, randn

HEIGHT, WIDTH, STEPS = 48, 80, 4
SHIFT = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
DEV = replace(FLUX1, in_channels=64, out_channels=64)


def scheduler(shift: bool):
    """The scheduler of FLUX.1 dev (shifted by the size of the picture) or schnell."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if shift else 1.0, use_dynamic_shifting=shift, **SHIFT)


@pytest.mark.parametrize("shift", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize(("steps", "tokens"), [(1, 256), (4, 4096), (28, 1024), (50, 9216)])
def test_sigmas(shift: bool, steps: int, tokens: int) -> None:
    """The noise levels of a pipeline run."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    theirs, mu = scheduler(shift), calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = torch.tensor(flux1_schedule(steps, tokens, shift), dtype=torch.float64)
    assert_close(theirs.sigmas.double(), ours, rtol=0, atol=1e-6)


def run_ours(model: Flux1, txt: torch.Tensor, vec: torch.Tensor, seeds: list[int], shift: bool, guidance: float | None):
    """The same run in our words."""
    noise = pack(torch.cat([initial_noise(HEIGHT, WIDTH, seed) for seed in seeds]))
    ids = image_ids(len(seeds), HEIGHT // 16, WIDTH // 16)
    sigmas = flux1_schedule(STEPS, noise.shape[1], shift)
    return noise, denoise(model, noise, ids, txt, text_ids(*txt.shape[:2]), vec, sigmas, guidance)


@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
def test_latents_of_a_run(guided: bool) -> None:
    """FluxPipeline from given embeddings and noise: ids, schedule, guidance and every step are the same."""
    config = replace(DEV, guidance_embed=guided)
    transformer, model = flux1_pair(config)
    txt, vec = randn(2, 6, config.context_in_dim, seed=1), randn(2, config.vec_in_dim, seed=2)
    noise, ours = run_ours(model, txt, vec, [3, 4], shift=guided, guidance=3.5)

    nothing = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipe = diffusers.FluxPipeline(scheduler=scheduler(guided), transformer=transformer, **nothing)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt_embeds=txt,
        pooled_prompt_embeds=vec,
        latents=noise,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        output_type="latent",
    ).images
    assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_prompt_to_pixels(tokenizer: Callable[[str], Path]) -> None:
    """The whole of FluxPipeline from tiny parts: tokenizers, both encoders, transformer, autoencoder."""
    prompts, length = ["a photo of a cat", "Two RED squares; 3 blue ones - café"], 24
    clip_config = replace(CLIP, vocab_size=49408, max_position_embeddings=77, eos_token_id=49407)
    t5_config = replace(T5, vocab_size=32128)
    config = replace(DEV, vec_in_dim=clip_config.hidden_size, context_in_dim=t5_config.d_model)

    their_clip, clip = clip_pair(clip_config)
    their_t5, t5 = t5_pair(t5_config)
    transformer, model = flux1_pair(config)
    their_vae, vae = autoencoder_pair(replace(AUTOENCODER, ch_mult=(1, 2, 2, 2), z_channels=16))
    pipe = diffusers.FluxPipeline(
        scheduler=scheduler(True),
        vae=their_vae,
        text_encoder=their_clip,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer("clip_l")),
        text_encoder_2=their_t5,
        tokenizer_2=transformers.T5TokenizerFast.from_pretrained(tokenizer("t5_v1_1_xxl")),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)

    with torch.inference_mode():
        txt = t5(load_t5_tokenizer(tokenizer("t5_v1_1_xxl"))(prompts, length))
        _, vec = clip(load_clip_tokenizer(tokenizer("clip_l"))(prompts, 77))
        noise, latents = run_ours(model, txt, vec, [5, 6], shift=True, guidance=2.5)
        pixels = vae.decode(unpack(latents, HEIGHT, WIDTH))

    steps: list[torch.Tensor] = []
    theirs = pipe(
        prompts,
        latents=noise,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=2.5,
        max_sequence_length=length,
        callback_on_step_end=lambda _pipe, _i, _t, kept: steps.append(kept["latents"]) or {},
        output_type="pt",
    ).images
    assert len(steps) == STEPS
    assert_close(latents, steps[-1], rtol=0, atol=1e-4)
    assert_close((pixels / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=1e-4)
