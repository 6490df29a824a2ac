"""ComfyUI's editor graph (`workflow`) in the form of the graph that ran (`prompt`).

In the editor's file the values of a node stand in the order of its widgets, links have numbers, and some nodes exist
for the editor alone: reroutes, primitives, set and get, sub-graphs, and those that are bypassed (mode 4) or muted
(mode 2). Read from the file format of ComfyUI's frontend (`litegraph`, schemas 0.4 and 1). Whatever is not as it should
be is left out and told of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miniflux.errors import SettingsError
from miniflux.settings import strict

MAX_NODES = 5000
MAX_NESTED = 8  # sub-graphs within sub-graphs
MUTED, BYPASSED = 2, 4
FROM_OUTSIDE, TO_OUTSIDE = "-10", "-20"  # the ends of a sub-graph, as if they were nodes
CONTROLS = ("fixed", "increment", "decrement", "randomize")

# Names of the values of a node in the editor's order; None is what happens to the seed after a run, which some lack.
WIDGETS: dict[str, tuple[str | None, ...]] = {
    "KSampler": ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        *("add_noise", "noise_seed", None, "steps", "cfg", "sampler_name", "scheduler"),
        *("start_at_step", "end_at_step", "return_with_leftover_noise"),
    ),
    "SamplerCustom": ("add_noise", "noise_seed", None, "cfg"),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "RandomNoise": ("noise_seed", None),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeFlux": ("clip_l", "t5xxl", "guidance"),
    "FluxGuidance": ("guidance",),
    "CFGGuider": ("cfg",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "EmptyFlux2LatentImage": ("width", "height", "batch_size"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "ModelSamplingFlux": ("max_shift", "base_shift", "width", "height"),
    "ModelSamplingSD3": ("shift",),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "UnetLoaderGGUF": ("unet_name",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "PrimitiveNode": ("value", None),
    "PrimitiveInt": ("value", None),
    "PrimitiveFloat": ("value",),
    "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",),
    "StringConcatenate": ("string_a", "string_b", "delimiter"),
}
Place = tuple[str, int]  # a node and one of its outputs


@dataclass
class _Item:
    """A node of the editor."""

    kind: str
    mode: Any
    values: Any
    inputs: list[tuple[str, Any, Place | None]]  # name, type, where it comes from
    widgets: list[str]  # names of the inputs that have widgets
    outputs: list[Any]  # types


@dataclass
class _Sheet:
    """All nodes of the graph and of its sub-graphs, those of sub-graph 12 as `12:3`."""

    items: dict[str, _Item] = field(default_factory=dict[str, _Item])
    results: dict[Place, Place] = field(default_factory=dict[Place, Place])  # what leaves a sub-graph, and from where
    notes: list[str] = field(default_factory=list[str])

    def note(self, line: str) -> None:
        if len(self.notes) < 50 and line not in self.notes:
            self.notes.append(line)


def graph_that_ran(value: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Node -> {class_type, inputs}; and what could not be read, a line each.

    Raises:
        SettingsError: there are no nodes, or more than are read.
    """
    sheet = _Sheet()
    definitions = _dict(value.get("definitions"))
    kinds = {str(_dict(one).get("id")): _dict(one) for one in _list(definitions.get("subgraphs"))}
    _fill(sheet, value, "", kinds, MAX_NESTED)
    if not sheet.items:
        raise SettingsError("workflow: no nodes")
    graph: dict[str, dict[str, Any]] = {}
    for number, item in sheet.items.items():
        if item.kind in kinds or _is_wire(item) or item.mode in (MUTED, BYPASSED):
            continue
        inputs = _valued(item)
        for name, _, place in item.inputs:
            source = _resolved(sheet, place)
            if source is not None:
                inputs[name] = list(source)
            elif place is not None:
                sheet.note(f"node {number}: {name} is linked to nothing")
        graph[number] = {"class_type": item.kind, "inputs": inputs}
    return graph, sheet.notes


