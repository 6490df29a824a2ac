"""What a run is going to need: memory of the machine and of the device, phase by phase, before anything is loaded.

Weights and the areas they are streamed through are counted exactly. What the networks compute on the way is counted as
the tensors that live at once at the worst moment of a block; the libraries' own needs are measured constants.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from miniflux.checkpoints.networks import BY_CONFIG
from miniflux.memory import bands
from miniflux.memory.lanes import stages_of
from miniflux.memory.streaming import Partition

WITHIN = 0.05  # how far the peak of a run may be from what was predicted ...
SMALL = 256_000_000  # ... and bytes that nobody needs to explain, of libraries and of the allocator
TEXTS = {"t5": "T5", "clip": "CLIP", "lm": "language model"}  # in the order in which they run
LIBRARIES = 60_000_000  # bytes that torch and the tokenizers take when they are first used


@dataclass(frozen=True)
class Line:
    """One thing that takes memory: bytes of the machine's (RAM) and of the device's own (VRAM)."""

    what: str
    ram: int = 0
    vram: int = 0


@dataclass(frozen=True)
class Ledger:
    """What a run needs in each phase; the peak is that of the worst phase.

    Attributes:
        mode: where the weights are.
        process: bytes that were taken before the pipeline was loaded.
        phases: what is in memory during each.
    """

    mode: str
    process: int
    phases: Mapping[str, tuple[Line, ...]]

    @property
    def ram(self) -> int:
        return max(sum(line.ram for line in lines) for lines in self.phases.values())

    @property
    def vram(self) -> int:
        return max(sum(line.vram for line in lines) for lines in self.phases.values())

    @property
    def working(self) -> tuple[int, int]:
        """Bytes of RAM and VRAM that a run takes beside what stays: the process, libraries and resident weights."""
        stays = set[Line].intersection(*(set(lines) for lines in self.phases.values()))
        comes = [[line for line in lines if line not in stays] for lines in self.phases.values()]
        return max(sum(x.ram for x in lines) for lines in comes), max(sum(x.vram for x in lines) for lines in comes)

    def differs(self, measured: int, predicted: int) -> bool:
        """Whether a measured peak is further from the predicted one than the ledger promises."""
        return abs(measured - predicted) > max(WITHIN * predicted, SMALL)

    def __str__(self) -> str:
        """A table in MB, with a sum for each phase."""
        lines = [f"{'memory ' + self.mode + ', MB':<44} {'RAM':>8} {'VRAM':>8}"]
        for phase, parts in self.phases.items():
            lines += [f"  {line.what:<42} {line.ram / 1e6:8.0f} {line.vram / 1e6:8.0f}" for line in parts]
            total = [sum(line.ram for line in parts) / 1e6, sum(line.vram for line in parts) / 1e6]
            lines.append(f"{phase:<44} {total[0]:8.0f} {total[1]:8.0f}")
        return "\n".join([*lines, f"{'peak':<44} {self.ram / 1e6:8.0f} {self.vram / 1e6:8.0f}"])


@dataclass(frozen=True)
class Placed:
    """One network of a pipeline.

    Attributes:
        plan: what of it stays and what comes and goes.
        mode: `resident`, `offload` or `stream`.
        stored: bytes of its files.
        largest: bytes of the largest tensor of a block that is read into memory of its own, because its dtype changes.
    """

    plan: Partition
    mode: str
    stored: int
    largest: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is asked of a run: sizes in tokens and pixels, tokens of conditions beside them and those of references that
    are looked at once, rows that go through the network, texts at once; bytes of networks that steer and are not where
    it computes yet, and numbers that they add to each image token; whether the picture before is decoded meanwhile."""

    width: int
    height: int
    text_tokens: int
    calls: int
    more_tokens: int = 0
    kept_tokens: int = 0
    batch: int = 1
    ahead: bool = True
    steering: int = 0
    added: int = 0
    decoding: bool = False


