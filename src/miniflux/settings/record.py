"""What a picture of ours says of itself: the request that made it, and the facts around."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miniflux.conditions.again import KINDS
from miniflux.errors import SettingsError
from miniflux.models.compiling import GRAPHS
from miniflux.settings import strict
from miniflux.settings.request import MAX_LEVELS, MAX_LORAS, Request, taken

MAX_FILES = 4096
MAX_CHANGES = 16  # that are named
TAKEN = (
    *("prompt", "negative", "seed", "variation", "width", "height", "t5_length", "padding"),
    *("solver", "schedule", "shift", "restart", "image", "mask", "strength", "stop"),
)
"""Settings that are fields of `Request`, under the same name and with the same meaning."""
FACTS = (
    *("version", "torch", "model", "model_path", "dtype", "dtype_asked", "device", "threads", "memory", "compiled"),
    *("loras", "files", "steps", "steps_asked", "sigmas", "guidance", "guide", "cache"),
    *("cached", "not_cached", "batch", "replaced", "resumed", "changed", "wrapped", "conditions", "sheet", "upsampled"),
)
UPSAMPLED = ("prompt", "model", "system", "temperature", "seed", "max_new_tokens")
"""What is said of a prompt that a language model wrote, see `miniflux.upsampling.Written`."""
BILL = ("evaluated", "skipped", "latent_l2", "psnr")  # what a step cache did, beside its settings


@dataclass(frozen=True)
class FileFact:
    """One file that a picture was made from.

    Attributes:
        part: `transformer`, `autoencoder` ..., or `lora NAME`.
        file: its name.
        sha256: 64 hexadecimal digits; None if it had changed when the picture was saved.
    """

    part: str
    file: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Sheet:
    """Names of columns and rows of a labelled sheet."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One picture.

    Attributes:
        request: what makes it again.
        version, torch, device, dtype, threads: what it was made with; empty, or 0, if the file does not say.
        compiled: whether compiled blocks drew it, or `graphs`, see `load(compile=...)`.
        sigmas: its noise levels.
        files: what it was made from; empty if the file does not say.
        doubts: why drawing it again may give another picture, a line each.
        sheet: of the first picture of a labelled sheet.
        upsampled: out of what a language model wrote the prompt, see `UPSAMPLED`; None if none did.
    """

    request: Request
    version: str = ""
    torch: str = ""
    device: str = ""
    dtype: str = ""
    threads: int = 0
    compiled: bool | str = False
    sigmas: tuple[float, ...] = ()
    files: tuple[FileFact, ...] = ()
    doubts: tuple[str, ...] = ()
    sheet: Sheet | None = None
    upsampled: Mapping[str, Any] | None = None


def record_of(value: object) -> Record:
    """The record that the settings of one picture stand for.

    Raises:
        SettingsError: a field is unknown, missing, or of another kind than it should be.
        InputError: a value is out of its range.
    """
    about = strict.record("settings", value)
    strict.only("settings", about, (*TAKEN, *FACTS))
    for name in ("prompt", "seed", "model"):
        if about.get(name) is None:
            raise SettingsError(f"settings: the field {name!r} is missing")
    sigmas = tuple(strict.number("sigmas", x) for x in strict.items("sigmas", about.get("sigmas") or [], MAX_LEVELS))
    files = tuple(
        _file(f"files[{i}]", x) for i, x in enumerate(strict.items("files", about.get("files") or [], MAX_FILES))
    )
    fields = {name: taken(name, about[name]) for name in TAKEN if about.get(name) is not None}
    loras, doubts = _loras(about, files)
    if about.get("replaced"):
        doubts.append("a callback replaced its latents on the way")
    others = strict.integer("batch", about.get("batch") or 1) - 1
    if others:
        doubts.append(f"it was drawn in one batch with {others} more, which may round otherwise")
    for name in strict.items("wrapped", about.get("wrapped") or [], MAX_CHANGES):
        doubts.append(f"a function of the caller's was given as {strict.text('wrapped', name, 100)}")
    steered = [
        strict.record("conditions", x) for x in strict.items("conditions", about.get("conditions") or [], MAX_CHANGES)
    ]
    kinds = [strict.text("conditions: kind", condition.get("kind"), 100) for condition in steered]
    doubts += [f"it was steered by {kind}, which is not given again" for kind in kinds if kind not in KINDS]
    given = [condition for condition, kind in zip(steered, kinds, strict=True) if kind in KINDS]
    if about.get("resumed"):
        doubts.append(f"it went on from step {strict.integer('resumed', about['resumed'])} of an earlier run")
    if about.get("changed"):
        lines = [strict.text("changed", line) for line in strict.items("changed", about["changed"], MAX_CHANGES)]
        doubts.append(f"the model had been changed in memory: {'; '.join(lines)}")
    steps = about.get("steps_asked", None if isinstance(fields.get("schedule"), tuple) else about.get("steps"))
    request = Request(
        **fields,
        model=taken("model", about.get("model_path") or about["model"]),
        dtype=None if about.get("dtype_asked") is None else taken("dtype", about["dtype_asked"], "dtype_asked"),
        steps=None if steps is None else taken("steps", steps),
        loras=loras,
        guidance=_strength("guidance", about.get("guidance"), sigmas),
        guide=_guide(about.get("guide"), sigmas),
        cache=_cache(about.get("cache")),
        conditions=taken("conditions", given),
    )
    return Record(
        request=request,
        version=strict.text("version", about.get("version", "")),
        torch=strict.text("torch", about.get("torch", "")),
        device=strict.text("device", about.get("device", "")),
        dtype=strict.text("dtype", about.get("dtype", "")),
        threads=strict.integer("threads", about.get("threads", 0)),
        compiled=GRAPHS if about.get("compiled") == GRAPHS else bool(about.get("compiled")),
        sigmas=sigmas,
        files=files,
        doubts=tuple(doubts),
        sheet=_sheet(about.get("sheet")),
        upsampled=_upsampled(about.get("upsampled")),
    )


def _file(what: str, value: object) -> FileFact:
    about = strict.record(what, value)
    strict.only(what, about, ("part", "file", "bytes", "sha256"))
    part, file = (strict.text(f"{what}: {name}", about.get(name)) for name in ("part", "file"))
    digest = None if about.get("sha256") is None else strict.sha256(f"{what}: sha256", about["sha256"])
    return FileFact(part, file, strict.integer(f"{what}: bytes", about.get("bytes")), digest)


def _loras(about: Mapping[str, Any], files: tuple[FileFact, ...]) -> tuple[Any, list[str]]:
    """As `Request.loras`, each with the hash of its file; and what makes them doubtful."""
    uses: list[dict[str, Any]] = []
    doubts: list[str] = []
    for i, value in enumerate(strict.items("loras", about.get("loras") or [], MAX_LORAS)):
        what = f"loras[{i}]"
        use = strict.record(what, value)
        strict.only(what, use, ("name", "source", "scale", "scheduled", "merged"))
        name = strict.text(f"{what}: name", use.get("name"))
        if use.get("scheduled"):
            doubts.append(f"the strength of LoRA {name} followed a function of the noise level, which no file keeps")
        if use.get("merged"):
            doubts.append(f"LoRA {name} was merged into the weights, which rounds otherwise")
        digest = next((file.sha256 for file in files if file.part == f"lora {name}"), None)
        if digest is None and files:
            doubts.append(f"LoRA {name} did not come from a file")
        found = {"file": use.get("source"), "scale": use.get("scale")}
        uses.append(found if digest is None else {**found, "sha256": digest})
    return taken("loras", uses), doubts


def _strength(what: str, value: object, sigmas: tuple[float, ...]) -> Any:
    """A number; or a list of them, one for each noise level but the last."""
    if isinstance(value, list):
        value = {"sigmas": list(sigmas[:-1]), "values": value}
    return None if value is None else taken("guidance", value, what)


def _guide(value: object, sigmas: tuple[float, ...]) -> Any:
    if value is None:
        return None
    about = dict(strict.record("guide", value))
    if isinstance(about.get("scale"), list):
        about["scale"] = {"sigmas": list(sigmas[:-1]), "values": about["scale"]}
    return taken("guide", about)


def _cache(value: object) -> Any:
    if value is None:
        return None
    about = strict.record("cache", value)
    return taken("cache", {name: x for name, x in about.items() if name not in BILL})


def _sheet(value: object) -> Sheet | None:
    if value is None:
        return None
    about = strict.record("sheet", value)
    strict.only("sheet", about, ("columns", "rows"))
    columns, rows = (
        tuple(
            strict.text(f"sheet: {side}", name, 200) for name in strict.items(f"sheet: {side}", about.get(side), 1000)
        )
        for side in ("columns", "rows")
    )
    if not columns or not rows:
        raise SettingsError("sheet: columns and rows must not be empty")
    return Sheet(columns, rows)


def _upsampled(value: object) -> Mapping[str, Any] | None:
    if value is None:
        return None
    about = strict.record("upsampled", value)
    strict.only("upsampled", about, UPSAMPLED)
    strict.text("upsampled: prompt", about.get("prompt"), strict.MAX_PROMPT)
    strict.text("upsampled: model", about.get("model"))
    if about.get("system") is not None:
        strict.sha256("upsampled: system", about["system"])
    strict.number("upsampled: temperature", about.get("temperature"))
    for name in ("seed", "max_new_tokens"):
        strict.integer(f"upsampled: {name}", about.get(name))
    return about
