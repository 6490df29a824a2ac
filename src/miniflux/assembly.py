"""Putting a pipeline together: which variant, which files, which sizes, which precision."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from miniflux.checkpoints.configs import axes_beside, config_beside, config_of_transformer, json_object
from miniflux.checkpoints.files import TensorSource
from miniflux.checkpoints.folders import GGUF, SAFETENSORS, models, path_of
from miniflux.checkpoints.formats.reading import contents_of
from miniflux.checkpoints.layouts import counterparts
from miniflux.checkpoints.loading import bare, compare, load_into, take_packed_layers
from miniflux.checkpoints.networks import BY_KIND, TRANSFORMERS, networks_of
from miniflux.checkpoints.networks.causal_lm import TEKKEN_TENSOR
from miniflux.checkpoints.opened import Opened, layout_in, network_of, parts_of, tekken_in, transformer_of
from miniflux.conditions import fill_channels
from miniflux.conversion.pipelines import SCHEDULER
from miniflux.errors import CheckpointError, InputError
from miniflux.families import FAMILIES
from miniflux.inspection import describe, fits
from miniflux.memory.compute import choose_device, choose_dtype
from miniflux.memory.ledger import Placed, Run, resident_size
from miniflux.memory.modes import MODES, Memory, check_mode, choose
from miniflux.memory.modulation import ahead_of
from miniflux.memory.streaming import Streamed, offload, partitioned, stream
from miniflux.models.autoencoder import Autoencoder, Flux2Autoencoder
from miniflux.models.causal_lm import CausalLmConfig
from miniflux.models.compiling import GRAPHS, check_compile, compile_blocks
from miniflux.models.flux1 import Flux1Config
from miniflux.models.tiny_autoencoder import TinyDecoder
from miniflux.models.transformer import Transformer
from miniflux.text import (
    ChatForm,
    ChatText,
    ChatTokenizer,
    Text,
    TextReader,
    load_chat_tokenizer,
    load_clip_tokenizer,
    load_t5_tokenizer,
)
from miniflux.text.chat import chat_tokenizer
from miniflux.text.tekken import tekken_of
from miniflux.variants import ALIASES, UNPUBLISHED, VARIANTS, Variant, variant
from miniflux.weights.finding import TOKENIZERS, Files, find
from miniflux.weights.origin import Origin, stamped
from miniflux.weights.which import which

log = logging.getLogger(__name__)


class Assembled(NamedTuple):
    """What a pipeline is made of."""

    variant: Variant
    transformer: Transformer
    autoencoder: Autoencoder | Flux2Autoencoder
    text: TextReader
    origin: Origin
    tiny: TinyDecoder | None = None
    memory: Memory | None = None


def assemble(
    name_or_path: str | Path,
    *,
    weights: str | Path | Mapping[str, str | Path] | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    memory: str,
    modulation_ahead: bool,
    compile: bool | str,
) -> Assembled:
    """The parts of a pipeline, loaded and on their device; arguments and errors as of `miniflux.load`."""
    check_mode(memory)
    place = choose_device(device)
    if compile:
        check_compile(compile, place)
    started, process = time.monotonic(), resident_size()

    # 1. Which model, and where its files are.
    first = [path_of(weights)] if isinstance(weights, (str, Path)) else []
    if first and not first[0].is_dir():
        raise InputError(f"weights {str(weights)!r} is no folder; single files are given as a dict from part to file")
    given = {part: Path(path) for part, path in weights.items()} if isinstance(weights, Mapping) else {}
    opened = Opened()
    chosen, files = locate(name_or_path, first, given, opened)
    named = str(name_or_path) in VARIANTS or str(name_or_path) in ALIASES
    asked = None if dtype is None else str(dtype).removeprefix("torch.")
    origin = Origin(chosen.name if named else str(name_or_path), asked, stamped(files))

    # 2. Which sizes: of the text encoders from their config files where there are any, else those of the variant.
    records = networks_of(chosen)
    told = {part: config_beside(files.of(part), one.of(chosen), opened) for part, one in records.items() if one.of_json}
    if chosen.lm is not None:
        told["lm"] = _as_read(told["lm"], chosen.lm, files.of("lm"))
    chosen = replace(chosen, **told)
    _check_widths(chosen, files)

    # 3. Which precision, from what the transformer's file stores.
    source = opened.part(files.transformer, records["transformer"].kind)
    largest = max(source.entries.values(), key=lambda entry: entry.size)
    parameters = sum(math.prod(entry.shape) for entry in contents_of(source).entries.values())
    compute = choose_dtype(dtype, place, largest.dtype, parameters)

    # 4. Build on the meta device, compare with the files, and decide where the weights will be.
    precise = torch.float32 if dtype is None else compute  # of what is never packed: the autoencoder
    built = {
        "transformer": _built(records["transformer"].kind, chosen.transformer, source, compute, chosen),
        **{
            part: _built(
                records[part].kind,
                config,
                opened.part(files.of(part), records[part].kind),
                compute if records[part].packed else precise,
            )
            for part, config in told.items()
        },
    }
    usual = chosen.t5_length or (chosen.chat.multiple if chosen.chat is not None else 0)
    run = Run(width=chosen.size, height=chosen.size, text_tokens=usual, calls=chosen.steps)
    parts = {name: part for name, (part, _) in built.items()}
    mode, placed = choose(memory, parts, run, place, compute, process)
    if compile and MODES[mode][0] != "resident":
        stay = " or ".join(name for name, (transformer, _) in MODES.items() if transformer == "resident")
        raise InputError(
            f"compile={compile!r} wants weights that stay where they compute: memory {stay}, got {mode}"
            + (", the first mode that fits into what is free" if memory == "auto" else "")
        )

    # 5. Assign from the files, or have the weights come and go.
    streamed = {name: _filled(placed[name], held, place) for name, (_, held) in built.items()}
    transformer = streamed["transformer"]
    texts = [network for part, network in streamed.items() if part in TOKENIZERS]
    kept = Memory(
        mode,
        placed,
        place,
        compute,
        process,
        transformer,
        tuple(network for network in texts if network is not None),
        ahead_of(transformer) if transformer is not None and modulation_ahead else None,
    )
    networks: dict[str, Any] = {name: part.plan.network for name, part in placed.items()}
    if compile:
        compile_blocks(networks["transformer"], graphs=compile == GRAPHS)
    assembled = Assembled(
        chosen,
        networks["transformer"],
        networks["autoencoder"],
        _text(chosen, networks, files),
        origin,
        _tiny(chosen, files.tiny, place, opened),
        kept,
    )
    log.info(
        "%s: %.1f million parameters in %s on %s, loaded in %.1f s",
        chosen.name,
        parameters / 1e6,
        str(compute).removeprefix("torch."),
        place,
        time.monotonic() - started,
    )
    return assembled


def _as_read(found: CausalLmConfig, wanted: CausalLmConfig, path: Path) -> CausalLmConfig:
    """The config of a language model of which as much is read as the variant reads.

    Raises:
        CheckpointError: it has not so many layers.
    """
    if wanted.layers_read is not None and found.num_hidden_layers < wanted.depth:
        raise CheckpointError(
            f"{path}: a language model of {found.num_hidden_layers} layers, and the prompt is read after {wanted.depth}"
        )
    if wanted.layers_read == found.num_hidden_layers:  # the others are cut off, and what is read was never the last
        found = replace(found, num_hidden_layers=wanted.num_hidden_layers)
    read = wanted.depth if wanted.depth < found.num_hidden_layers else None
    found = replace(found, layers_read=read)
    if found != replace(wanted, layers_read=read):
        other = [f.name for f in fields(found) if getattr(found, f.name) != getattr(wanted, f.name)]
        about = ", ".join(f"{name} {getattr(found, name)} instead of {getattr(wanted, name)}" for name in other)
        log.warning("%s is another language model than the one this model was trained with: %s", path, about)
    return found


def _text(chosen: Variant, networks: Mapping[str, Any], files: Files) -> TextReader:
    """The text side: a language model, or CLIP and T5."""
    if chosen.chat is not None:
        tokenizer = _chat_tokenizer(files.of("lm_tokenizer"), chosen.chat)
        return ChatText(networks["lm"], tokenizer, length=chosen.t5_length)
    assert chosen.t5_length is not None
    return Text(
        networks["clip"],
        networks["t5"],
        load_clip_tokenizer(files.of("clip_tokenizer")),
        load_t5_tokenizer(files.of("t5_tokenizer")),
        chosen.t5_length,
    )


def _chat_tokenizer(path: Path, form: ChatForm) -> ChatTokenizer:
    """The tokenizer in a folder, or in the language model's own file, as Mistral's has it for ComfyUI."""
    if not path.name.lower().endswith((*SAFETENSORS, *GGUF)):
        return load_chat_tokenizer(path, form)
    return chat_tokenizer(tekken_of(tekken_in(path), f"{path}: {TEKKEN_TENSOR}"), form)


def _tiny(chosen: Variant, path: Path | None, device: torch.device, opened: Opened) -> TinyDecoder | None:
    """The decoder for previews, in float32, if the variant has one and its file is here."""
    if path is None or chosen.tiny is None or chosen.tiny.z_channels != chosen.autoencoder.z_channels:
        return None
    part, source = _built(TinyDecoder, chosen.tiny, opened.part(path, TinyDecoder), torch.float32)
    _filled(part, source, device)
    return cast(TinyDecoder, part.plan.network)


def _check_widths(chosen: Variant, files: Files) -> None:
    """Refuse parts of different models. Canny and Depth read a second picture beside the noise, Fill a mask, too."""
    takes, family = chosen.transformer, FAMILIES[chosen.family]
    channels = family.patch**2 * chosen.autoencoder.latent_channels
    beside = (0, channels, fill_channels(family, takes, chosen.autoencoder.downscale))
    read = takes.in_channels if takes.in_channels - channels not in beside else channels
    together = [("image tokens", read, files.autoencoder, channels)]
    if chosen.lm is not None and chosen.chat is not None:
        words = len(chosen.chat.layers) * chosen.lm.hidden_size
        together.append(("text tokens", takes.context_in_dim, files.of("lm"), words))
    if chosen.t5 is not None:
        together.append(("text tokens", takes.context_in_dim, files.of("t5"), chosen.t5.d_model))
    if chosen.clip is not None and isinstance(takes, Flux1Config):
        together.append(("text summaries", takes.vec_in_dim, files.of("clip"), chosen.clip.hidden_size))
    for what, wanted, path, given in together:
        if given != wanted:
            raise CheckpointError(
                f"{files.transformer} and {path} do not belong together: {what} of {wanted} and of {given} channels"
            )


def locate(
    name_or_path: str | Path, first: list[Path], given: dict[str, Path], opened: Opened | None = None
) -> tuple[Variant, Files]:
    """The variant meant by a name, a folder or a file, and where its parts are.

    Raises:
        InputError, WeightsNotFoundError, CheckpointError: see `miniflux.load`.
    """
    text, path, opened = str(name_or_path), path_of(name_or_path), opened or Opened()
    repositories = {v.repository for v in VARIANTS.values()} - {""}
    if text in VARIANTS or text in ALIASES or text in repositories or text in UNPUBLISHED:
        chosen = variant(text)
        return chosen, find(chosen, first, given)
    if not os.path.exists(path):  # not path.exists(), which raises where the name is too long
        known = ", ".join([*VARIANTS, *ALIASES])
        raise InputError(f"{text!r} is neither a model nor a file or folder here; models are {known}")
    folder = path if path.is_dir() else path.parent
    transformer = given.get("transformer") or (_transformer_in(path) if path.is_dir() else path)
    chosen = _variant_in(transformer, folder, opened)
    beside: dict[str, Path] = {}  # what else an all-in-one file holds
    if transformer.is_file():
        inside = parts_of(opened.source(transformer))
        beside = {part: transformer for kind in inside if (part := BY_KIND[kind].part) != "transformer"}
    return chosen, find(chosen, [*first, folder], {"transformer": transformer, **beside, **given})


def _transformer_in(folder: Path) -> Path:
    """The transformer in a folder: its `transformer` folder, or the one single file that holds one (if there is none,
    the one GGUF file)."""
    if (folder / "transformer").is_dir():
        return folder / "transformer"
    drawing = {record.kind for record in TRANSFORMERS}
    found = [model for model in models(folder) if drawing & set(parts_of(TensorSource(model.complete())))]
    found = [model.path for model in found if not model.is_gguf] or [model.path for model in found]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{folder}: expected a folder `transformer` or one file of a transformer; found {names}")
    return found[0]


def _variant_in(transformer: Path, folder: Path, opened: Opened) -> Variant:
    """What a transformer's file holds, read from its keys and shapes; its name only tells models with the same tensors
    apart."""
    source = transformer_of(opened.source(transformer))
    kind = network_of(source) or next(iter(parts_of(source)), None)
    if kind is None or BY_KIND[kind].part != "transformer":
        found = kind.__name__ if kind else describe(source)
        raise CheckpointError(f"{source}: expected a transformer of FLUX, found {found}")
    axes = axes_beside(transformer) if transformer.is_dir() else None
    try:
        config = config_of_transformer(contents_of(source).entries, source.metadata, axes)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    found = which(config, source.metadata, transformer.name, folder)
    found.warn(transformer)
    known = found.variant
    if known.transformer != config:
        name = folder.resolve().name if transformer.is_dir() else transformer.stem
        known = replace(known, name=name, repository="", file=transformer.name, transformer=config)
    scheduler = json_object(folder / "scheduler" / "scheduler_config.json")
    return _scheduled(known, scheduler, folder) if scheduler and isinstance(config, Flux1Config) else known


def _scheduled(known: Variant, scheduler: Mapping[str, Any], folder: Path) -> Variant:
    """A variant of FLUX.1 with the schedule that its folder states.

    Raises:
        CheckpointError: one that FLUX.1 never has.
    """
    if not scheduler.get("use_dynamic_shifting") and scheduler.get("shift", 1.0) != 1.0:
        raise CheckpointError(
            f"{folder}: its scheduler has the fixed shift {scheduler['shift']}, which FLUX.1 never uses"
        )
    for name, value in SCHEDULER.items():
        if scheduler.get(name, value) != value:
            raise CheckpointError(f"{folder}: its scheduler has {name} {scheduler[name]!r}; FLUX.1's is {value!r}")
    return replace(known, shift=bool(scheduler.get("use_dynamic_shifting")))


def _built(
    kind: type[nn.Module],
    config: Any,
    source: TensorSource,
    dtype: torch.dtype,
    chosen: Variant | None = None,
) -> tuple[Placed, TensorSource]:
    """One network on the meta device, in which its file fits. `chosen` is named when its transformer turns out to be
    another one."""
    network = bare(kind, config)
    report = compare(network, source)
    if report.problems:
        expected = f"the transformer of {chosen.name}" if chosen else f"the {kind.__name__}"
        if network_of(source) is not kind or (chosen and not fits(source, chosen.transformer)):
            raise CheckpointError(f"{source}: expected {expected}, found {describe(source)}\n{report}")
        raise CheckpointError(str(report))
    take_packed_layers(network, source)
    plan, table = partitioned(network, source, dtype), counterparts(network, layout_in(source, network))
    # A module alone in its chain, such as a table of tokens, is read before there is memory for the others.
    blocks = [unit for chain in plan.chains if len(chain) > 1 for unit in chain]
    read = [source.entries[name] for unit in blocks for piece in unit.pieces for name in table[piece.key].keys]
    largest = max((entry.size for entry in read if entry.dtype != dtype), default=0)
    return Placed(plan, "resident", sum(entry.size for entry in source.entries.values()), largest), source


def _filled(part: Placed, source: TensorSource, device: torch.device) -> Streamed | None:
    """Give a network its weights, or see to it that they come and go."""
    network = part.plan.network.eval()
    network.requires_grad_(False)
    if part.mode == "resident":
        load_into(network, source, device=device, dtype=part.plan.dtype)
        network.requires_grad_(False)
        return None
    return (stream if part.mode == "stream" else offload)(part.plan, source, device)
