"""Settings as ComfyUI writes them: a graph of nodes, followed back from the sampler to what made the picture.

`prompt` is the graph that ran: number -> {class_type, inputs}, where an input is a value or [number, output].
`workflow` is the editor's, see `comfyui_editor`. Names of nodes and inputs from ComfyUI's `nodes.py` and
`comfy_extras/`. A value that comes from a node which is not known here is listed, never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from miniflux.errors import SettingsError
from miniflux.sampling import guide
from miniflux.settings import strict
from miniflux.settings.comfyui_editor import CONTROLS, MAX_NODES, graph_that_ran
from miniflux.settings.foreign import Mapped, any_number, whole_number
from miniflux.settings.request import Request

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

MAX_DEPTH = 30  # of nodes whose values come from others
WHOLE = ("value", "text", "string", "int", "float", "number", "seed", "noise_seed", "prompt", "positive")
"""The only value of a node that gives nothing else: its output."""
CHANGING = re.compile("random|wildcard|dynamic", re.IGNORECASE)  # in the names of nodes that change what they are given
TEXTS = ("t5xxl", "text", "clip_l", "clip_g", "text_g", "text_l")
ENCODERS = ("CLIPTextEncode", "CLIPTextEncodeFlux", "CLIPTextEncodeSD3", "CLIPTextEncodeSDXL")
Node = Mapping[str, Any]


def read(what: str, text: str) -> Mapped:
    """What of such a graph can be understood.

    Args:
        what: `prompt` or `workflow`; either may hold either form.

    Raises:
        SettingsError: it is no graph, or larger than is read.
    """
    value = strict.record(what, strict.parsed(what, text, lenient=True))
    for inner in ("prompt", "output"):  # as it is sent to the server
        if isinstance(value.get(inner), dict) and "class_type" not in value[inner]:
            value = value[inner]
    if isinstance(value.get("nodes"), list):
        nodes, notes = graph_that_ran(value)
    else:
        nodes, notes = _nodes(what, value)
    return _Graph(nodes).mapped(notes)


def _nodes(what: str, value: Mapping[str, Any]) -> tuple[dict[str, Node], list[str]]:
    if len(value) > MAX_NODES:
        raise SettingsError(f"{what}: {len(value)} nodes; at most {MAX_NODES} are read")
    nodes: dict[str, Node] = {}
    notes: list[str] = []
    for number, node in value.items():
        kind, inputs = (node.get("class_type"), node.get("inputs", {})) if isinstance(node, dict) else (None, None)
        if isinstance(kind, str) and isinstance(inputs, dict):
            nodes[number] = {"class_type": kind, "inputs": {name: _unwrapped(x) for name, x in inputs.items()}}
        else:
            notes.append(f"the entry {strict.shown(number)} is no node")
    if value and not nodes:
        raise SettingsError(f"{what}: holds no node of ComfyUI")
    return nodes, notes


def _unwrapped(value: Any) -> Any:
    """A list that is no link is written as an object around it."""
    return value["__value__"] if isinstance(value, dict) and "__value__" in value else value


class _Graph:
    """A graph, and which of its nodes have been understood."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self.nodes = nodes
        self.used: set[str] = set()
        self.values: dict[str, Any] = {}  # that nodes give
        self.depth = 0  # of nodes that give each other values
        self.unknown: dict[str, None] = {}  # values that come from nodes which are not understood

    def mapped(self, notes: list[str]) -> Mapped:
        mapped = Mapped(Request(prompt=""))
        sampler = self._sampler()
        if sampler is None:
            mapped.miss("no sampler that is known here leads to the picture")
        else:
            self._follow(mapped, sampler)
        for line in (*self.unknown, *notes):
            mapped.miss(line)
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
        """The number of the node that an input comes from, through reroutes."""
        seen: set[str] = set()
        while (
            isinstance(value, list)
            and len(value) == 2
            and isinstance(value[0], (str, int))
            and str(value[0]) in self.nodes
            and str(value[0]) not in seen
        ):
            number = str(value[0])
            if not self.nodes[number]["class_type"].startswith("Reroute"):
                return number
            seen.add(number)
            self.used.add(number)
            value = next(iter(self.nodes[number]["inputs"].values()), None)
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
        """An input, also if a node that gives nothing but this value gives it; None and told of if another does."""
        value = node["inputs"].get(name)
        if not isinstance(value, list):
            return value
        number = self._source(value)
        if number is None:
            self.unknown[f"{name}: linked to nothing that is here"] = None
            return None
        if number not in self.values:
            self.values[number] = None  # what a circle gives
            self.depth += 1
            self.values[number] = self._constant(self.nodes[number]) if self.depth < MAX_DEPTH else None
            self.depth -= 1
        if self.values[number] is None:
            kind = self.nodes[number]["class_type"]
            self.unknown[f"{name}: comes from node {number}, {kind}, which is not understood"] = None
        else:
            self.used.add(number)
        return self.values[number]

    def _constant(self, node: Node) -> Any:
        """The value that a node gives, if it is certain."""
        inputs, kind = node["inputs"], node["class_type"]
        if kind == "StringConcatenate":
            parts = [self._value(node, name) for name in ("string_a", "string_b")]
            texts = [part for part in parts if isinstance(part, str)]
            delimiter = self._value(node, "delimiter") if "delimiter" in inputs else ""
            if len(texts) < 2 or not isinstance(delimiter, str) or sum(map(len, texts)) > strict.MAX_PROMPT:
                return None
            return delimiter.join(texts)
        said = {name: value for name, value in inputs.items() if value not in CONTROLS}
        if len(said) != 1 or CHANGING.search(kind):
            return None
        (name,) = said
        return self._value(node, name) if name.lower() in WHOLE else None

    def _guider(self, sampler: Node) -> Node:
        return next(self._chain(sampler, "guider"), sampler)

    def _words(self, mapped: Mapped, guider: Node, name: str) -> str:
        """The text behind a conditioning; for the positive one, its guidance is set as well."""
        positive = name != "negative"
        what = "prompt" if positive else "negative"
        names = (name, "conditioning", "conditioning_1", "conditioning_to", "positive" if positive else "negative")
        for node in self._chain(guider, *names):
            kind, inputs = node["class_type"], node["inputs"]
            if "guidance" in inputs and positive:
                mapped.number("guidance", self._value(node, "guidance"))
            elif "guidance" in inputs:
                mapped.miss(f"the guidance of the negative prompt, {strict.shown(self._value(node, 'guidance'))}")
            if kind == "ConditioningZeroOut":
                return ""
            texts = {key: self._value(node, key) for key in TEXTS if key in inputs}
            if not texts and kind != "FluxGuidance":
                mapped.miss(f"{kind} between the {what} and the sampler")
            if not texts:
                continue
            if kind not in ENCODERS:
                mapped.miss(f"{kind} is read as CLIPTextEncode")
            key, text = next(((key, text) for key, text in texts.items() if isinstance(text, str)), ("", ""))
            for other, said in texts.items():
                if said != text:
                    mapped.miss(f"{what}: {other} is another text than {key}, which is taken: {strict.shown(said)}")
            text = mapped.words(what, text)
            mapped.weighted(what, text)
            return text
        mapped.miss(f"{what}: no text leads to the sampler")
        return ""

    def _follow(self, mapped: Mapped, sampler: Node) -> None:
        guider = self._guider(sampler)
        self._model(mapped, guider, sampler)
        mapped.take(
            "prompt",
            prompt=self._words(mapped, guider, "positive" if "positive" in guider["inputs"] else "conditioning"),
        )
        scale = self._value(guider, "cfg")
        number = 1 if "cfg" not in guider["inputs"] else any_number(scale)
        if number is None:
            mapped.miss(f"cfg {strict.shown(scale)}: no number")
        elif number == 1:
            list(self._chain(guider, "negative", "conditioning"))  # understood: it has no effect
        else:
            negative = self._words(mapped, guider, "negative") or None
            try:
                mapped.take(f"cfg {scale}", guide=guide("cfg", scale=number), negative=negative)
            except ValueError as error:
                mapped.miss(f"cfg {scale}: {error}")
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
        if "denoise" in levels["inputs"]:
            denoise = self._value(levels, "denoise")
            if any_number(denoise) != 1:
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
            width, height = (whole_number(self._value(node, name)) for name in ("width", "height"))
            if width is None or height is None:
                mapped.miss(f"size {strict.shown(node['inputs'].get('width'))} x {node['inputs'].get('height')}")
            else:
                mapped.take(f"size {width}x{height}", width=width, height=height)
            if node["inputs"].get("batch_size", 1) != 1:
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
                if node["inputs"].get("weight_dtype", "default") != "default":
                    mapped.miss(f"weight_dtype {strict.shown(node['inputs']['weight_dtype'])}")
            elif kind in ("LoraLoader", "LoraLoaderModelOnly"):
                loras.append((self._value(node, "lora_name"), self._value(node, "strength_model")))
                clip = self._value(node, "strength_clip")
                if "strength_clip" in node["inputs"] and any_number(clip) != any_number(loras[-1][1]):
                    mapped.miss(f"strength_clip {strict.shown(clip)} of LoRA {strict.shown(loras[-1][0])}")
            elif not kind.startswith("ModelSampling"):
                mapped.miss(f"{kind} between the model and the sampler")
        for name, scale in reversed(loras):  # the one nearest to the model first
            mapped.lora(name, scale)
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
        numbers = [any_number(x) for x in (high, low, width, height)]
        if None in numbers:
            mapped.miss("ModelSamplingFlux: its numbers are none")
            return
        high, low, width, height = (x for x in numbers if x is not None)
        slope = (high - low) / (4096 - 256)
        mu = slope * width * height / 256 + low - 256 * slope
        try:
            mapped.take(f"ModelSamplingFlux {mu}", shift=math.exp(mu))
        except OverflowError:
            mapped.miss(f"ModelSamplingFlux: a shift of exp({mu})")
