"""Language models on this machine that can write longer prompts."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from miniflux.errors import InputError, MinifluxError
from miniflux.service.catalogue import Catalogue
from miniflux.settings.strict import shown
from miniflux.upsampling import Written, borrowed, check_upsampler, write
from miniflux.upsampling.rewriting import MAX_NEW
from miniflux.weights.origin import stamps


class Writers:
    """Those of a catalogue: the text encoders of its models, as far as they are whole, and what else is in its folder.

    Args:
        catalogue: what there is; asked anew each time.
        device, dtype: as of `load_upsampler`.
    """

    def __init__(self, catalogue: Catalogue, device: str | None = None, dtype: str | None = None) -> None:
        self.catalogue, self.device, self.dtype = catalogue, device, dtype
        self._known: dict[Path, tuple[object, str]] = {}  # why it cannot write, and of which files that was told
        self._lock = threading.Lock()

    def listed(self) -> tuple[dict[str, Path], dict[str, str]]:
        """Folders of those that can write, by name; and why the others cannot. Headers of new files are read."""
        found: dict[str, Path] = {}
        unable: dict[str, str] = {}
        for name, place in self.catalogue.language_models().items():
            reason = self._reason(place).replace(f"{place}", name)
            if reason:
                unable[name] = reason
            else:
                found[name] = place
        return found, unable

    def _reason(self, place: Path) -> str:
        """Why it cannot write; empty if it can."""
        try:
            files = stamps(place)
        except MinifluxError as error:
            return _line(error)
        if place not in self._known or self._known[place][0] != files:
            try:
                check_upsampler(place)
                self._known[place] = files, ""
            except MinifluxError as error:
                self._known[place] = files, _line(error)
        return self._known[place][1]

    def write(
        self,
        name: str,
        prompt: str,
        system: str | None,
        temperature: float | None = None,
        max_new_tokens: int = MAX_NEW,
    ) -> Written:
        """A prompt, rewritten. One model writes at a time, and goes when it is done: whole ones are large.

        Raises:
            InputError: the name is in no list; see also `miniflux.upsampling.write`.
            CheckpointError: its files have changed.
        """
        found, _ = self.listed()
        if name not in found:
            raise InputError(f"language model {shown(name)} is not here; there are {', '.join(found) or 'none'}")
        with self._lock, borrowed(found[name], device=self.device, dtype=self.dtype) as upsampler:
            options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens}
            return write(upsampler, prompt, name, system=system, **options)


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
