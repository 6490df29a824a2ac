"""Whether a pipeline is still what its files say: what has been changed in memory since it was loaded.

Hooks, exchanged modules and weights, other attributes, patched functions: a picture that they have a part in is not
that of the files, so it is not kept as theirs, and the settings say so. What is ours is no change: LoRAs (which are
told apart), packed layers, weights that come and go.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, Protocol

import torch.nn.functional
from torch import nn
from torch.nn.modules import module as every_module

from miniflux.checkpoints.fingerprint import (
    WHOLE,
    Facts,
    Same,
    differences,
    facts_of,
    is_as,
    plain,
    tensor_facts,
    total_bytes,
)
from miniflux.lora.adapters import adapters_of
from miniflux.lora.standing import HUNG, changed_adapters, taken_over
from miniflux.models.autoencoder import Autoencoder, Flux2Autoencoder
from miniflux.models.transformer import Transformer
from miniflux.text import Text, TextReader, TextTokenizer
from miniflux.variants import Variant
from miniflux.weights.finding import TOKENIZERS
from miniflux.weights.origin import Edited, Origin, Stamp

SHOWN = 8  # changes that are named
PROBE = "A red circle, 2 blue stars; 3rd: caf\u00e9!"  # what a tokenizer makes of it tells whether it is the same
ROOMS = ("models", "sampling", "text", "lora.layer", "checkpoints.quantized", "checkpoints.formats", "result")
"""Where the functions are that make a picture; with those of `torch.nn.functional`, which others like to exchange."""
FUNCTIONS = (FunctionType, BuiltinFunctionType, staticmethod, classmethod, property)
TEXT_CACHE = ("_cache", "_lock", "cache_size", "encoded", "_said_clip_limit", "clip", "t5", "lm", "length")
"""Of `Text`, what does not decide what a prompt becomes, is looked at by itself (networks) or told (the length)."""


class Loaded(Protocol):
    """What a pipeline has that decides its pictures."""

    variant: Variant
    transformer: Transformer
    autoencoder: Autoencoder | Flux2Autoencoder
    text: TextReader
    origin: Origin | None


class Baseline:
    """A pipeline as it was when it was put together.

    Args:
        pipe: the pipeline, just loaded. Only facts of it are kept, and none of its weights.
    """

    def __init__(self, pipe: Loaded) -> None:
        networks = _networks(pipe)
        self.whole = total_bytes(list(networks.values())) <= WHOLE
        self.networks = {part: facts_of(network, self.whole, HUNG) for part, network in networks.items()}
        self.around, self.code = _around(pipe), _code(networks.values())
        self._prompts = self._told_of_prompts(pipe, self.networks, self.around)
        self._lock = threading.Lock()

    def changes(self, pipe: Loaded) -> tuple[str, ...]:
        """What is no longer as it was, a part and a name each: `transformer: double_blocks.0.img_mlp.0.weight` ...

        If what becomes of a prompt has changed since the last look, prompts that were read before are forgotten.
        """
        now = {part: self._facts(part, network) for part, network in _networks(pipe).items()}
        around = _around(pipe)
        prompts = self._told_of_prompts(pipe, now, around)
        with self._lock:
            if prompts != self._prompts:
                pipe.text.clear()
            self._prompts = prompts
        found = [f"{part}: {line}" for part, then in self.networks.items() for line in differences(then, now[part])]
        found += [f"{part}: is another one" for part, then in self.around.items() if around[part] != then]
        found += [f"lora {name}: is not as it was attached" for name in changed_adapters(pipe)]
        found += [f"code: {label}" for label, owner, name, value in self.code if vars(owner).get(name) is not value]
        return tuple(found)

    def _facts(self, part: str, network: nn.Module) -> Facts:
        """Facts of a network as it would be without what adapters have exchanged in it for now."""
        then = self.networks[part]
        if is_as(network, then, self.whole, HUNG):
            return then
        facts = facts_of(network, self.whole, HUNG)
        for module, taken in taken_over(network).items():
            own, before = facts.get(module, {}), then.get(module, {})
            originals = {name: tensor for name, tensor in taken.items() if tensor is not None}
            told = dict(zip(originals, tensor_facts(list(originals.values()), self.whole), strict=True))
            for name in taken:
                own.pop(name, None)
                if name in before:
                    own[name] = told.get(name, before[name])
        return facts

    @staticmethod
    def _told_of_prompts(pipe: Loaded, facts: Mapping[str, Facts], around: Mapping[str, Any]) -> Any:
        """All that decides what becomes of a prompt."""
        adapters = [
            (name, Same(adapter), plain(adapter.scale), adapter.merged)
            for network in pipe.text.networks.values()
            for name, adapter in list(adapters_of(network).items())
        ]
        readers = ("text", *pipe.text.tokenizers)
        return [facts[part] for part in pipe.text.networks], [around[part] for part in readers], adapters


def claimed(files: Sequence[tuple[str, Stamp]], changes: Sequence[str]) -> tuple[tuple[str, Stamp], ...]:
    """Files of a pipeline; those of parts that were changed in memory claim no hash any more."""
    changed = {line.partition(": ")[0] for line in changes}
    if "text" in changed:
        changed |= {*TOKENIZERS, *(tokenizer for tokenizer, _ in TOKENIZERS.values())}
    return tuple((part, Edited.like(stamp) if part in changed else stamp) for part, stamp in files)


def summary(changes: Sequence[str]) -> list[str]:
    """The first of many changes, and how many more there are."""
    more = len(changes) - SHOWN
    return [*changes[:SHOWN], *([f"and {more} more"] if more > 0 else [])]


def _networks(pipe: Loaded) -> dict[str, nn.Module]:
    return {"transformer": pipe.transformer, "autoencoder": pipe.autoencoder, **pipe.text.networks}


def _around(pipe: Loaded) -> dict[str, Any]:
    """Facts of what is no network."""
    shadowing = {name: plain(value) for name, value in vars(pipe).items() if hasattr(type(pipe), name)}
    text = {name: plain(value) for name, value in vars(pipe.text).items() if name not in TEXT_CACHE}
    tokenizers = {name: text.pop(name, None) and tokenizer for name, tokenizer in pipe.text.tokenizers.items()}
    return {
        "variant": plain(pipe.variant),
        "pipeline": (Same(type(pipe)), shadowing),
        "text": (Same(type(pipe.text)), text),
        **{name: (Same(tokenizer), plain(vars(tokenizer)), _read(tokenizer)) for name, tokenizer in tokenizers.items()},
        "hooks of all modules": (
            plain(every_module._global_forward_pre_hooks),  # pyright: ignore[reportPrivateUsage]
            plain(every_module._global_forward_hooks),  # pyright: ignore[reportPrivateUsage]
        ),
    }


def _read(tokenizer: TextTokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.tokens(PROBE))


def _code(networks: Iterable[nn.Module]) -> list[tuple[str, Any, str, object]]:
    """(label, where it is, its name there, itself) of all functions that make a picture, so that patches are seen."""
    rooms = tuple(f"miniflux.{room}" for room in ROOMS)
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(rooms)]
    kinds = {type(module) for network in networks for module in network.modules()} | {nn.Module, Text, TextTokenizer}
    kinds |= {v for m in modules for v in vars(m).values() if isinstance(v, type) and v.__module__ == m.__name__}
    owners: list[Any] = [torch.nn.functional, *modules, *sorted(kinds, key=lambda kind: kind.__qualname__)]
    return [
        (f"{owner.__name__}.{name}", owner, name, value)
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, FUNCTIONS)
    ]
