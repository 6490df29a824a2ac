"""`miniflux lora`: look into, convert, merge and extract LoRA files."""

from __future__ import annotations

import argparse
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from miniflux.apps import arguments, console
from miniflux.apps.outputs import new_file


def add(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    lora = commands.add_parser("lora", help="look into, convert, merge and extract LoRA files")
    actions = lora.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect_lora = actions.add_parser(
        "inspect", help="say what a LoRA file changes", description="Print the receipt of a LoRA file: every module it "
        "changes, with rank, scale and strength, also beside the weights of the model if they are on this machine.",
    )  # fmt: skip
    inspect_lora.add_argument("file", type="path", metavar="FILE")
    inspect_lora.add_argument("--model", metavar="NAME", help="compare with this model; default: the first that fits")
    inspect_lora.set_defaults(run=_inspect)

    convert = actions.add_parser("convert", help="write a LoRA in the names of another program")
    convert.add_argument("file", type="path", metavar="FILE")
    convert.add_argument("-o", "--output", required=True, type="path", metavar="FILE", help="ends in .safetensors")
    convert.add_argument("--to", required=True, metavar="DIALECT", help="diffusers, kohya, comfyui or xlabs")
    convert.add_argument("--model", metavar="NAME", help="what it is for; default: the first that fits")
    convert.set_defaults(run=_convert)

    merge = actions.add_parser("merge", help="write a checkpoint with LoRAs merged in")
    merge.add_argument("base", type="path", metavar="BASE", help="a transformer's file, or folder with shards")
    merge.add_argument("--lora", action="append", type=arguments.lora, required=True, metavar="PATH[:SCALE]")
    merge.add_argument(
        "--pack", action="store_true", help="packed weights stay packed; most of a LoRA is then rounded off"
    )
    merge.add_argument(
        "-o", "--output", required=True, type="path", metavar="FILE", help="ends in .safetensors, or .gguf as BASE"
    )
    merge.set_defaults(run=_merge)

    extract = actions.add_parser("extract", help="the difference of two checkpoints as a LoRA")
    extract.add_argument("base", type="path", metavar="BASE")
    extract.add_argument("tuned", type="path", metavar="TUNED")
    extract.add_argument("-o", "--output", required=True, type="path", metavar="FILE", help="ends in .safetensors")
    extract.add_argument("--rank", type=int, default=32, metavar="N", help="default %(default)s")
    extract.add_argument(
        "--to", default="kohya", metavar="DIALECT", help="diffusers, kohya (default), comfyui or xlabs"
    )
    extract.set_defaults(run=_extract)
    for command in (inspect_lora, convert, merge, extract):
        arguments.add_verbose(command)
    for command in (convert, merge, extract):
        arguments.add_force(command)


def _inspect(options: argparse.Namespace) -> None:
    from miniflux.lora import inspect

    console.say(str(inspect(options.file, options.model)))


def _convert(options: argparse.Namespace) -> None:
    from miniflux.lora import convert, fits

    model, *others = (options.model,) if options.model else fits(options.file)
    with _written(options, [options.file]) as path:
        count = convert(options.file, path, options.to, model)
    also = f" (it fits {', '.join(others)} as well)" if others else ""
    console.say(f"{path}: {count} tensors, {options.to}, for {model}{also}")


def _merge(options: argparse.Namespace) -> None:
    from miniflux.lora import merge_files

    with _written(options, [options.base, *(file for file, _ in options.lora)]) as path:
        receipts = merge_files(options.base, options.lora, path, pack=options.pack)
    none = [file for file, scale in options.lora if scale == 0]
    applied = sum(receipt.applied for receipt, (_, scale) in zip(receipts, options.lora, strict=True) if scale != 0)
    said = f"; {', '.join(none)} at scale 0 adds nothing" if none else ""
    console.say(f"{path}: {applied} changes merged, {os.path.getsize(path):,} bytes{said}")


def _extract(options: argparse.Namespace) -> None:
    from miniflux.lora import extract

    with _written(options, [options.base, options.tuned]) as path:
        found = extract(options.base, options.tuned, path, options.rank, options.to)
    worst = min(found, key=lambda module: module.captured, default=None)
    held = "" if worst is None else f"; at least {100 * worst.captured:.2f} % of each difference ({worst.target})"
    console.say(f"{path}: {len(found)} modules at rank {options.rank}{held}")


def _written(options: argparse.Namespace, inputs: list[str]) -> AbstractContextManager[Path]:
    """Where the result goes; refused at once if nothing can be written there."""
    from miniflux.checkpoints.saving import checkpoint_path

    if not options.output.endswith(".gguf"):
        checkpoint_path(options.output)
    return new_file(options.output, options.force, inputs)
