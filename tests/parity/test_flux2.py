"""diffusers' pipelines of FLUX.2: loaded from the folder that they write, ours draw the same picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import miniflux
from miniflux.conditions import Reference
from miniflux.sampling import initial_noise, pack
from tests.parity.peers import diffusers, transformers
from tests.tiny import randomise

WIDTH, HEIGHT, STEPS = 96, 64, 4
PROMPT = "a red circle on a blue background"
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8), "RGB")
OTHER = Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 81, 3), np.uint8), "RGB")
TEMPLATE = (  # as Qwen3's for one message of the user, with thinking switched off
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
TRANSFORMER = {
    "in_channels": 128,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "axes_dims_rope": (4, 4, 4, 4),
    "timestep_guidance_channels": 256,
}
VAE = {
    "block_out_channels": (16, 16, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
LANGUAGE = {
    "vocab_size": 151936,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def qwen(folder: Path) -> Any:
    found = transformers.AutoTokenizer.from_pretrained(folder)
    found.chat_template = TEMPLATE
    return found


def small_vae() -> Any:
    vae = randomise(diffusers.AutoencoderKLFlux2(**VAE), 1)
    with torch.no_grad():
        vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 128))
        vae.bn.running_var.copy_(torch.linspace(0.5, 2, 128))
        for name, p in vae.named_parameters():
            if name.endswith("bias"):
                p -= 1
    return vae.eval()


def language_model(layers: int) -> Any:
    config = transformers.Qwen3Config(**LANGUAGE, num_hidden_layers=layers, tie_word_embeddings=True)
    return randomise(transformers.Qwen3ForCausalLM(config), 2).eval()


def scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


@pytest.fixture(scope="module")
def klein(tokenizer: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A klein of random networks, and the folder that it writes."""
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=scheduler(),
        vae=small_vae(),
        text_encoder=language_model(29),
        tokenizer=qwen(tokenizer("qwen3")),
        transformer=randomise(
            diffusers.Flux2Transformer2DModel(**TRANSFORMER, joint_attention_dim=48, guidance_embeds=False), 3
        ),
        is_distilled=True,
    )
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("klein")
    pipe.save_pretrained(folder)
    return pipe, folder


def draw(pipe: Any, seed: int = 3, **options: Any) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Packed latents and 8-bit pixels of diffusers from our noise."""
    steps: list[Tensor] = []

    def keep(_pipe: Any, _i: int, _t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        steps.append(kept["latents"])
        return {}

    width, height = options.pop("width", WIDTH), options.pop("height", HEIGHT)
    options = {"num_inference_steps": STEPS, "max_sequence_length": 40, **options}
    if "generator" not in options:
        options["latents"] = initial_noise(height, width, seed, 128, 1)
    images = pipe(
        prompt=PROMPT,
        height=height,
        width=width,
        callback_on_step_end=keep,
        **options,
    ).images
    return steps[-1], np.asarray(images[0]).astype(int)


def assert_same(ours: miniflux.Result, theirs: tuple[Tensor, np.ndarray[Any, Any]]) -> None:
    latents, pixels = theirs
    assert float((pack(ours.latents, 1) - latents).abs().max()) <= 1e-4 * float(latents.abs().max())
    drawn = np.asarray(ours.images[0]).astype(int)
    assert drawn.shape == pixels.shape and np.abs(drawn - pixels).max() <= 1
    assert pixels.std() > 5  # a flat picture would prove nothing


OPTIONS: dict[str, Any] = {"seed": 3, "steps": STEPS, "width": WIDTH, "height": HEIGHT, "t5_length": 40}


@pytest.mark.parametrize("references", [[], [PHOTO], [PHOTO, OTHER]], ids=len)
def test_klein(klein: tuple[Any, Path], references: list[Image.Image]) -> None:
    """Distilled: no guidance. Of references the middle is seen, in whole tokens."""
    theirs, folder = klein
    ours = miniflux.load(folder, device="cpu")
    assert ours.variant.family == "flux2" and ours.variant.lm is not None and ours.variant.lm.layers_read == 27
    conditions = [Reference(one, index=i + 1) for i, one in enumerate(references)]
    result = ours.generate(PROMPT, conditions=conditions, **OPTIONS)
    assert_same(result, draw(theirs, guidance_scale=1.0, **({"image": references} if references else {})))


def test_klein_base(klein: tuple[Any, Path], tmp_path: Path) -> None:
    """Which one it is, its tensors do not tell: the pipeline's index does. Drawn with two texts, as it was made for."""
    theirs, folder = klein
    peer = diffusers.Flux2KleinPipeline(**theirs.components, is_distilled=False)
    peer.set_progress_bar_config(disable=True)
    peer.save_pretrained(tmp_path)
    ours = miniflux.load(tmp_path, device="cpu")
    assert (ours.variant.cfg, ours.variant.steps) == (4.0, 50)
    assert (miniflux.load(folder, device="cpu").variant.cfg, ours.variant.once) == (None, False)
    assert_same(ours.generate(PROMPT, **OPTIONS), draw(peer, guidance_scale=4.0))


