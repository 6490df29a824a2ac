"""Which points there are: of the transformer's blocks, of what is around them, of text encoders and autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from miniflux.models.flux3 import StreamBlock
from miniflux.models.layers import DoubleStream, LastLayer, MLPEmbedder, Modulation, SingleStream
from miniflux.models.transformer import Transformer
from miniflux.study.values.inventory_beside import autoencoder_points, text_points
from miniflux.study.values.point import Networks, Point, Points, View, by_head, cut, of_index, whole

JOINT, PICTURE = ("text", "image", "reference"), ("image", "reference")
LETTERS: dict[tuple[str, ...], str] = {("text",): "T", ("image",): "L", PICTURE: "L", ("reference",): "R"}
SEQUENCES = {"txt_mode_blocks": ("text",), "image_cond": ("reference",), "image": ("image",)}
"""Of FLUX.3, whose first blocks each have one kind of tokens."""
QK = {"q": "queries", "k": "keys"}
ATTENTION = {
    "q": "queries behind their norm, not rotated yet",
    "k": "keys, likewise",
    "v": "values",
    "q_rope": "queries, rotated",
    "k_rope": "keys, rotated",
    "attn_weights": "attention weights of each query, float32",
    "z": "what each head gives, before the projection",
}
"""In the order in which they are computed."""


def points(pipe: Networks) -> Points:
    """All points of a pipeline, network by network, each in the order in which it computes."""
    config = pipe.transformer.config
    hidden, heads = config.hidden_size, config.num_heads
    sizes = {
        "hidden": hidden,
        "H": heads,
        "D": hidden // heads,
        "mlp": _mlp(pipe.transformer),
        "out": config.out_channels,
    }
    text = {name: text_points(name, network) for name, network in pipe.text.networks.items()}
    found = [point for made, _ in text.values() for point in made]
    found += [*_transformer(pipe.transformer), *autoencoder_points(pipe.autoencoder)]
    return Points(
        found, {**{name: known for name, (_, known) in text.items()}, "transformer": sizes, "autoencoder": {}}
    )


@dataclass(frozen=True)
class _At:
    """Makes the points of one part of the transformer."""

    path: str
    tokens: tuple[str, ...] = ()
    block: str | None = None

    def __call__(
        self,
        name: str,
        module: str,
        site: str,
        shape: tuple[str, ...],
        what: str,
        view: View | str = whole,
        **more: Any,
    ) -> Point:
        """`name` and `module` are below the path."""
        path, full = (".".join(filter(None, (self.path, part))) for part in (module, name))
        return Point(full, ("B", *shape), what, "transformer", path, site, view, self.tokens, self.block, **more)


def _mlp(network: Transformer) -> int:
    """Width of the MLPs behind the activation."""
    return int(network.config.hidden_size * network.config.mlp_ratio)


def _transformer(network: Transformer) -> Iterator[Point]:
    picture = PICTURE if network.config.joined else ("image",)
    entries = {"txt_in": ("text",), "img_in": picture, "emb_in.image": ("image",), "emb_in.image_cond": ("reference",)}
    modules, blocks = dict(network.named_modules()), network.config.blocks
    for path, module in modules.items():
        if isinstance(module, MLPEmbedder):
            times = (
                2 if path == "time_in" and not network.config.joined else 1
            )  # of the picture, and of what stands still
            yield _At(path)("out", "", "out", ("hidden",), "its share of the vector that modulations see", times=times)
        elif path in entries:
            tokens = entries[path]
            yield _At(path, tokens)("out", "", "out", (LETTERS[tokens], "hidden"), "tokens as they enter the blocks")
        elif isinstance(module, Modulation) and not any(path.startswith(f"{block}.") for block in blocks):
            yield from _modulation(_At(path), "", module)
    for path in blocks:
        yield from _block(path, modules[path], _mlp(network))
    for path, module in modules.items():
        if isinstance(module, LastLayer):
            at, width = _At(path, picture), network.config.hidden_size
            for i, part in enumerate(("shift", "scale")):
                view = cut(i * width, (i + 1) * width)
                yield _At(path)(part, "adaLN_modulation", "out", ("hidden",), f"{part} of the last layer", view)
            yield at("norm_final.out", "norm_final", "out", ("L", "hidden"), "modulated input of the last layer")
            yield at("out", "", "out", ("L", "out"), "the velocity")


def _modulation(at: _At, path: str, module: Modulation) -> Iterator[Point]:
    """Shift, scale and gate; of a double block around attention and around the MLP."""
    around = ("attention", "the MLP") if module.parts == 2 else ("the block",)
    for i, it in enumerate(around):
        first = ("attn_", "mlp_")[i] if module.parts == 2 else ""
        for part in ("shift", "scale", "gate"):
            name = ".".join(filter(None, (path, first + part)))
            yield at(name, path, "out", ("hidden",), f"{part} around {it}", _part(i, part))


def _part(i: int, part: str) -> View:
    return lambda shifts: getattr(shifts[i], part)[:, 0]


def _block(path: str, block: nn.Module, mlp: int) -> Iterator[Point]:
    if isinstance(block, DoubleStream):
        return _double(path, block, mlp)
    if isinstance(block, SingleStream):
        return _single(_At(path, JOINT, path), block, mlp)
    assert isinstance(block, StreamBlock)
    tokens = next((tokens for part, tokens in SEQUENCES.items() if part in path.split(".")), JOINT)
    return _stream(_At(path, tokens, path), block, "T+L+R" if tokens == JOINT else LETTERS[tokens])


def _double(path: str, block: DoubleStream, mlp: int) -> Iterator[Point]:
    sides = [("img", "L", _At(path, PICTURE, path)), ("txt", "T", _At(path, ("text",), path))]
    for i, (s, letter, at) in enumerate(sides):
        yield at(f"{s}_in", "", "in", (letter, "hidden"), "residual stream before the block", of_index(i))
    for s, letter, at in sides:
        mod, attn = getattr(block, f"{s}_mod", None), f"{s}_attn"
        if mod is not None:
            yield from _modulation(_At(path, (), path), f"{s}_mod", mod)
        yield at(f"{s}_norm1.out", f"{s}_norm1", "out", (letter, "hidden"), "modulated input of attention")
        yield at(f"{attn}.qkv.out", f"{attn}.qkv", "out", (letter, "3*hidden"), "queries, keys, values side by side")
        yield from _raw(at, f"{attn}.", f"{attn}.qkv", block.img_attn.num_heads, block.img_attn.proj, letter)
    yield from _attention(_At(path, JOINT, path), "T+L")
    for s, letter, at in sides:
        before = _wide(getattr(block, f"{s}_mlp")[0].out_features, mlp)
        yield at(f"{s}_attn.proj.out", f"{s}_attn.proj", "out", (letter, "hidden"), "attention's output, projected")
        yield at(f"{s}_norm2.out", f"{s}_norm2", "out", (letter, "hidden"), "modulated input of the MLP")
        yield at(f"{s}_mlp.pre", f"{s}_mlp.0", "out", (letter, before), "MLP before its activation")
        yield at(f"{s}_mlp.post", f"{s}_mlp.1", "out", (letter, "mlp"), "MLP behind its activation")
        yield at(f"{s}_mlp.out", f"{s}_mlp", "out", (letter, "hidden"), "the MLP's output")
    for i, (s, letter, at) in enumerate(sides):
        yield at(f"{s}_out", "", "out", (letter, "hidden"), "residual stream behind the block", of_index(i))


def _single(at: _At, block: SingleStream, mlp: int) -> Iterator[Point]:
    S, (qkv, before) = "T+L", block.split
    modulation = getattr(block, "modulation", None)
    yield at("in", "", "in", (S, "hidden"), "residual stream before the block", of_index(0))
    if modulation is not None:
        yield from _modulation(_At(at.path, (), at.block), "modulation", modulation)
    yield at("pre_norm.out", "pre_norm", "out", (S, "hidden"), "modulated input")
    both = f"3*hidden+{_wide(before, mlp)}"
    yield at("linear1.out", "linear1", "out", (S, both), "queries, keys, values and MLP side by side")
    yield from _raw(at, "", "linear1", block.num_heads, block.linear2, S)
    yield from _attention(at, S)
    yield at("mlp.pre", "linear1", "out", (S, _wide(before, mlp)), "MLP before its activation", cut(qkv, None))
    yield at("mlp.post", "mlp_act", "out", (S, "mlp"), "MLP behind its activation")
    yield at("linear2.out", "linear2", "out", (S, "hidden"), "what attention and MLP give together")
    yield at("out", "", "out", (S, "hidden"), "residual stream behind the block")


def _stream(at: _At, block: StreamBlock, S: str) -> Iterator[Point]:
    H = (S, "hidden")
    yield at("in", "", "in", H, "residual stream before the block", of_index(0))
    # The norm is called once for each part of the sequence; the first linear is given all of them.
    yield at("pre_norm.out", "q_proj", "in", H, "modulated input", of_index(0), shared=True)
    for x, name in QK.items():
        view = by_head(block.num_heads)
        yield at(f"{x}_raw", f"{x}_proj", "out", ("H", S, "D"), f"{name} before their norm", view)
    yield from _attention(at, S, wide=True)
    yield at("attn_out.out", "attn_out", "out", H, "attention's output, projected")
    yield at("mlp.pre", "mlp_in", "out", (S, "2*mlp"), "MLP before its activation")
    yield at("mlp.post", "mlp_act", "out", (S, "mlp"), "MLP behind its activation")
    yield at("mlp.out", "mlp_out", "out", H, "the MLP's output")
    yield at("out", "", "out", H, "residual stream behind the block")


def _raw(at: _At, first: str, module: str, heads: int, back: Any, S: str) -> Iterator[Point]:
    """Queries and keys as they come out of the linear that makes them side by side. `back` gives the width."""
    width = back.out_features
    for i, (x, name) in enumerate(QK.items()):
        view = by_head(heads, cut(i * width, (i + 1) * width))
        yield at(f"{first}{x}_raw", module, "out", ("H", S, "D"), f"{name} before their norm", view)


def _attention(at: _At, S: str, wide: bool = False) -> Iterator[Point]:
    """`wide`: whether queries and keys are in float32 between norm and rotation."""
    for name, what in ATTENTION.items():
        shape = ("H", S, "keys") if name == "attn_weights" else ("H", S, "D")
        yield at(name, "", "attention", shape, what, name, float32=name == "attn_weights" or (wide and name in QK))


def _wide(width: int, mlp: int) -> str:
    return "mlp" if width == mlp else f"{width // mlp}*mlp"
