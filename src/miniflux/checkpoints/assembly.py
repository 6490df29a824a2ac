"""Putting a pipeline together: which variant, which files, which sizes, which precision."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from miniflux.checkpoints.files import TensorSource, open_tensors, tensor_paths
from miniflux.checkpoints.finding import Files, find
from miniflux.checkpoints.inspection import describe, flux1_config, network_of
from miniflux.checkpoints.loading import compare, load_into
from miniflux.errors import CheckpointError, ConfigError, InputError
from miniflux.memory.compute import choose_device, choose_dtype
from miniflux.models.autoencoder import Autoencoder, AutoencoderConfig
from miniflux.models.clip import ClipTextConfig, ClipTextEncoder
from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.models.t5 import T5Config, T5Encoder
from miniflux.text import Text, load_clip_tokenizer, load_t5_tokenizer
from miniflux.variants import ALIASES, VARIANTS, Variant, variant, variant_of

if TYPE_CHECKING:
    from miniflux.pipeline import Pipeline

log = logging.getLogger(__name__)

MEMORY_MODES = ("auto", "resident")
Config = TypeVar("Config", ClipTextConfig, T5Config)


def assemble(
    name_or_path: str | Path,
    *,
    weights: str | Path | Mapping[str, str | Path] | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    memory: str,
) -> Pipeline:
    """See `miniflux.load`."""
    from miniflux.pipeline import Pipeline

    if memory not in MEMORY_MODES:
        raise InputError(f"memory must be one of {', '.join(MEMORY_MODES)}, got {memory!r}")
    place = choose_device(device)
    started = time.monotonic()

    # 1. Which model, and where its files are.
    first = [Path(weights)] if isinstance(weights, (str, Path)) else []
    given = {part: Path(path) for part, path in weights.items()} if isinstance(weights, Mapping) else {}
    chosen, files = locate(name_or_path, first, given)

    # 2. Which sizes: of the text encoders from their config files where there are any, else those of the variant.
    chosen = replace(
        chosen,
        clip=_config(files.clip, ClipTextConfig, chosen.clip),
        t5=_config(files.t5, T5Config, chosen.t5),
        autoencoder=_autoencoder_config(files.autoencoder, chosen.autoencoder),
    )

    # 3. Which precision, from what the transformer's file stores.
    source = open_tensors(files.transformer)
    largest = max(source.entries.values(), key=lambda entry: entry.size)
    parameters = sum(entry.size // entry.dtype.itemsize for entry in source.entries.values())
    compute = choose_dtype(dtype, place, largest.dtype, parameters)

    # 4. Build on the meta device, assign from the files.
    pipe = Pipeline(
        chosen,
        _network(Flux1, chosen.transformer, source, place, compute, chosen),
        _network(Autoencoder, chosen.autoencoder, files.autoencoder, place, torch.float32 if dtype is None else compute),
        Text(
            _network(ClipTextEncoder, chosen.clip, files.clip, place, compute),
            _network(T5Encoder, chosen.t5, files.t5, place, compute),
            load_clip_tokenizer(files.clip_tokenizer),
            load_t5_tokenizer(files.t5_tokenizer),
            chosen.t5_length,
        ),
    )
    log.info(
        "%s: %.1f million parameters in %s on %s, loaded in %.1f s",
        chosen.name,
        parameters / 1e6,
        str(compute).removeprefix("torch."),
        place,
        time.monotonic() - started,
    )
    return pipe


def locate(name_or_path: str | Path, first: list[Path], given: dict[str, Path]) -> tuple[Variant, Files]:
    """The variant meant by a name, a folder or a file, and where its parts are.

    Raises:
        InputError, WeightsNotFoundError, CheckpointError: see `miniflux.load`.
    """
    text, path = str(name_or_path), Path(name_or_path)
    repositories = {v.repository for v in VARIANTS.values()} - {""}
    if text in VARIANTS or text in ALIASES or text in repositories:
        chosen = variant(text)
        return chosen, find(chosen, first, given)
    if not path.exists():
        known = ", ".join([*VARIANTS, *ALIASES])
        raise InputError(f"{text!r} is neither a model nor a file or folder here; models are {known}")
    folder = path if path.is_dir() else path.parent
    transformer = given.get("transformer") or (_transformer_in(path) if path.is_dir() else path)
    chosen = _variant_in(transformer, folder)
    return chosen, find(chosen, [*first, folder], {"transformer": transformer, **given})


def _transformer_in(folder: Path) -> Path:
    """The transformer in a folder: its `transformer` folder, or the one single file that holds one."""
    if (folder / "transformer").is_dir():
        return folder / "transformer"
    found = [file for file in sorted(folder.glob("*.safetensors")) if network_of(open_tensors(file).entries) is Flux1]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(f"{folder}: expected a folder `transformer` or one FLUX.1 transformer file; found {names}")
    return found[0]


def _variant_in(transformer: Path, folder: Path) -> Variant:
    """What a transformer's file holds, read from its keys and shapes, never from its name."""
    source = open_tensors(transformer)
    kind = network_of(source.entries)
    if kind is not Flux1:
        found = kind.__name__ if kind else "no network known here"
        raise CheckpointError(f"{source}: expected a FLUX.1 transformer, found {found}")
    about = _json(transformer / "config.json") if transformer.is_dir() else {}
    axes = about.get("axes_dims_rope")
    config = flux1_config(source.entries, source.metadata, tuple(axes) if axes else None)
    known = variant_of(config)
    if known is None:
        base = VARIANTS["flux1-dev" if config.guidance_embed else "flux1-schnell"]
        known = replace(base, name=transformer.stem, repository="", file=transformer.name, transformer=config)
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    if scheduler:
        if not scheduler.get("use_dynamic_shifting") and scheduler.get("shift", 1.0) != 1.0:
            raise CheckpointError(f"{folder}: its scheduler has the fixed shift {scheduler['shift']}, which FLUX.1 never uses")
        known = replace(known, shift=bool(scheduler.get("use_dynamic_shifting")))
    return known


