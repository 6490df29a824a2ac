"""Which values carry what: activation patching as a sweep (causal tracing, arXiv 2202.05262, section 2).

    table = study.trace(pipe, "a red circle on a blue background", "a green circle on a blue background",
                        points="double_blocks.*.txt_in", tokens=["red", "circle", "background"])
    print(table)

A clean run is captured. Then the corrupted prompt is drawn again and again, each time with a few values of the clean
run put in, and it is measured how much of the clean outcome comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from miniflux.checks import check_number, shown
from miniflux.errors import InputError
from miniflux.nano import scenes
from miniflux.nano.recipe.adherence import FOREGROUND
from miniflux.pipeline import Pipeline
from miniflux.plan import Plan
from miniflux.result import Result, checked_output
from miniflux.study import plotting
from miniflux.study.mapping.words import find
from miniflux.study.values.capturing import MAX_BYTES, capture
from miniflux.study.values.editing import edit, patch
from miniflux.study.values.inventory import points as all_points
from miniflux.study.values.planning import text_tokens
from miniflux.study.values.point import TOKENS, Points
from miniflux.study.values.selecting import Numbers, Tokens

Metric = Callable[[Result], float]
ALL = "all"


@dataclass(frozen=True)
class Cell:
    """One run of the sweep.

    Attributes:
        point: where values of the clean run were put in.
        steps, tokens: in which steps, and of which tokens.
        outcome: what the metric says of it.
        recovered: the share of the clean outcome that came back; 1 for all, 0 for none.
    """

    point: str
    steps: str
    tokens: str
    outcome: float
    recovered: float


@dataclass(frozen=True)
class Trace:
    """A sweep.

    Attributes:
        clean, corrupted: what the metric says of these runs.
        cells: point by point, steps by steps, tokens by tokens.
    """

    clean: float
    corrupted: float
    cells: tuple[Cell, ...]

    def best(self) -> Cell:
        """Where most came back."""
        return max(self.cells, key=lambda cell: cell.recovered)

    def __str__(self) -> str:
        """A row per point and steps, a column per tokens: the share that came back."""
        columns = list(dict.fromkeys(cell.tokens for cell in self.cells))
        rows = {(c.point, c.steps): dict[str, float]() for c in self.cells}
        for cell in self.cells:
            rows[cell.point, cell.steps][cell.tokens] = cell.recovered
        names = [f"{point}  steps {steps}" for point, steps in rows]
        first, width = max(map(len, names)), [max(6, len(name)) for name in columns]
        lines = [" " * first + "".join(f"  {name:>{w}}" for name, w in zip(columns, width, strict=True))]
        for name, row in zip(names, rows.values(), strict=True):
            lines.append(
                f"{name:<{first}}" + "".join(f"  {row[c]:>{w}.3f}" for c, w in zip(columns, width, strict=True))
            )
        return "\n".join([*lines, f"clean {self.clean:.4g}, corrupted {self.corrupted:.4g}"])

    def plot(self, path: str | Path) -> Path:
        """The same as a picture; returns the path.

        Raises:
            MissingExtraError: matplotlib is not installed.
            OutputError: the place cannot be written to.
        """
        path = checked_output(path, plotting.KINDS)
        figure, ax = plotting.axes("Share of the clean outcome that comes back", "tokens", "")
        columns = list(dict.fromkeys(cell.tokens for cell in self.cells))
        rows = list(dict.fromkeys((cell.point, cell.steps) for cell in self.cells))
        values = np.zeros((len(rows), len(columns)))
        for cell in self.cells:
            values[rows.index((cell.point, cell.steps)), columns.index(cell.tokens)] = cell.recovered
        figure.set_size_inches(3 + 0.8 * len(columns), 1.5 + 0.3 * len(rows))
        shown_as = ax.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        ax.grid(visible=False)
        ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        ax.set_yticks(range(len(rows)), [f"{point}, steps {steps}" for point, steps in rows], fontsize="small")
        figure.colorbar(shown_as)
        return plotting.save(figure, path)


def trace(
    pipe: Pipeline,
    clean: str,
    corrupted: str,
    points: str | Iterable[str],
    *,
    over_steps: Sequence[Numbers] | None = None,
    tokens: Sequence[Tokens] | None = None,
    metric: Metric | None = None,
    max_bytes: int = MAX_BYTES,
    **asked: Any,
) -> Trace:
    """Put values of a clean run into a corrupted one, and see what comes back.

    Args:
        clean, corrupted: two prompts, with as many tokens where these are patched.
        points: names or patterns of the transformer's points.
        over_steps: groups of steps, each patched by itself; None for all steps at once.
        tokens: groups of tokens, likewise: `text`, `image`, `reference`, places, or words of the clean prompt as
            `words` names them; None for all tokens at once.
        metric: of the one picture of a result, the larger the more it is like the clean one; None for the distance of
            its latents to those of the clean run, as a negative number.
        max_bytes: of the clean run's values in memory.
        asked: as of `pipe.generate`. The runs are as many as there are points times groups, and two.

    Raises:
        InputError: as of `capture` and `edit`; the metric does not tell the two prompts apart; a word that is not in
            the clean prompt, or that a point has no token of.
    """
    for name, prompt in (("clean", clean), ("corrupted", corrupted)):
        if not isinstance(prompt, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"{name} must be one prompt, got {shown(prompt)}")
    chosen = all_points(pipe).select(points)
    steps = {ALL: None} if over_steps is None else {_range(group): group for group in over_steps}
    with capture(pipe, chosen.names, max_bytes=max_bytes) as kept:
        was = pipe.generate(clean, **asked)
    if len(was.images) != 1:
        raise InputError(f"one picture is traced, got {len(was.images)}")
    measure = metric or _near(was.latents)
    groups = {ALL: None} if tokens is None else _groups(pipe, clean, chosen, tokens, asked)

    def outcome(result: Result) -> float:
        return float(check_number("what the metric says", measure(result), -float("inf")))

    first, last = outcome(was), outcome(pipe.generate(corrupted, **asked))
    if first == last:
        raise InputError(f"the metric says {first:g} of both prompts: nothing can come back")
    cells: list[Cell] = []
    for point in chosen.names:
        for at, group in steps.items():
            for name, places in groups.items():
                with edit(pipe, {point: patch(kept)}, steps=group, tokens=places):
                    now = outcome(pipe.generate(corrupted, **asked))
                cells.append(Cell(point, at, name, now, (now - last) / (first - last)))
    return Trace(first, last, tuple(cells))


def colour(clean: str, corrupted: str) -> Metric:
    """For scenes of the nano models: 1 where the object has the first colour, 0 where it has the second; between and
    beyond them the place of its median colour along the line through both.

    Raises:
        InputError: no colours of their palette.
    """
    for name in (clean, corrupted):
        if name not in scenes.PALETTE:
            raise InputError(f"a colour must be one of {', '.join(scenes.PALETTE)}, got {shown(name)}")
    one, other = (np.asarray(scenes.PALETTE[name], float) for name in (clean, corrupted))

    def measured(result: Result) -> float:
        pixels = np.asarray(result.images[0].convert("RGB"), float)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        inside = np.linalg.norm(pixels - np.median(edge, axis=0), axis=-1) > FOREGROUND
        found = np.median(pixels[inside] if inside.any() else edge, axis=0)
        return float((found - other) @ (one - other) / ((one - other) @ (one - other)))

    return measured


def _near(latents: Tensor) -> Metric:
    return lambda result: 0.0 - float((result.latents - latents).norm())


def _range(group: Numbers) -> str:
    numbers = [group] if isinstance(group, int) else list(group)
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _groups(
    pipe: Pipeline, prompt: str, chosen: Points, tokens: Sequence[Tokens], asked: dict[str, Any]
) -> dict[str, Tokens]:
    """Tokens by their names: those of a word as places among the text's."""
    if isinstance(tokens, str):
        raise InputError(f"tokens must be a list of groups, got {tokens!r}")
    found: dict[str, Tokens] = {}
    for group in tokens:
        if not isinstance(group, str) or group in TOKENS:
            found[group if isinstance(group, str) else _range(group)] = group
            continue
        for point in chosen:
            if point.tokens[:1] != ("text",):
                raise InputError(f"{group!r} is a word, and {point.name} has no text tokens")
        (word,) = find(pipe.text, prompt, [group])
        window = text_tokens(pipe, Plan.of(pipe.as_it_is(), prompt, **asked), prompt)
        found[group] = tuple(word.places(window))
    return found
