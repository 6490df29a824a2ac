"""Words of the command line that mean more than a word: sizes, pairs, LoRAs with a scale."""

from __future__ import annotations

import argparse


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels, of 1024x768 or 1024."""
    width, cross, height = text.lower().partition("x")
    try:
        return int(width), int(height if cross else width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a size looks like 1024x768 (width x height), got {text!r}") from None


def lora(text: str) -> tuple[str, float]:
    """A path and a scale, of PATH[:SCALE]."""
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon else (text, 1.0)
    except ValueError:  # a colon that belongs to the path
        return text, 1.0


def pair(text: str) -> tuple[float, float]:
    """Two numbers, of A:B."""
    first, colon, second = text.partition(":")
    try:
        return float(first), float(second if colon else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two numbers as A:B, got {text!r}") from None


def variation(text: str) -> tuple[int, float]:
    """A seed and an amount, of SEED:AMOUNT."""
    seed, colon, amount = text.partition(":")
    try:
        return int(seed), float(amount if colon else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected SEED:AMOUNT, such as 7:0.2, got {text!r}") from None


def numbers(text: str) -> list[int]:
    """Whole numbers, of 8,16,32."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers as 8,16,32, got {text!r}") from None


def spacing(text: str) -> str | list[float]:
    """The name of a schedule, or noise levels of 1,0.6,0.3,0."""
    if "," not in text:
        return text
    try:
        return [float(level) for level in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a name, or noise levels as 1,0.6,0.3,0, got {text!r}") from None


def add_verbose(command: argparse.ArgumentParser) -> None:
    """The option that every command has."""
    command.add_argument("-v", "--verbose", action="store_true", help="say more about what is done")
