"""`miniflux study count`: what a picture of a model costs."""

from __future__ import annotations

import argparse
from typing import Any

from miniflux.apps import arguments, console


def add(subjects: Any) -> None:
    """Add the subject to those of `study`."""
    command = subjects.add_parser(
        "count",
        help="parameters, operations, bytes and memory",
        description="For every kind of block of every network of a model: its parameters, the bytes of its weights, "
        "the floating-point operations of one call, and the memory that its tensors take at the worst moment; and what "
        "a step and a picture cost. Nothing is loaded: the model need not be here.",
    )
    command.add_argument("model", metavar="NAME", help="a model that `miniflux variants` lists, or nano")
    command.add_argument("--size", type=arguments.size, metavar="WxH", help="of the picture; default the model's own")
    command.add_argument("--steps", type=int, metavar="N", help="default the model's own")
    command.add_argument(
        "--text-length", type=int, metavar="N", help="tokens of T5 or the language model; default the model's own"
    )
    command.add_argument(
        "--references", type=int, default=0, metavar="N", help="pictures of that size that it looks at, too"
    )
    command.add_argument(
        "--dtype",
        metavar="NAME",
        help="what weights are stored in: float32, bfloat16, float16 or a format of `convert --format`; default "
        "bfloat16, and the autoencoder in float32",
    )
    command.set_defaults(run=_count)
    arguments.add_verbose(command)


def _count(options: argparse.Namespace) -> None:
    from miniflux import study

    width, height = options.size or (None, None)
    counts = study.count(
        options.model,
        width=width,
        height=height,
        steps=options.steps,
        text_tokens=options.text_length,
        references=options.references,
        dtype=options.dtype,
    )
    console.say(str(counts))
