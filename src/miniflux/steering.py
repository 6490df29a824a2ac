"""Networks that steer, from their files: ControlNets, Redux, IP-Adapters, told from their keys; and vision towers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miniflux.checkpoints.configs import axes_beside, axes_in, json_object
from miniflux.checkpoints.files import TensorSource, open_tensors
from miniflux.checkpoints.folders import SAFETENSORS, files_in, path_of
from miniflux.checkpoints.formats.reading import GivenTensors, contents_of
from miniflux.checkpoints.layouts import own_shapes
from miniflux.checkpoints.loading import bare, load_into
from miniflux.checkpoints.networks import BY_KIND, Network
from miniflux.checkpoints.networks.controlnet import CONTROLNET
from miniflux.checkpoints.networks.vision import CLIP_VISION, PATCHES, SIGLIP_VISION
from miniflux.checkpoints.opened import known_in, network_of
from miniflux.conditions import Steering
from miniflux.errors import CheckpointError, ConfigError
from miniflux.inspection import describe
from miniflux.models.ip_adapter import XlabsIPAdapter
from miniflux.models.redux import Redux
from miniflux.models.vision import ClipVision, SiglipVision, VisionConfig
from miniflux.variants import CLIP_VIT_L14, SIGLIP_SO400M, VARIANTS
from miniflux.weights.finding import BUNDLED
from miniflux.weights.origin import stamps

log = logging.getLogger(__name__)

BUNDLED_CONTROLNETS = {path.stem: path for path in files_in(BUNDLED / "controlnets", SAFETENSORS)}
TORCH_FILES = (".bin", ".pt", ".pth")
FOLDERS = ("image_embedder", "controlnet")  # of a diffusers pipeline's folder that hold such a network
TOWERS = ("image_encoder", "vision")  # where its vision tower lies


def load(
    path: str | Path,
    *,
    vision: str | Path | Sequence[str | Path] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Steering:
    """A network that steers, told from its keys: a ControlNet (InstantX, Shakker Labs, XLabs; alibaba-pai's of FLUX.2),
    Redux, or an IP-Adapter (XLabs, InstantX).

    Args:
        path: its file, a folder with it, a folder of diffusers' pipelines with a folder of it, or the name of a bundled
            one ("canny").
        vision: the file or folder of the vision tower it sees pictures with: SigLIP for Redux and InstantX' IP-Adapter,
            CLIP for XLabs'. Of several, the one that it needs, if it needs any. None for `image_encoder` in or beside
            the folder.
        dtype: what weights become; None for that of the file.
        device: where they go; None to leave them on the CPU until they are used.

    Raises:
        CheckpointError: it cannot be read, is something else, does not fit; or a vision tower is needed and not found.
    """
    place = _placed(path)
    folder = next((place / name for name in FOLDERS if (place / name).is_dir()), place)
    source = _opened(folder)
    kind = next((found.what.kind for found in known_in(source) if not found.prefix), None)
    if kind in (None, SiglipVision, ClipVision):
        found = network_of(source)
        what = found.__name__ if found else describe(source)
        raise CheckpointError(f"{folder}: expected a ControlNet, Redux or an IP-Adapter, found {what}")
    record = BY_KIND[kind]
    network, files = _loaded(record, source, folder, dtype, device), [(record.word, stamp) for stamp in stamps(folder)]
    if record.part == CONTROLNET.part:
        if isinstance(vision, str | Path):
            raise CheckpointError(f"{folder}: a {record.word} sees control pictures by itself, and vision was given")
        return Steering(network, None, tuple(files))
    wanted = CLIP_VISION if isinstance(network, XlabsIPAdapter) else SIGLIP_VISION
    towers = [vision] if isinstance(vision, str | Path) else list(vision or ())
    opened = [(path, _opened(path)) for path in (path_of(one) for one in towers or [_beside(place, wanted)])]
    fitting = [one for one in opened if any(sign in one[1].entries for sign in wanted.signs)]
    tower, seen = (fitting or opened)[0]
    if not fitting:
        raise CheckpointError(f"{tower}: expected the vision tower of {_called(wanted)}, found {describe(seen)}")
    eyes: Any = _loaded(wanted, seen, tower, dtype, device)
    width = eyes.config.hidden_size if wanted is SIGLIP_VISION else eyes.config.projection_dim
    config: Any = network.config
    needed = config.redux_dim if isinstance(network, Redux) else config.embedding
    if width != needed:
        raise CheckpointError(f"{tower}: sees in {width} channels, and {folder} wants {needed}")
    return Steering(network, eyes, (*files, *((wanted.word, stamp) for stamp in stamps(tower))))


def _placed(path: str | Path) -> Path:
    """A path, or that of the bundled ControlNet of this name."""
    place, bundled = path_of(path), BUNDLED_CONTROLNETS.get(str(path))
    if place.exists():
        return place
    if bundled is None and not place.suffix and len(place.parts) == 1:
        names = ", ".join(BUNDLED_CONTROLNETS)
        raise CheckpointError(f"{path}: no such file or folder, and no bundled ControlNet of this name ({names})")
    return bundled or place


def _called(record: Network) -> str:
    return "SigLIP" if record is SIGLIP_VISION else "CLIP"


def _opened(path: Path) -> TensorSource:
    """The tensors in a file or folder; of torch's own files, which are read without running what may be in them."""
    if path.suffix not in TORCH_FILES or not path.is_file():
        return open_tensors(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever its reader meets
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    tensors: dict[str, Tensor] = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        inner: Mapping[Any, Any] = value if isinstance(value, dict) else {"": value}
        tensors |= {f"{key}.{name}".rstrip("."): one for name, one in inner.items() if isinstance(one, Tensor)}
    return GivenTensors(tensors)


def _beside(place: Path, wanted: Network) -> Path:
    for folder in (place if place.is_dir() else place.parent, place.parent):
        for name in TOWERS:
            if (folder / name).is_dir():
                return folder / name
    raise CheckpointError(
        f"{place}: sees pictures with the vision tower of {_called(wanted)}, and none is beside it: give vision=, "
        "its file or folder"
    )


def _loaded(
    record: Network, source: TensorSource, path: Path, dtype: torch.dtype | None, device: torch.device | str | None
) -> nn.Module:
    module = bare(record.kind, _config(record, source, path))
    try:
        load_into(module, source, device=device, dtype=dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    log.info("%s: %s", path, record.word)
    return module.eval().requires_grad_(False)


def _config(record: Network, source: TensorSource, path: Path) -> Any:
    """What the shapes of a file say; the rest from the `config.json` beside it, or as the released networks have it."""
    entries = contents_of(source).entries
    shapes = own_shapes(record, {key: tuple(entry.shape) for key, entry in entries.items()})
    more: dict[str, Any] = {}
    beside = json_object(path / "config.json") if path.is_dir() else {}
    try:
        assert record.sizes is not None
        if record.of_json is not None:
            usual = CLIP_VIT_L14 if record is CLIP_VISION else SIGLIP_SO400M
            told: VisionConfig = record.of_json(beside) if beside else usual
            # No shape tells their number: as the released tower of this width has them.
            heads = told.num_attention_heads if beside or shapes[PATCHES][0] == usual.hidden_size else 1
            return replace(told, **record.sizes(shapes, told), num_attention_heads=heads)
        if record.head:
            head = shapes[record.head][0]
            released = {sum(v.transformer.axes_dim): v.transformer.axes_dim for v in VARIANTS.values()}
            axes = (axes_beside(path) if beside else None) or axes_in(source.metadata) or released.get(head)
            if axes is None:
                raise ConfigError(f"heads of {head} channels, whose rotary axes are not in the file")
            more = {"axes_dim": axes}
        return record.config(**record.sizes(shapes, None), **more)
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: no {record.word} of known sizes: {what}") from error
