"""For unit tests of programs that use miniflux: pipelines of random weights, as small as they can be.

pipe = miniflux.tiny("flux1-schnell", seed=1)
result = pipe.generate("anything", seed=7)      # noise to the eye, the same on every machine of a kind
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from miniflux.checkpoints.loading import bare
from miniflux.checks import whole
from miniflux.memory.compute import choose_device, choose_dtype
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.models.tiny_autoencoder import TinyDecoder
from miniflux.pipeline import Pipeline
from miniflux.sampling.latents import MAX_SEED
from miniflux.text import Text, load_clip_tokenizer, load_t5_tokenizer
from miniflux.variants import VARIANTS, Sizes, Variant
from miniflux.variants import variant as find_variant
from miniflux.weights.finding import BUNDLED

SIZE = 64  # pixels that are drawn unless others are asked for
TEXT = 32  # T5 tokens, likewise
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
    the bundled tokenizers. It takes every option of `generate` that the variant takes.

    Args:
        variant: a name, see `miniflux.variants.names()`. The defaults are its own, but for the size (64 pixels) and the
            text (32 tokens); its name is `tiny-` and that.
        seed: of the weights.
        device, dtype: where and in what it computes; as of `miniflux.load`.

    Raises:
        InputError: an unknown variant, device or dtype, or a seed out of its range.
    """
    seed, place = whole("seed", seed, 0, MAX_SEED - 4), choose_device(device)
    small = _small(find_variant(variant))
    compute = choose_dtype(dtype, place, torch.float32, 0)

    def made(kind: type[M], config: Any, i: int) -> M:
        network = bare(kind, config).to_empty(device="cpu")  # whose making draws no random numbers of torch's own
        randomise(network, seed + i).requires_grad_(False).to(place, compute)
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):  # about 0, or all pictures would be white and black
                parameter -= 1
        return network

    return Pipeline(
        small,
        made(Flux1, small.transformer, 0),
        made(Autoencoder, small.autoencoder, 1),
        Text(
            made(ClipTextEncoder, small.clip, 2),
            made(T5Encoder, small.t5, 3),
            load_clip_tokenizer(BUNDLED / "tokenizer"),
            load_t5_tokenizer(BUNDLED / "tokenizer_2"),
            small.t5_length,
        ),
        tiny=None if small.tiny is None else made(TinyDecoder, small.tiny, 4),
    )


def _small(variant: Variant) -> Variant:
    """The variant with everything small that does not tell it from others; text encoders fit the bundled tokenizers."""
    nano, latent = VARIANTS["nano-dev"], variant.autoencoder
    clip = replace(nano.clip, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    t5 = replace(nano.t5, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2)
    transformer = replace(
        variant.transformer,
        vec_in_dim=clip.hidden_size,
        context_in_dim=t5.d_model,
        hidden_size=64,
        num_heads=4,
        depth=2,
        depth_single_blocks=2,
        axes_dim=(4, 6, 6),
    )
    preview = variant.tiny and replace(variant.tiny, width=8, blocks=[min(1, n) for n in variant.tiny.blocks])
    return replace(
        variant,
        name=f"tiny-{variant.name}",
        repository="",
        transformer=transformer,
        autoencoder=replace(latent, ch=8, num_res_blocks=1, num_groups=4),
        clip=clip,
        t5=t5,
        t5_length=TEXT,
        size=SIZE,
        learned=Sizes(),  # none better than others
        tiny=preview,
        downloads=(),
    )
