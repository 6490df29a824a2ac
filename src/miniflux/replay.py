"""Making a picture again from what its file says, and saying where it differs."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miniflux import lora
from miniflux.arguments import mask_for
from miniflux.checkpoints.folders import models
from miniflux.conditions import Condition, Steering
from miniflux.conditions.again import NETWORKS, again
from miniflux.errors import (
    CheckpointError,
    InputError,
    MinifluxError,
    ReplayError,
    SettingsError,
    WeightsNotFoundError,
)
from miniflux.loaded import summary
from miniflux.lora.attaching import BUNDLED_LORAS, resolved
from miniflux.memory.compute import choose_device
from miniflux.models.compiling import GRAPHS
from miniflux.pictures import digest_of, on_white, open_picture
from miniflux.pipeline import Pipeline, load
from miniflux.result import QUALITY, Result, joined, labelled, psnr
from miniflux.settings import LoraUse, Record, Request, read_picture, strict
from miniflux.variants import ALIASES, VARIANTS
from miniflux.version import __version__
from miniflux.weights.finding import PARTS
from miniflux.weights.origin import Stamp

log = logging.getLogger(__name__)

OTHERS = (
    "--model, --weights, --lora and --network name other files"  # as the command line has them; arguments from Python
)
NEAR = 1e-12  # noise levels that close are the same


@dataclass(frozen=True)
class Replay:
    """A picture made again.

    Attributes:
        result: the pictures, as `generate` gives them.
        image: what corresponds to the file: the picture, the grid or the labelled sheet.
        same: whether its pixels are those of the file, bit for bit; for JPEG and WebP, what the encoder makes of them.
        psnr: in dB, infinite if they are the same.
        largest: the largest difference of a pixel, of 255.
        differences: what was not as it was: files, versions, precision, device; a line each.
    """

    result: Result
    image: Image.Image
    same: bool
    psnr: float
    largest: int
    differences: tuple[str, ...]


def replay(
    path: str | Path,
    *,
    force: bool = False,
    weights: str | Path | None = None,
    device: str | None = None,
    image: str | Path | Image.Image | None = None,
    mask: str | Path | Image.Image | Tensor | None = None,
    pictures: Sequence[str | Image.Image] = (),
    networks: Sequence[Steering] = (),
    model: str | Path | None = None,
    loras: Sequence[str | Path] = (),
    progress: Callable[[int, int], None] | None = None,
    pipes: MutableMapping[tuple[str, str | None], Pipeline] | None = None,
) -> Replay:
    """Make a picture again from its settings, and compare.

    Args:
        path: a PNG, JPEG or WebP file of ours.
        force: go on where a file, a setting or the size differs.
        weights: look for the model's files here first.
        device: None for the one it was made on, if there is such a one.
        image, mask: the picture that was changed and where, or their files, if it was made from one.
        pictures, networks: those that steered it, see `conditions.again`.
        model: what to load instead of the model that the file names. Models and LoRAs that are not where they were are
            looked for beside the picture.
        loras: files to take for LoRAs that the file names: those of their hash or name, or in order if as many.
        progress: called after every step with (steps done, steps in all).
        pipes: pipelines that were loaded before, by model and dtype, without LoRAs; those that are loaded are added.

    Raises:
        SettingsError: it holds no settings of ours, or damaged ones.
        ReplayError: a weight or LoRA file is another one or missing (all are named), or the picture to change is.
        InputError: a picture or a LoRA was given that the file does not name.
        MinifluxError: as `load` and `generate`.
    """
    reading = read_picture(path)
    if reading.origin != "miniflux":
        wrote = "nothing that was written by miniflux" if reading.origin == "none" else f"settings of {reading.origin}"
        raise SettingsError(f"{path}: holds {wrote}; only pictures of miniflux can be made again")
    kept, kind = on_white(open_picture(path)), _kind(path)
    records = reading.records
    first = records[0]
    differences = [*_versions(first), *dict.fromkeys(doubt for record in records for doubt in record.doubts)]
    if not first.files:
        differences.append("the file does not name the weights it was made with")
    image = None if image is None else open_picture(image)
    _check_image(first.request, image)
    where = mask_for(mask, image)
    _check_mask(first.request, where)
    networks = _in_order(records, networks)
    steered = [again([use.described() for use in record.request.conditions], pictures, networks) for record in records]

    pipes = {} if pipes is None else pipes
    results: list[Result] = []
    done = 0
    total = sum(max(1, len(record.sigmas) - 1) for record in records)
    for record, conditions in zip(records, steered, strict=True):
        key = (record.request.model, record.request.dtype)
        if key not in pipes:
            pipes[key] = _fitting(record, Path(path).parent, model, weights, device)
        pipe = pipes[key]
        wrong = [*_wrong_files(record, pipe), *_wrong_networks(record, networks)]
        uses = _found_loras(record.request.loras, Path(path).parent, loras, wrong)
        if wrong and not force:
            why = "; ".join(dict.fromkeys(wrong))
            raise ReplayError(f"{path}: not made again, because {why} ({OTHERS}; --force goes on)")
        differences += wrong

        def told(step: int, _: int, done: int = done) -> None:
            if progress is not None:
                progress(done + step, total)

        results.append(_drawn(pipe, record, uses, image, where, conditions, told))
        if record.upsampled is not None:
            results[-1].settings[0]["upsampled"] = dict(record.upsampled)
        done += max(1, len(record.sigmas) - 1)
        differences += _unlike(record, results[-1])
    result = joined(results)
    sheet = first.sheet
    if sheet is None:
        made = result.grid()
    else:
        made = labelled(result.images, sheet.columns, sheet.rows)
        result.settings[0]["sheet"] = {"columns": list(sheet.columns), "rows": list(sheet.rows)}
    if made.size != kept.size:
        differences.append(
            f"the file has {kept.size[0]}x{kept.size[1]} pixels, its settings make {made.size[0]}x{made.size[1]}"
        )
        if not force:
            raise ReplayError(f"{path}: {differences[-1]} (--force goes on)")
        kept = kept.resize(made.size)
    seen = _as_stored(made, kind)
    gap = np.abs(np.asarray(seen, np.int16) - np.asarray(kept, np.int16))
    largest = int(gap.max())
    return Replay(result, made, largest == 0, psnr(seen, kept), largest, tuple(dict.fromkeys(differences)))


def _kind(path: str | Path) -> str:
    """The format of a picture file whose settings were read."""
    with open(path, "rb") as file:
        start = file.read(4)
    return {b"\x89PNG": "PNG", b"RIFF": "WEBP"}.get(start, "JPEG")


def _versions(record: Record) -> list[str]:
    """What of the programs differs."""
    told: list[str] = []
    for name, then, now in (
        ("miniflux", record.version, __version__),
        ("torch", record.torch, str(torch.__version__)),
    ):
        if then and then != now:
            told.append(f"made with {name} {then}, this is {now}")
    return told


def _check_image(request: Request, image: Image.Image | None) -> None:
    if request.image is None:
        if image is not None:
            raise InputError("a picture to change was given, and this one was not made from any")
    elif image is None:
        raise ReplayError(
            "it was made from another picture, which its file does not hold: give that one as well (--image FILE)"
        )
    elif digest_of(image) != request.image:
        raise ReplayError("the picture to change is not the one it was made from: its pixels differ (--image)")


def _check_mask(request: Request, mask: Tensor | None) -> None:
    if request.mask is None:
        if mask is not None:
            raise InputError("a mask was given, and this picture was made without one")
    elif mask is None:
        raise ReplayError("a part of another picture was changed, and its file does not hold which: give --mask FILE")
    elif digest_of(mask) != request.mask:
        raise ReplayError("the mask is not the one it was made with (--mask)")


def _fitting(
    record: Record, beside: Path, model: str | Path | None, weights: str | Path | None, device: str | None
) -> Pipeline:
    """The first pipeline whose files are those of the record, of those that can be meant; else the first of all."""
    first: Pipeline | None = None
    failed: MinifluxError | None = None
    for name, folder in _places(record.request.model, beside, model, weights):
        try:
            pipe = _loaded(record, name, folder, device)
        except (CheckpointError, WeightsNotFoundError) as error:
            failed = failed or error
            continue
        if not _wrong_files(record, pipe):
            return pipe
        first = first or pipe
    if first is None:
        assert failed is not None
        raise failed
    return first


def _places(
    named: str, beside: Path, model: str | Path | None, weights: str | Path | None
) -> list[tuple[str | Path, str | Path | None]]:
    """What to load, and which folder to look in first: as the picture says, and beside it.

    Raises:
        ReplayError: the model is none of ours, and there is no such file.
    """
    folders = [weights, *([beside] if weights is None and models(beside) else [])]
    if model is not None:
        return [(model, folder) for folder in folders]
    known = {*VARIANTS, *ALIASES, *(variant.repository for variant in VARIANTS.values())}
    if named in known:
        return [(named, folder) for folder in folders]
    name = Path(named.replace("\\", "/")).name
    paths = [Path(named), *([] if weights is None else [Path(weights) / name]), beside / name]
    there = [path for path in dict.fromkeys(paths) if path.exists()]
    if not there:
        raise ReplayError(f"the model {named} is neither there nor beside the picture ({OTHERS})")
    return [(path, folder) for path in there for folder in folders]


def _loaded(record: Record, model: str | Path, weights: str | Path | None, device: str | None) -> Pipeline:
    """A pipeline for a record, on its device if there is such a one here, in its precision."""
    request = record.request
    if device is None and record.device:
        try:
            device = str(choose_device(record.device))
        except InputError:  # which is said after the run
            log.warning("there is no device %s here", strict.shown(record.device))
    pipe = _opened(record, model, weights=weights, device=device, dtype=request.dtype)
    if record.dtype and str(pipe.dtype).removeprefix("torch.") != record.dtype:  # what suits a device may change
        pipe = _opened(record, model, weights=weights, device=pipe.device, dtype=record.dtype)
    return pipe


def _opened(record: Record, model: str | Path, **options: Any) -> Pipeline:
    """A pipeline, compiled if that of the record was and it can be here."""
    if record.compiled:
        try:
            return load(model, compile=record.compiled, **options)
        except InputError as error:  # which is said after the run
            log.warning("%s", error)
    return load(model, **options)


def _in_order(records: Sequence[Record], networks: Sequence[Steering]) -> list[Steering]:
    """Networks in the order in which the file names theirs, told by their hashes; one that is given once, and steered
    several times, stands for all."""
    hashes = list(dict.fromkeys(file.sha256 for file in records[0].files))

    def place(network: Steering) -> int:
        known = [hashes.index(digest) for _, stamp in network.files if (digest := stamp.sha256()) in hashes]
        return min(known, default=len(hashes))

    wanted = sum(use.kind in NETWORKS for use in records[0].request.conditions)
    return sorted(networks, key=place) * (wanted if len(networks) == 1 and wanted > 1 else 1)


def _wrong_networks(record: Record, networks: Sequence[Steering]) -> list[str]:
    """Networks that steer and are not those of the record."""
    known = {file.sha256 for file in record.files}
    stamps = [(what, stamp) for network in networks for what, stamp in network.files]
    return [
        f"the {what} {Path(stamp.path).name} is another one" for what, stamp in stamps if stamp.sha256() not in known
    ]


def _wrong_files(record: Record, pipe: Pipeline) -> list[str]:
    """Files of the model that are not those of the record, and what has been changed since they were loaded."""
    assert pipe.origin is not None
    changed = pipe.changed()
    here = {(part, Path(stamp.path).name): stamp for part, stamp in pipe.origin.files}
    wrong = [f"the loaded pipeline has been changed in memory: {'; '.join(summary(changed))}"] if changed else []
    for file in record.files:
        if file.part not in PARTS:  # of a LoRA, or a network that steers
            continue
        parts = [stamp for (part, _), stamp in here.items() if part == file.part]
        stamp = here.get((file.part, file.file)) or (parts[0] if len(parts) == 1 else None)
        if stamp is None:
            wrong.append(f"{file.part}: {file.file} is missing")
        elif file.sha256 is None:
            wrong.append(f"{file.part}: {file.file} had changed, or what was loaded from it, when the picture was made")
        elif stamp.sha256() != file.sha256:
            wrong.append(f"{file.part}: {stamp.path} is not the {file.file} that the picture was made with")
    return wrong


def _found_loras(uses: Sequence[LoraUse], beside: Path, given: Sequence[str | Path], wrong: list[str]) -> list[LoraUse]:
    """The LoRAs of a record as they are here; `wrong` grows by those that differ or are not found.

    Raises:
        InputError: one was given that is not one of them.
    """
    found: list[LoraUse] = []
    files_given = [resolved(lora) for lora in given]
    unused = [Path(str(lora)) for lora in files_given]
    for i, use in enumerate(uses):
        name = Path(use.file.replace("\\", "/")).name
        mine = [Path(str(lora)) for lora in files_given]
        by_name = [lora for lora in mine if name in (lora.name, lora.stem)]
        in_order = [mine[i]] if len(mine) == len(uses) else []
        elsewhere = [Path(use.file), beside / name, BUNDLED_LORAS / name, BUNDLED_LORAS / f"{name}.safetensors"]
        same = [file for place in (*mine, *elsewhere) for file in _tensors(place) if _is(file, use)]
        likely = [file for place in (*by_name, *in_order, *elsewhere) for file in _tensors(place)]
        if not same and not likely:
            wrong.append(f"LoRA {use.file} is missing")
            continue
        file = (likely if use.sha256 is None and likely else same or likely)[0]
        if not same:
            wrong.append(f"LoRA {file} is not the one that the picture was made with")
        unused = [lora for lora in unused if file not in _tensors(lora)]
        found.append(LoraUse(str(file), use.scale))
    if unused:
        names = ", ".join(use.file for use in uses) or "none"
        raise InputError(f"the LoRA {unused[0]} is none of those that the picture was made with ({names})")
    return found


def _is(file: Path, use: LoraUse) -> bool:
    return use.sha256 in (None, Stamp.of(file).sha256())


def _tensors(place: Path) -> list[Path]:
    """The file at a place, or the one in the folder."""
    if place.is_dir():
        return [path for model in models(place) for path in model.paths][:1]
    return [place] if place.is_file() else []


def _drawn(
    pipe: Pipeline,
    record: Record,
    uses: Sequence[LoraUse],
    image: Image.Image | None,
    mask: Tensor | None,
    conditions: Sequence[Condition],
    progress: Callable[[int, int], None],
) -> Result:
    names = [f"{i}" for i in range(len(uses))]
    given: dict[str, Any] = {} if image is None else {"image": image, "mask": mask, "strength": record.request.strength}
    attached: list[str] = []
    try:
        for name, use in zip(names, uses, strict=True):
            lora.attach(pipe, use.file, use.strength, name)
            attached.append(name)
        return pipe.generate(**record.request.arguments(), **given, conditions=conditions, progress=progress)
    finally:
        for name in reversed(attached):
            lora.detach(pipe, name)


def _unlike(record: Record, result: Result) -> list[str]:
    """Facts of the run that differ from the record's."""
    about, told = result.settings[0], list[str]()
    for name, then in (("device", record.device), ("dtype", record.dtype), ("threads", record.threads)):
        if then and then != about[name] and not (name == "threads" and about["device"] != "cpu"):
            told.append(f"made with {name} {then}, this is {about[name]}")
    if record.compiled != about.get("compiled", False):
        kind = "blocks as CUDA graphs" if record.compiled == GRAPHS else "compiled blocks"
        told.append(f"made {'with' if record.compiled else 'without'} {kind}, and this is not")
    sigmas = about["sigmas"]
    pairs = zip(record.sigmas, sigmas, strict=False)
    if record.sigmas and (len(sigmas) != len(record.sigmas) or any(abs(a - b) > NEAR for a, b in pairs)):
        told.append("the noise levels are others than they were")
    return told


def _as_stored(image: Image.Image, kind: str) -> Image.Image:
    """What a file of this kind makes of a picture: JPEG and WebP lose something."""
    if kind == "PNG":
        return image
    stream = io.BytesIO()
    image.save(stream, format=kind, quality=QUALITY)
    return Image.open(stream).convert("RGB")
