"""The two sides of a comparison: a transformer of ours, or that of diffusers, and the parts in which both are told
apart, by one set of names.

Blocks are called alike in both: their streams `img` and `txt`, or `x` where they are of one kind; of joint blocks,
which hold both in one tensor, text and picture are told apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from miniflux.checkpoints.configs import axes_beside, config_of_transformer
from miniflux.checkpoints.folders import path_of
from miniflux.checkpoints.formats.reading import contents_of
from miniflux.checkpoints.layouts import DIFFUSERS, counterparts, to_layout
from miniflux.checkpoints.loading import bare, load_into
from miniflux.checkpoints.networks import BY_CONFIG, BY_KIND
from miniflux.checkpoints.opened import Opened, transformer_of
from miniflux.checkpoints.quantized import packed_layers
from miniflux.errors import InputError, MissingExtraError
from miniflux.families import FAMILIES
from miniflux.memory.compute import choose_device, choose_dtype
from miniflux.models.flux1 import Flux1
from miniflux.models.flux2 import Flux2
from miniflux.models.flux3 import Flux3
from miniflux.models.layers import LastLayer, Modulation
from miniflux.models.transformer import Transformer
from miniflux.sampling import Told
from miniflux.study.divergence.tensors import Named, bound, exchanged, tensors_in
from miniflux.variants import ALIASES, VARIANTS, like, variant
from miniflux.weights.finding import find, found_parts

IN, OUT, X = "in", "out", "x"  # of what is called with one tensor, or returns one; of a block, its stream
THEIRS = {"hidden_states": "img", "encoder_hidden_states": "txt", "temb": "vec"}  # how diffusers calls streams


@dataclass(frozen=True)
class Unit:
    """A part of a network, and how to read and exchange what it is given and what it makes.

    Attributes:
        name: as ours has it.
        begins, ends: the modules whose call it begins with, and with whose result it ends.
        block: whether it is a block.
        joint: whether its one stream is text, then picture.
        names: other names of arguments.
        results: names of the tensors that it returns, where there are several.
    """

    name: str
    begins: nn.Module
    ends: nn.Module
    block: bool = False
    joint: bool = False
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    results: tuple[str, ...] = ()

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], text: int) -> Named:
        """The tensors that it is called with, by name; `text`: how many tokens of text there are."""
        found = dict(tensors_in(bound(self.begins, args, kwargs).arguments))
        return self._apart(self._called(found), text)

    def handed(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], others: Named
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What it is called with, with other tensors in the places of those that `others` names."""
        called = bound(self.begins, args, kwargs)
        found = dict(tensors_in(called.arguments))
        names = dict(zip(self._called(found), found, strict=True))
        joined = self._joined(others)
        called.arguments.update(
            exchanged(called.arguments, {names[name]: one for name, one in joined.items() if name in names})
        )
        return called.args, called.kwargs

    def made(self, result: Any, text: int) -> Named:
        """The tensors that it returns, by name."""
        return self._apart(self._returned(result), text)

    def instead(self, result: Any, others: Named) -> Any:
        """What it returns, with other tensors."""
        names = dict(zip(self._returned(result), dict(tensors_in(result)), strict=True))
        return exchanged(result, {names[name]: one for name, one in self._joined(others).items() if name in names})

    def _called(self, found: Named) -> Named:
        if len(found) == 1 and not self.block:
            return dict(zip((IN,), found.values(), strict=True))
        named = {self.names.get(name, name): one for name, one in found.items()}
        alone = self.block and "img" in named and "txt" not in named
        return {X if alone and name == "img" else name: one for name, one in named.items()}

    def _returned(self, result: Any) -> Named:
        found = dict(tensors_in(result))
        if len(found) == 1:
            return dict(zip((X if self.block else OUT,), found.values(), strict=True))
        return dict(zip(self.results, found.values(), strict=True)) if self.results else found

    def _apart(self, named: Named, text: int) -> Named:
        if not self.joint or X not in named:
            return named
        x = named.pop(X)
        return {"txt": x[:, :text], "img": x[:, text:], **named}

    def _joined(self, named: Named) -> Named:
        if not self.joint or not {"txt", "img"} <= set(named):
            return named
        return {X: torch.cat((named["txt"], named["img"]), dim=1), **named}


