"""Settings as ComfyUI writes them: a graph of nodes, followed back from the sampler to what made the picture.

`prompt` is the graph that ran: number -> {class_type, inputs}, where an input is a value or [number, output].
`workflow` is the editor's; its values stand in the order of the widgets. Names of nodes and inputs from ComfyUI's
`nodes.py` and `comfy_extras/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from miniflux.errors import SettingsError
from miniflux.sampling import guide
from miniflux.settings import strict
from miniflux.settings.foreign import Mapped
from miniflux.settings.request import Request

MAX_NODES = 5000
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustomAdvanced", "SamplerCustom")
OUTPUTS = ("SaveImage", "PreviewImage", "SaveImageWebsocket", "SaveAnimatedWEBP", "SaveAnimatedPNG")
SILENT = (
    *OUTPUTS,
    *("VAEDecode", "VAEDecodeTiled", "VAELoader", "CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader"),
    *("Note", "MarkdownNote", "ConditioningZeroOut", "Reroute"),
)
LOADERS = {"UNETLoader": "unet_name", "UnetLoaderGGUF": "unet_name", "CheckpointLoaderSimple": "ckpt_name"}
EMPTY = ("EmptyLatentImage", "EmptySD3LatentImage", "EmptyFlux2LatentImage")
DEFAULT_MU = 1.15  # `ModelSamplingFlux` of a model without such a node: FLUX.1's shift at 4096 tokens, for every size

# Names of the values of a node in the editor's order; None is a widget that sets nothing.
WIDGETS: dict[str, tuple[str | None, ...]] = {
    "KSampler": ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "RandomNoise": ("noise_seed", None),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeFlux": ("clip_l", "t5xxl", "guidance"),
    "FluxGuidance": ("guidance",),
    "CFGGuider": ("cfg",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "ModelSamplingFlux": ("max_shift", "base_shift", "width", "height"),
    "ModelSamplingSD3": ("shift",),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "CheckpointLoaderSimple": ("ckpt_name",),
}
Node = Mapping[str, Any]


def read(prompt: str | None, workflow: str | None) -> Mapped:
    """What of such a graph can be understood.

    Raises:
        SettingsError: it is no graph, or larger than is read.
    """
    if prompt is not None:
        graph = _nodes(strict.record("prompt", strict.parsed("prompt", prompt, lenient=True)))
    else:
        assert workflow is not None
        graph = _from_editor(strict.record("workflow", strict.parsed("workflow", workflow, lenient=True)))
    return _Graph(graph).mapped()


def _nodes(value: Mapping[str, Any]) -> dict[str, Node]:
    if len(value) > MAX_NODES:
        raise SettingsError(f"prompt: {len(value)} nodes; at most {MAX_NODES} are read")
    for number, node in value.items():
        what = f"prompt: node {strict.shown(number)}"
        strict.text(f"{what}: class_type", strict.record(what, node).get("class_type"))
        strict.record(f"{what}: inputs", node.get("inputs"))
    return dict(value)


def _from_editor(value: Mapping[str, Any]) -> dict[str, Node]:
    """The editor's graph in the form of the one that ran."""
    links: dict[Any, list[Any]] = {}
    for link in strict.items("workflow: links", value.get("links") or [], 4 * MAX_NODES):
        parts = strict.items("workflow: a link", link, 10)
        if len(parts) < 3:
            raise SettingsError(f"workflow: a link must be [id, node, output, ...], got {strict.shown(link)}")
        links[strict.integer("workflow: a link", parts[0])] = [str(parts[1]), parts[2]]
    graph: dict[str, Node] = {}
    for node in strict.items("workflow: nodes", value.get("nodes"), MAX_NODES):
        about = strict.record("workflow: a node", node)
        kind = strict.text("workflow: a node's type", about.get("type"))
        inputs: dict[str, Any] = {}
        for given in strict.items("workflow: inputs", about.get("inputs") or [], 1000):
            given = strict.record("workflow: an input", given)
            if isinstance(given.get("link"), int) and given["link"] in links:
                inputs[strict.text("workflow: an input's name", given.get("name"))] = links[given["link"]]
        values = about.get("widgets_values")
        if isinstance(values, list):
            inputs = {name: x for name, x in zip(WIDGETS.get(kind, ()), values, strict=False) if name} | inputs
        graph[str(about.get("id"))] = {"class_type": kind, "inputs": inputs}
    return graph


