"""diffusers' modular pipelines of FLUX.3: ours draw the same latents from the files of the same networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import miniflux
from miniflux.conditions import Reference
from miniflux.errors import InputError
from miniflux.sampling import initial_noise, pack
from tests.parity.peers import diffusers, transformers
from tests.parity.test_flux2 import LANGUAGE, OTHER, PHOTO, PROMPT, TEMPLATE, qwen, small_vae
from tests.tiny import randomise

WIDTH, HEIGHT, STEPS = 96, 64, 4
TRANSFORMER = {
    "in_channels": 128,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "axes_dims_rope": (4, 4, 4, 4),
    "joint_attention_dim": 8 * LANGUAGE["hidden_size"],
}


class Processor:
    """What the pipeline asks of a processor of text and pictures, as far as text goes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.apply_chat_template = tokenizer, tokenizer.apply_chat_template


LONG = "a red circle " * 40  # two windows of the text


def qwen_vl() -> Any:
    text = transformers.Qwen3VLTextConfig(**LANGUAGE, num_hidden_layers=33, rope_theta=5e6)
    text.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    vision = transformers.models.qwen3_vl.Qwen3VLVisionConfig(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, deepstack_visual_indexes=[0]
    )
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    return randomise(transformers.Qwen3VLForConditionalGeneration(config), 2).eval()


@pytest.fixture(scope="module", params=["base", "distilled"])
def both(
    request: pytest.FixtureRequest, tokenizer: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """Theirs and ours, of the same random networks."""
    distilled = request.param == "distilled"
    folder = tmp_path_factory.mktemp(request.param)
    words = qwen(tokenizer("qwen3"))
    words.chat_template = TEMPLATE
    parts: dict[str, Any] = {
        "transformer": randomise(diffusers.Flux3Transformer2DModel(**TRANSFORMER, flow_map=distilled), 3),
        "vae": small_vae(),
        "text_encoder": qwen_vl(),
        "tokenizer": words,
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    blocks = (diffusers.Flux3DistilledAutoBlocks if distilled else diffusers.Flux3AutoBlocks)()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipe = blocks.init_pipeline()
    parts["tokenizer"] = Processor(words)
    pipe.update_components(**parts)
    pipe.set_progress_bar_config(disable=True)
    ours = miniflux.load(folder, device="cpu")
    assert ours.variant.family == "flux3" and (ours.variant.cfg is None) == distilled
    return pipe, ours


@pytest.mark.parametrize("prompt", [PROMPT, "", LONG], ids=["short", "empty", "long"])
@pytest.mark.parametrize("references", [[], [OTHER], [PHOTO, OTHER]], ids=len)
def test_the_same_latents(both: tuple[Any, Any], references: list[Image.Image], prompt: str) -> None:
    """Windows of the text, positions, references, the time aimed at (distilled), two texts (base)."""
    theirs, ours = both
    options: dict[str, Any] = {"image": references} if references else {}
    if ours.variant.cfg is not None:
        theirs.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0))
    expected: Tensor = theirs(
        prompt=prompt,
        latents=initial_noise(HEIGHT, WIDTH, 3, 128, 1),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        output="latents",
        output_type="pt",
        **options,
    )
    conditions = [Reference(one, index=i + 1) for i, one in enumerate(references)]
    found = ours.generate(prompt, conditions=conditions, seed=3, steps=STEPS, width=WIDTH, height=HEIGHT).latents
    expected = expected if expected.ndim == 3 else pack(expected, 1)
    assert float((pack(found, 1) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert np.isfinite(float(expected.std())) and float(expected.std()) > 0.1


def test_a_flow_map_jumps(both: tuple[Any, Any]) -> None:
    """Solvers that ask for slopes are refused by name; those that jump are not."""
    _, ours = both
    options: dict[str, Any] = {"steps": 2, "width": 64, "height": 64}
    if not ours.variant.transformer.flow_map:
        assert torch.isfinite(ours.generate(PROMPT, solver="heun", **options).latents).all()
        return
    with pytest.raises(InputError, match=r"is a flow map.* heun needs slopes .* euler, lcm, stochastic"):
        ours.generate(PROMPT, solver="heun", **options)
    assert torch.isfinite(ours.generate(PROMPT, solver="lcm", **options).latents).all()
