"""A path shown: what steps and blocks point to as pictures, and its numbers as curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miniflux.disk import folder_to_fill, write_beside
from miniflux.errors import InputError
from miniflux.memory.bands import through
from miniflux.pipeline import Pipeline
from miniflux.result import checked_output, labelled, save_picture, to_image
from miniflux.study import plotting
from miniflux.study.paths.geometry import spread
from miniflux.study.paths.trajectories import Trajectory, blocks, steps


@torch.inference_mode()
def decoded(pipe: Pipeline, latents: Tensor, side: int | None = None) -> list[Image.Image]:
    """Latents (N, C, h, w) as pictures, one after the other.

    Args:
        side: the longer side in pixels, if they are to be made smaller.
    """
    decode = cast("Callable[..., Tensor]", pipe.autoencoder.decode)
    weight = pipe.autoencoder.decoder.conv_in.weight
    found = [to_image(decode(one.to(weight.device, weight.dtype), through)[0]) for one in latents.split(1)]
    for image in found:
        if side is not None:
            image.thumbnail((side, side))
    return found


def strip(pipe: Pipeline, path: Trajectory, *, most: int = 12, side: int | None = 128) -> Image.Image:
    """The pictures that steps point to, one row, under the noise levels they begin at; of at most `most` steps."""
    chosen = spread(len(path.pictures), most)
    return labelled(decoded(pipe, path.pictures[chosen], side), [f"sigma {path.sigmas[k]:.3f}" for k in chosen], [""])


def grid(pipe: Pipeline, path: Trajectory, *, most: int = 8, side: int | None = 128) -> Image.Image:
    """The pictures that blocks point to, a row for each block and a column for each of at most `most` steps. Where
    guidance has a part, what the step itself points to is the last row.

    Raises:
        InputError: no blocks were looked at.
    """
    if not path.blocks:
        raise InputError("no blocks were looked at: there is nothing to show of them")
    chosen = spread(len(path.pictures), most)
    shown_blocks = [decoded(pipe, path.block_pictures(k), side) for k in chosen]
    rows, names = [list(row) for row in zip(*shown_blocks, strict=True)], list(path.blocks)
    if any(path.guided(k) for k in chosen):
        rows.append(decoded(pipe, path.pictures[chosen], side))
        names.append("with guidance")
    return labelled([image for row in rows for image in row], [f"sigma {path.sigmas[k]:.3f}" for k in chosen], names)


def save(pipe: Pipeline, path: Trajectory, folder: Path) -> None:
    """Fill a folder: `steps.png`, `blocks.png`, `path.svg`, `cosines.svg`, and all arrays with the names of the blocks
    as `path.npz`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the folder cannot be made, or written to.
    """
    plotting.check()
    folder_to_fill(folder, "a path")
    save_picture(strip(pipe, path), folder / "steps.png", None)
    save_picture(grid(pipe, path), folder / "blocks.png", None)
    plot(path, folder / "path.svg")
    plot_blocks(path, folder / "cosines.svg")
    names = ("latents", "pictures", "positive", "seen")
    arrays = {name: getattr(path, name).numpy() for name in names}
    arrays |= {"sigmas": np.array(path.sigmas), "blocks": np.array(path.blocks)}

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez(file, **arrays)

    write_beside(folder / "path.npz", write)


def plot(path: Trajectory, file: str | Path) -> Path:
    """Drift, turns and guidance's share against the steps; returns the path of the file.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the place cannot be written to.
    """
    file = checked_output(file, plotting.KINDS)
    figure, ax = plotting.axes("A path from noise to a picture", "steps done", "relative L2 distance, share")
    found = steps(path)
    done = range(1, len(found) + 1)
    ax.plot(done, [step.from_start for step in found], marker="o", markersize=3, label="latents, from the start")
    ax.plot(done, [step.to_end for step in found], marker="o", markersize=3, label="latents, to the end")
    ax.plot(done, [step.pointed for step in found], marker="o", markersize=3, label="picture pointed to, to the end")
    if any(step.guided for step in found):
        ax.plot(done, [step.guided for step in found], marker="o", markersize=3, label="guidance's share")
    ax.xaxis.get_major_locator().set_params(integer=True)
    other = ax.twinx()
    bent = [math.nan if step.turn is None else step.turn for step in found]
    other.plot(done, bent, color="gray", linestyle="--", label="turn of the velocity (right)")
    other.set_ylabel("degrees")
    lines = [*ax.get_lines(), *other.get_lines()]
    ax.legend(lines, [line.get_label() for line in lines], fontsize="small")
    return plotting.save(figure, file)


def plot_blocks(path: Trajectory, file: str | Path) -> Path:
    """The cosine between each block's velocity and the network's own, blocks downwards and steps to the right.

    Raises:
        InputError: no blocks were looked at.
        MissingExtraError: matplotlib is not installed.
        OutputError: the place cannot be written to.
    """
    if not path.blocks:
        raise InputError("no blocks were looked at: there is nothing to show of them")
    file = checked_output(file, plotting.KINDS)
    figure, ax = plotting.axes("How near each block's velocity is to the network's own", "step", "")
    ax.grid(False)
    cosines = [block.cosines for block in blocks(path)]
    drawn = ax.imshow(cosines, aspect="auto", cmap="RdBu", vmin=-1, vmax=1, extent=(0.5, len(path.pictures) + 0.5,
                      len(path.blocks) - 0.5, -0.5))  # fmt: skip
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_yticks(range(len(path.blocks)), path.blocks, fontsize="x-small")
    figure.colorbar(drawn, label="cosine")
    return plotting.save(figure, file)