def predict(
    mode: str, parts: Mapping[str, Placed], run: Run, device: torch.device, dtype: torch.dtype, process: int
) -> Ledger:
    """The ledger of a run.

    Args:
        mode: its name.
        parts: the networks by part: `transformer`, `autoencoder` and text encoders.
        dtype: what transformer and text encoders compute in.
        process: bytes that the process took before the pipeline was loaded.
    """
    host = device.type == "cpu"

    def on_device(what: str, size: float) -> Line:
        return Line(what, ram=int(size)) if host else Line(what, vram=int(size))

    def stays(name: str) -> list[Line]:
        part = parts[name]
        if part.mode == "resident":
            return [on_device(f"{name}: weights", part.plan.total)]
        waiting = [Line(f"{name}: weights that wait", ram=part.stored)] if part.mode == "offload" else []
        return [*waiting, on_device(f"{name}: weights outside the blocks", part.plan.kept_size)]

    def blocks(name: str, chains: slice = slice(None)) -> list[Line]:
        part = parts[name]
        if part.mode == "resident":
            return []
        areas = part.plan.areas[chains]
        copied = stages_of(device) * sum(areas) // 2
        return [
            on_device(f"{name}: running blocks", sum(areas)),
            Line(f"{name}: reading", ram=copied + (part.largest if part.mode == "stream" else 0)),
        ]

    configs: dict[str, Any] = {name: part.plan.network.config for name, part in parts.items()}
    itemsize = dtype.itemsize
    common = [Line("the process", ram=process), Line("libraries at work", ram=LIBRARIES)]
    for name in parts:
        common += stays(name)
    ahead = run.ahead and parts["transformer"].mode != "resident"
    config = configs["transformer"]
    table = [on_device("modulation of all calls", run.calls * BY_CONFIG[type(config)].modulation(config) * itemsize)]
    table = table if ahead else []
    each = 2 * len(config.blocks) * config.hidden_size * itemsize  # keys and values
    waits = parts["transformer"].mode != "resident"
    what, size = "references: keys and values", run.kept_tokens * each
    kept = Line(what, ram=size) if waits else on_device(what, size)
    floats = next(iter(parts["autoencoder"].plan.kept)).empty.dtype.itemsize
    steering = [on_device("networks that steer: weights", run.steering)] if run.steering else []
    computed = activations(configs, run, itemsize, floats)
    decoding = (on_device("autoencoder: activations", computed["autoencoder"]),)
    texts: dict[str, tuple[Line, ...]] = {}
    held: list[Line] = []  # areas are let go of after all encoders
    for name in (name for name in TEXTS if name in parts):
        held += blocks(name)
        texts[f"text, {TEXTS[name]}"] = (*common, *held, on_device(f"{name}: activations", computed[name]))
    return Ledger(
        mode,
        process,
        {
            **texts,
            "denoising": (
                *common,
                *blocks("transformer", slice(1) if ahead else slice(None)),
                *table,
                *([kept] if run.kept_tokens else []),
                *steering,
                on_device("transformer: activations", computed["transformer"]),
                *(decoding if run.decoding else ()),
            ),
            "decoding": (*common, *table, *steering, *decoding),
        },
    )


def activations(configs: Mapping[str, Any], run: Run, itemsize: int, floats: int) -> dict[str, int]:
    """Bytes that each network computes on the way, at its worst moment.

    Args:
        configs: of the networks, by part.
        itemsize, floats: bytes of a number in transformer and text encoders, and in the autoencoder.
    """
    unit = configs["autoencoder"].unit
    image_tokens = -(-run.width // unit) * -(-run.height // unit)
    found: dict[str, int] = {}
    for part, config in configs.items():
        size, of_each = run.text_tokens, itemsize
        if part == "transformer":
            size += image_tokens + run.more_tokens
        elif part == "autoencoder":
            size, of_each = image_tokens * unit**2, floats
        found[part] = BY_CONFIG[type(config)].activations(config, size, of_each)
        if part == "autoencoder" and size > bands.WHOLE:
            decoder = replace(config, ch=getattr(config, "decoder_ch", None) or config.ch)
            found[part] = bands.activations(decoder, size, of_each)
    found["transformer"] += run.added * (image_tokens + run.more_tokens) * itemsize
    found["transformer"] *= run.batch
    return found


def _status(field: str) -> int | None:
    """Bytes that Linux states of this process; None elsewhere."""
    if sys.platform != "linux":
        return None
    for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None


def resident_size() -> int:
    """Bytes of memory that this process has now; 0 where that is not known."""
    return _status("VmRSS") or 0


def peak_size() -> int | None:
    """The most bytes of memory that this process ever had; None where that is not known."""
    return _status("VmHWM")
