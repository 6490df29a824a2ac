"""A prompt that a language model wrote, and out of what: `write`. What a picture's settings say of it."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miniflux.upsampling.loading import load_upsampler
from miniflux.upsampling.rewriting import MAX_NEW, SYSTEM, Upsampler, system_text


@dataclass(frozen=True)
class Written:
    """A long prompt.

    Attributes:
        text: what is drawn.
        prompt: what it was written out of.
        model: the folder of the language model, by its name alone.
        system: the SHA-256 of what the model was told to do, in UTF-8; None if it was told nothing.
        temperature, seed, max_new_tokens: as of `Upsampler.rewrite`.
    """

    text: str
    prompt: str
    model: str
    system: str | None
    temperature: float
    seed: int
    max_new_tokens: int

    def described(self) -> dict[str, Any]:
        """For the settings of a picture, whose prompt is `text`; replay needs none of it."""
        return {name: value for name, value in vars(self).items() if name != "text"}


def write(
    upsampler: Upsampler,
    prompt: str,
    model: str,
    *,
    system: str | Path | None = SYSTEM,
    temperature: float | None = None,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW,
) -> Written:
    """Rewrite a prompt, and keep how.

    Args:
        model: what the settings are to call the language model.
        system: as of `Upsampler.rewrite`; by default words of ours.
        temperature: None for the release's.

    Raises:
        InputError: see `Upsampler.rewrite`.
    """
    told = system_text(system)
    temperature = upsampler.turns.temperature if temperature is None else temperature
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "max_new_tokens": max_new_tokens}
    text = upsampler.rewrite(prompt, system=told, **options)
    digest = None if told is None else hashlib.sha256(told.encode()).hexdigest()
    return Written(text, prompt, model, digest, float(temperature), seed, max_new_tokens)


@contextmanager
def borrowed(folder: str | Path, *, device: str | None = None, dtype: str | None = None) -> Generator[Upsampler]:
    """A language model for as long as it is wanted: whole ones are large, and go before anything else is loaded.
    Arguments and errors as of `load_upsampler`."""
    upsampler = load_upsampler(folder, device=device, dtype=dtype)
    try:
        yield upsampler
    finally:
        del upsampler
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
