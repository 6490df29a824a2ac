"""`miniflux generate`: pictures from a prompt."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniflux.apps import arguments, console, upsample
from miniflux.apps.outputs import FIELDS, IN_FOLDER, Outputs, sheet_name
from miniflux.apps.prompts import prompts_of
from miniflux.errors import InputError, LoraError, MinifluxError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from miniflux.conditions import Condition
    from miniflux.pipeline import Pipeline, Result
    from miniflux.sampling import Moment
    from miniflux.sampling.guidance import Cfg
    from miniflux.upsampling import Written
    from miniflux.variants import Variant

REDUX_NAMES = ("flux1-redux-dev.safetensors", "FLUX.1-Redux-dev")
RANDOM_SEEDS = 2**32  # those that every other program takes, too
TEXTS_AHEAD = 16  # prompts whose embeddings are made at once: where text encoders come and go, each visit costs


def add(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    generate = commands.add_parser(
        "generate",
        help="draw pictures from a prompt",
        description="Draw pictures from a prompt. Settings that are not given are those the model was made for. Every "
        "picture is written as soon as it is drawn; Ctrl-C keeps those that are.",
        epilog="Weights are looked for in --weights, in the folder named by MINIFLUX_WEIGHTS, and in the Hugging Face "
        "cache; `miniflux variants` says what is here, `miniflux fetch` gets it. Nothing is downloaded.",
    )
    generate.add_argument(
        "prompt",
        nargs="+",
        metavar="PROMPT",
        help="what to draw; several quoted prompts give several pictures; @FILE for a prompt per line of a file, - of "
        "stdin (@@ begins a prompt with @)",
    )
    generate.add_argument(
        "-o",
        "--output",
        type="path",
        default="out.png",
        metavar="FILE|FOLDER/",
        help=".png, .jpg or .webp, default %(default)s; several pictures are numbered (out-1.png), or named by fields: "
        f"{' '.join(f'{{{name}}}' for name in FIELDS)}; in a folder {IN_FOLDER}",
    )
    generate.add_argument("--grid", type="path", metavar="FILE", help="write all pictures on one sheet as well")
    arguments.add_force(generate)
    generate.add_argument(
        "--model",
        default="nano",
        metavar="NAME|PATH",
        help="nano (bundled, the default), nano-schnell, a name of `miniflux variants`, or a file or folder",
    )
    generate.add_argument("--weights", type="path", metavar="FOLDER", help="look for the model's files here first")
    generate.add_argument(
        "--seed",
        type=arguments.seed,
        default=0,
        metavar="N|random",
        help="picture i is drawn from seed + i; default 0; random draws one, and says it",
    )
    generate.add_argument("--steps", type=int, metavar="N", help="more is slower and finer")
    generate.add_argument(
        "--guidance", type=float, metavar="X", help="how strongly the prompt is followed; not for schnell and "
        "klein; of base models the scale of their CFG",
    )  # fmt: skip
    generate.add_argument(
        "--size", type=arguments.size, metavar="WxH", help="in pixels, multiples of 16 (else rounded up)"
    )
    generate.add_argument("--images", type=int, default=1, metavar="N", help="pictures per prompt")
    generate.add_argument("--t5-length", type=int, metavar="N", help="text tokens that T5 or a language model reads")
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
    upsample.add(generate)
    generate.set_defaults(run=_run)
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
    sampling.add_argument("--negative", metavar="TEXT", help="what the picture should not show; needs --cfg, "
                          "but for base models, which are drawn with it")  # fmt: skip
    sampling.add_argument(
        "--guidance-method", metavar="NAME", help="cfg (default), cfg-zero, apg, perp-neg, skip-layer, nag; needs "
        "--cfg as --negative does",
    )  # fmt: skip
    sampling.add_argument(
        "--window", type=arguments.pair, metavar="START:STOP", help="the share of the steps that --cfg works in: 0:0.6"
    )
    sampling.add_argument(
        "--cache", metavar="NAME", help="skip blocks that hardly change: first-block, tea, mag, taylor"
    )
    arguments.add_pictures(sampling)
    sampling.add_argument(
        "--control",
        type=arguments.path,
        metavar="FILE",
        help="edges or a depth map to follow: for Canny and Depth models, and their LoRAs",
    )
    sampling.add_argument(
        "--reference",
        type=arguments.path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture to look at, for Kontext, FLUX.2 and FLUX.3; may be given several times",
    )
    sampling.add_argument(
        "--once", action=argparse.BooleanOptionalAction, help="look at references once, for all steps: FLUX.2 klein; "
        "default as the model was trained",
    )  # fmt: skip
    sampling.add_argument(
        "--crop-back", action=argparse.BooleanOptionalAction, help="cut the picture back to its reference, which "
        "FLUX.3 mirrors around itself up to whole tokens; default where no --size is given",
    )  # fmt: skip
    sampling.add_argument(
        "--redux", type=arguments.steering, action="append", default=[], metavar="[NET=]FILE[:SCALE]",
        help="a picture to vary: NET is the file or folder of Redux, else found as flux1-redux-dev in --weights",
    )  # fmt: skip
    sampling.add_argument(
        "--controlnet", type=arguments.steering, action="append", default=[], metavar="NET=FILE[:SCALE[:MODE]]",
        help="a control picture for a ControlNet; MODE for Union ones: canny, depth ...; may be given several times",
    )  # fmt: skip
    sampling.add_argument(
        "--ip-adapter", type=arguments.steering, action="append", default=[], metavar="NET=FILE[:SCALE]",
        help="a picture to look at with an IP-Adapter; may be given several times",
    )  # fmt: skip
    sampling.add_argument(
        "--vision", type="path", action="append", default=[], metavar="PATH", help="the vision tower that Redux or an "
        "IP-Adapter sees with; default image_encoder beside it; may be given several times",
    )  # fmt: skip
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


@dataclass(frozen=True)
class _Call:
    """What the options ask for, checked as far as it can be without weights.

    Attributes:
        prompts: of each picture, in order.
        written: what is drawn instead of a prompt, where a language model was asked.
        seed: of the first; picture i is drawn from seed + i.
        settings: arguments of `Pipeline.generate` that all pictures share.
        outputs: where they go.
        sheet: what was drawn, if it is wanted on a grid.
        blocks: of a step cache, how many were skipped and evaluated.
        grid: where the sheet goes.
    """

    prompts: list[str]
    seed: int
    image: Image.Image | None
    mask: Tensor | None
    settings: dict[str, Any]
    outputs: Outputs
    grid: Path | None
    written: dict[str, Written] = field(default_factory=dict[str, "Written"])
    sheet: list[Result] = field(default_factory=list)
    blocks: Counter[str] = field(default_factory=Counter)

    def text(self, prompt: str) -> str:
        """What is drawn of a prompt."""
        return self.written[prompt].text if prompt in self.written else prompt


def _run(options: argparse.Namespace) -> None:
    from miniflux.lora import attach
    from miniflux.pipeline import load

    call = _checked(options)
    arguments.say_notes(options)
    places = {"device": options.device, "dtype": options.dtype, "memory": options.memory}
    call.written.update(upsample.written(options, call.prompts, call.seed))
    pipe = load(options.model, weights=options.weights, **places)
    call.settings["guide"] = _guide(options, pipe.variant)
    for path, scale in options.lora:
        logging.getLogger(__name__).info("%s", attach(pipe, path, scale))
    try:
        _draw(options, pipe, call)
    except KeyboardInterrupt as stop:
        done = call.outputs.done
        names = f" ({', '.join(map(str, done))})" if done else ""
        stop.kept = f"{len(done)} of {len(call.prompts)} pictures are kept{names}"  # pyright: ignore
        try:
            _write_sheet(options, call)
        except (MinifluxError, OSError) as error:  # that the run was stopped, and what is kept, is said all the same
            stop.kept += f"; the sheet is not written: {error}"  # pyright: ignore
        raise
    _write_sheet(options, call)
    if options.cache is not None:
        spared, made = call.blocks["skipped"], call.blocks["evaluated"]
        console.say(f"cache {options.cache}: {spared} of {spared + made} blocks spared")


def _write_sheet(options: argparse.Namespace, call: _Call) -> None:
    """All pictures that were drawn on one sheet, if that is wanted."""
    from miniflux.result import joined

    if call.grid is None or not call.sheet:
        return
    with call.outputs.beside(call.grid) as path:
        joined(call.sheet).save(path, metadata=not options.no_metadata)
    total = len(call.prompts)
    many = f"all {total}" if len(call.sheet) == total else f"{len(call.sheet)} of {total} pictures"
    console.say(f"{path}: {many} on one sheet")


def _checked(options: argparse.Namespace) -> _Call:
    """Everything that can be refused without weights is, before they are loaded: which may take minutes."""
    from miniflux.arguments import MAX_IMAGES, cache_for, size_for, variation_for
    from miniflux.checks import whole
    from miniflux.families import FAMILIES
    from miniflux.lora import read
    from miniflux.lora.attaching import resolved
    from miniflux.memory.compute import DTYPES, choose_device
    from miniflux.memory.modes import check_mode
    from miniflux.pictures import digest_of
    from miniflux.plan import once_for
    from miniflux.result import FORMATS, checked_output
    from miniflux.sampling.latents import MAX_SEED
    from miniflux.settings import LoraUse, Request
    from miniflux.variants import ALIASES, VARIANTS, variant

    images = whole("images", options.images, 1, MAX_IMAGES)
    prompts = [prompt for prompt in prompts_of(options.prompt) for _ in range(images)]
    seed = secrets.randbelow(RANDOM_SEEDS) if options.seed is None else options.seed
    whole("seed", seed, 0, MAX_SEED + 1 - len(prompts))
    varied = variation_for(options.variation, len(prompts))
    outputs = Outputs(options.output, len(prompts), options.force, tuple(FORMATS))
    grid = None if options.grid is None else checked_output(sheet_name(options.grid))
    if options.weights is not None and not Path(options.weights).is_dir():
        raise InputError(f"--weights {options.weights}: no such folder")
    check_mode(options.memory)
    choose_device(options.device)
    if options.dtype is not None and options.dtype not in DTYPES:
        raise InputError(f"dtype {options.dtype!r} is not one of {', '.join(DTYPES)}")
    if options.preview_every is not None and options.preview_every < 1:
        raise InputError(f"--preview-every must be at least 1, got {options.preview_every}")
    if options.image is None and options.strength is not None:
        raise InputError(f"--strength {options.strength} says how much of a picture to change: no image is given")
    upsample.check(options)
    image, mask = arguments.picture_and_mask(options)
    known = variant(options.model) if options.model in VARIANTS or options.model in ALIASES else None
    width, height = options.size or (None, None)
    settings: dict[str, Any] = {
        "steps": options.steps,
        "guidance": options.guidance,
        "width": width,
        "height": height,
        "t5_length": options.t5_length,
        "padding": options.padding,
        "solver": options.solver,
        "shift": options.shift,
        "guide": _guide(options, known),
        "negative": options.negative,
        "strength": 1.0 if options.strength is None else options.strength,
    }
    spacing = options.schedule
    if known is not None:
        size_for(known, known.autoencoder, width, height, image)
    cache_for(known or variant("nano"), options.cache)
    for prompt in dict.fromkeys(prompts):
        Request(
            prompt=prompt,
            model=options.model,
            loras=tuple(LoraUse(path, scale) for path, scale in options.lora),
            seed=seed,
            schedule=spacing if isinstance(spacing, str) else tuple(spacing),
            variation=varied,
            image=None if image is None else digest_of(image),
            mask=None if mask is None else digest_of(mask),
            dtype=options.dtype,
            **settings,
        )
    files = [resolved(path) for path, _ in options.lora]
    for file in files:
        read(file)
    twice = next((file for i, file in enumerate(files) if file in files[:i]), None)
    if twice is not None:
        raise LoraError(f"--lora {twice}: {Path(str(twice)).stem!r} is attached already; name it once, with one scale")
    settings |= {"schedule": spacing, "cache": options.cache}
    settings["conditions"] = _conditions(options)
    if known is not None:
        once_for(known, FAMILIES[known.family], settings["conditions"])
    return _Call(prompts, seed, image, mask, settings, outputs, grid)


def _conditions(options: argparse.Namespace) -> list[Condition]:
    """What else steers the pictures, with the networks that it needs."""
    from miniflux.conditions import Control, ControlNet, IPAdapter, Redux, Reference, Steering
    from miniflux.steering import load

    known: dict[str, Steering] = {}

    def network(name: str) -> Steering:
        if name not in known:
            known[name] = load(name, vision=options.vision or None)
        return known[name]

    for option in ("redux", "ip_adapter"):
        for _, _, _, mode in getattr(options, option):
            if mode is not None:
                raise InputError(f"--{option.replace('_', '-')}: a mode, {mode!r}, is for ControlNets alone")
    for name in ("once", "crop_back"):
        if (asked := getattr(options, name)) is not None and not options.reference:
            flag = f"--{'' if asked else 'no-'}{name.replace('_', '-')}"
            raise InputError(f"{flag} is for references, and no --reference is given")
    made: list[Condition] = [
        Reference(path, index=i + 1, once=options.once, crop=options.crop_back)
        for i, path in enumerate(options.reference)
    ]
    made += [] if options.control is None else [Control(options.control)]
    for name, picture, scale, _ in options.redux:
        made.append(Redux(network(name or _redux(options)), picture, scale))
    for name, picture, scale, mode in options.controlnet:
        named = mode if mode is None or not mode.isdigit() else int(mode)
        made.append(ControlNet(network(_named(name, "--controlnet")), picture, scale, mode=named))
    for name, picture, scale, _ in options.ip_adapter:
        made.append(IPAdapter(network(_named(name, "--ip-adapter")), picture, scale))
    if options.vision and not (options.redux or options.ip_adapter):
        raise InputError("--vision is what --redux and --ip-adapter see with, and neither is given")
    return made


def _named(name: str, option: str) -> str:
    if not name:
        raise InputError(f"{option} NET=FILE names the file or folder of its network first")
    return name


def _redux(options: argparse.Namespace) -> str:
    """Where Redux lies, if nobody says: in a folder of weights, under the name of the release."""
    folders = [options.weights, os.environ.get("MINIFLUX_WEIGHTS")]
    places = [Path(folder) / name for folder in folders if folder for name in REDUX_NAMES]
    for place in places:
        if place.exists():
            return str(place)
    raise InputError(f"--redux FILE: no {' or '.join(REDUX_NAMES)} in --weights or MINIFLUX_WEIGHTS; give NET=FILE")


def _draw(options: argparse.Namespace, pipe: Pipeline, call: _Call) -> None:
    """Every picture on its own: what is drawn is written, whatever becomes of the next."""
    from tqdm import tqdm

    total = len(call.prompts)
    with tqdm(unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:
        for i, prompt in enumerate(call.prompts):
            if i % TEXTS_AHEAD == 1:  # not before the first picture, whose call checks everything
                for text in dict.fromkeys(call.prompts[i : i + TEXTS_AHEAD]):  # one by one, each in its own length
                    pipe.text.encode([call.text(text)], options.t5_length, options.padding)
            about = {"index": i + 1, "seed": call.seed + i, "prompt": prompt}

            def progress(done: int, steps: int, i: int = i) -> None:
                bar.total = total * steps
                bar.update(i * steps + done - bar.n)

            def preview(_: int, moment: Moment, about: dict[str, Any] = about) -> None:
                if moment.step % options.preview_every == 0 and moment.step < moment.steps:
                    _preview(options, pipe, call, moment, about)

            varied = options.variation
            result = pipe.generate(
                call.text(prompt),
                seed=call.seed + i,
                variation=None if varied is None else (varied[0] + i, varied[1]),
                image=call.image,
                mask=call.mask,
                progress=progress,
                watch=preview if options.preview_every else None,
                **call.settings,
            )
            said = result.settings[0]
            if prompt in call.written:
                said["upsampled"] = call.written[prompt].described()
            w, h = result.images[0].size
            with call.outputs.place({**said, "model": _model(said), "width": w, "height": h, **about}) as path:
                result.save(path, metadata=not options.no_metadata)
            with tqdm.external_write_mode(file=sys.stdout):
                shown = f", {prompt!r}" if len(set(call.prompts)) > 1 else ""
                console.say(f"{path}: {w}x{h}, {pipe.variant.name}, seed {call.seed + i}{shown}")
            if call.grid is not None:
                call.sheet.append(result)
            if options.cache is not None:
                call.blocks.update({key: said["cache"][key] for key in ("skipped", "evaluated")})


def _model(said: dict[str, Any]) -> str:
    """The model in the name of a file: a variant, or what the file it was read from is called."""
    return said["model"] if said["model_path"] is None else Path(said["model_path"]).stem


def _preview(options: argparse.Namespace, pipe: Pipeline, call: _Call, moment: Moment, about: dict[str, Any]) -> None:
    """Write how far a picture is beside where it will be."""
    from miniflux.conditions import Reference
    from miniflux.families import FAMILIES
    from miniflux.result import save_picture

    seen = [one for one in call.settings["conditions"] if isinstance(one, Reference)]
    seen = [one.framed(FAMILIES[pipe.variant.family], len(seen)).shown_at for one in seen]
    size = call.image.size if call.image is not None else options.size or next(iter(seen), None)
    width, height = size or (pipe.variant.size, pipe.variant.size)
    said = {"model": pipe.variant.name, "width": width, "height": height, "steps": moment.steps}
    stem = call.outputs.stem({**said, "solver": options.solver, **about})
    with call.outputs.beside(call.outputs.folder / f"{stem}-step{moment.step:03d}.png") as path:
        save_picture(pipe.preview(moment, width, height), path, None)


def _guide(options: argparse.Namespace, known: Variant | None) -> Cfg | None:
    """What --cfg, --guidance-method and --window say; refuses what would have no effect. Base models are drawn with CFG
    of a scale of their own; which model a path means, None, is known when it is loaded."""
    from miniflux.sampling import guide

    scale, own = options.cfg, None if known is None else known.cfg
    shaped = options.guidance_method is not None or options.window is not None
    if scale is None and own is None:
        for name in ("negative", "guidance_method", "window"):
            if known is not None and getattr(options, name) is not None:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} has no effect without --cfg X: {known.name} is drawn without it")
        return None
    if scale is None and not shaped:
        return None  # that of the model, which --guidance may make stronger
    window = {} if options.window is None else {"window": options.window}
    return guide(options.guidance_method or "cfg", scale=own if scale is None else scale, **window)
