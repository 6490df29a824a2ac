"""Which points there are beside the transformer: in the text encoders and in the autoencoder.

An autoencoder does not call all of its modules (on a CPU some convolutions are products of matrices), and large
pictures go through it in bands: then its blocks are not called at all, and nothing is seen of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from miniflux.models.autoencoder import Level
from miniflux.models.causal_lm import CausalLm
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.t5 import T5Encoder
from miniflux.study.values.point import Point, View, by_head, of_index, whole

Row = tuple[str, str, str, str, str]
"""(pattern of a module, suffix, site, shape behind B and T, what); a shape with H or G is seen by head."""

T5_LAYER, CLIP_LAYER, LM_LAYER = r"encoder\.block\.\d+", r"text_model\.encoder\.layers\.\d+", r"model\.layers\.\d+"
STREAM = ("residual stream before the layer", "residual stream behind the layer")
TEXT: dict[type[nn.Module], tuple[Row, ...]] = {
    T5Encoder: (
        ("shared", "out", "out", "d_model", "embedded tokens"),
        (T5_LAYER, "in", "in", "d_model", STREAM[0]),
        (T5_LAYER + r"\.layer\.0\.layer_norm", "out", "out", "d_model", "normalised input of attention"),
        *((T5_LAYER + rf"\.layer\.0\.SelfAttention\.{x}", x, "out", "H", f"{x} of attention") for x in "qkv"),
        (T5_LAYER + r"\.layer\.0\.SelfAttention\.o", "z", "in", "H", "what each head gives, before the projection"),
        (T5_LAYER + r"\.layer\.0\.SelfAttention", "out", "out", "d_model", "attention's output, projected"),
        (T5_LAYER + r"\.layer\.1\.layer_norm", "out", "out", "d_model", "normalised input of the MLP"),
        (T5_LAYER + r"\.layer\.1\.DenseReluDense\.wi_[01]", "out", "out", "d_ff", "halves of the gated MLP"),
        (T5_LAYER + r"\.layer\.1\.DenseReluDense", "out", "out", "d_model", "the MLP's output"),
        (T5_LAYER, "out", "out", "d_model", STREAM[1]),
        (r"encoder\.final_layer_norm", "out", "out", "d_model", "what the transformer reads"),
    ),
    ClipTextEncoder: (
        (r"text_model\.embeddings", "out", "out", "hidden", "embedded tokens with their positions"),
        (CLIP_LAYER, "in", "in", "hidden", STREAM[0]),
        (CLIP_LAYER + r"\.layer_norm1", "out", "out", "hidden", "normalised input of attention"),
        *((CLIP_LAYER + rf"\.self_attn\.{x}_proj", x, "out", "H", f"{x} of attention") for x in "qkv"),
        (CLIP_LAYER + r"\.self_attn\.out_proj", "z", "in", "H", "what each head gives, before the projection"),
        (CLIP_LAYER + r"\.self_attn", "out", "out", "hidden", "attention's output, projected"),
        (CLIP_LAYER + r"\.layer_norm2", "out", "out", "hidden", "normalised input of the MLP"),
        (CLIP_LAYER + r"\.mlp\.fc1", "pre", "out", "mlp", "MLP before its activation"),
        (CLIP_LAYER + r"\.mlp\.fc2", "post", "in", "mlp", "MLP behind its activation"),
        (CLIP_LAYER + r"\.mlp", "out", "out", "hidden", "the MLP's output"),
        (CLIP_LAYER, "out", "out", "hidden", STREAM[1]),
        (r"text_model\.final_layer_norm", "out", "out", "hidden", "normalised, of all tokens"),
        ("", "pooled", "out", "", "the summary vector, which the transformer reads"),
    ),
    CausalLm: (
        (r"model\.embed_tokens", "out", "out", "hidden", "embedded tokens"),
        (LM_LAYER, "in", "in", "hidden", STREAM[0]),
        (LM_LAYER + r"\.input_layernorm", "out", "out", "hidden", "normalised input of attention"),
        (LM_LAYER + r"\.self_attn\.q_proj", "q_raw", "out", "H", "queries before their norm"),
        (LM_LAYER + r"\.self_attn\.k_proj", "k_raw", "out", "G", "keys before their norm"),
        (LM_LAYER + r"\.self_attn\.v_proj", "v", "out", "G", "values"),
        (LM_LAYER + r"\.self_attn\.o_proj", "z", "in", "H", "what each head gives, before the projection"),
        (LM_LAYER + r"\.self_attn", "out", "out", "hidden", "attention's output, projected"),
        (LM_LAYER + r"\.post_attention_layernorm", "out", "out", "hidden", "normalised input of the MLP"),
        (LM_LAYER + r"\.mlp\.(gate|up)_proj", "out", "out", "mlp", "halves of the gated MLP"),
        (LM_LAYER + r"\.mlp\.down_proj", "post", "in", "mlp", "MLP behind its activation"),
        (LM_LAYER + r"\.mlp", "out", "out", "hidden", "the MLP's output"),
        (LM_LAYER, "out", "out", "hidden", STREAM[1]),
    ),
}
SIZES: dict[type[nn.Module], Callable[[Any], dict[str, int]]] = {
    T5Encoder: lambda c: {"d_model": c.d_model, "d_ff": c.d_ff, "H": c.num_heads, "D": c.d_kv},
    ClipTextEncoder: lambda c: {
        "hidden": c.hidden_size,
        "mlp": c.intermediate_size,
        "H": c.num_attention_heads,
        "D": c.hidden_size // c.num_attention_heads,
    },
    CausalLm: lambda c: {
        "hidden": c.hidden_size,
        "mlp": c.intermediate_size,
        "H": c.num_attention_heads,
        "G": c.num_key_value_heads,
        "D": c.head_dim,
    },
}


def text_points(part: str, network: nn.Module) -> tuple[list[Point], dict[str, int]]:
    """The points of a text encoder, and what its letters stand for; none of a kind that is not known here."""
    rows = TEXT.get(type(network), ())
    sizes = SIZES[type(network)](network.config) if rows else {}
    found: list[tuple[tuple[int, ...], int, Point]] = []
    for path, _ in network.named_modules():
        for i, (pattern, suffix, site, letters, what) in enumerate(rows):
            if re.fullmatch(pattern, path):
                layer = tuple(int(n) for n in re.findall(r"(?<=block\.)\d+|(?<=layers\.)\d+", path))
                order = (1, *layer) if layer else (0 if i < len(rows) // 2 else 2,)
                found.append((order, i, _text_point(part, path, suffix, site, letters, what, sizes)))
    return [point for *_, point in sorted(found, key=lambda each: each[:2])], sizes


def _text_point(part: str, path: str, suffix: str, site: str, letters: str, what: str, sizes: dict[str, int]) -> Point:
    """Names of what a projection makes are those of what it stands in: `self_attn.q`."""
    inner = suffix not in ("in", "out", "pooled")
    name = ".".join(filter(None, (part, path.rpartition(".")[0] if inner else path, suffix)))
    view: View = whole if site == "out" else of_index(0)
    if suffix == "pooled":
        return Point(name, ("B", "hidden"), what, part, path, site, of_index(1))
    if letters in ("H", "G"):
        shape = ("B", letters, "T", "D")
        return Point(name, shape, what, part, path, site, by_head(sizes[letters], view), ("text",))
    return Point(name, ("B", "T", letters), what, part, path, site, view, ("text",))


def autoencoder_points(network: Any) -> list[Point]:
    """The points of an autoencoder; rows and columns as multiples of those of the latent."""
    return [*_way(network.encoder, "encoder"), *_way(network.decoder, "decoder")]


def _way(network: Any, way: str) -> Iterator[Point]:
    """Encoder or decoder, in the order in which it computes."""
    grows = way == "decoder"
    levels: list[tuple[str, Any]] = [each for each in network.named_modules() if isinstance(each[1], Level)]
    factor = 1 if grows else 2 ** (len(levels) - 1)

    def at(path: str, channels: int, factor: int, what: str) -> Point:
        h, w = (side if factor == 1 else f"{factor}*{side}" for side in "hw")
        return Point(
            f"autoencoder.{way}.{path}.out",
            ("B", str(channels), h, w),
            what,
            "autoencoder",
            f"{way}.{path}",
            "out",
            whole,
        )

    def middle() -> Iterator[Point]:
        wide = network.mid.block_1.conv1.out_channels
        for name, what in (("block_1", "a residual block"), ("attn_1", "attention"), ("block_2", "a residual block")):
            yield at(f"mid.{name}", wide, 1, f"behind {what} of the middle")

    yield at("conv_in", network.conv_in.out_channels, factor, "behind the first convolution")
    if grows:
        yield from middle()
    for path, level in reversed(levels) if grows else levels:
        wide = level.block[-1].conv1.out_channels
        for i in range(len(level.block)):
            yield at(f"{path}.block.{i}", wide, factor, "behind a residual block")
        for name in ("upsample", "downsample"):
            if hasattr(level, name):
                factor = factor * 2 if grows else factor // 2
                yield at(f"{path}.{name}", wide, factor, "at the next size")
    if not grows:
        yield from middle()
    yield at("conv_out", network.conv_out.out_channels, factor, "behind the last convolution")
