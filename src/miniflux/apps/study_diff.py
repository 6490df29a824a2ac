"""`miniflux study diff`: where two networks part."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from miniflux.apps import arguments, console
from miniflux.apps.outputs import check_place, new_file


def add(subjects: Any) -> None:
    """Add the subject to those of `study`."""
    command = subjects.add_parser(
        "diff",
        help="the first block at which two networks part",
        description="Run two transformers on one input, and say of every block how far its streams are apart: by "
        "itself (own), given what the other's block was given, and in a run of its own (grown). The first block whose "
        "own error is more than rounding explains is named.",
        epilog="Two checkpoints, a quantised file and its original, one file in two precisions (--dtype-b) or on two "
        "devices (--device-b), with a LoRA and without (--lora), or this implementation and diffusers' (B is the word "
        "diffusers).",
    )
    command.add_argument("a", metavar="A", help="a model, a file or a folder of a transformer")
    command.add_argument("b", metavar="B", help="likewise; or diffusers: its implementation, with the weights of A")
    command.add_argument("--prompt", metavar="TEXT", help="what the text is; default random tokens")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise; default %(default)s")
    command.add_argument("--size", type=arguments.size, metavar="WxH", help="of the picture; default the model's own")
    command.add_argument("--text-length", type=int, metavar="N", help="tokens; default the model's own")
    command.add_argument("--sigma", type=float, default=1.0, metavar="X", help="noise level; default %(default)s")
    command.add_argument("--references", type=int, metavar="N", help="pictures of noise that are looked at, too")
    for side in ("a", "b"):
        command.add_argument(f"--dtype-{side}", metavar="NAME", help=f"what {side.upper()} computes in")
        command.add_argument(f"--device-{side}", metavar="NAME", help=f"where {side.upper()} computes")
    command.add_argument(
        "--lora", type=arguments.lora, metavar="FILE[:SCALE]", help="a LoRA that is added to B, and not to A"
    )
    command.add_argument(
        "--tolerance", type=float, default=1.0, metavar="X", help="times what rounding explains; default %(default)s"
    )
    command.add_argument("--layers", action="store_true", help="look into the block at which they part, too")
    command.add_argument(
        "--plot", type="path", metavar="FILE", help="draw it: .png, .svg or .pdf (needs miniflux[study])"
    )
    command.set_defaults(run=_diff)
    arguments.add_verbose(command)
    arguments.add_force(command)


def _diff(options: argparse.Namespace) -> None:
    place = None
    if options.plot is not None:
        from miniflux.study import plotting

        check_place(Path(options.plot), plotting.KINDS)
        plotting.check()
        place = new_file(options.plot, options.force)
    from miniflux.study.divergence import comparing

    width, height = options.size or (None, None)
    lora, scale = options.lora or (None, 1.0)
    found = comparing.diff(
        options.a,
        options.b,
        prompt=options.prompt,
        seed=options.seed,
        width=width,
        height=height,
        text_tokens=options.text_length,
        sigma=options.sigma,
        references=options.references,
        device=(options.device_a, options.device_b),
        dtype=(options.dtype_a, options.dtype_b),
        lora=lora,
        scale=scale,
        tolerance=options.tolerance,
        layers=options.layers,
    )
    console.say(str(found))
    if place is not None:
        with place as path:
            comparing.plot(found, path)
        console.say(str(path))
