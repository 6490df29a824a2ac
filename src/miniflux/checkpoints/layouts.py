"""How each family of checkpoint files names its tensors, as tables.

The native layout of a network is the identity: module names are the official keys. Every other layout is a list of
rows (our name, their names, how the tensors correspond). Names may hold `{i}` and `{j}` for numbers; one table serves
both directions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from miniflux.checkpoints.quantized import packed_layers
from miniflux.errors import CheckpointError
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.models.tiny_autoencoder import TinyDecoder

How = Literal["same", "rows", "first third", "second third", "last third", "swap halves", "1x1", "packed"]
"""same: equal. rows: theirs stacked along the output rows are ours. first third and so on: ours are these rows of
theirs. swap halves: the two halves of the rows change places. 1x1: theirs is the weight of a linear, ours of a 1x1
convolution (and the biases are equal). packed: a part of a packed weight, equal and always in its own dtype."""
THIRDS: dict[How, int] = {"first third": 0, "second third": 1, "last third": 2}


@dataclass(frozen=True)
class Row:
    """One correspondence between names; a trailing `*` stands for `weight` or `bias`, `scale` and so on."""

    ours: str
    theirs: tuple[str, ...]
    how: How = "same"


def _row(ours: str, *theirs: str, how: How = "same") -> Row:
    return Row(ours, theirs, "rows" if len(theirs) > 1 else how)


# diffusers' FluxTransformer2DModel. Its fused tensors are split, and its last modulation has scale before shift.
FLUX1_DIFFUSERS = [
    _row("img_in.*", "x_embedder.*"),
    _row("txt_in.*", "context_embedder.*"),
    _row("time_in.in_layer.*", "time_text_embed.timestep_embedder.linear_1.*"),
    _row("time_in.out_layer.*", "time_text_embed.timestep_embedder.linear_2.*"),
    _row("guidance_in.in_layer.*", "time_text_embed.guidance_embedder.linear_1.*"),
    _row("guidance_in.out_layer.*", "time_text_embed.guidance_embedder.linear_2.*"),
    _row("vector_in.in_layer.*", "time_text_embed.text_embedder.linear_1.*"),
    _row("vector_in.out_layer.*", "time_text_embed.text_embedder.linear_2.*"),
    _row("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", how="swap halves"),
    _row("final_layer.linear.*", "proj_out.*"),
    _row("double_blocks.{i}.img_mod.lin.*", "transformer_blocks.{i}.norm1.linear.*"),
    _row("double_blocks.{i}.txt_mod.lin.*", "transformer_blocks.{i}.norm1_context.linear.*"),
    _row(
        "double_blocks.{i}.img_attn.qkv.*",
        "transformer_blocks.{i}.attn.to_q.*",
        "transformer_blocks.{i}.attn.to_k.*",
        "transformer_blocks.{i}.attn.to_v.*",
    ),
    _row(
        "double_blocks.{i}.txt_attn.qkv.*",
        "transformer_blocks.{i}.attn.add_q_proj.*",
        "transformer_blocks.{i}.attn.add_k_proj.*",
        "transformer_blocks.{i}.attn.add_v_proj.*",
    ),
    _row("double_blocks.{i}.img_attn.norm.query_norm.scale", "transformer_blocks.{i}.attn.norm_q.weight"),
    _row("double_blocks.{i}.img_attn.norm.key_norm.scale", "transformer_blocks.{i}.attn.norm_k.weight"),
    _row("double_blocks.{i}.txt_attn.norm.query_norm.scale", "transformer_blocks.{i}.attn.norm_added_q.weight"),
    _row("double_blocks.{i}.txt_attn.norm.key_norm.scale", "transformer_blocks.{i}.attn.norm_added_k.weight"),
    _row("double_blocks.{i}.img_attn.proj.*", "transformer_blocks.{i}.attn.to_out.0.*"),
    _row("double_blocks.{i}.txt_attn.proj.*", "transformer_blocks.{i}.attn.to_add_out.*"),
    _row("double_blocks.{i}.img_mlp.0.*", "transformer_blocks.{i}.ff.net.0.proj.*"),
    _row("double_blocks.{i}.img_mlp.2.*", "transformer_blocks.{i}.ff.net.2.*"),
    _row("double_blocks.{i}.txt_mlp.0.*", "transformer_blocks.{i}.ff_context.net.0.proj.*"),
    _row("double_blocks.{i}.txt_mlp.2.*", "transformer_blocks.{i}.ff_context.net.2.*"),
    _row("single_blocks.{i}.modulation.lin.*", "single_transformer_blocks.{i}.norm.linear.*"),
    _row(
        "single_blocks.{i}.linear1.*",
        "single_transformer_blocks.{i}.attn.to_q.*",
        "single_transformer_blocks.{i}.attn.to_k.*",
        "single_transformer_blocks.{i}.attn.to_v.*",
        "single_transformer_blocks.{i}.proj_mlp.*",
    ),
    _row("single_blocks.{i}.linear2.*", "single_transformer_blocks.{i}.proj_out.*"),
    _row("single_blocks.{i}.norm.query_norm.scale", "single_transformer_blocks.{i}.attn.norm_q.weight"),
    _row("single_blocks.{i}.norm.key_norm.scale", "single_transformer_blocks.{i}.attn.norm_k.weight"),
]


def _autoencoder_rows() -> list[Row]:
    """diffusers' AutoencoderKL. Its decoder counts levels from the smallest: `{-i}` is the last level minus i."""
    rows = [
        _row(f"{half}.{name}.*", f"{half}.{name}.*")
        for half in ("encoder", "decoder")
        for name in ("conv_in", "conv_out")
    ]
    places = [("encoder.down.{i}", "encoder.down_blocks.{i}"), ("decoder.up.{i}", "decoder.up_blocks.{-i}")]
    blocks = [(f"{ours}.block.{{j}}", f"{theirs}.resnets.{{j}}") for ours, theirs in places]
    for half in ("encoder", "decoder"):
        blocks += [(f"{half}.mid.block_{n + 1}", f"{half}.mid_block.resnets.{n}") for n in (0, 1)]
        ours, theirs = f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0"
        rows.append(_row(f"{half}.norm_out.*", f"{half}.conv_norm_out.*"))
        rows.append(_row(f"{ours}.norm.*", f"{theirs}.group_norm.*"))
        names = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
        rows += [_row(f"{ours}.{a}.*", f"{theirs}.{b}.*", how="1x1") for a, b in names]
    for ours, theirs in blocks:
        rows += [_row(f"{ours}.{name}.*", f"{theirs}.{name}.*") for name in ("norm1", "conv1", "norm2", "conv2")]
    for ours, theirs in places:
        rows.append(_row(f"{ours}.block.{{j}}.nin_shortcut.*", f"{theirs}.resnets.{{j}}.conv_shortcut.*"))
    rows.append(_row("encoder.down.{i}.downsample.conv.*", "encoder.down_blocks.{i}.downsamplers.0.conv.*"))
    rows.append(_row("decoder.up.{i}.upsample.conv.*", "decoder.up_blocks.{-i}.upsamplers.0.conv.*"))
    return rows


