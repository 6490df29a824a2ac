"""`miniflux replay`: make a picture again from what its file says."""

from __future__ import annotations

import argparse
from typing import Any

from miniflux.errors import ReplayError


def add(commands: Any) -> None:
    """Add the command to the command line."""
    command = commands.add_parser(
        "replay",
        help="make a saved picture again, and compare",
        description="Make a picture again from the settings in its file. On a CPU in float32 its pixels are the same, "
        "byte for byte. Refused if a weight or LoRA file is not the one that it was made with.",
    )
    command.add_argument("picture", metavar="PICTURE", help="a .png, .jpg or .webp of miniflux")
    command.add_argument("-o", "--output", metavar="FILE", help="write what was made")
    command.add_argument("--force", action="store_true", help="go on where files differ, and show the difference")
    command.add_argument("--weights", metavar="FOLDER", help="look for the model's files here first")
    command.add_argument("--device", metavar="NAME", help="default: the one it was made on")
    command.add_argument("--image", metavar="FILE", help="the picture that was changed, if it was made from one")
    command.add_argument("--no-metadata", action="store_true", help="leave the settings out of --output")
    command.add_argument("-v", "--verbose", action="store_true", help="say more about what is done")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    import torch

    from miniflux.pictures import open_picture
    from miniflux.replay import replay
    from miniflux.result import checked_output, save_picture
    from miniflux.settings import read_picture

    output = None if options.output is None else checked_output(options.output)
    image = None if options.image is None else open_picture(options.image)
    records = read_picture(options.picture).records
    if records and records[0].device == "cpu" and 0 < records[0].threads <= 256:
        torch.set_num_threads(records[0].threads)  # products are summed in another order by another number
    made = replay(options.picture, force=options.force, weights=options.weights, device=options.device, image=image)
    if made.same:
        said = f"{options.picture}: made again, the same pixels"
    else:
        said = f"{options.picture}: the pixels differ: PSNR {made.psnr:.1f} dB, at most {made.largest} of 255"
        if not options.force:
            why = "; ".join(made.differences) or "nothing else that its file tells does"
            raise ReplayError(f"{said} ({why}; --force goes on)")
    print("\n".join([said, *(f"  {line}" for line in made.differences)]))
    if output is not None:
        made.result.hash_files()
        save_picture(made.image, output, None if options.no_metadata else made.result.settings)
        print(f"{output}: written")
