"""Which model a LoRA was made for, told from the widths in its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, get_args

from torch import nn

from miniflux.checkpoints.layouts import hidden_size, stacked_rows
from miniflux.checkpoints.loading import bare
from miniflux.checkpoints.networks import BY_CONFIG, networks_of
from miniflux.lora.dialects import PartName, Place
from miniflux.lora.files import Group, shape_of
from miniflux.models.transformer import TransformerConfig
from miniflux.variants import VARIANTS, Variant, variant


def stand_ins(model: str | Variant) -> dict[PartName, nn.Module]:
    """The networks of a variant, or of the one of this name, on the meta device.

    Raises:
        InputError: an unknown model.
    """
    sizes = model if isinstance(model, Variant) else variant(model)
    records = networks_of(sizes)
    return {part: bare(records[part].kind, records[part].of(sizes)) for part in get_args(PartName) if part in records}


@cache
def _shapes(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear of a transformer."""
    return {
        key: (module.out_features, module.in_features)
        for key, module in bare(BY_CONFIG[type(config)].kind, config).named_modules()
        if isinstance(module, nn.Linear)
    }


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
        shapes, hidden = _shapes(one.transformer), one.transformer.hidden_size  # which several variants share
        scores[name] = sum(_agrees(shapes.get(p.target), p, hidden, given) for p, given in asked)
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