# T5 in GGUF files, as llama.cpp names it (`gguf/tensor_mapping.py`, MODEL_ARCH.T5ENCODER).
T5_LLAMA_CPP = [
    _row("shared.*", "token_embd.*"),
    _row("encoder.final_layer_norm.*", "enc.output_norm.*"),
    _row("encoder.block.{i}.layer.0.layer_norm.*", "enc.blk.{i}.attn_norm.*"),
    *(_row(f"encoder.block.{{i}}.layer.0.SelfAttention.{x}.*", f"enc.blk.{{i}}.attn_{x}.*") for x in "qkvo"),
    _row("encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.*", "enc.blk.{i}.attn_rel_b.*"),
    _row("encoder.block.{i}.layer.1.layer_norm.*", "enc.blk.{i}.ffn_norm.*"),
    _row("encoder.block.{i}.layer.1.DenseReluDense.wi_0.*", "enc.blk.{i}.ffn_gate.*"),
    _row("encoder.block.{i}.layer.1.DenseReluDense.wi_1.*", "enc.blk.{i}.ffn_up.*"),
    _row("encoder.block.{i}.layer.1.DenseReluDense.wo.*", "enc.blk.{i}.ffn_down.*"),
]

# CLIP as OpenAI published it, and as open_clip still names it (`clip/model.py` of openai/CLIP): q, k and v are one.
CLIP_OPENAI = [
    _row("text_model.embeddings.token_embedding.*", "token_embedding.*"),
    _row("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    _row("text_model.final_layer_norm.*", "ln_final.*"),
    *(
        _row(f"text_model.encoder.layers.{{i}}.self_attn.{x}_proj.*", "transformer.resblocks.{i}.attn.in_proj_*", how=n)
        for x, n in zip("qkv", THIRDS, strict=True)
    ),
    _row("text_model.encoder.layers.{i}.self_attn.out_proj.*", "transformer.resblocks.{i}.attn.out_proj.*"),
    _row("text_model.encoder.layers.{i}.layer_norm1.*", "transformer.resblocks.{i}.ln_1.*"),
    _row("text_model.encoder.layers.{i}.layer_norm2.*", "transformer.resblocks.{i}.ln_2.*"),
    _row("text_model.encoder.layers.{i}.mlp.fc1.*", "transformer.resblocks.{i}.mlp.c_fc.*"),
    _row("text_model.encoder.layers.{i}.mlp.fc2.*", "transformer.resblocks.{i}.mlp.c_proj.*"),
]

ORIGINAL, DIFFUSERS, ALL_IN_ONE, OPENAI = "original", "diffusers", "all-in-one", "openai"

# Behind what ComfyUI's all-in-one files keep each network; of other spellings see `prefixes.py`.
PREFIXES: dict[type[nn.Module], str] = {
    Flux1: "model.diffusion_model.",
    Autoencoder: "vae.",
    ClipTextEncoder: "text_encoders.clip_l.transformer.",
    T5Encoder: "text_encoders.t5xxl.transformer.",
}


def _behind(kind: type[nn.Module]) -> dict[str, list[Row]]:
    return {ALL_IN_ONE: [_row("**", PREFIXES[kind] + "**")]}


# Layout names by network; "original" is the identity and always exists.
TABLES: dict[type[nn.Module], dict[str, list[Row]]] = {
    Flux1: {DIFFUSERS: FLUX1_DIFFUSERS, **_behind(Flux1)},
    Autoencoder: {DIFFUSERS: _autoencoder_rows(), **_behind(Autoencoder)},
    ClipTextEncoder: {
        "without prefix": [_row("text_model.**", "**")],  # as newer transformers name it in memory
        OPENAI: CLIP_OPENAI,
        **_behind(ClipTextEncoder),
    },
    T5Encoder: {
        "encoder embedding": [_row("shared.*", "encoder.embed_tokens.*"), _row("encoder.**", "encoder.**")],
        "llama.cpp": T5_LLAMA_CPP,
        **_behind(T5Encoder),
    },
    # AutoencoderTiny: no place for the clamp, which has no tensors. `{i-1}` is one less.
    TinyDecoder: {DIFFUSERS: [_row("{i}.**", "decoder.layers.{i-1}.**")]},
}

# The encoder of TAEF1 in diffusers' file: five plain convolutions, three of them without bias, and ten blocks of three.
_TINY_ENCODER = [
    *(f"encoder.layers.{place}.weight" for place in (0, 2, 6, 10, 14)),
    *(f"encoder.layers.{place}.bias" for place in (0, 14)),
    *(
        f"encoder.layers.{place}.conv.{n}.{kind}"
        for place in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)
        for n in (0, 2, 4)
        for kind in ("weight", "bias")
    ),
]
# Tensors that published files carry beside the network's own, and why nothing is lost without them.
REDUNDANT: dict[type[nn.Module], dict[str, str]] = {
    ClipTextEncoder: {
        "text_model.embeddings.position_ids": "the numbers 0, 1, 2 ...",
        "text_projection.weight": "FLUX takes the pooled vector before CLIP's projection",
        "logit_scale": "only for comparing with images",
        "visual_projection.weight": "belongs to CLIP's image encoder",
        "embeddings.position_ids": "the numbers 0, 1, 2 ...",
        "text_projection": "FLUX takes the pooled vector before CLIP's projection",
        "attn_mask": "no token looks at later ones",
        **dict.fromkeys(("input_resolution", "context_length", "vocab_size"), "a size, which the shapes tell"),
    },
    T5Encoder: {
        "encoder.embed_tokens.weight": "a second copy of shared.weight",
        "logit_scale": "ComfyUI writes it with every text encoder; only CLIP has one",
        "output.weight": "belongs to T5's decoder",
    },
    TinyDecoder: dict.fromkeys(_TINY_ENCODER, "previews only decode"),
}
# What the other half of whole files begins with: transformers', OpenAI's and llama.cpp's names.
OTHER_HALVES: dict[type[nn.Module], tuple[tuple[str, ...], str]] = {
    ClipTextEncoder: (("vision_model.", "visual."), "belongs to CLIP's image encoder"),
    T5Encoder: (("decoder.", "lm_head.", "dec."), "belongs to T5's decoder"),
}


