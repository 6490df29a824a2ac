"""The command `miniflux`.

Exit code 0 when it worked, 2 for what the user can mend (one line on stderr), 1 for our own faults.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from miniflux.errors import InputError, MinifluxError, WeightsNotFoundError
from miniflux.version import __version__

if TYPE_CHECKING:
    from PIL import Image

    from miniflux.sampling import Moment
    from miniflux.sampling.guidance import Cfg

OK, FAULT, MENDABLE, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(MENDABLE)


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    try:
        return int(width), int(height if cross else width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a size looks like 1024x768 (width x height), got {text!r}") from None


def _lora(text: str) -> tuple[str, float]:
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon else (text, 1.0)
    except ValueError:  # a colon that belongs to the path
        return text, 1.0


def _pair(text: str) -> tuple[float, float]:
    first, colon, second = text.partition(":")
    try:
        return float(first), float(second if colon else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two numbers as A:B, got {text!r}") from None


def _variation(text: str) -> tuple[int, float]:
    seed, colon, amount = text.partition(":")
    try:
        return int(seed), float(amount if colon else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected SEED:AMOUNT, such as 7:0.2, got {text!r}") from None


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers as 8,16,32, got {text!r}") from None


def _spacing(text: str) -> str | list[float]:
    if "," not in text:
        return text
    try:
        return [float(level) for level in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a name, or noise levels as 1,0.6,0.3,0, got {text!r}") from None


def _sampling_options(generate: argparse.ArgumentParser) -> None:
    """How to get from noise to a picture."""
    sampling = generate.add_argument_group("sampling")
    sampling.add_argument(
        "--solver", default="euler", metavar="NAME", help="euler (default), heun, dpmpp-2m, unipc ..."
    )
    sampling.add_argument(
        "--schedule", type=_spacing, default="auto", metavar="NAME|LEVELS", help="auto (what suits the solver), "
        "uniform, karras, beta ..., or noise levels of your own: 1,0.8,0.5,0",
    )  # fmt: skip
    sampling.add_argument("--shift", type=float, metavar="X", help="static shift of the noise levels; 1 for none")
    sampling.add_argument("--cfg", type=float, metavar="X", help="scale of guidance by a second text; 1 has no effect")
    sampling.add_argument("--negative", metavar="TEXT", help="what the picture should not show; needs --cfg")
    sampling.add_argument(
        "--guidance-method", metavar="NAME", help="cfg (default), cfg-zero, apg, perp-neg, skip-layer, nag; needs --cfg"
    )
    sampling.add_argument(
        "--window", type=_pair, metavar="START:STOP", help="the share of the steps that --cfg works in: 0:0.6"
    )
    sampling.add_argument(
        "--cache", metavar="NAME", help="skip blocks that hardly change: first-block, tea, mag, taylor"
    )
    sampling.add_argument("--image", metavar="FILE", help="a picture to change instead of noise to begin with")
    sampling.add_argument("--strength", type=float, metavar="X", help="how much of it to change, above 0 to 1")
    sampling.add_argument(
        "--variation",
        type=_variation,
        metavar="SEED:AMOUNT",
        help="go from the noise of --seed towards that of another",
    )
    sampling.add_argument(
        "--preview-every", type=int, metavar="N", help="every N steps, write how far it is beside the output"
    )


def parser() -> argparse.ArgumentParser:
    """The command line, with help that a newcomer can act on."""
    root = _Parser(
        prog="miniflux",
        description="FLUX image models, from scratch in PyTorch.",
        epilog='First picture, without any download:  miniflux generate "a red circle on a blue background" -o out.png',
    )
    root.add_argument("--version", action="version", version=f"miniflux {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)

    generate = commands.add_parser(
        "generate",
        help="draw pictures from a prompt",
        description="Draw pictures from a prompt. Settings that are not given are those the model was made for.",
        epilog="Weights are looked for in --weights, in the folder named by MINIFLUX_WEIGHTS, and in the Hugging Face "
        "cache; weights/README.md says where each file comes from. Nothing is downloaded.",
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
    generate.add_argument("--size", type=_size, metavar="WxH", help="in pixels, multiples of 16 (else rounded up)")
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
        type=_lora,
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

    inspect = commands.add_parser(
        "inspect",
        help="say what a file or folder is",
        description="Say which network, variant, layout and format a safetensors or GGUF file or a model folder holds.",
    )
    inspect.add_argument("path", metavar="FILE|FOLDER")
    inspect.add_argument("--data", action="store_true", help="read every tensor: name those with NaN, and all zero")
    inspect.add_argument("--json", action="store_true", help="the same for programs")
    inspect.set_defaults(run=_inspect)

    lora = commands.add_parser("lora", help="look into, convert, merge and extract LoRA files")
    actions = lora.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect_lora = actions.add_parser(
        "inspect", help="say what a LoRA file changes", description="Print the receipt of a LoRA file: every module it "
        "changes, with rank, scale and strength. No model is loaded.",
    )  # fmt: skip
    inspect_lora.add_argument("file", metavar="FILE")
    inspect_lora.add_argument("--model", metavar="NAME", help="compare with this model; default: the first that fits")
    inspect_lora.set_defaults(run=_lora_inspect)

    convert = actions.add_parser("convert", help="write a LoRA in the names of another program")
    convert.add_argument("file", metavar="FILE")
    convert.add_argument("-o", "--output", required=True, metavar="FILE", help="ends in .safetensors")
    convert.add_argument("--to", required=True, metavar="DIALECT", help="diffusers, kohya, comfyui or xlabs")
    convert.add_argument("--model", default="flux1-dev", metavar="NAME", help="what it is for; default %(default)s")
    convert.set_defaults(run=_lora_convert)

    merge = actions.add_parser("merge", help="write a checkpoint with LoRAs merged in")
    merge.add_argument("base", metavar="BASE", help="a transformer's file, or folder with shards")
    merge.add_argument("--lora", action="append", type=_lora, required=True, metavar="PATH[:SCALE]")
    merge.add_argument(
        "--pack", action="store_true", help="packed weights stay packed; most of a LoRA is then rounded off"
    )
    merge.add_argument("-o", "--output", required=True, metavar="FILE", help="ends in .safetensors, or .gguf as BASE")
    merge.set_defaults(run=_lora_merge)

    extract = actions.add_parser("extract", help="the difference of two checkpoints as a LoRA")
    extract.add_argument("base", metavar="BASE")
    extract.add_argument("tuned", metavar="TUNED")
    extract.add_argument("-o", "--output", required=True, metavar="FILE", help="ends in .safetensors")
    extract.add_argument("--rank", type=int, default=32, metavar="N", help="default %(default)s")
    extract.add_argument(
        "--to", default="kohya", metavar="DIALECT", help="diffusers, kohya (default), comfyui or xlabs"
    )
    extract.set_defaults(run=_lora_extract)

    study = commands.add_parser("study", help="look at how it works")
    subjects = study.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    schedules = subjects.add_parser(
        "schedule", help="noise levels", description="Print a schedule, or draw several (needs miniflux[study])."
    )
    schedules.add_argument("names", nargs="*", metavar="NAME", help="default: uniform; with --plot all of them")
    schedules.add_argument("--steps", type=int, default=20, metavar="N", help="default %(default)s")
    schedules.add_argument(
        "--size", type=_size, default=(1024, 1024), metavar="WxH", help="for the shift of FLUX.1 dev"
    )
    schedules.add_argument("--shift", type=float, metavar="X", help="a static shift instead; 1 for none")
    schedules.add_argument("--plot", metavar="FILE", help="draw them: .png, .svg or .pdf")
    schedules.set_defaults(run=_study_schedule)
    solvers = subjects.add_parser(
        "solvers",
        help="error against calls of the network",
        description="For every deterministic solver, the error of its latents against a reference of 1000 calls, and "
        "the order at which it falls.",
    )
    solvers.add_argument("--model", default="nano", metavar="NAME|PATH")
    solvers.add_argument("--prompts", type=int, default=4, metavar="N", help="how many; default %(default)s")
    solvers.add_argument("--calls", type=_numbers, default=[8, 16, 32, 64], metavar="N,N", help="default 8,16,32,64")
    solvers.add_argument("--plot", metavar="FILE", help="draw it: .png, .svg or .pdf (needs miniflux[study])")
    solvers.set_defaults(run=_study_solvers)

    from miniflux.apps import convert as convert_files
    from miniflux.apps import fetch, replay, ui

    replay.add(commands)
    fetch.add(commands)
    convert_files.add(commands)
    ui.add(commands)

    for command in (generate, inspect, inspect_lora, convert, merge, extract, schedules, solvers):
        command.add_argument("-v", "--verbose", action="store_true", help="say more about what is done")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="miniflux: %(message)s")
    warnings.showwarning = _show_warning
    try:
        options.run(options)
    except MinifluxError as error:
        lines = str(error).splitlines()
        whole = options.verbose or isinstance(error, WeightsNotFoundError)  # which says how to get them
        print("miniflux:", "\n".join(lines if whole else lines[:1]), file=sys.stderr)
        return MENDABLE
    except KeyboardInterrupt:
        print("miniflux: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if options.verbose:
            raise
        print(f"miniflux: a fault of ours: {type(error).__name__}: {error} (-v shows where)", file=sys.stderr)
        return FAULT
    return OK


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"miniflux: {message}", file=sys.stderr)


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


def _study_schedule(options: argparse.Namespace) -> None:
    from miniflux.study import schedules

    width, height = options.size
    names = options.names or (list(schedules.SPACINGS) if options.plot else ["uniform"])
    made = schedules.schedules(names, options.steps, width, height, options.shift)
    if options.plot:
        print(f"{schedules.plot(made, options.plot)}: {len(made)} schedules of {options.steps} steps")
    else:
        print("\n\n".join(str(schedule) for schedule in made))


def _study_solvers(options: argparse.Namespace) -> None:
    from miniflux.pipeline import load
    from miniflux.study import solvers

    errors = solvers.measure(load(options.model), options.calls, options.prompts)
    print(solvers.table(errors))
    if options.plot:
        print(solvers.plot(errors, options.plot))


def _inspect(options: argparse.Namespace) -> None:
    from miniflux.checkpoints import inspect

    found = inspect(options.path, data=options.data)
    print(found.json() if options.json else found)


def _lora_inspect(options: argparse.Namespace) -> None:
    from miniflux.lora import inspect

    print(inspect(options.file, options.model))


def _lora_convert(options: argparse.Namespace) -> None:
    from miniflux.lora import convert

    count = convert(options.file, options.output, options.to, options.model)
    print(f"{options.output}: {count} tensors, {options.to}")


def _lora_merge(options: argparse.Namespace) -> None:
    from miniflux.lora import merge_files

    receipts = merge_files(options.base, options.lora, options.output, pack=options.pack)
    applied, size = sum(receipt.applied for receipt in receipts), os.path.getsize(options.output)
    print(f"{options.output}: {applied} changes merged, {size:,} bytes")


def _lora_extract(options: argparse.Namespace) -> None:
    from miniflux.lora import extract

    found = extract(options.base, options.tuned, options.output, options.rank, options.to)
    worst = min(found, key=lambda module: module.captured, default=None)
    held = "" if worst is None else f"; at least {100 * worst.captured:.2f} % of each difference ({worst.target})"
    print(f"{options.output}: {len(found)} modules at rank {options.rank}{held}")
