"""How LoRA files name what they change, as tables.

A key is `prefix + module + suffix`. The suffix says what the tensor is (`.lora_A.weight`: the down projection); prefix
and module say where it belongs, in one of four spellings of the network's modules: the original release's, diffusers',
XLabs' and the text encoders' own. A dialect is a prefix with a spelling, perhaps with underscores for dots.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from torch import nn

from miniflux.checkpoints.networks import NETWORKS
from miniflux.checkpoints.networks.flux1 import COMMON_DIFFUSERS, FLUX1, FLUX1_DIFFUSERS
from miniflux.checkpoints.networks.flux2 import FLUX2_DIFFUSERS
from miniflux.checkpoints.networks.flux3 import FLUX3_DIFFUSERS
from miniflux.checkpoints.networks.record import LoraSpelling, Row, row
from miniflux.errors import LoraError

PartName = Literal["transformer", "clip", "t5"]

# What the end of a key says about its tensor. Longer endings are tried first.
SUFFIXES: dict[str, str] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",  # diffusers before PEFT
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".down.weight": "down",  # XLabs
    ".up.weight": "up",
    ".lora_B.bias": "bias",
    ".diff_b": "bias",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".hada_w1_a": "hada_w1_a",
    ".hada_w1_b": "hada_w1_b",
    ".hada_w2_a": "hada_w2_a",
    ".hada_w2_b": "hada_w2_b",
    ".lokr_w1": "lokr_w1",
    ".lokr_w1_a": "lokr_w1_a",
    ".lokr_w1_b": "lokr_w1_b",
    ".lokr_w2": "lokr_w2",
    ".lokr_w2_a": "lokr_w2_a",
    ".lokr_w2_b": "lokr_w2_b",
    ".diff": "diff",
    ".w_norm": "diff",  # LyCORIS, of norms
    ".set_weight": "replace",
    ".reshape_weight": "reshape",
}
SIGNS = ("down", "up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff")  # what only tensors of LoRA files are
_ENDINGS = sorted(SUFFIXES, key=len, reverse=True)
NORM_PARAMETER = "scale"  # of QK norms
# A plain norm weight, which takes the place of the model's: BFL's control LoRAs, and what diffusers makes of them.
_NORM_WEIGHT = re.compile(rf"(.+(?:query_norm|key_norm))\.{NORM_PARAMETER}|(.+\.norm_(?:added_)?[qk])\.weight")


@dataclass(frozen=True)
class Place:
    """A module of ours, or a slice of its output rows.

    Attributes:
        network: which network it belongs to.
        target: its name there.
        first, last, parts: rows from part `first` up to part `last` of `parts` that are stacked (0, 1, 1: all).
        swap: the two halves of the rows change places.
    """

    network: PartName
    target: str
    first: int = 0
    last: int = 1
    parts: int = 1
    swap: bool = False


@dataclass(frozen=True)
class _Rule:
    """A spelling of a module, `{i}` for block numbers, the place it means, and whether only FLUX.2 spells it so."""

    theirs: str
    place: Place
    flux2: bool = False


@dataclass(frozen=True)
class Dialect:
    """A way of naming modules.

    Attributes:
        name: what a receipt calls it.
        prefix: what every key begins with.
        spelling: how modules are named after that.
        flat: whether underscores stand for the dots of the module name.
        tail: what comes after the module name.
        kind: the class of the network in whose record it is; FLUX.1's are those of FLUX.2, too.
    """

    name: str
    prefix: str
    spelling: LoraSpelling
    flat: bool = False
    tail: str = ""
    kind: type[nn.Module] | None = None

    @property
    def network(self) -> PartName:
        return self.spelling if self.spelling in ("clip", "t5") else "transformer"

    def place(self, module: str) -> Place | None:
        """The place that the part of a key before its suffix means; None if it is not of this dialect."""
        if not module.startswith(self.prefix) or not module.endswith(self.tail):
            return None
        name = module[len(self.prefix) : len(module) - len(self.tail)]
        for pattern, rule in _index(self.spelling, self.flat).get(_shape_of(name), ()):
            match = pattern.fullmatch(name)
            if match is not None:
                target = _numbered(rule.place.target, match.groups())
                return Place(rule.place.network, target, rule.place.first, rule.place.last, rule.place.parts,
                             rule.place.swap)  # fmt: skip
        return None

    def module(self, place: Place, flux2: bool = False) -> str | None:
        """The inverse: what comes before the suffix for a place of a FLUX.1 (or FLUX.2); None if this dialect has no
        name for it."""
        for rule in RULES[self.spelling]:
            if rule.flux2 and not flux2:
                continue
            same = (rule.place.first, rule.place.last, rule.place.parts, rule.place.swap) == (
                place.first,
                place.last,
                place.parts,
                place.swap,
            )
            match = _regex(rule.place.target).fullmatch(place.target) if same else None
            if match is not None and rule.place.network == place.network:
                name = _numbered(rule.theirs, match.groups())
                return self.prefix + (name.replace(".", "_") if self.flat else name) + self.tail
        return None


# XLabs' attention processors: 1 is the picture's half of a double block, 2 the text's. (place, spelling)
XLABS: list[tuple[Place, str]] = [
    (Place("transformer", "double_blocks.{i}.img_attn.qkv"), "double_blocks.{i}.processor.qkv_lora1"),
    (Place("transformer", "double_blocks.{i}.img_attn.proj"), "double_blocks.{i}.processor.proj_lora1"),
    (Place("transformer", "double_blocks.{i}.txt_attn.qkv"), "double_blocks.{i}.processor.qkv_lora2"),
    (Place("transformer", "double_blocks.{i}.txt_attn.proj"), "double_blocks.{i}.processor.proj_lora2"),
    (Place("transformer", "single_blocks.{i}.linear1", 0, 3, 4), "single_blocks.{i}.processor.qkv_lora"),
    (Place("transformer", "single_blocks.{i}.linear2"), "single_blocks.{i}.processor.proj_lora"),
]

CLIP_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
T5_ATTENTION = ("q", "k", "v", "o")
T5_MLP = ("wi_0", "wi_1", "wo")


def _stem(name: str) -> str:
    """A row of a checkpoint table without the parameter at its end."""
    return name.removesuffix(".*").removesuffix(".scale").removesuffix(".weight")


def _from_rows(rows: Iterable[Row]) -> list[_Rule]:
    return [
        _Rule(_stem(theirs), Place("transformer", _stem(row.ours), n, n + 1, len(row.theirs), row.how == "swap halves"))
        for row in rows
        for n, theirs in enumerate(row.theirs)
    ]


# What of FLUX.2 is not called as in FLUX.1, and LyCORIS' own name of a module.
FLUX2_ROWS = [
    *(one for one in FLUX2_DIFFUSERS if one not in COMMON_DIFFUSERS),
    row("single_blocks.{i}.linear2.*", "single_transformer_blocks.{i}.attn.to_out.0.*"),
]


def _original() -> list[_Rule]:
    """The network's own names; and OneTrainer's, which number the parts of a fused module: `img_attn.qkv.0`."""
    rules = [_Rule(_stem(row.ours), Place("transformer", _stem(row.ours))) for row in FLUX1_DIFFUSERS]
    known = {rule.theirs for rule in rules}
    rules += [
        _Rule(ours, Place("transformer", ours))
        for ours in dict.fromkeys(_stem(row.ours) for row in FLUX2_ROWS)
        if ours not in known
    ]
    for one in FLUX1_DIFFUSERS:
        for n in range(len(one.theirs) if len(one.theirs) > 1 else 0):
            rules.append(
                _Rule(f"{_stem(one.ours)}.{n}", Place("transformer", _stem(one.ours), n, n + 1, len(one.theirs)))
            )
    return rules


RULES: dict[LoraSpelling, list[_Rule]] = {
    "original": _original(),
    "diffusers": _from_rows(FLUX1_DIFFUSERS) + [replace(rule, flux2=True) for rule in _from_rows(FLUX2_ROWS)],
    "flux3": [_Rule(_stem(row.ours), Place("transformer", _stem(row.ours))) for row in FLUX3_DIFFUSERS],
    "flux3 diffusers": _from_rows(FLUX3_DIFFUSERS),
    "xlabs": [_Rule(theirs, place) for place, theirs in XLABS],
    "clip": [
        _Rule(name, Place("clip", name))
        for name in (f"text_model.encoder.layers.{{i}}.{linear}" for linear in CLIP_LINEARS)
    ],
    "t5": [
        _Rule(name, Place("t5", name))
        for name in (
            *(f"encoder.block.{{i}}.layer.0.SelfAttention.{linear}" for linear in T5_ATTENTION),
            *(f"encoder.block.{{i}}.layer.1.DenseReluDense.{linear}" for linear in T5_MLP),
        )
    ],
}

ORDER = [FLUX1, *(network for network in NETWORKS if network is not FLUX1)]
# Of two that explain a file equally well the first is taken, unless the network is known that it is for (`recognise`).
DIALECTS = [Dialect(*names, network.kind) for network in sorted(NETWORKS, key=ORDER.index) for names in network.lora]
MISPRINTS = {"diffusion_model.sformer_blocks.": "diffusion_model.transformer_blocks."}  # some FLUX.2 exports


@cache
def _regex(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{i\}", r"(\d+)"))


def _numbered(name: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        name = name.replace("{i}", number, 1)
    return name


def _shape_of(name: str) -> str:
    """A name with its numbers blanked out: what rules are looked up by."""
    return re.sub(r"\d+", "#", name)


@cache
def _index(spelling: LoraSpelling, flat: bool) -> dict[str, list[tuple[re.Pattern[str], _Rule]]]:
    found: dict[str, list[tuple[re.Pattern[str], _Rule]]] = {}
    for rule in RULES[spelling]:
        name = rule.theirs.replace(".", "_") if flat else rule.theirs
        found.setdefault(_shape_of(name.replace("{i}", "0")), []).append((_regex(name), rule))
    return found


def split(key: str) -> tuple[str, str] | None:
    """(module, what the tensor is) of a key; None if its ending says nothing we know."""
    for wrong, right in MISPRINTS.items():
        if key.startswith(wrong):
            key = right + key[len(wrong) :]
    for ending in _ENDINGS:
        if key.endswith(ending) and len(key) > len(ending):
            return key[: -len(ending)].removesuffix("." + NORM_PARAMETER), SUFFIXES[ending]
    match = _NORM_WEIGHT.fullmatch(key)
    return (match[1] or match[2], "replace") if match else None


@dataclass(frozen=True)
class Recognised:
    """What a set of keys is.

    Attributes:
        dialect: name of the way it was written; text encoder parts do not count.
        groups: for every module that the file changes: its place, and its tensors as {what it is: key}.
        unmatched: keys that mean nothing in this dialect.
    """

    dialect: str
    groups: dict[str, tuple[Place, dict[str, str]]]
    unmatched: list[str]


def recognise(keys: Collection[str], kind: type[nn.Module] | None = None) -> Recognised:
    """Parse every key of a file.

    Args:
        kind: the class of the transformer that it is for, if that is known: FLUX.3 and FLUX.1 share names of modules.

    Raises:
        LoraError: no key is of any known dialect, or the file mixes several; the message lists the groups.
    """
    parts = {key: split(key) for key in keys}
    modules = {part[0] for part in parts.values() if part is not None}
    understood: dict[Dialect, dict[str, Place]] = {}
    for dialect in DIALECTS:
        places = {module: place for module in modules if (place := dialect.place(module)) is not None}
        if places:
            understood[dialect] = places
    chosen: dict[Dialect, dict[str, Place]] = {}
    for network in ("transformer", "clip", "t5"):
        candidates = {dialect: places for dialect, places in understood.items() if dialect.network == network}
        chosen.update(_cover(candidates, kind))
    if not chosen:
        shown = ", ".join(sorted(keys)[:3])
        raise LoraError(f"none of the {len(keys)} keys is of a known LoRA dialect; they begin with {shown}")
    names = [dialect.name for dialect in chosen if dialect.network == "transformer"] or [d.name for d in chosen]
    groups: dict[str, tuple[Place, dict[str, str]]] = {}
    unmatched: list[str] = []
    everywhere = {module: place for places in chosen.values() for module, place in places.items()}
    for key, part in parts.items():
        if part is None or part[0] not in everywhere:
            unmatched.append(key)
            continue
        module, what = part
        tensors = groups.setdefault(module, (everywhere[module], {}))[1]
        if what in tensors:
            raise LoraError(f"{tensors[what]!r} and {key!r} both give the {what} of {module}")
        tensors[what] = key
    return Recognised(names[0], groups, sorted(unmatched))


def _cover(
    candidates: Mapping[Dialect, Mapping[str, Place]], kind: type[nn.Module] | None
) -> dict[Dialect, dict[str, Place]]:
    """The dialect that explains all modules that any of them explains.

    Raises:
        LoraError: it takes more than one.
    """
    if not candidates:
        return {}
    best = max(candidates, key=lambda dialect: (len(candidates[dialect]), dialect.kind is kind))
    rest: dict[Dialect, set[str]] = {
        dialect: left for dialect, places in candidates.items() if (left := set(places) - set(candidates[best]))
    }
    if rest:
        groups = {best: set(candidates[best]), **rest}
        listed = "; ".join(f"{d.name}: {len(names)} modules, such as {min(names)}" for d, names in groups.items())
        raise LoraError(f"the file mixes dialects ({listed}): it was put together from several files")
    return {best: dict(candidates[best])}