@dataclass(frozen=True)
class Side:
    """A network that is compared.

    Attributes:
        label: what it is, for people.
        network: of ours; of diffusers, the one that it was made like.
        units: its parts, by name.
        call: runs it on what a network of ours is told.
        place: of its own weights.
    """

    label: str
    network: Transformer
    units: Mapping[str, Unit]
    call: Callable[[Told], Tensor]
    place: tuple[torch.device, torch.dtype]

    def told(self, told: Told) -> Told:
        """The same, where and in what this side computes. Positions and times stay as precise as they are."""
        device, dtype = self.place
        cast_to = {name: one.to(device) for name, one in tensors_in(told)}
        for name in ("img", "words.txt", "words.vec"):
            if name in cast_to:
                cast_to[name] = cast_to[name].to(dtype)
        return exchanged(told, cast_to)


Given = Callable[[Unit, int, Named], "Named | None"]
"""Told of a unit, which of its calls it is, and its tensors; returns others to put in their place, or None."""


@contextmanager
def watched(units: Mapping[str, Unit], text: int, given: Given, made: Given) -> Generator[None]:
    """In here, whoever calls a unit has `given` asked before, and `made` after."""
    handles: list[Any] = []
    calls = dict.fromkeys(units, 0)

    def before(unit: Unit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            others = given(unit, calls[unit.name], unit.given(args, kwargs, text))
            return None if others is None else unit.handed(args, kwargs, others)

        return hook

    def after(unit: Unit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, result: Any) -> Any:
            others = made(unit, calls[unit.name], unit.made(result, text))
            calls[unit.name] += 1
            return None if others is None else unit.instead(result, others)

        return hook

    try:
        for unit in units.values():
            handles.append(unit.begins.register_forward_pre_hook(before(unit), with_kwargs=True))
            handles.append(unit.ends.register_forward_hook(after(unit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def ours(network: Transformer, label: str = "") -> Side:
    """A network of ours."""
    units = {name: Unit(name, one, one) for name, one in _around(network)}
    for name in network.config.blocks:
        block, joint = network.get_submodule(name), name.startswith("single_blocks.")
        units[name] = Unit(name, block, block, block=True, joint=joint, results=("img", "txt"))
    family = FAMILIES[like(network.config)[0].family]
    weights = next(network.parameters())
    return Side(
        label or type(network).__name__,
        network,
        units,
        lambda told: family.velocity(network, told),
        (weights.device, weights.dtype),
    )


def _around(network: nn.Module, above: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that are called outside of blocks."""
    for name, one in network.named_children():
        if isinstance(one, nn.ModuleDict):
            yield from _around(one, f"{above}{name}.")
        elif not isinstance(one, nn.ModuleList):
            yield f"{above}{name}", one


def diffusers_of(network: Transformer) -> nn.Module:
    """diffusers' transformer with the same weights: another implementation of the same.

    Raises:
        MissingExtraError: diffusers is not installed, or an older one without this class.
        InputError: weights are packed, and diffusers reads no such.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("comparing with diffusers needs it: pip install diffusers") from error
    if packed_layers(network):
        raise InputError("diffusers does not read packed weights: compare a file of float32, bfloat16 or float16")
    about = BY_KIND[type(network)].as_json(network.config)
    kind = getattr(diffusers, name := about["_class_name"], None)
    if kind is None:
        raise MissingExtraError(f"this diffusers ({diffusers.__version__}) has no {name}: pip install -U diffusers")
    wanted = {key: value for key, value in about.items() if key in kind.__init__.__wrapped__.__code__.co_varnames}
    with torch.device("meta"):
        theirs = kind(**wanted)
    theirs.load_state_dict(to_layout(network, network.state_dict(), DIFFUSERS), assign=True)
    return theirs.eval().requires_grad_(False)


def theirs(module: Any, like_ours: Transformer, label: str = "diffusers") -> Side:
    """diffusers' transformer, its parts under the names that ours has for them. Modulations that blocks share are not
    parts of their own here, because diffusers hands them on in another form: what is wrong with one is a fault of the
    first block that it changes.

    Args:
        like_ours: a network of ours with the same sizes.

    Raises:
        InputError: it is no transformer of diffusers with these sizes.
    """
    origins, units = counterparts(like_ours, DIFFUSERS), dict[str, Unit]()
    try:
        for name, unit in ours(like_ours).units.items():
            keys = [key for mine, origin in origins.items() if mine.startswith(f"{name}.") for key in origin.keys]
            path = _common(keys)
            if isinstance(unit.begins, LastLayer):
                units[name] = Unit(name, module.norm_out, module.proj_out, names={"hidden_states": X})
            elif not isinstance(unit.begins, Modulation):
                part = module.get_submodule(path)
                units[name] = Unit(name, part, part, unit.block, unit.joint, THEIRS, ("txt", "img"))
        weights: nn.Parameter = next(module.parameters())
    except (AttributeError, StopIteration) as error:
        wanted = BY_KIND[type(like_ours)].as_json(like_ours.config)["_class_name"]
        raise InputError(f"{type(module).__name__} is not diffusers' {wanted} of the same sizes: {error}") from error
    call = CALLS[type(like_ours)]
    return Side(label, like_ours, units, lambda told: call(module, told), (weights.device, weights.dtype))


def _common(keys: Sequence[str]) -> str:
    """The name of the module that holds all these tensors; of a block, the block, whose number ends its name."""
    shared: list[str] = []
    for parts in zip(*(key.split(".")[:-1] for key in keys), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
        if parts[0].isdigit():
            break
    return ".".join(shared)


def _call_diffusers(module: Any, told: Told) -> Tensor:
    """FLUX.1 and FLUX.2."""
    words = told.words
    vec = {} if words.vec is None else {"pooled_projections": words.vec}
    return module(
        hidden_states=told.img,
        encoder_hidden_states=words.txt,
        timestep=told.timesteps,
        img_ids=told.img_ids[0],
        txt_ids=words.txt_ids[0],
        guidance=told.guidance,
        return_dict=False,
        **vec,
    )[0]


def _call_diffusers_flux3(module: Any, told: Told) -> Tensor:
    """References are arguments of their own."""
    drawn = told.drawn or told.img.shape[1]
    seen = {"image_cond_hidden_states": told.img[:, drawn:], "image_cond_ids": told.img_ids[0, drawn:]}
    return module(
        hidden_states=told.img[:, :drawn],
        encoder_hidden_states=told.words.txt,
        timestep=told.timesteps,
        img_ids=told.img_ids[0, :drawn],
        txt_ids=told.words.txt_ids[0],
        target_timestep=told.target if module.config.flow_map else None,
        return_dict=False,
        **(seen if drawn < told.img.shape[1] else {}),
    )[0]


CALLS: Mapping[type[nn.Module], Callable[[Any, Told], Tensor]] = {
    Flux1: _call_diffusers,
    Flux2: _call_diffusers,
    Flux3: _call_diffusers_flux3,
}


def load_transformer(
    model: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> Transformer:
    """The transformer of a model, or in a file or folder; nothing else of the model need be here.

    Args:
        device, dtype: as of `miniflux.load`.

    Raises:
        InputError, WeightsNotFoundError, CheckpointError: as of `miniflux.load`.
    """
    place, path = choose_device(device), transformer_path(model)
    source = transformer_of(Opened().source(path))
    contents = contents_of(source)
    config = config_of_transformer(contents.entries, source.metadata, axes_beside(path) if path.is_dir() else None)
    parameters = sum(torch.Size(entry.shape).numel() for entry in contents.entries.values())
    largest = max(source.entries.values(), key=lambda entry: entry.size)
    network = bare(BY_CONFIG[type(config)].kind, config).eval().requires_grad_(False)
    load_into(network, source, device=place, dtype=choose_dtype(dtype, place, largest.dtype, parameters))
    return cast(Transformer, network.requires_grad_(False))


def transformer_path(model: str | Path) -> Path:
    """Where the transformer of a model is, or that in a folder; a file is itself.

    Raises:
        InputError: it is neither a model nor a file or folder.
        WeightsNotFoundError: the model's is not on this machine.
    """
    text = str(model)
    if text in VARIANTS or text in ALIASES:
        chosen = variant(text)
        found, _ = found_parts(chosen)
        return found["transformer"] if "transformer" in found else find(chosen).transformer
    if not os.path.exists(text):
        known = ", ".join([*VARIANTS, *ALIASES])
        raise InputError(f"{text!r} is neither a model nor a file or folder here; models are {known}")
    path = path_of(model)
    return path / "transformer" if (path / "transformer").is_dir() else path
