"""`miniflux study path`: the way from noise to a picture, step by step and block by block."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from miniflux.apps import arguments, console
from miniflux.apps.outputs import check_place, new_file

SHEETS = (".png", ".jpg", ".jpeg", ".webp")


def add(subjects: Any) -> None:
    """Add the subject to those of `miniflux study`."""
    path = subjects.add_parser(
        "path",
        help="the picture that each step and each block points to",
        description="Draw a picture and print its path: drift of the latents, turns, guidance's share, and how near "
        "each block is to what the network says at the end.",
    )
    path.add_argument("prompt", metavar="PROMPT", help="what to draw; quoted")
    path.add_argument(
        "-o",
        "--output",
        type="path",
        metavar="FILE|FOLDER/",
        help="a sheet of what every block points to (.png, .jpg, .webp); or a folder of sheets (steps.png, blocks.png),"
        " curves (path.svg, cosines.svg; needs miniflux[study]) and arrays (path.npz)",
    )
    path.add_argument("--model", default="nano", metavar="NAME|PATH")
    path.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    path.add_argument("--steps", type=int, metavar="N", help="default: as the model was made for")
    path.add_argument("--size", type=arguments.size, metavar="WxH")
    path.add_argument("--solver", default="euler", metavar="NAME", help="default %(default)s")
    path.add_argument("--guidance", type=float, metavar="X", help="default: as the model was made for")
    path.add_argument(
        "--beside",
        type=float,
        metavar="X",
        help="draw it at this guidance, too, and print how far the two are apart",
    )
    path.set_defaults(run=_run)
    arguments.add_verbose(path)
    arguments.add_force(path)


def _run(options: argparse.Namespace) -> None:
    place, folder = None, False
    if options.output is not None:
        folder = options.output.endswith(("/", os.sep)) or os.path.isdir(options.output)
        check_place(Path(options.output), None if folder else SHEETS)
        if folder:
            from miniflux.study import plotting

            plotting.check()
        place = new_file(options.output, options.force, folder=folder)
    from miniflux.pipeline import load
    from miniflux.result import save_picture
    from miniflux.study.paths import pictures, trajectories

    pipe = load(options.model)
    width, height = options.size or (None, None)
    asked: dict[str, Any] = {"seed": options.seed, "steps": options.steps, "solver": options.solver}
    asked |= {"width": width, "height": height, "guidance": options.guidance}
    path = trajectories.trajectory(pipe, options.prompt, **asked)
    said = [trajectories.table(path), trajectories.block_table(path)]
    if options.beside is not None:
        other = trajectories.trajectory(pipe, options.prompt, blocks=(), **{**asked, "guidance": options.beside})
        said.append(trajectories.apart_table(trajectories.apart(path, other)))
    console.say("\n\n".join(said))
    if place is None:
        return
    with place as there:
        if folder:
            pictures.save(pipe, path, there)
        else:
            save_picture(pictures.grid(pipe, path), there, None)
    console.say(str(there))
