"""Which model a LoRA was made for, told from the widths in its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, get_args

from torch import nn

from miniflux.checkpoints.layouts import hidden_size, stacked_rows
from miniflux.checkpoints.loading import bare
from miniflux.checkpoints.networks import BY_PART
from miniflux.lora.dialects import PartName, Place
from miniflux.lora.files import Group, shape_of
from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.variants import FLUX2_SIZES, VARIANTS, Flux2Sizes, Variant, variant


def stand_ins(model: str | Variant) -> dict[PartName, nn.Module]:
    """The networks of a variant, or of the one of this name, on the meta device.

    Raises:
        InputError: an unknown model.
    """
    sizes = model if isinstance(model, Variant) else variant(model)
    return {part: bare(BY_PART[part].kind, BY_PART[part].of(sizes)) for part in get_args(PartName)}


@cache
def _flux1_shapes(config: Flux1Config) -> dict[str, tuple[int, int]]:
    model = bare(Flux1, config)
    return {
        key: (module.out_features, module.in_features)
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _flux2_shape(sizes: Flux2Sizes, target: str) -> tuple[int, int] | None:
    """(out, in) of a linear of FLUX.2; None if it has no such layer. Its MLPs are gated: twice as wide inside."""
    root, _, rest = target.partition(".")
    number, _, name = rest.partition(".")
    h, inner = sizes.hidden_size, int(sizes.mlp_ratio * sizes.hidden_size)
    if root == "double_blocks" and int(number) < sizes.depth:
        kind = name.partition("_")[2]
        shapes = {"attn.qkv": (3 * h, h), "attn.proj": (h, h), "mlp.0": (2 * inner, h), "mlp.2": (h, inner)}
        return shapes.get(kind)
    if root == "single_blocks" and int(number) < sizes.depth_single_blocks:
        return {"linear1": (3 * h + 2 * inner, h), "linear2": (h, h + inner)}.get(name)
    return {
        "img_in": (h, sizes.in_channels),
        "txt_in": (h, sizes.context_in_dim),
        "double_stream_modulation_img.lin": (6 * h, h),
        "double_stream_modulation_txt.lin": (6 * h, h),
        "single_stream_modulation.lin": (3 * h, h),
        "final_layer.linear": (sizes.in_channels, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }.get(target)


def _agrees(shape: tuple[int, int] | None, place: Place, hidden: int, given: tuple[int, int]) -> bool:
    if shape is None:
        return False
    heights = stacked_rows(place.parts, shape[0], hidden)
    rows = sum(heights[place.first : place.last])
    return given == (rows, shape[1])


def fitting_models(groups: Sequence[Group], found: Mapping[PartName, nn.Module]) -> str:
    """A sentence that names the models whose widths a file has; empty if there is none, or only the given one."""
    asked = [
        (group.place, shape)
        for group in groups
        if group.place.network == "transformer" and (shape := shape_of(group.tensors)) is not None
    ]
    if not asked:
        return ""
    scores: dict[str, int] = {}
    for name, one in VARIANTS.items():
        shapes = _flux1_shapes(one.transformer)  # which several variants share
        hidden = shapes["img_in"][0]
        scores[name] = sum(_agrees(shapes.get(p.target), p, hidden, given) for p, given in asked)
    for name, sizes in FLUX2_SIZES.items():
        scores[name] = sum(_agrees(_flux2_shape(sizes, p.target), p, sizes.hidden_size, given) for p, given in asked)
    best = max(scores.values())
    if best == 0:
        widths = sorted({given[1] for _, given in asked})
        return f"; its widths ({', '.join(map(str, widths[:4]))}) are those of no model known here"
    names = [name for name, score in scores.items() if score == best]
    network = found.get("transformer")
    known = {name: variant.transformer for name, variant in VARIANTS.items()}
    config: Any = getattr(network, "config", None)
    if any(known[name] == config for name in names if name in known):
        return ""  # the widths are right: something else is wrong
    own = "" if network is None else f", this model's width is {hidden_size(network)}"
    return f"; its widths are those of {' or '.join(names)}{own}"
