"""`miniflux generate`: pictures from a prompt."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniflux.apps import arguments
from miniflux.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from miniflux.sampling import Moment
    from miniflux.sampling.guidance import Cfg


def add(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    generate = commands.add_parser(
        "generate",
        help="draw pictures from a prompt",
        description="Draw pictures from a prompt. Settings that are not given are those the model was made for.",
        epilog="Weights are looked for in --weights, in the folder named by MINIFLUX_WEIGHTS, and in the Hugging Face "
        "cache; `miniflux variants` says what is here, `miniflux fetch` gets it. Nothing is downloaded.",
    )
    generate.add_argument(
        "prompt", nargs="+", metavar="PROMPT", help="what to draw; several prompts give several pictures"
    )
    generate.add_argument(
        "-o", "--output", default="out.png", metavar="FILE", help=".png, .jpg or .webp; default %(default)s"
    )
    generate.add_argument(
        "--model",
        default="nano",
        metavar="NAME|PATH",
        help="nano (bundled, the default), nano-schnell, flux1-dev, flux1-schnell, flux1-krea-dev, or a file or folder",
    )
    generate.add_argument("--weights", metavar="FOLDER", help="look for the model's files here first")
    generate.add_argument(
        "--seed", type=int, default=0, metavar="N", help="picture i is drawn from seed + i; default 0"
    )
    generate.add_argument("--steps", type=int, metavar="N", help="more is slower and finer")
    generate.add_argument(
        "--guidance", type=float, metavar="X", help="how strongly the prompt is followed; not for schnell"
    )
    generate.add_argument(
        "--size", type=arguments.size, metavar="WxH", help="in pixels, multiples of 16 (else rounded up)"
    )
    generate.add_argument("--images", type=int, default=1, metavar="N", help="pictures per prompt; several make a grid")
    generate.add_argument("--t5-length", type=int, metavar="N", help="text tokens the T5 encoder reads")
    generate.add_argument(
        "--padding",
        default="released",
        metavar="KIND",
        help="behind a short prompt: released (padding counts, the default), masked or trimmed",
    )
    generate.add_argument(
        "--lora",
        action="append",
        type=arguments.lora,
        default=[],
        metavar="PATH[:SCALE]",
        help="add a LoRA file, or the bundled one: realism:0.8; may be given several times",
    )
    generate.add_argument("--no-metadata", action="store_true", help="leave the settings out of the file")
    generate.add_argument("--device", metavar="NAME", help="cpu, cuda, mps ...; default the best there is")
    generate.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16; default what suits the device")
    generate.add_argument(
        "--memory", default="auto", metavar="MODE", help="where weights are: auto (what fits; the default), resident, "
        "text-freed, offload (in RAM, block by block to the device) or stream (in the file)",
    )  # fmt: skip
    _sampling_options(generate)
    generate.set_defaults(run=_generate)
    arguments.add_verbose(generate)


def _sampling_options(generate: argparse.ArgumentParser) -> None:
    """How to get from noise to a picture."""
    sampling = generate.add_argument_group("sampling")
    sampling.add_argument(
        "--solver", default="euler", metavar="NAME", help="euler (default), heun, dpmpp-2m, unipc ..."
    )
    sampling.add_argument(
        "--schedule", type=arguments.spacing, default="auto", metavar="NAME|LEVELS", help="auto (what suits the "
        "solver), uniform, karras, beta ..., or noise levels of your own: 1,0.8,0.5,0",
    )  # fmt: skip
    sampling.add_argument("--shift", type=float, metavar="X", help="static shift of the noise levels; 1 for none")
    sampling.add_argument("--cfg", type=float, metavar="X", help="scale of guidance by a second text; 1 has no effect")
    sampling.add_argument("--negative", metavar="TEXT", help="what the picture should not show; needs --cfg")
    sampling.add_argument(
        "--guidance-method", metavar="NAME", help="cfg (default), cfg-zero, apg, perp-neg, skip-layer, nag; needs --cfg"
    )
    sampling.add_argument(
        "--window", type=arguments.pair, metavar="START:STOP", help="the share of the steps that --cfg works in: 0:0.6"
    )
    sampling.add_argument(
        "--cache", metavar="NAME", help="skip blocks that hardly change: first-block, tea, mag, taylor"
    )
    sampling.add_argument("--image", metavar="FILE", help="a picture to change instead of noise to begin with")
    sampling.add_argument("--strength", type=float, metavar="X", help="how much of it to change, above 0 to 1")
    sampling.add_argument(
        "--variation",
        type=arguments.variation,
        metavar="SEED:AMOUNT",
        help="go from the noise of --seed towards that of another",
    )
    sampling.add_argument(
        "--preview-every", type=int, metavar="N", help="every N steps, write how far it is beside the output"
    )


def _generate(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from miniflux.pipeline import checked_output, load

    output = checked_output(options.output)
    if options.weights is not None and not Path(options.weights).is_dir():
        raise InputError(f"--weights {options.weights}: no such folder")
    places = {"device": options.device, "dtype": options.dtype, "memory": options.memory}
    pipe = load(options.model, weights=options.weights, **places)
    for path, scale in options.lora:
        from miniflux.lora import attach

        receipt = attach(pipe, path, scale)
        logging.getLogger(__name__).info("%s", receipt)
    width, height = options.size or (None, None)
    image = None if options.image is None else _opened(options.image)
    with tqdm(unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        def preview(index: int, moment: Moment) -> None:
            if moment.step % options.preview_every == 0 and moment.step < moment.steps:
                w, h = (width, height) if image is None else image.size
                size = w or pipe.variant.size, h or pipe.variant.size
                pipe.preview(moment, *size).save(output.with_name(f"{output.stem}-{index}-step{moment.step:03d}.png"))

        result = pipe.generate(
            options.prompt,
            seed=options.seed,
            steps=options.steps,
            guidance=options.guidance,
            width=width,
            height=height,
            images=options.images,
            t5_length=options.t5_length,
            padding=options.padding,
            solver=options.solver,
            schedule=options.schedule,
            shift=options.shift,
            guide=_guide(options),
            negative=options.negative,
            variation=options.variation,
            image=image,
            strength=1.0 if options.strength is None else options.strength,
            cache=options.cache,
            progress=progress,
            callback=preview if options.preview_every else None,
        )
    result.save(output, metadata=not options.no_metadata)
    count, (w, h) = len(result.images), result.images[0].size
    print(f"{output}: {count} picture{'s' if count > 1 else ''} of {w}x{h}, {pipe.variant.name}, seed {options.seed}")
    if options.cache is not None:
        spared, run = (sum(said["cache"][key] for said in result.settings) for key in ("skipped", "evaluated"))
        print(f"cache {options.cache}: {spared} of {spared + run} blocks spared")


def _guide(options: argparse.Namespace) -> Cfg | None:
    """What --cfg, --guidance-method and --window say; refuses what would have no effect."""
    from miniflux.sampling import guide

    if options.preview_every is not None and options.preview_every < 1:
        raise InputError(f"--preview-every must be at least 1, got {options.preview_every}")
    if options.cfg is None:
        for flag in ("negative", "guidance_method", "window"):
            if getattr(options, flag) is not None:
                raise InputError(f"--{flag.replace('_', '-')} has no effect without --cfg X")
        return None
    window = {} if options.window is None else {"window": options.window}
    return guide(options.guidance_method or "cfg", scale=options.cfg, **window)


def _opened(path: str) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except OSError as error:
        raise InputError(f"{path}: no picture could be read: {error.strerror or error}") from error
