"""What is known of a network outside its module, as one record: how files name it, where they lie, how it is run.

A record is data. Whoever reads, writes, packs or streams networks asks it, and knows none of them by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, cast

from torch import nn

from miniflux.variants import Variant

ORIGINAL, DIFFUSERS, ALL_IN_ONE, OPENAI = "original", "diffusers", "all-in-one", "openai"

How = Literal["same", "rows", "first third", "second third", "last third", "swap halves", "pairs", "1x1", "packed"]
"""same: equal. rows: theirs stacked along the output rows are ours. first third and so on: ours are these rows of
theirs. swap halves: the two halves of the rows change places. pairs: in every head, theirs are the rows of its two
halves in turn (of networks whose `paired` says so; of others equal). 1x1: theirs is the weight of a linear, ours of a
1x1 convolution (and the biases are equal). packed: a part of a packed weight, equal and always in its own dtype."""
MOVED: tuple[How, ...] = ("swap halves", "pairs")  # whose rows have other places
THIRDS: dict[How, int] = {"first third": 0, "second third": 1, "last third": 2}

Shapes = Mapping[str, tuple[int, ...]]
LoraSpelling = Literal["original", "diffusers", "flux3", "flux3 diffusers", "xlabs", "clip", "t5"]
Config = TypeVar("Config")


@dataclass(frozen=True)
class Row:
    """One correspondence between names; a trailing `*` stands for `weight` or `bias`, `scale` and so on."""

    ours: str
    theirs: tuple[str, ...]
    how: How = "same"


def row(ours: str, *theirs: str, how: How = "same") -> Row:
    return Row(ours, theirs, "rows" if len(theirs) > 1 else how)


@dataclass(frozen=True)
class Layout:
    """A naming of tensors other than the network's own.

    Attributes:
        rows: the table, for both directions.
        marks: beginnings of keys, one of which is in every file that is named so and in no other.
    """

    rows: Sequence[Row]
    marks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Network:
    """One kind of network.

    Attributes:
        part: its role in a pipeline, a field of `Variant`: transformer, autoencoder, clip, t5, lm, tiny.
        word: what people call it.
        phrase: the same in a sentence, of a file that holds nothing else.
        kind: its module.
        config: the class of that.
        signs: keys that tell it from other networks, in any of its layouts. The first that is there counts.
        behind_prefix: whether the signs tell it behind a prefix, too.
        layouts: by name, without its own. That of all-in-one files follows from `prefix`.
        stacked: rows of each but the last of tensors that other layouts stack, from its config; 0 if there are none.
        levels: how many levels other layouts count from the other end, from its config; 0 if they do not.
        paired: rows of a head where other layouts have them in pairs, from its config; 0 if they do not.
        redundant: tensors that published files carry beside its own, and why nothing is lost without them.
        other_half: what the other half of files of a whole model begins with, and what it is.
        beyond: which tensors a network of a config does without, though files have them, and why; None of the others.
        usual: of configs that make the same tensors, whether files with these keys are usually of this one.
        prefix: of its tensors in all-in-one files; empty if it is in none.
        folder, stem: its folder in diffusers' pipelines, and what the files in there are called.
        single: what people call its single file; empty if that depends on the variant.
        names: under which releases keep it, a file or a folder; `{file}` and `{tiny_file}` are the variant's own.
        comfyui: the folders of `ComfyUI/models` in which its files lie.
        architecture: in the header of GGUF files, from its config; empty if there are none.
        header: the name under which the header of a file tells its config.
        title: what its releases are called, of a transformer.
        telling: weights without which no size is told, of a transformer, whose file alone tells all of them.
        head: a tensor as long as a head of attention, likewise.
        sizes: values of its config from shapes under its own names, beside a config of which the others are; None if no
            file is asked for them.
        told: values of its config that the header of a file tells in others' words.
        of_json: its config from the content of the `config.json` beside its file; None if that is not read.
        as_json: what diffusers or transformers want to find in there.
        named_there: what that content is of, in a sentence.
        guessed: what of the config neither shapes nor that header tell; empty if nothing is lost.
        lora: the ways in which LoRA files name its modules, fields of `lora.dialects.Dialect`: what a receipt calls it,
            what every key begins with, how modules are named after that, whether underscores stand for dots, what
            follows.
        packed: linears are packed whose names begin so.
        chains: of modules that come and go in this order while it runs, as patterns of their names.
        stays: tensors in there that stay all the same, as a pattern.
        modulation: numbers that its modulations of one call make, from its config.
        activations: bytes it computes on the way at the worst moment, from its config, tokens (or pixels) and the bytes
            of a number.
    """

    part: str
    word: str
    phrase: str
    kind: type[nn.Module]
    config: type[Any]
    signs: tuple[str, ...]
    behind_prefix: bool = True
    layouts: Mapping[str, Layout]
    stacked: Callable[[Any], int] = lambda config: 0
    levels: Callable[[Any], int] = lambda config: 0
    paired: Callable[[Any], int] = lambda config: 0
    redundant: Mapping[str, str] = field(default_factory=dict[str, str])
    other_half: tuple[tuple[str, ...], str] = ((), "")
    beyond: Callable[[Any, str], str | None] = lambda config, key: None
    usual: Callable[[Any, Collection[str]], bool] = lambda config, keys: True
    prefix: str = ""
    folder: str = ""
    stem: str = ""
    single: str = ""
    names: tuple[str, ...] = ()
    comfyui: tuple[str, ...] = ()
    architecture: Callable[[Any], str] = lambda config: ""
    header: str = ""
    title: str = ""
    telling: tuple[str, ...] = ()
    head: str = ""
    sizes: Callable[[Shapes, Any], dict[str, Any]] | None = None
    told: Callable[[Mapping[str, str]], dict[str, Any]] = lambda metadata: {}
    of_json: Callable[[Mapping[str, Any]], Any] | None = None
    as_json: Callable[[Any], dict[str, Any]] = lambda config: {}
    named_there: str = ""
    guessed: str = ""
    lora: tuple[tuple[str, str, LoraSpelling, bool, str], ...] = ()
    packed: tuple[str, ...] = ()
    chains: tuple[str, ...] = ()
    stays: re.Pattern[str] | None = None
    modulation: Callable[[Any], int] = lambda config: 0
    activations: Callable[[Any, int, int], int] = lambda config, size, itemsize: 0

    def of(self, variant: Variant) -> Any:
        """Its config in a variant; None where the variant has another network in this part, or none."""
        config = getattr(variant, self.part, None)
        return config if type(config) is self.config else None

    @property
    def rows(self) -> dict[str, Sequence[Row]]:
        """The tables of all layouts but its own, by name."""
        behind = {ALL_IN_ONE: [row("**", f"{self.prefix}**")]} if self.prefix else {}
        return {**{name: layout.rows for name, layout in self.layouts.items()}, **behind}

    def why_redundant(self, key: str) -> str | None:
        """Why it does not need a tensor that files of it carry; None if nothing is known of that."""
        begins, why = self.other_half
        return why if begins and key.startswith(begins) else self.redundant.get(key)


TRANSFORMER: dict[str, Any] = {
    "part": "transformer",
    "word": "transformer",
    "prefix": "model.diffusion_model.",
    "folder": "transformer",
    "stem": "diffusion_pytorch_model",
    "names": ("{file}", "transformer"),
    "comfyui": ("diffusion_models", "unet", "checkpoints"),
    "header": "axes_dim",
}
"""What the records of all transformers have in common: `Network(**TRANSFORMER, ...)`."""


def count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers stand in the place of the group."""
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def known_fields(kind: type[Config], content: Mapping[str, Any]) -> Config:
    """A config of the fields that it has in common with a JSON object."""
    names = {one.name for one in fields(cast(Any, kind))}
    return kind(**{key: value for key, value in content.items() if key in names})