def _json(path: Path) -> dict[str, Any]:
    """The content of a config file; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def _config(path: Path, kind: type[Config], default: Config) -> Config:
    """A text encoder's config from the `config.json` beside its weights; `default` where there is none."""
    content = _json(path / "config.json") if path.is_dir() else {}
    content = content.get("text_config", content)
    if not content:
        return default
    known = {field.name for field in fields(kind)}
    try:
        return kind(**{key: value for key, value in content.items() if key in known})
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{path / 'config.json'}: not a {kind.__name__}: {error}") from error


def _autoencoder_config(path: Path, default: AutoencoderConfig) -> AutoencoderConfig:
    """The autoencoder's config from diffusers' `config.json`; `default` where there is none."""
    content = _json(path / "config.json") if path.is_dir() else {}
    if not content:
        return default
    if content.get("use_quant_conv") or content.get("use_post_quant_conv"):
        raise CheckpointError(f"{path / 'config.json'}: an autoencoder with quant convolutions is not FLUX.1's")
    try:
        widths = content["block_out_channels"]
        return AutoencoderConfig(
            in_channels=content["in_channels"],
            ch=widths[0],
            out_ch=content["out_channels"],
            ch_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=content["layers_per_block"],
            z_channels=content["latent_channels"],
            scale_factor=content["scaling_factor"],
            shift_factor=content.get("shift_factor") or 0.0,
            num_groups=content["norm_num_groups"],
        )
    except (KeyError, TypeError, IndexError, ConfigError) as error:
        raise CheckpointError(f"{path / 'config.json'}: not an AutoencoderKL: {error}") from error


def _network(
    kind: type[nn.Module],
    config: Flux1Config | AutoencoderConfig | ClipTextConfig | T5Config,
    source: Path | TensorSource,
    device: torch.device,
    dtype: torch.dtype,
    chosen: Variant | None = None,
) -> Any:
    """One network on its device. `chosen` is named when its transformer turns out to be another one."""
    if isinstance(source, Path):
        source = TensorSource(tensor_paths(source))
    with torch.device("meta"):
        network = kind(config)  # pyright: ignore[reportCallIssue]
    report = compare(network, source)
    if report.problems and chosen is not None:
        held = describe(source.entries)
        if held != chosen.name:
            raise CheckpointError(f"{source}: expected the transformer of {chosen.name}, found {held}\n{report}")
    load_into(network, source, device=device, dtype=dtype)
    return network.eval().requires_grad_(False)
