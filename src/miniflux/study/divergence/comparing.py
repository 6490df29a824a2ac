"""Where two networks part: error by block of two implementations, files, precisions or devices on one input.

    print(study.diff("flux1-dev", "flux1-dev-Q4_K.gguf"))

How it is told which block is at fault: `parting`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import BoundArguments
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miniflux.arguments import MAX_TEXT, size_for
from miniflux.checkpoints.networks import BY_KIND, is_transformer
from miniflux.checks import check_number, whole
from miniflux.errors import InputError
from miniflux.families import FAMILIES
from miniflux.lora.attaching import attach, detach
from miniflux.pipeline import Pipeline, load
from miniflux.result import checked_output
from miniflux.sampling import Told, Words
from miniflux.sampling.latents import MAX_SEED
from miniflux.study import plotting
from miniflux.study.divergence.parting import Diff, compared, like, traced, worst
from miniflux.study.divergence.sides import Side, Unit, diffusers_of, load_transformer, ours, theirs
from miniflux.study.divergence.tensors import bound, exchanged, tensors_in
from miniflux.variants import like as variants_like

Compared = str | Path | Pipeline | nn.Module
DIFFUSERS = "diffusers"  # in the place of B
ATTACHED = "compared"  # the name of the LoRA on B
SIGMA, TARGET = 1.0, 0.5  # the time, and the one that a flow map jumps to
MAX_REFERENCES = 10


def diff(
    a: Compared,
    b: Compared,
    *,
    prompt: str | None = None,
    seed: int = 0,
    width: int | None = None,
    height: int | None = None,
    text_tokens: int | None = None,
    sigma: float = SIGMA,
    references: int | None = None,
    device: tuple[str | None, str | None] = (None, None),
    dtype: tuple[str | None, str | None] = (None, None),
    lora: str | Path | None = None,
    scale: float = 1.0,
    tolerance: float = 1.0,
    layers: bool = False,
) -> Diff:
    """Compare two transformers on one input, block by block.

    Args:
        a, b: a model's name, a file or folder of a transformer, a pipeline, a transformer of ours, or diffusers' of the
            same sizes; b also "diffusers": its implementation with a's weights.
        prompt: what the text tokens are made of, by a's text encoders (a is then a model or a pipeline); None for
            random ones.
        seed: of the noise, and of random text.
        width, height: of the picture in pixels; None for the model's own.
        text_tokens: how many; None for the model's own.
        sigma: the noise level, rounded to what bfloat16 can say, so that both sides get the same time.
        references: pictures, of noise, that are looked at; None for one where only then all blocks run (FLUX.3).
        device, dtype: of a and of b where they are loaded here; see `miniflux.load`.
        lora: a file that is attached to b, at `scale`.
        tolerance: how many times more than rounding explains still counts as that. Above 1 to find the block that a
            quantised file does most harm to, say.
        layers: look into the block at which they part, too: ours against ours.

    Raises:
        InputError: they are networks of other kinds or sizes, a number is out of its range, or there is nothing that
            reads the prompt.
        CheckpointError, WeightsNotFoundError, LoraError: a file cannot be read, is missing, or does not fit.
        MissingExtraError: diffusers is to be compared with, and is not installed.
    """
    check_number("tolerance", tolerance, 0)
    pipe = _reader(a, prompt, device[0], dtype[0])
    left = _side("A", a, device[0], dtype[0]) if pipe is None or pipe is a else _side("A", pipe, None, None)
    right = _other(left, b, device[1], dtype[1])
    _check_alike(left, right)
    if lora is not None:
        if right.network is left.network:
            raise InputError("a LoRA is attached to B alone: name or load B apart from A")
        attach(right.network, lora, scale, ATTACHED)
    try:
        told = inputs(left, pipe, prompt, seed, width, height, text_tokens, sigma, references)
        text = told.words.txt.shape[1]
        rounding = max(torch.finfo(side.place[1]).eps for side in (left, right)) / 2
        with torch.inference_mode():
            trace = traced(left.units, text, lambda: left.call(left.told(told)), lambda one: one)
            rows, output = compared(trace, right.units, text, lambda: right.call(right.told(told)), rounding)
            label = right.label if lora is None else f"{right.label}, with {Path(lora).name} at {scale:g}"
            found = Diff(left.label, label, tuple(rows), output, rounding, tolerance)
            return replace(found, inside=_inside(found, left, right, told)) if layers else found
    finally:
        if lora is not None:
            detach(right.network, ATTACHED)


def _reader(a: Compared, prompt: str | None, device: str | None, dtype: str | None) -> Pipeline | None:
    """The pipeline whose text encoders read the prompt; None where none has to."""
    if isinstance(a, Pipeline) or prompt is None:
        return a if isinstance(a, Pipeline) else None
    if isinstance(a, nn.Module):
        raise InputError("a network alone reads no prompt: give A as a model's name, a file or a pipeline")
    return load(a, device=device, dtype=dtype)


def _side(name: str, given: Compared, device: str | None, dtype: str | None) -> Side:
    """A side that is ours."""
    network = given.transformer if isinstance(given, Pipeline) else given
    if not isinstance(network, nn.Module):
        network = load_transformer(network, device, dtype)
    elif device is not None or (dtype is not None and not isinstance(given, Pipeline)):
        raise InputError(f"{name} is a network already: its device and precision are its own")
    if not is_transformer(network):
        raise InputError(f"{name} must be a transformer of FLUX, got {type(network).__name__}")
    said = given.variant.name if isinstance(given, Pipeline) else given if isinstance(given, (str, Path)) else ""
    weights = next(network.parameters())
    where = f"{str(weights.dtype).removeprefix('torch.')} on {weights.device}"
    return ours(network, f"{said or type(network).__name__}, {where}")  # pyright: ignore[reportArgumentType]


def _other(left: Side, b: Compared, device: str | None, dtype: str | None) -> Side:
    """The other side, which may be diffusers'."""
    if isinstance(b, str) and b == DIFFUSERS:
        if device is not None or dtype is not None:
            raise InputError("diffusers gets A's weights, on A's device in A's precision: give no other to B")
        return theirs(diffusers_of(left.network), left.network, "diffusers, with the same weights")
    if isinstance(b, nn.Module) and not is_transformer(b):
        return theirs(b, left.network, f"diffusers' {type(b).__name__}")
    return _side("B", b, device, dtype)


