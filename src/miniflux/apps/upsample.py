"""The options of `miniflux generate` that have a language model write longer prompts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniflux.apps import console
from miniflux.errors import InputError

if TYPE_CHECKING:
    from miniflux.upsampling import Written

FURTHER = ("upsample_system", "upsample_temperature", "upsample_tokens")


def add(generate: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = generate.add_argument_group("longer prompts")
    group.add_argument(
        "--upsample", type="path", metavar="FOLDER", help="have the language model in this folder rewrite each prompt "
        "first: FLUX.2's text_encoder, whole, or another Qwen3 or Mistral",
    )  # fmt: skip
    group.add_argument(
        "--upsample-system", metavar="TEXT|@FILE", help="what it is told to do; default a few words of ours"
    )
    group.add_argument(
        "--upsample-temperature", type=float, metavar="X", help="0 takes the likeliest words, above it they are drawn "
        "from --seed; default 0.15 for Mistral, as released, else 0",
    )  # fmt: skip
    group.add_argument("--upsample-tokens", type=int, metavar="N", help="it writes at most so many; default 512")


def check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        InputError: an option has nothing to work on, or is out of its range.
    """
    from miniflux.checks import check_number, whole
    from miniflux.upsampling.rewriting import system_text

    if options.upsample is None:
        for name in FURTHER:
            if getattr(options, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} has no effect without --upsample FOLDER")
        return
    if options.upsample_temperature is not None:
        check_number("--upsample-temperature", options.upsample_temperature, 0)
    if options.upsample_tokens is not None:
        whole("--upsample-tokens", options.upsample_tokens, 1)
    if options.upsample_system is not None:
        system_text(_told(options.upsample_system))


def _told(text: str) -> str | Path:
    return Path(text[1:]) if text.startswith("@") else text


def written(options: argparse.Namespace, prompts: Iterable[str], seed: int) -> dict[str, Written]:
    """Each prompt as the language model writes it, said as soon as it is; the model is let go before another is loaded.

    Raises:
        WeightsNotFoundError, CheckpointError, TokenizerError: it cannot write, and what is missing.
        InputError: a prompt is too long for it, or it answers nothing.
    """
    from miniflux.upsampling import borrowed, write

    if options.upsample is None:
        return {}
    told = {
        "system": None if options.upsample_system is None else _told(options.upsample_system),
        "temperature": options.upsample_temperature,
        "max_new_tokens": options.upsample_tokens,
    }
    further: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    found: dict[str, Written] = {}
    with borrowed(options.upsample, dtype=options.dtype, device=options.device) as upsampler:
        for prompt in dict.fromkeys(prompts):
            found[prompt] = write(upsampler, prompt, Path(options.upsample).resolve().name, seed=seed, **further)
            console.say(f"{prompt!r} is drawn as {found[prompt].text!r}")
    return found
