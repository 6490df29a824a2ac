"""`miniflux study map` and `study iou`: where words and concepts are in a picture, and how well maps find them."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from miniflux.apps import arguments, console
from miniflux.apps.outputs import check_place, new_file
from miniflux.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MOVING = (".gif", ".webp")


def add(subjects: Any) -> None:
    """Add the subjects to those of `miniflux study`."""
    maps = subjects.add_parser(
        "map",
        help="where words and concepts are in a picture",
        description="Draw a picture and write maps of it: how much its pixels attend to a word of the prompt (--word), "
        "or where a concept is that need not be in the prompt (--concept).",
    )
    maps.add_argument("prompt", metavar="PROMPT")
    maps.add_argument("--word", action="append", metavar="WORD", help="of the prompt; may be given again; of two red:2")
    maps.add_argument("--concept", action="append", metavar="TEXT", help="anything; may be given again")
    maps.add_argument("-o", "--output", type="path", default="map.png", metavar="FILE", help="default %(default)s")
    maps.add_argument(
        "--by", choices=("step", "block", "both"), help="a sheet of one word: a map for each step or block"
    )
    maps.add_argument("--animation", type="path", metavar="FILE", help="step by step (or block by block): .gif, .webp")
    maps.add_argument("--raw", type="path", metavar="FILE", help="all numbers: .npz")
    maps.add_argument(
        "--direction",
        choices=("image_to_text", "text_to_image"),
        help="of --word: who looks at whom; default image_to_text",
    )
    maps.add_argument("--space", choices=("output", "query_key"), help="of --concept; default output")
    maps.add_argument("--pieces", choices=("one", "all"), help="of --concept: which of its tokens count; default one")
    maps.add_argument("--block", action="append", metavar="NAME", help="single_blocks.3, or double_blocks for all such")
    maps.add_argument("--at", type=arguments.numbers, metavar="N,N", help="steps that count, from 0; default all")
    maps.add_argument("--model", default="nano", metavar="NAME|PATH")
    maps.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    maps.add_argument("--steps", type=int, metavar="N", help="of the run")
    maps.add_argument("--size", type=arguments.size, metavar="WxH", help="of the picture in pixels")
    maps.set_defaults(run=_map)
    score = subjects.add_parser(
        "iou",
        help="how well maps find objects, on nano",
        description="For unseen scenes of nano: the mean IoU of the map of a shape's word with the true shape, for "
        "every kind of map.",
    )
    score.add_argument("--model", default="nano", metavar="NAME|PATH")
    score.add_argument("--prompts", type=int, default=100, metavar="N", help="how many; default %(default)s")
    score.add_argument("--size", type=arguments.size, metavar="WxH", help="of the pictures in pixels")
    score.set_defaults(run=_iou)
    for command in (maps, score):
        arguments.add_verbose(command)
    arguments.add_force(maps)


def _map(options: argparse.Namespace) -> None:
    if bool(options.word) == bool(options.concept):
        raise InputError("give --word or --concept, one of the two kinds")
    names = options.word or options.concept
    if (options.by or options.animation) and len(names) > 1:
        raise InputError(f"--by and --animation show one map, and there are {len(names)} names")
    for kind, option in (("word", "direction"), ("concept", "space"), ("concept", "pieces")):
        if getattr(options, option) and not getattr(options, kind):
            raise InputError(f"--{option} is for --{kind}")
    if options.animation and options.by == "both":
        raise InputError("--by both is no order for --animation: give step or block")
    place = _place(options.output, PICTURES, options.force)
    moving, raw = _place(options.animation, MOVING, options.force), _place(options.raw, (".npz",), options.force)
    from miniflux.pipeline import load
    from miniflux.result import save_picture
    from miniflux.study.mapping import overlays
    from miniflux.study.mapping.attention import attention_maps
    from miniflux.study.mapping.concepts import concept_maps

    width, height = options.size or (None, None)
    asked: dict[str, Any] = {"seed": options.seed, "steps": options.steps, "width": width, "height": height}
    asked |= {"blocks": options.block, "at_steps": options.at}
    pipe = load(options.model)
    if options.word:
        maps = attention_maps(pipe, options.prompt, names, direction=options.direction or "image_to_text", **asked)
    else:
        space, pieces = options.space or "output", options.pieces or "one"
        maps = concept_maps(pipe, options.prompt, names, space=space, pieces=pieces, **asked)
    assert place is not None
    with place as path:
        picture = overlays.grid(maps, names[0], options.by) if options.by else overlays.words_picture(maps)
        save_picture(picture, path, None)
        console.say(f"{path}: {maps!r}")
    if moving is not None:
        with moving as path:
            console.say(str(overlays.animation(maps, names[0], path, options.by or "step")))
    if raw is not None:
        with raw as path:
            console.say(str(maps.save(path)))


def _iou(options: argparse.Namespace) -> None:
    from miniflux.pipeline import load
    from miniflux.study.mapping import scoring

    size = {} if options.size is None else dict(zip(("width", "height"), options.size, strict=True))
    console.say(str(scoring.measure(load(options.model), options.prompts, **size)))


def _place(given: str | None, endings: tuple[str, ...], force: bool) -> AbstractContextManager[Path] | None:
    """Where a file goes, if one is wanted; refused before anything is computed, or torch imported."""
    if given is None:
        return None
    check_place(Path(given), endings)
    return new_file(given, force)