def why_redundant(kind: type[nn.Module], key: str) -> str | None:
    """Why a network does not need a tensor that files of it carry; None if nothing is known of it."""
    begins, why = OTHER_HALVES.get(kind, ((), ""))
    return why if begins and key.startswith(begins) else REDUNDANT.get(kind, {}).get(key)


@dataclass(frozen=True)
class Origin:
    """What one of our tensors is made of in another layout."""

    keys: tuple[str, ...]
    how: How


@cache
def _pattern(ours: str) -> re.Pattern[str]:
    text = re.escape(ours).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
    return re.compile(text.replace(r"\*\*", "(?P<tail>.+)").replace(r"\*", r"(?P<tail>[^.]+)"))


def hidden_size(module: nn.Module) -> int:
    """Width of the residual stream of a transformer; 0 for networks whose layouts stack no rows."""
    return module.config.hidden_size if isinstance(module, Flux1) else 0


def layouts_of(module: nn.Module) -> list[str]:
    """Names of the layouts known for this network, `original` first."""
    return [ORIGINAL, *TABLES.get(type(module), {})]


def origins(module: nn.Module, layout: str) -> dict[str, Origin]:
    """For every tensor of the network: which keys of a file in `layout` it comes from. Packed layers know the keys of
    their parts, which are those of the file that they were made for.

    Raises:
        CheckpointError: the network has no such layout.
    """
    tables = TABLES.get(type(module), {})
    if layout not in (ORIGINAL, *tables):
        known = ", ".join(layouts_of(module))
        raise CheckpointError(f"{type(module).__name__} has no layout {layout!r}; known: {known}")
    levels = len(module.config.ch_mult) if isinstance(module, Autoencoder) else 0
    packed = {
        f"{name}.{part}": key for name, layer in packed_layers(module).items() for part, key in layer.origins.items()
    }

    def origin(key: str) -> Origin:
        if key in packed:
            return Origin((packed[key],), "packed")
        return Origin((key,), "same") if layout == ORIGINAL else _origin(key, tables[layout], levels)

    return {key: origin(key) for key in module.state_dict()}