class _Graph:
    """A graph, and which of its nodes have been understood."""

    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes
        self.used: set[str] = set()

    def mapped(self) -> Mapped:
        sampler = self._sampler()
        prompt = "" if sampler is None else self._prompt(sampler)
        mapped = Mapped(Request(prompt=strict.text("prompt", prompt, strict.MAX_PROMPT)))
        if sampler is None:
            mapped.miss("no sampler that is known here leads to the picture")
        else:
            self._follow(mapped, sampler)
        for number, node in self.nodes.items():
            if number not in self.used and node["class_type"] not in SILENT:
                mapped.miss(f"node {number}: {node['class_type']}")
        return mapped

    def _sampler(self) -> Node | None:
        """The sampler that leads to the first output; or the only one."""
        outputs = [number for number, node in self.nodes.items() if node["class_type"] in OUTPUTS]
        line, seen = outputs[:1], set(outputs[:1])
        while line:
            number = line.pop(0)
            if self.nodes[number]["class_type"] in SAMPLERS:
                self.used.add(number)
                return self.nodes[number]
            for value in self.nodes[number]["inputs"].values():
                source = self._source(value)
                if source is not None and source not in seen:
                    seen.add(source)
                    line.append(source)
        found = [number for number, node in self.nodes.items() if node["class_type"] in SAMPLERS]
        if len(found) != 1:
            return None
        self.used.add(found[0])
        return self.nodes[found[0]]

    def _source(self, value: object) -> str | None:
        """The number of the node that an input comes from."""
        if (
            isinstance(value, list)
            and len(value) == 2
            and isinstance(value[0], (str, int))
            and str(value[0]) in self.nodes
        ):
            return str(value[0])
        return None

    def _chain(self, node: Node, *names: str) -> Iterator[Node]:
        """The nodes that an input comes from, one behind the other, by the first of these names that is a link."""
        seen: set[str] = set()
        while True:
            sources = [self._source(node["inputs"].get(name)) for name in names]
            number = next((source for source in sources if source is not None), None)
            if number is None or number in seen:
                return
            seen.add(number)
            node = self.nodes[number]
            self.used.add(number)
            yield node

    def _value(self, node: Node, name: str) -> Any:
        """An input, also if a node of a single value gives it."""
        value = node["inputs"].get(name)
        for source in self._chain(node, name):
            for key in ("value", "text", "string", "int", "float", "seed"):
                if key in source["inputs"] and not isinstance(source["inputs"][key], list):
                    return source["inputs"][key]
        return value if not isinstance(value, list) else None

    def _conditioning(self, node: Node) -> str:
        return "positive" if "positive" in node["inputs"] else "conditioning"

    def _guider(self, sampler: Node) -> Node:
        return next(self._chain(sampler, "guider"), sampler)

    def _text(self, node: Node, name: str) -> str | None:
        """The words behind a conditioning."""
        for source in self._chain(node, name, "conditioning", "conditioning_1"):
            for key in ("t5xxl", "text", "clip_l"):
                words = self._value(source, key)
                if isinstance(words, str):
                    return words
            if source["class_type"] == "ConditioningZeroOut":
                return ""
        return None

    def _prompt(self, sampler: Node) -> str:
        guider = self._guider(sampler)
        return self._text(guider, self._conditioning(guider)) or ""

    def _follow(self, mapped: Mapped, sampler: Node) -> None:
        guider = self._guider(sampler)
        self._model(mapped, guider, sampler)
        for node in self._chain(guider, self._conditioning(guider), "conditioning", "conditioning_1"):
            if node["class_type"] in ("FluxGuidance", "CLIPTextEncodeFlux"):
                mapped.number("guidance", self._value(node, "guidance"))
            elif node["class_type"] != "CLIPTextEncode":
                mapped.miss(f"{node['class_type']} between the prompt and the sampler")
        cfg = self._value(guider, "cfg")
        if isinstance(cfg, (int, float)) and not isinstance(cfg, bool) and cfg != 1:
            try:
                negative = self._text(guider, "negative") or None
                mapped.take(f"cfg {cfg}", guide=guide("cfg", scale=float(cfg)), negative=negative)
            except ValueError as error:
                mapped.miss(f"cfg {cfg}: {error}")
        else:
            list(self._chain(guider, "negative", "conditioning"))  # understood: it has no effect
        self._sampling(mapped, sampler)

    def _sampling(self, mapped: Mapped, sampler: Node) -> None:
        levels = next(self._chain(sampler, "sigmas"), sampler)
        noise = next(self._chain(sampler, "noise"), sampler)
        chosen = next(self._chain(sampler, "sampler"), sampler)
        if "sampler_name" in chosen["inputs"]:
            mapped.solver(self._value(chosen, "sampler_name"))
        elif chosen is not sampler:
            mapped.miss(f"sampler {chosen['class_type']}")
        if levels["class_type"] == "OptimalStepsScheduler":
            mapped.schedule("optimalsteps")
        elif "scheduler" in levels["inputs"]:
            mapped.schedule(self._value(levels, "scheduler"))
        elif levels is not sampler:
            mapped.miss(f"noise levels of {levels['class_type']}")
        if "steps" in levels["inputs"]:
            mapped.number("steps", self._value(levels, "steps"))
        denoise = self._value(levels, "denoise")
        if denoise not in (None, 1):
            mapped.miss(f"denoise {strict.shown(denoise)}: the picture it began with is not in the file")
        for name in ("noise_seed", "seed"):
            if name in noise["inputs"]:
                mapped.number("seed", self._value(noise, name))
                mapped.miss("seed: noise is drawn otherwise there, so it gives another picture here")
        for name in ("start_at_step", "end_at_step", "add_noise", "return_with_leftover_noise"):
            if name in sampler["inputs"]:
                mapped.miss(f"{name} {strict.shown(sampler['inputs'][name])}")
        for node in self._chain(sampler, "latent_image"):
            if node["class_type"] not in EMPTY:
                mapped.miss(f"begins with latents of {node['class_type']}")
                continue
            width, height = self._value(node, "width"), self._value(node, "height")
            try:
                mapped.take(f"size {width}x{height}", width=int(width), height=int(height))
            except (TypeError, ValueError, OverflowError):
                mapped.miss(f"size {strict.shown(width)} x {strict.shown(height)}")
            if self._value(node, "batch_size") not in (None, 1):
                mapped.number("images", self._value(node, "batch_size"))

    def _model(self, mapped: Mapped, guider: Node, sampler: Node) -> None:
        start = guider if "model" in guider["inputs"] else sampler
        levels = next(self._chain(sampler, "sigmas"), start)
        chain = list(self._chain(start, "model"))
        shifts = [
            node for node in [*chain, *self._chain(levels, "model")] if node["class_type"].startswith("ModelSampling")
        ]
        loras: list[tuple[Any, Any]] = []
        for node in chain:
            kind = node["class_type"]
            if kind in LOADERS:
                mapped.model(self._value(node, LOADERS[kind]))
            elif kind in ("LoraLoader", "LoraLoaderModelOnly"):
                loras.append((self._value(node, "lora_name"), self._value(node, "strength_model")))
                clip = self._value(node, "strength_clip")
                if clip not in (None, loras[-1][1]):
                    mapped.miss(f"strength_clip {strict.shown(clip)} of LoRA {strict.shown(loras[-1][0])}")
            elif not kind.startswith("ModelSampling"):
                mapped.miss(f"{kind} between the model and the sampler")
        for name, scale in reversed(loras):  # the one nearest to the model first
            mapped.lora(str(name), scale)
        self._shift(mapped, shifts[0] if shifts else None)

    def _shift(self, mapped: Mapped, node: Node | None) -> None:
        if mapped.request.model in ("flux1-schnell", "nano-schnell") and node is None:
            return
        if node is None:
            mapped.take(f"shift {DEFAULT_MU}", shift=math.exp(DEFAULT_MU))
            return
        if node["class_type"] != "ModelSamplingFlux":
            mapped.number("shift", self._value(node, "shift"))
            return
        high, low, width, height = (self._value(node, name) for name in ("max_shift", "base_shift", "width", "height"))
        try:
            slope = (float(high) - float(low)) / (4096 - 256)
            mu = slope * int(width) * int(height) / 256 + float(low) - 256 * slope
            mapped.take(f"ModelSamplingFlux {mu}", shift=math.exp(mu))
        except (TypeError, ValueError, OverflowError):
            mapped.miss("ModelSamplingFlux: its numbers are none")
