"""For unit tests of programs that use miniflux: pipelines of random weights, as small as they can be.

pipe = miniflux.tiny("flux1-schnell", seed=1)
result = pipe.generate("anything", seed=7)      # noise to the eye, the same on every machine of a kind
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from miniflux.checkpoints.loading import bare
from miniflux.checkpoints.networks import BY_CONFIG
from miniflux.checks import whole
from miniflux.memory.compute import choose_device, choose_dtype
from miniflux.models.causal_lm import CausalLm
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.t5 import T5Encoder
from miniflux.models.tiny_autoencoder import TinyDecoder
from miniflux.pipeline import Pipeline
from miniflux.sampling.latents import MAX_SEED
from miniflux.text import ChatForm, ChatText, ChatTokenizer, Text, TextReader, load_clip_tokenizer, load_t5_tokenizer
from miniflux.variants import NANO_CLIP, NANO_T5, Sizes, Variant
from miniflux.variants import variant as find_variant
from miniflux.weights.finding import BUNDLED

SIZE = 64  # pixels that are drawn unless others are asked for
TEXT = 32  # tokens of a prompt, likewise
SPECIAL = re.compile(r"<[^<>]+>|\[[^][]+\]")  # what chat forms have for special tokens
M = TypeVar("M", bound=nn.Module)


def randomise(module: M, seed: int = 0) -> M:
    """Give every parameter a value that matters: matrices keep the variance, norms and biases are far from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
            else:
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
    return module.eval()


def tiny(
    variant: str = "flux1-dev",
    seed: int = 0,
    *,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | None = None,
) -> Pipeline:
    """A pipeline of any variant with few and random weights: made in memory in a fraction of a second, of no file but
    the bundled tokenizers; language models read bytes. It takes every option of `generate` that the variant takes.

    Args:
        variant: a name, see `miniflux.variants.names()`. The defaults are its own, but for the size (64 pixels) and the
            text (32 tokens, beside those of a chat's form); its name is `tiny-` and that.
        seed: of the weights.
        device, dtype: where and in what it computes; as of `miniflux.load`.

    Raises:
        InputError: an unknown variant, device or dtype, or a seed out of its range.
    """
    seed, place = whole("seed", seed, 0, MAX_SEED - 4), choose_device(device)
    small = _small(find_variant(variant))
    compute = choose_dtype(dtype, place, torch.float32, 0)

    def made(kind: type[Any], config: Any, i: int) -> Any:
        network = bare(kind, config).to_empty(device="cpu")  # whose making draws no random numbers of torch's own
        for name, buffer in network.named_buffers():  # statistics of latents
            buffer.fill_(name.endswith("var"))
        randomise(network, seed + i).requires_grad_(False).to(place, compute)
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):  # about 0, or all pictures would be white and black
                parameter -= 1
        return network

    return Pipeline(
        small,
        made(BY_CONFIG[type(small.transformer)].kind, small.transformer, 0),
        made(BY_CONFIG[type(small.autoencoder)].kind, small.autoencoder, 1),
        _text(small, made),
        tiny=None if small.tiny is None else made(TinyDecoder, small.tiny, 4),
    )


def _text(small: Variant, made: Callable[[Any, Any, int], Any]) -> TextReader:
    """The text side, with the bundled tokenizers."""
    if small.lm is not None and small.chat is not None:
        return ChatText(made(CausalLm, small.lm, 2), bytes_tokenizer(small.chat), length=small.t5_length)
    assert small.t5_length is not None
    return Text(
        made(ClipTextEncoder, small.clip, 2),
        made(T5Encoder, small.t5, 3),
        load_clip_tokenizer(BUNDLED / "tokenizer"),
        load_t5_tokenizer(BUNDLED / "tokenizer_2"),
        small.t5_length,
    )


def bytes_tokenizer(form: ChatForm) -> ChatTokenizer:
    """A tokenizer that needs no file: each byte is a token, and so is each special token of a form (`<pad>` ...)."""
    marks = sorted({form.pad, *SPECIAL.findall(form.before + form.after)})

    def encode(text: str) -> list[int]:
        pieces = re.split("(" + "|".join(map(re.escape, marks)) + ")", text)
        return [
            i
            for piece in pieces
            for i in ([256 + marks.index(piece)] if piece in marks else list(piece.encode("utf-8")))
        ]

    return ChatTokenizer(encode, form)


def _small(variant: Variant) -> Variant:
    """The variant with everything small that does not tell it from others; text encoders fit the bundled tokenizers."""
    sizes = _small_text(variant)
    form = len(bytes_tokenizer(variant.chat).tokens("")) if variant.chat else 0
    width = sizes["lm"].hidden_size * len(variant.chat.layers) if variant.chat else sizes["t5"].d_model
    common = {"context_in_dim": width, "hidden_size": 64, "num_heads": 4, "depth": 2, "depth_single_blocks": 2}
    axes, summary = ((4, 6, 6), {"vec_in_dim": sizes["clip"].hidden_size}) if "clip" in sizes else ((4, 4, 4, 4), {})
    preview = variant.tiny and replace(variant.tiny, width=8, blocks=[min(1, n) for n in variant.tiny.blocks])
    return replace(
        variant,
        name=f"tiny-{variant.name}",
        repository="",
        transformer=replace(variant.transformer, axes_dim=axes, **common, **summary),
        autoencoder=replace(variant.autoencoder, ch=8, num_res_blocks=1, num_groups=4),
        **sizes,
        t5_length=None if variant.t5_length is None else TEXT + form,
        size=SIZE,
        learned=Sizes(),  # none better than others
        tiny=preview,
        downloads=(),
    )


def _small_text(variant: Variant) -> dict[str, Any]:
    """Sizes of the text encoders, which fit the bundled tokenizers."""
    if variant.lm is None or variant.chat is None:
        small = {"num_hidden_layers": 1, "num_attention_heads": 2}
        return {
            "clip": replace(NANO_CLIP, hidden_size=16, intermediate_size=32, **small),
            "t5": replace(NANO_T5, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2),
        }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    depth = {"num_hidden_layers": max(variant.chat.layers) + 1, "layers_read": max(variant.chat.layers)}
    return {"lm": replace(variant.lm, vocab_size=272, hidden_size=16, intermediate_size=24, **heads, **depth)}