@pytest.mark.parametrize("references", [[], [PHOTO], [PHOTO, OTHER]], ids=len)
def test_klein_kv(klein: tuple[Any, Path], references: list[Image.Image], tmp_path: Path) -> None:
    """References looked at once: theirs keeps what they say at the first step, with text and picture beside them."""
    theirs, _ = klein
    peer = diffusers.Flux2KleinKVPipeline(
        **{name: theirs.components[name] for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")}
    )
    peer.set_progress_bar_config(disable=True)
    peer.save_pretrained(tmp_path)
    ours = miniflux.load(tmp_path, device="cpu")
    assert ours.variant.once
    conditions = [Reference(one, index=i + 1) for i, one in enumerate(references)]
    result = ours.generate(PROMPT, conditions=conditions, **OPTIONS)
    assert_same(result, draw(peer, **({"image": references} if references else {})))
    plain = ours.generate(PROMPT, conditions=[replace(one, once=False) for one in conditions], **OPTIONS)
    assert torch.equal(plain.latents, result.latents) == (not references)


MISTRAL_TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
)
MARKS = ["<s>", "</s>", "<unk>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]


def bytes_of_mistral(folder: Path) -> Any:
    """A tokenizer of single bytes with the special tokens of Mistral-Small."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {mark: i for i, mark in enumerate([*MARKS, *sorted(ByteLevel.alphabet())])}
    made = Tokenizer(BPE(vocabulary, []))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    made.save(str(folder / "tokenizer.json"))
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    peer.chat_template = MISTRAL_TEMPLATE
    return peer


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A dev of random networks; its language model within a Mistral that sees pictures, too."""
    folder = tmp_path_factory.mktemp("dev")
    text = transformers.MistralConfig(**{**LANGUAGE, "vocab_size": 300}, num_hidden_layers=31, pad_token_id=3)
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    whole = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=8)
    pipe = diffusers.Flux2Pipeline(
        scheduler=scheduler(),
        vae=small_vae(),
        text_encoder=randomise(transformers.Mistral3ForConditionalGeneration(whole), 2).eval(),
        tokenizer=bytes_of_mistral(folder),
        transformer=randomise(
            diffusers.Flux2Transformer2DModel(**TRANSFORMER, joint_attention_dim=48, guidance_embeds=True), 3
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe, folder


@pytest.mark.parametrize("references", [[], [OTHER]], ids=len)
def test_dev(dev: tuple[Any, Path], references: list[Image.Image]) -> None:
    """With the guidance input; the prompt padded on the left."""
    theirs, folder = dev
    ours = miniflux.load(folder, device="cpu")
    conditions = [Reference(one) for one in references]
    result = ours.generate(PROMPT, conditions=conditions, guidance=2.5, **{**OPTIONS, "t5_length": 300})
    options: dict[str, Any] = {"guidance_scale": 2.5, "max_sequence_length": 300}
    assert_same(result, draw(theirs, **options, **({"image": references} if references else {})))


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("extra", [False, True], ids=["alone", "with another reference"])
def test_klein_inpainting(klein: tuple[Any, Path], strength: float, extra: bool) -> None:
    """The picture itself is a reference, too; theirs puts it back in the latents alone, ours in the pixels as well."""
    theirs, folder = klein
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    peer = diffusers.Flux2KleinInpaintPipeline(**{name: theirs.components[name] for name in names}, is_distilled=True)
    peer.set_progress_bar_config(disable=True)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[16:, 32:] = 255
    told: dict[str, Any] = {"image": PHOTO, "mask_image": Image.fromarray(mask), "guidance_scale": 1.0}
    told |= {"strength": strength, "generator": torch.Generator().manual_seed(3)}  # latents would not be mixed
    latents, _ = draw(peer, **told, **({"image_reference": OTHER.crop((0, 0, 80, 64))} if extra else {}))
    seen = [Reference(PHOTO), *([Reference(OTHER.crop((0, 0, 80, 64)), index=2)] if extra else [])]
    ours = miniflux.load(folder, device="cpu")
    result = ours.generate(
        PROMPT, image=PHOTO, mask=Image.fromarray(mask), strength=strength, conditions=seen, **OPTIONS
    )
    assert float((pack(result.latents, 1) - latents).abs().max()) <= 1e-4 * float(latents.abs().max())
    assert np.array_equal(np.asarray(result.images[0])[mask == 0], np.asarray(PHOTO)[mask == 0])
