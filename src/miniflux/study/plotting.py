"""Pictures of numbers, by matplotlib (the extra `study`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from miniflux.disk import write_beside
from miniflux.errors import MissingExtraError

KINDS = (".png", ".svg", ".pdf")


def check() -> None:
    """Asked before what is to be drawn is computed, which may take long. Costs no import.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError("drawing needs matplotlib: pip install 'miniflux[study]'")


def axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    """An empty figure and its axes, not bound to a screen.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    check()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    ax.grid(alpha=0.3)
    return figure, ax


def save(figure: Any, path: Path) -> Path:
    """Write the figure beside and rename it; returns the path."""
    kind = path.suffix[1:].lower()
    write_beside(path, lambda beside: figure.savefig(beside, format=kind, dpi=120))
    return path