def _fill(sheet: _Sheet, graph: Mapping[str, Any], prefix: str, kinds: Mapping[str, Any], depth: int) -> None:
    links: dict[str, Place] = {}
    for link in _list(graph.get("links")):
        if isinstance(link, dict):
            parts = [link.get(name) for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
        else:
            parts = [*_list(link), *[None] * 5][:5]
        number, origin, slot, target, target_slot = parts
        if origin is None or not isinstance(slot, int):
            if link is not None:
                sheet.note(f"link {strict.shown(link)}")
            continue
        place = (prefix + str(origin), slot)
        links[str(number)] = place
        if str(target) == TO_OUTSIDE and isinstance(target_slot, int):
            sheet.results[(prefix.removesuffix(":"), target_slot)] = place
    for node in _list(graph.get("nodes")):
        about = _dict(node)
        kind = about.get("type")
        if not isinstance(kind, str) or about.get("id") is None:
            sheet.note(f"an entry that is no node: {strict.shown(node)}")
            continue
        if len(sheet.items) >= MAX_NODES:
            raise SettingsError(f"workflow: more than {MAX_NODES} nodes")
        given = [_dict(one) for one in _list(about.get("inputs"))]
        number = prefix + str(about["id"])
        sheet.items[number] = _Item(
            kind,
            about.get("mode"),
            about.get("widgets_values"),
            [(str(one.get("name")), one.get("type"), links.get(str(one.get("link")))) for one in given],
            [str(one.get("name")) for one in given if one.get("widget")],
            [_dict(one).get("type") for one in _list(about.get("outputs"))],
        )
        if kind in kinds and depth:
            _fill(sheet, kinds[kind], f"{number}:", kinds, depth - 1)
            if about.get("widgets_values"):
                sheet.note(
                    f"node {number}: values at the edge of the sub-graph {strict.shown(kinds[kind].get('name'))}"
                )


def _resolved(sheet: _Sheet, place: Place | None) -> Place | None:
    """Where a link comes from, through all that exists for the editor alone."""
    seen: set[Place] = set()
    while place is not None and place not in seen:
        seen.add(place)
        number, slot = place
        parent, colon, end = number.rpartition(":")
        if end == FROM_OUTSIDE and colon:
            place = _input(sheet.items.get(parent), slot)
            continue
        item = sheet.items.get(number)
        if item is None or item.mode == MUTED:
            return None
        if item.mode == BYPASSED:
            place = _passed(item, slot)
        elif place in sheet.results:
            place = sheet.results[place]
        elif item.kind.lower().replace(" ", "").endswith("getnode"):
            place = _set(sheet, item)
        elif _is_wire(item):
            place = _input(item, 0)
        else:
            return place
    return None


def _is_wire(item: _Item) -> bool:
    return item.kind.startswith("Reroute") or item.kind.lower().replace(" ", "").endswith(("setnode", "getnode"))


def _input(item: _Item | None, slot: int) -> Place | None:
    return item.inputs[slot][2] if item is not None and 0 <= slot < len(item.inputs) else None


def _passed(item: _Item, slot: int) -> Place | None:
    """The input that a bypassed node hands on: of the output's type, in the same place if there is such a one."""
    kind = item.outputs[slot] if 0 <= slot < len(item.outputs) else None
    same = [i for i, (_, given, place) in enumerate(item.inputs) if given == kind and place is not None]
    return None if not same else item.inputs[slot if slot in same else same[0]][2]


def _set(sheet: _Sheet, getter: _Item) -> Place | None:
    """What the set node of the same name is given."""
    for item in sheet.items.values():
        if item.kind.lower().replace(" ", "").endswith("setnode") and item.values == getter.values and item.values:
            return _input(item, 0)
    return None


def _valued(item: _Item) -> dict[str, Any]:
    """The values of a node by the names of its widgets."""
    if isinstance(item.values, dict):
        return dict(item.values)
    values = _list(item.values)
    names = WIDGETS.get(item.kind)
    if names is None:  # newer files name the widgets among the inputs
        names = tuple(item.widgets)
        if len(names) != len([x for x in values if x not in CONTROLS]):
            return {}
        names = tuple(part for name in names for part in ((name, None) if "seed" in name else (name,)))
    found: dict[str, Any] = {}
    waiting = list(values)
    for name in names:
        if not waiting:
            break
        if name is not None:
            found[name] = waiting.pop(0)
        elif waiting[0] in CONTROLS or isinstance(waiting[0], bool):  # true and false in old files
            waiting.pop(0)
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