def _check_alike(left: Side, right: Side) -> None:
    """Refuse networks of different kinds and sizes: nothing of them can be compared."""
    a, b = left.network, right.network
    if type(a) is not type(b):
        raise InputError(f"A is {_title(a)}, and B is {_title(b)}: compare two of one family")
    for name in ("hidden_size", "num_heads", "depth", "depth_single_blocks", "in_channels", "context_in_dim"):
        mine, other = getattr(a.config, name), getattr(b.config, name)
        if mine != other:
            raise InputError(f"A and B are of other sizes: {name} is {mine} in A and {other} in B")
    if (one := set(left.units) ^ set(right.units)) and right.network is not left.network:
        raise InputError(f"only one of A and B has {', '.join(sorted(one))}")


def _title(network: nn.Module) -> str:
    return f"a {BY_KIND[type(network)].title}"


def inputs(
    side: Side,
    pipe: Pipeline | None,
    prompt: str | None,
    seed: int,
    width: int | None,
    height: int | None,
    text_tokens: int | None,
    sigma: float,
    references: int | None,
) -> Told:
    """What both networks are told; arguments as of `diff`. All from one generator on the CPU, in float32."""
    config: Any = side.network.config
    variant = pipe.variant if pipe is not None else variants_like(config)[0]
    family, unit = FAMILIES[variant.family], variant.autoencoder.unit
    width, height = size_for(variant, variant.autoencoder, width, height)
    usual = variant.t5_length or (variant.chat.multiple if variant.chat is not None else 1)
    length = usual if text_tokens is None else whole("text_tokens", text_tokens, 1, MAX_TEXT)
    count = int(not config.joined) if references is None else whole("references", references, 0, MAX_REFERENCES)
    time = float(torch.tensor(check_number("sigma", sigma, 0, 1)).bfloat16())
    generator = torch.Generator().manual_seed(whole("seed", seed, 0, MAX_SEED))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, columns = height // unit, width // unit
    ids = [family.image_ids(1, rows, columns), *(family.reference_ids(i + 1, rows, columns) for i in range(count))]
    img = normal(1, (1 + count) * rows * columns, config.in_channels)
    vec = normal(1, config.vec_in_dim) if hasattr(config, "vec_in_dim") else None
    words = Words(normal(1, length, config.context_in_dim), family.text_ids(1, length), vec, None)
    if prompt is not None:
        assert pipe is not None
        read = pipe.text.encode([prompt], variant.t5_length if text_tokens is None else text_tokens)
        words = Words(read.txt, family.text_ids(1, read.txt.shape[1]), read.vec, None)
    guided = torch.tensor([float(variant.guidance or SIGMA)]) if config.guidance_embed else None
    return Told(
        img=img,
        img_ids=torch.cat(ids, dim=1),
        words=words,
        timesteps=torch.tensor([time]),
        guidance=guided,
        target=torch.tensor([TARGET * time]),
        drawn=rows * columns,
    )