def _origin(key: str, rows: Sequence[Row], levels: int) -> Origin:
    for row in rows:
        match = _pattern(row.ours).fullmatch(key)
        if match is None:
            continue
        found = match.groupdict()
        if "i" in found:
            found |= {"-i": str(levels - 1 - int(found["i"])), "i-1": str(int(found["i"]) - 1)}
        return Origin(tuple(_filled(name, found) for name in row.theirs), row.how)
    raise AssertionError(f"no row for {key}")


def _filled(name: str, found: Mapping[str, str]) -> str:
    name = re.sub(r"\*\*?", found.get("tail", ""), name)
    return re.sub(r"\{(-?[ij]|i-1)\}", lambda match: found[match[1]], name)


def detect(module: nn.Module, keys: Collection[str]) -> str:
    """The layout that explains most of a file's keys."""
    present = set(keys)

    def explained(layout: str) -> int:
        return sum(key in present for origin in origins(module, layout).values() for key in origin.keys)

    return max(layouts_of(module), key=explained)


def stacked_rows(count: int, total: int, hidden: int) -> list[int]:
    """Heights of `count` tensors that are stacked to `total` rows: all but the last are `hidden` high."""
    return [hidden] * (count - 1) + [total - hidden * (count - 1)]


def their_shape_fits(shapes: Sequence[tuple[int, ...]], how: How, target: tuple[int, ...], hidden: int) -> bool:
    """Whether tensors of these shapes make one of shape `target`."""
    if how in THIRDS:
        return bool(target) and shapes[0] == (3 * target[0], *target[1:])
    if how == "rows":
        return list(shapes) == [(rows, *target[1:]) for rows in stacked_rows(len(shapes), target[0], hidden)]
    if how == "1x1":  # some files keep the convolution's two trailing axes
        return shapes[0] == target or (*shapes[0], 1, 1) == target
    return shapes[0] == target


def to_ours(parts: Sequence[Tensor], how: How, target: tuple[int, ...]) -> Tensor:
    """Their tensors -> ours. A view wherever possible."""
    if how == "rows":
        return torch.cat(list(parts))
    if how in THIRDS:
        return parts[0].chunk(3)[THIRDS[how]]
    if how == "swap halves":
        return torch.cat(parts[0].chunk(2)[::-1])
    return parts[0].view(target)


def to_theirs(tensor: Tensor, how: How, count: int, hidden: int) -> list[Tensor]:
    """Ours -> their `count` tensors."""
    if how == "rows":
        return list(tensor.split(stacked_rows(count, tensor.shape[0], hidden)))
    if how == "swap halves":
        return [torch.cat(tensor.chunk(2)[::-1])]
    if how == "1x1" and tensor.ndim == 4:
        return [tensor[:, :, 0, 0]]
    return [tensor]


def from_layout(module: nn.Module, tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Rename and reshape a complete set of tensors of `layout` into the network's own; the input is left alone."""
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    plan = origins(module, layout)
    return {key: to_ours([tensors[k] for k in o.keys], o.how, shapes[key]) for key, o in plan.items()}


def to_layout(module: nn.Module, tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The inverse of `from_layout`."""
    result: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for key, origin in origins(module, layout).items():
        if origin.how in THIRDS:
            thirds.setdefault(origin.keys[0], {})[THIRDS[origin.how]] = tensors[key]
            continue
        parts = to_theirs(tensors[key], origin.how, len(origin.keys), hidden_size(module))
        result.update(zip(origin.keys, parts, strict=True))
    return result | {key: torch.cat([rows[n] for n in sorted(rows)]) for key, rows in thirds.items()}
