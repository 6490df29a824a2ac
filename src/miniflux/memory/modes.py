"""Where the weights of a pipeline are while it works: the modes, the choice between them, and who keeps order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from miniflux.errors import InputError
from miniflux.memory.free import free_ram, free_vram
from miniflux.memory.ledger import Ledger, Placed, Run, peak_size, predict
from miniflux.memory.modulation import Ahead
from miniflux.memory.streaming import Streamed
from miniflux.sampling.forwards import Told

log = logging.getLogger(__name__)

# Of each mode: where the transformer and the text encoders are. The autoencoder, small beside them, is always resident.
# In the order in which `auto` tries them, the fastest first.
MODES: dict[str, tuple[str, str]] = {
    "resident": ("resident", "resident"),
    "text-freed": ("resident", "stream"),
    "offload": ("offload", "offload"),
    "stream": ("stream", "stream"),
}
NAMES = ("auto", *MODES)
SPARED = 0.9  # the share of free memory that `auto` fills


def check_mode(memory: str) -> None:
    """
    Raises:
        InputError: no such mode; the message lists those there are.
    """
    if memory not in NAMES:
        raise InputError(f"memory must be one of {', '.join(NAMES)}, got {memory!r}")


def in_mode(mode: str, parts: Mapping[str, Placed]) -> dict[str, Placed]:
    """The networks with their weights where a mode has them."""
    transformer, text = MODES[mode]
    places = {"transformer": transformer, "autoencoder": "resident"}
    return {name: replace(part, mode=places.get(name, text)) for name, part in parts.items()}


def choose(
    memory: str, parts: Mapping[str, Placed], run: Run, device: torch.device, dtype: torch.dtype, process: int
) -> tuple[str, dict[str, Placed]]:
    """The mode asked for, or for `auto` the fastest that fits into what is free, and the parts in that mode.

    Args:
        parts: the networks; their modes do not count.
        run: a run as it is likely to come.
    """
    ram, vram = free_ram(), free_vram(device)
    tried: list[str] = []
    for mode in MODES if memory == "auto" else (memory,):
        placed = in_mode(mode, parts)
        ledger = predict(mode, placed, run, device, dtype, process)
        wanted = ledger.ram - ledger.process
        fits = (ram is None or wanted <= SPARED * ram) and (vram is None or ledger.vram <= SPARED * vram)
        needs = f"{mode} needs {wanted / 1e9:.1f} GB RAM" + (
            "" if vram is None else f" and {ledger.vram / 1e9:.1f} VRAM"
        )
        if memory != "auto" or fits or mode == list(MODES)[-1]:
            free = "unknown" if ram is None else f"{ram / 1e9:.1f} GB RAM"
            free += "" if vram is None else f" and {vram / 1e9:.1f} GB VRAM"
            why = "as asked" if memory != "auto" else "it fits" if fits else "nothing needs less"
            log.info("memory %s: %s (free: %s%s)", mode, why, free, "".join(f"; {t}" for t in [*tried, needs]))
            return mode, placed
        tried.append(needs)
    raise AssertionError("the last mode is always taken")


@dataclass
class Memory:
    """What a pipeline knows of where its weights are.

    Attributes:
        mode: a name of `MODES`.
        parts: the networks.
        device, dtype: where and in what they compute.
        process: bytes that the process took before.
        transformer: the streamed transformer; None where it is resident.
        text: the streamed text encoders.
        ahead: the modulations that are computed before a run; None where they are computed as they come.
    """

    mode: str
    parts: Mapping[str, Placed]
    device: torch.device
    dtype: torch.dtype
    process: int
    transformer: Streamed | None = None
    text: tuple[Streamed, ...] = ()
    ahead: Ahead | None = None
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def ledger(self, run: Run) -> Ledger:
        """What a run is going to need."""
        run = replace(run, ahead=self.ahead is not None)
        return predict(self.mode, self.parts, run, self.device, self.dtype, self.process)

    def fitting(self, run: Run, free: tuple[int | None, int | None]) -> list[str]:
        """The other modes in which the pipeline could be loaded and this run would fit into so much RAM and VRAM."""
        now, fits = self.ledger(run), list[str]()
        taken = (now.ram - now.process - now.working[0], now.vram - now.working[1])  # what reloading gives back
        for mode in MODES:
            other = predict(mode, in_mode(mode, self.parts), run, self.device, self.dtype, now.process)
            needs = (other.ram - other.process, other.vram)
            if mode != self.mode and all(
                known is None or need <= SPARED * (known + given)
                for need, known, given in zip(needs, free, taken, strict=True)
            ):
                fits.append(mode)
        return fits

    def free_text(self) -> None:
        """Let go of what the text encoders hold: called after encoding."""
        for network in self.text:
            network.free()

    @contextmanager
    def denoising(self, calls: Callable[[], list[Told]]) -> Generator[None]:
        """Around the run of one picture: modulations ahead of it, and memory for blocks let go behind it.

        Args:
            calls: the calls of the network that the run is going to make; asked only if that is of use.
        """
        if self.transformer is None:
            yield
            return
        with self._lock:
            self._running += 1
        try:
            if self.ahead is None:
                yield
            else:
                with self.ahead.prepared(calls()):
                    yield
        finally:
            with self._lock:
                self._running -= 1
                last = not self._running
            if last:
                self.transformer.free()

    @contextmanager
    def checked(self, run: Run) -> Generator[Ledger]:
        """Around all the work on a picture: compares the peak with the ledger, where the process needed more memory
        than ever before; else its peak is not known."""
        ledger, before = self.ledger(run), peak_size()
        yield ledger
        after = peak_size()
        log.debug("%s", ledger)
        if before is not None and after is not None and after > before and ledger.differs(after, ledger.ram):
            log.warning("peak memory %.2f GB, predicted %.2f GB:\n%s", after / 1e9, ledger.ram / 1e9, ledger)
