"""`miniflux replay`: make a picture again from what its file says."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from miniflux.apps import console
from miniflux.apps.arguments import add_pictures, picture_and_mask
from miniflux.apps.outputs import new_file
from miniflux.errors import InputError, ReplayError


def add(commands: Any) -> None:
    """Add the command to the command line."""
    command = commands.add_parser(
        "replay",
        help="make a saved picture again, and compare",
        description="Make a picture again from the settings in its file. On a CPU in float32 its pixels are the same, "
        "byte for byte. Refused if a weight or LoRA file is not the one that it was made with. Models and LoRAs that "
        "are not where they were are looked for beside the picture.",
    )
    command.add_argument("picture", type="path", metavar="PICTURE", help="a .png, .jpg or .webp of miniflux")
    command.add_argument("-o", "--output", type="path", metavar="FILE", help="write what was made")
    command.add_argument("--force", action="store_true", help="go on where files differ, and show the difference; "
        "write over --output if it is there, else it is numbered")  # fmt: skip
    command.add_argument(
        "--model", type="path", metavar="NAME|PATH", help="load this instead of the model that the file names"
    )
    command.add_argument("--lora", action="append", default=[], metavar="PATH", help="take this for a LoRA that the "
        "file names; may be given several times")  # fmt: skip
    command.add_argument("--weights", type="path", metavar="FOLDER", help="look for the model's files here first")
    command.add_argument("--device", metavar="NAME", help="default: the one it was made on")
    add_pictures(command)
    command.add_argument(
        "--picture",
        dest="pictures",
        action="append",
        default=[],
        metavar="FILE",
        help="one that steered it; may be given several times",
    )
    command.add_argument(
        "--network",
        dest="networks",
        action="append",
        default=[],
        metavar="PATH",
        help="a ControlNet, Redux or IP-Adapter that steered it; may be given several times",
    )
    command.add_argument("--vision", type="path", action="append", default=[], metavar="PATH", help="the vision tower "
        "of --network; may be given several times")  # fmt: skip
    command.add_argument("--no-metadata", action="store_true", help="leave the settings out of --output")
    command.add_argument("-v", "--verbose", action="store_true", help="say more about what is done")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from miniflux.replay import replay
    from miniflux.result import checked_output, save_picture
    from miniflux.settings import read_picture
    from miniflux.steering import load

    place = None
    if options.output is not None:
        checked_output(options.output)
        place = new_file(options.output, options.force, [options.picture])
    if options.vision and not options.networks:
        raise InputError("--vision is what a --network sees with, and none is given")
    image, mask = picture_and_mask(options)
    records = read_picture(options.picture).records
    if records and records[0].device == "cpu" and 0 < records[0].threads <= 256:
        torch.set_num_threads(records[0].threads)  # products are summed in another order by another number
    with tqdm(unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        made = replay(
            options.picture,
            force=options.force,
            weights=options.weights,
            device=options.device,
            image=image,
            mask=mask,
            pictures=options.pictures,
            networks=[load(path, vision=options.vision or None) for path in options.networks],
            model=options.model,
            loras=options.lora,
            progress=progress,
        )
    if made.same:
        said = f"{options.picture}: made again, the same pixels"
    else:
        said = f"{options.picture}: the pixels differ: PSNR {made.psnr:.1f} dB, at most {made.largest} of 255"
        if not options.force:
            why = "; ".join(made.differences) or "nothing else that its file tells does"
            raise ReplayError(f"{said} ({why}; --force goes on)")
    console.say("\n".join([said, *(f"  {line}" for line in made.differences)]))
    if place is not None:
        made.result.hash_files()
        with place as path:
            save_picture(made.image, path, None if options.no_metadata else made.result.settings)
        console.say(f"{path}: written")
