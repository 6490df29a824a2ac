"""How many floating-point operations a network takes: closed formulas of its sizes, and of nothing that was run.

Counted are products of matrices, convolutions and attention, a multiplication and an addition as two; norms,
activations and rotations are not: they are below a thousandth. Attention is counted whole, also where it is causal, and
convolutions as they are defined, though the autoencoder has a shorter way for some on a CPU. That is what
`torch.utils.flop_counter.FlopCounterMode` counts on a device whose kernels it knows. Of those of a CPU it does not know
all: there it misses attention, and the linears of `models.linear`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from miniflux.checkpoints.quantized import QuantizedLinear
from miniflux.models.autoencoder import Autoencoder, Flux2Autoencoder
from miniflux.models.causal_lm import CausalLm, CausalLmConfig
from miniflux.models.clip import ClipTextConfig, ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.flux2 import Flux2
from miniflux.models.flux3 import Flux3
from miniflux.models.t5 import T5Config, T5Encoder

Flops = dict[str, int]
"""By name of the module that computes: a linear, a convolution, or the block whose attention it is."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What goes through the networks for one picture.

    Attributes:
        width, height: of the picture, in pixels; multiples of a token's side.
        text: tokens of T5, or of the language model.
        references: tokens of pictures that are looked at.
        unit: pixels along a side of a token.
    """

    width: int
    height: int
    text: int
    references: int
    unit: int

    @property
    def image(self) -> int:
        """Tokens of the picture."""
        return self.width // self.unit * (self.height // self.unit)


# Who computes on what, in the transformers: the first that fits. Modulations and embedders see one vector.
VECTOR = r"(time|guidance|vector|ref_time)_in\.|.*(_mod|modulation)\.lin$|.*modulation(s\.\w+|_img|_txt)\.lin$|.*adaLN"
JOINT_ROWS = (
    (VECTOR, ("vector",)),
    (r"img_in$|double_blocks\.\d+\.img_|final_layer\.linear", ("image", "references")),
    (r"txt_in$|double_blocks\.\d+\.txt_", ("text",)),
    (r"single_blocks\.", ("text", "image", "references")),
)
FLUX3_ROWS = (
    (r"time_in\.", ("vector", "vector")),  # the time of the picture, and 0, that of text and references
    (r"(early|single)_stream_modulations\.image_cond", ("reference vector",)),
    (VECTOR, ("vector",)),
    (r"emb_in\.image$|content_mode_blocks\.image\.|final_layer\.image\.linear", ("image",)),
    (r"emb_in\.image_cond$|content_mode_blocks\.image_cond\.", ("references",)),
    (r"txt_in$|txt_mode_blocks\.", ("text",)),
    (r"single_blocks\.", ("text", "image", "references")),
)


def flops_of(network: nn.Module, work: Work) -> Flops:
    """Operations of one call of a network, by the module that computes them: of a transformer for one row of its batch,
    of a text encoder for one text, of an autoencoder for decoding (its decoder alone)."""
    return FORMULAS[type(network)](cast(Any, network), work)


def encoding_flops(network: Autoencoder | Flux2Autoencoder, width: int, height: int) -> Flops:
    """Operations of encoding a picture of so many pixels."""
    return _convolutions(network.encoder, "encoder", width * height, "down")


def _linears(network: nn.Module, rows: Callable[[str], int]) -> Flops:
    """Of every linear, from the rows that it is applied to."""
    return {
        name: 2 * rows(name) * one.in_features * one.out_features
        for name, one in network.named_modules()
        if isinstance(one, nn.Linear | QuantizedLinear)
    }


def _attention(width: int, queries: int, keys: int) -> int:
    """Scores and sums of all heads, which are so wide together."""
    return 4 * width * queries * keys


def _by_rows(network: nn.Module, table: Sequence[tuple[str, tuple[str, ...]]], work: Work) -> Flops:
    """Linears by a table of who computes on what."""
    lengths = {
        "vector": 1,
        "reference vector": int(work.references > 0),
        "image": work.image,
        "text": work.text,
        "references": work.references,
    }

    def rows(name: str) -> int:
        seen = next((seen for pattern, seen in table if re.match(pattern, name)), None)
        assert seen is not None, f"no row for {name}"
        return sum(lengths[one] for one in seen)

    return _linears(network, rows)


def _joint(network: Flux1 | Flux2, work: Work) -> Flops:
    """FLUX.1 and FLUX.2: text, picture and references meet in every block."""
    tokens = work.text + work.image + work.references
    one = _attention(network.config.hidden_size, tokens, tokens)
    return _by_rows(network, JOINT_ROWS, work) | dict.fromkeys(network.config.blocks, one)


def _apart_then_joint(network: Flux3, work: Work) -> Flops:
    """FLUX.3: each stream alone first."""
    lengths = {"txt_mode": work.text, "content_mode_blocks.image.": work.image, "content_mode_": work.references}
    everything = work.text + work.image + work.references

    def attention(block: str) -> int:
        tokens = next((n for begin, n in lengths.items() if block.startswith(begin)), everything)
        return _attention(network.config.hidden_size, tokens, tokens)

    return _by_rows(network, FLUX3_ROWS, work) | {block: attention(block) for block in network.config.blocks}


def _t5(network: T5Encoder, work: Work) -> Flops:
    config: T5Config = network.config
    one = _attention(config.num_heads * config.d_kv, work.text, work.text)
    blocks = {f"encoder.block.{i}": one for i in range(config.num_layers)}
    return _linears(network, lambda name: work.text) | blocks


def _clip(network: ClipTextEncoder, work: Work) -> Flops:
    """All positions, whatever the prompt."""
    config: ClipTextConfig = network.config
    tokens = config.max_position_embeddings
    one = _attention(config.hidden_size, tokens, tokens)
    layers = {f"text_model.encoder.layers.{i}": one for i in range(config.num_hidden_layers)}
    return _linears(network, lambda name: tokens) | layers


def _causal_lm(network: CausalLm, work: Work) -> Flops:
    """Reading; the output layer of a model that could write is not asked."""
    config: CausalLmConfig = network.config
    one = _attention(config.num_attention_heads * config.head_dim, work.text, work.text)
    layers = {f"model.layers.{i}": one for i in range(config.depth)}
    return _linears(network, lambda name: 0 if name == "lm_head" else work.text) | layers


def _decoding(network: Autoencoder | Flux2Autoencoder, work: Work) -> Flops:
    return _convolutions(network.decoder, "decoder", work.width * work.height, "up")


def _convolutions(half: nn.Module, called: str, pixels: int, levels: str) -> Flops:
    """Of encoder or decoder, from the places at each level: a quarter of those of the level before."""
    depth = len(cast(Any, half).get_submodule(levels))
    smallest = pixels // 4 ** (depth - 1)
    found: Flops = {}
    for name, conv in half.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        level = re.match(rf"{levels}\.(\d+)\.", name)
        at = pixels // 4 ** int(level[1]) if level else pixels if name == _OUTSIDE[levels] else smallest
        at = at // 4 if ".downsample." in name else 4 * at if ".upsample." in name else at
        rows, columns = conv.kernel_size
        found[f"{called}.{name}"] = 2 * at * conv.out_channels * conv.in_channels * rows * columns
    width = cast(Any, half).mid.attn_1.q.out_channels
    found[f"{called}.mid"] = _attention(width, smallest, smallest)
    return found


_OUTSIDE = {"up": "conv_out", "down": "conv_in"}  # the convolution at the size of the picture, of no level
FORMULAS: Mapping[type[nn.Module], Callable[[Any, Work], Flops]] = {
    Flux1: _joint,
    Flux2: _joint,
    Flux3: _apart_then_joint,
    T5Encoder: _t5,
    ClipTextEncoder: _clip,
    CausalLm: _causal_lm,
    Autoencoder: _decoding,
    Flux2Autoencoder: _decoding,
}