def _inside(found: Diff, left: Side, right: Side, told: Told) -> tuple[Any, ...]:
    """Rows of the modules in the part at which they part: the same for these, with its own arguments."""
    row = found.first
    if row is None or right.label.startswith(DIFFUSERS):
        return ()
    name = row.name.partition(",")[0]
    mine, other = (_called(side, name, told) for side in (left, right))
    tensors = dict(tensors_in(mine.arguments))
    same = {key: like(tensors[key], one) for key, one in tensors_in(other.arguments)}
    other.arguments.update(exchanged(other.arguments, same))
    units: list[dict[str, Unit]] = []
    runs: list[Callable[[], Tensor]] = []
    for side, given in ((left, mine), (right, other)):
        part = side.units[name].begins
        inner = [(f"{name}.{inner}", one) for inner, one in part.named_modules() if inner]
        units.append({called: Unit(called, one, one) for called, one in inner})
        runs.append(lambda part=part, given=given: next(tensors_in(part(*given.args, **given.kwargs)))[1])
    trace = traced(units[0], 0, runs[0], lambda one: one.clone())
    return tuple(compared(trace, units[1], 0, runs[1], found.rounding)[0])


def _called(side: Side, name: str, told: Told) -> BoundArguments:
    """What a part of a network is called with, the first time."""
    part, seen = side.units[name].begins, list[BoundArguments]()
    handle = part.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(bound(module, args, kwargs)), with_kwargs=True
    )
    try:
        side.call(side.told(told))
    finally:
        handle.remove()
    return seen[0]


def plot(found: Diff, path: str | Path) -> Path:
    """Own and grown error of every block, on a logarithmic axis, and how much of its own rounding explains; returns the
    path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the place cannot be written to.
    """
    path = checked_output(path, plotting.KINDS)
    figure, ax = plotting.axes("Error by block", "", "relative L2 error")
    rows = [row for row in found.rows if row.block]
    names = [row.name for row in rows]
    own = [worst(row.own) for row in rows]
    explained = [one.relative / one.excess * found.tolerance if one.excess else None for one in own]
    grown = [max(one.relative for one in row.grown.values()) for row in rows]
    ax.plot(names, [_visible(x) for x in grown], marker="o", markersize=3, label="grown: B by itself")
    ax.plot(names, [_visible(one.relative) for one in own], marker="o", markersize=3, label="own: given A's tensors")
    ax.plot(names, explained, linestyle="--", label="what rounding explains")
    if found.parts_at in names:
        ax.axvline(names.index(found.parts_at), color="tab:red", alpha=0.5, label=f"they part at {found.parts_at}")
    ax.set_yscale("log")
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
    ax.legend(fontsize="small")
    return plotting.save(figure, path)


def _visible(number: float) -> float | None:
    """A zero has no place on a logarithmic axis."""
    return number or None
